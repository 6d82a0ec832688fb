"""From a candidate circuit to a verdict: plant its twin, draw the tempered posterior around both, and measure every draw.

`measure_survival` gives the curves, `naturalness` judges them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from slt_interp.data import Counterfactuals
from slt_interp.degradation.dials import TemperedPosterior
from slt_interp.degradation.matching import BehaviorProbe, match_posterior
from slt_interp.degradation.naturalness import Survival
from slt_interp.degradation.planted import REACHED, Planted, plant, released
from slt_interp.degradation.transport import transport
from slt_interp.estimators.volume import behavioral_kl
from slt_interp.models.mlp import MLP
from slt_interp.probes.alignment import random_rotations, refit_alignment
from slt_interp.probes.dormancy import dormancy_share
from slt_interp.probes.draws import over_draws
from slt_interp.probes.effect import EffectProbe, flip_rate
from slt_interp.probes.interchange import Alignment, interchange_patch
from slt_interp.samplers.diagnostics import split_rhat
from slt_interp.samplers.hmc import HMC
from slt_interp.taps import NO_DAMAGE, Damage, Network, damaged_runs, record, replace
from slt_interp.tree import Params, dimension, register_dataclass

Draw = Callable[[Key[Array, ""], int], Counterfactuals]
"""`(key, size) -> Counterfactuals` of a model with one variable; a plain function or a frozen dataclass."""


def measure_survival(
    key: Key[Array, ""],
    network: MLP,
    params: Params,
    site: str,
    alignment: Alignment,
    inputs: Float[Array, "example input"],
    swapped: Draw,
    matched: Draw,
    *,
    variable: int = 0,
    localization: float | None = None,
    excess_losses: tuple[float, ...] = (0.002, 0.01),
    num_chains: int = 16,
    num_draws: int = 16,
    num_burnin: int = 384,
    thinning: int = 48,
    num_counterfactuals: int = 512,
    answer: Callable[[MLP], Network] | None = None,
    behavior: Callable[[MLP], Network] | None = None,
    progress: bool = True,
) -> Survival:
    """Measure a candidate circuit, its planted twin and random maps along the tempered posterior, for `naturalness`.

    The loss is the KL to the network's own answers on `inputs`, of which the weights are an exact minimum. A twin is planted
    beside the candidate, and the posterior of that network is drawn by HMC on all inputs, at the excess losses asked for. On
    every draw candidate and twin are refitted for a short while from where they were, each among its own units.

    Cost: about (num_burnin + num_draws x thinning) x 8 gradients per chain and excess loss, once or twice.

    Args:
        key: everything random follows from it.
        network: a multilayer perceptron.
        params: its weights.
        site: where the candidate is.
        alignment: the candidate.
        inputs: on which the network's behavior is to be kept.
        swapped: counterfactuals that take the variable's value from any source.
        matched: counterfactuals whose sources have the base's value.
        variable: of the alignment, the one that is judged.
        localization: gamma: 1 / gamma is the variance of every weight where the loss does not hold it. If not given, the
            largest of `LOCALIZATIONS` at which the twin is predicted to be dead (`released`): a larger one would hold it.
        excess_losses: rising, nats per example.
        num_chains: the unit of replication.
        num_draws: networks kept of each, at every excess loss.
        num_burnin: trajectories dropped of each.
        thinning: trajectories per draw.
        num_counterfactuals: examples of each kind on which effects are measured.
        answer: for a network of several answers, takes the one that the circuit is claimed for: its class is that of the
            causal model.
        behavior: what of the outputs the loss is to keep, all of them if not given; restrict it to the answer to ask what that
            alone holds.
        progress: whether to show progress bars.

    Returns:
        Curves over the excess losses that were reached.

    Raises:
        InputError: as `plant` and `match_posterior`.
    """
    example_key, probe_key, dial_key, dormancy_key, release_key = jax.random.split(key, 5)
    planted = plant(network, params, site, alignment, variable)
    kept = planted.network if behavior is None else behavior(planted.network)
    seen = planted.network if answer is None else answer(planted.network)
    probe = circuit_probe(example_key, planted, seen, site, variable, swapped, matched, num_counterfactuals, is_confined=True)
    excess = BehaviorProbe.at(kept, planted.params, inputs)
    loss_fn, reference = behavioral_kl(Untapped(kept), planted.params, inputs)
    if localization is None:
        localization = _choose_localization(release_key, planted, probe)
    dial = TemperedPosterior(
        loss_fn,
        reference,
        localization,
        partial(HMC, step_size=0.1),
        num_burnin=num_burnin,
        thinning=thinning,
        progress=progress,
    )
    center = over_draws(probe_key, probe, jax.tree.map(lambda w: w[None, None], planted.params))
    # In the network as it was: units planted beside it would count among those that do nothing.
    plain, alone = network if answer is None else answer(network), alignment.masks[variable : variable + 1]
    examples = swapped(dormancy_key, num_counterfactuals)
    dormancy = dormancy_share(plain, params, site, Alignment(alignment.rotation, alone), examples)
    llc, levels = 0.5 * dimension(planted.params), []
    for i, excess_loss in enumerate(sorted(excess_losses, reverse=True)):
        found = match_posterior(
            jax.random.fold_in(dial_key, i),
            dial,
            planted.params,
            excess,
            excess_loss,
            llc=llc,
            num_chains=num_chains,
            num_draws=num_draws,
        )
        llc = max(found.level * found.excess_loss, 1.0)
        read = over_draws(probe_key, probe, found.degraded.params)
        levels.append((found.excess_loss, {name: np.asarray(x, np.float64) for name, x in read.items()}))
    # Short chains may miss what was asked for by more than its steps.
    levels.sort(key=lambda level: level[0])
    return _to_survival(levels, float(dormancy), float(center["accuracy"][0, 0]), localization)


@partial(
    register_dataclass,
    data_fields=["candidate", "twin", "units", "twin_units", "random", "before", "swapped", "matched", "damage"],
    meta_fields=["network", "site", "counterfactuals"],
)
@dataclass(frozen=True)
class CircuitProbe:
    """The probe of everything that `naturalness` wants of one network; give it to `over_draws`. Make it by `circuit_probe`.

    `effect` and `twin` are those after a refit on `counterfactuals` among `units` and `twin_units`; `frozen` and `frozen_twin`
    those without, `transported` and `transported_twin` those of alignments that were turned as the activations were, from what
    they were `before` on the bases of `swapped`. `random` is the mean over random maps; the others are those of `EffectProbe`
    for the refitted candidate.
    """

    network: Network
    site: str
    candidate: Alignment
    twin: Alignment
    units: Float[Array, " width"]
    twin_units: Float[Array, " width"]
    random: Alignment
    before: Float[Array, "example width"]
    swapped: Counterfactuals
    matched: Counterfactuals
    counterfactuals: Draw
    damage: Damage = NO_DAMAGE

    def __call__(self, key: Key[Array, ""], params: Params) -> dict[str, Float[Array, ""]]:
        """Measure at one weight vector."""
        refit_key, run_key = jax.random.split(key)
        network, other = damaged_runs(self.network, self.damage, run_key)

        def refitted(alignment: Alignment, units: Float[Array, " width"]) -> Alignment:
            return refit_alignment(
                refit_key,
                self.network,
                params,
                self.site,
                alignment,
                self.counterfactuals,
                units=units,
                batch_size=_REFIT_BATCH,
            )

        def effect(alignment: Alignment) -> Float[Array, ""]:
            patch = interchange_patch(other, params, self.site, alignment, self.swapped)
            return flip_rate(network.apply(params, self.swapped.base, replace(self.site, patch)), self.swapped)

        after = record(network, params, self.swapped.base)[1][self.site]
        candidate = refitted(self.candidate, self.units)
        measured = EffectProbe(self.network, self.site, candidate, self.swapped, self.matched, self.damage)(run_key, params)
        return {
            **measured,
            "frozen": effect(self.candidate),
            "twin": effect(refitted(self.twin, self.twin_units)),
            "frozen_twin": effect(self.twin),
            "transported": effect(transport(self.candidate, self.before, after)),
            "transported_twin": effect(transport(self.twin, self.before, after)),
            "random": jax.vmap(effect)(self.random).mean(),
        }


def circuit_probe(
    key: Key[Array, ""],
    planted: Planted,
    network: Network,
    site: str,
    variable: int,
    swapped: Draw,
    matched: Draw,
    num_counterfactuals: int,
    *,
    is_confined: bool,
) -> CircuitProbe:
    """Make the probe of a candidate and its planted twin, with examples of its own; `network` gives the answer to look at.

    The twin is refitted among the units that were planted for it. So is, if `is_confined`, the candidate among those that its
    directions reach into, or an illusion would turn into the circuit beside it; a circuit that is known to be one may be let to
    follow its network among all units that there were. The copies u belong to either: the network may come to read them in
    place of what they copy. Random maps are those of the network before.
    """
    keys = jax.random.split(key, 3)
    candidate, twin = (Alignment(a.rotation, a.masks[variable : variable + 1]) for a in (planted.genuine, planted.twin))
    twin_units = _reached(twin)
    own = _reached(candidate) if is_confined else jnp.ones(len(twin_units))
    width, before = len(twin.rotation), planted.copies[0]
    rotations = jnp.broadcast_to(jnp.eye(width), (_NUM_RANDOM, width, width))
    rotations = rotations.at[:, :before, :before].set(random_rotations(keys[2], _NUM_RANDOM, before))
    examples = swapped(keys[0], num_counterfactuals)
    return CircuitProbe(
        network,
        site,
        candidate,
        twin,
        jnp.where(jnp.arange(width) < before, own, jnp.arange(width) <= planted.copies[-1]).astype(jnp.float32),
        twin_units,
        Alignment(rotations, jnp.broadcast_to(candidate.masks, (_NUM_RANDOM, *candidate.masks.shape))),
        record(network, planted.params, examples.base)[1][site],
        examples,
        matched(keys[1], num_counterfactuals),
        swapped,
    )


@dataclass(frozen=True)
class Untapped:
    """A network's outputs, for losses; equal for equal networks, so that another network of the kind compiles nothing."""

    network: Network

    def __call__(self, params: Params, inputs: Array) -> Float[Array, "example class"]:
        """Compute the logits."""
        return self.network.apply(params, inputs)


def _rhat(effect: Float[np.ndarray, "chain draw"]) -> float:
    """Compute R-hat; an effect that does not vary has none, and chains agree."""
    return split_rhat(effect) if np.ptp(effect) > 0 else 1.0


def _choose_localization(key: Key[Array, ""], planted: Planted, probe: CircuitProbe) -> float:
    """Find the largest localization at which the twin's copies, free of all else, are predicted to have lost its effect."""
    for localization in LOCALIZATIONS[:-1]:
        draw_key, read_key = jax.random.split(key)
        moved = released(draw_key, planted.params, planted.layer, planted.copies, localization, _NUM_RELEASED)
        read = {name: float(x.mean()) for name, x in over_draws(read_key, probe, moved).items()}
        if (read["twin"] - read["random"]) / (read["accuracy"] - read["random"]) < _DEAD:
            return localization
    return LOCALIZATIONS[-1]


def _reached(alignment: Alignment) -> Float[Array, " width"]:
    """Tell which units the directions of an alignment reach into, 1 or 0."""
    size = jnp.abs(alignment.rotation * (alignment.masks.sum(axis=0) > 0)).max(axis=1)
    return (size > REACHED).astype(jnp.float32)


def _to_survival(
    levels: list[tuple[float, dict[str, np.ndarray]]], dormancy: float, ceiling: float, localization: float
) -> Survival:
    """Take chain means, and the R-hat of the candidate's effect."""
    means = {name: np.array([read[name].mean(axis=1) for _, read in levels]) for name in levels[0][1]}
    names = ("effect", "twin", "frozen", "random", "disturbance", "swap_disturbance", "accuracy")
    return Survival(
        excess_loss=np.array([excess_loss for excess_loss, _ in levels]),
        **{name: means[name] for name in names},
        rhat=np.array([_rhat(read["effect"]) for _, read in levels]),
        dormancy=dormancy,
        ceiling=ceiling,
        localization=localization,
    )


LOCALIZATIONS = (100.0, 30.0, 10.0, 3.0, 1.0, 0.3)
"""Among which one is chosen; the last one if the twin is predicted to live at all."""

_NUM_RANDOM, _REFIT_BATCH = 4, 128

_NUM_RELEASED, _DEAD = 32, 0.4
"""Draws of the prediction, and the twin's scaled effect below which it is dead, with a margin to the limit of a verdict."""

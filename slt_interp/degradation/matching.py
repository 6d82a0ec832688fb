"""Set a dial to a wanted excess loss, so that dials can be compared at equal damage."""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import log_softmax
from jaxtyping import Array, Float, Key

from slt_interp.data import Batch
from slt_interp.degradation.dials import Degraded, Dial, TemperedPosterior
from slt_interp.errors import InputError
from slt_interp.posterior import LossFn
from slt_interp.probes.draws import Probe, over_draws
from slt_interp.taps import NO_DAMAGE, Damage, Network, NoDamage, Tapped
from slt_interp.tree import Params, norm, register_dataclass


class Matched(NamedTuple):
    """A dial at a wanted excess loss.

    Attributes:
        level: where the dial stands.
        degraded: its draws there.
        excess_loss: mean over its chains of L(w) - L(w*), nats per example.
        std_error: over chains.
        is_comparable: False where most of the networks answer at chance; True if the probe does not measure "is_above_chance".
    """

    level: float
    degraded: Degraded
    excess_loss: float
    std_error: float
    is_comparable: bool

    def __str__(self) -> str:
        word = "" if self.is_comparable else ", not comparable: accuracy is at chance"
        return f"level {self.level:.3g}: excess loss {self.excess_loss:.3g} +- {self.std_error:.2g} nats{word}"


@partial(register_dataclass, data_fields=["data"], meta_fields=["loss_fn"])
@dataclass(frozen=True)
class LossProbe:
    """The probe `(key, params) -> {"loss"}`: the mean loss over fixed data, nats per example."""

    loss_fn: LossFn
    data: Batch

    def __call__(self, key: Key[Array, ""], params: Params) -> dict[str, Float[Array, ""]]:
        """Measure at one weight vector."""
        del key
        return {"loss": self.loss_fn(params, self.data)}


@partial(register_dataclass, data_fields=["inputs", "log_probabilities", "damage"], meta_fields=["network"])
@dataclass(frozen=True)
class BehaviorProbe:
    """The probe of a network's behavior: "loss", the KL from its soft outputs to those of other weights, nats per example.

    The network's own weights are an exact minimum of it, of loss 0, whatever they were trained on. "is_above_chance" says
    whether more answers are its own than if always the most frequent one were given, by three standard errors. Make it by `at`.
    """

    network: Network
    inputs: Float[Array, "example *input"]
    log_probabilities: Float[Array, "example class"]
    damage: Damage = NO_DAMAGE

    @classmethod
    def at(cls, network: Network, params: Params, inputs: Float[Array, "example *input"]) -> "BehaviorProbe":
        """Take the behavior at `params` on `inputs` as the reference.

        >>> from slt_interp.models.mlp import MLP
        >>> import jax
        >>> params = MLP((3, 4, 2)).init(jax.random.key(0))
        >>> probe = BehaviorProbe.at(MLP((3, 4, 2)), params, jax.numpy.ones((5, 3)))
        >>> float(probe(jax.random.key(1), params)["loss"])
        0.0
        """
        return cls(network, inputs, log_softmax(network.apply(params, inputs)))

    def __call__(self, key: Key[Array, ""], params: Params) -> dict[str, Array]:
        """Measure at one weight vector."""
        found = log_softmax(Tapped(self.network, self.damage(key)).apply(params, self.inputs))
        answers, num_classes = self.log_probabilities.argmax(axis=-1), self.log_probabilities.shape[-1]
        chance = jnp.bincount(answers, length=num_classes).max() / len(answers)
        above = jnp.mean(found.argmax(axis=-1) == answers) - chance
        return {
            "loss": jnp.mean(jnp.sum(jnp.exp(self.log_probabilities) * (self.log_probabilities - found), axis=-1)),
            "is_above_chance": above > 3 * jnp.sqrt(chance * (1 - chance) / len(answers)),
        }


@partial(register_dataclass, data_fields=["center"], meta_fields=[])
@dataclass(frozen=True)
class DistanceProbe:
    """The probe `(key, params) -> {"loss"}` that sets dials to equal distances: |w - center|^2, in place of a loss."""

    center: Params

    def __call__(self, key: Key[Array, ""], params: Params) -> dict[str, Float[Array, ""]]:
        """Measure at one weight vector."""
        del key
        return {"loss": norm(jax.tree.map(jnp.subtract, params, self.center)) ** 2}


def match(
    key: Key[Array, ""],
    dial: Dial,
    params: Params,
    probe: Probe,
    excess_loss: float,
    *,
    bracket: tuple[float, float],
    num_chains: int,
    num_draws: int,
) -> Matched:
    """Find the level at which a dial raises the loss by `excess_loss` on average.

    The dial is read with the same random numbers at every level, which makes the mean loss a continuous function of most
    dials; its crossing is found by Brent's method in the logarithm of the level, to 1 % of the excess loss or better. Dials
    that move in steps (pruning, rank, checkpoints, coarse grids) end at a step: `excess_loss` of the result says where.

    Args:
        key: for the dial.
        dial: cheap to read; for a fixed key the loss should rise with its level, or fall.
        params: the weights that are degraded.
        probe: measures "loss", as `LossProbe`, `BehaviorProbe`, the one for dials that damage activations, and `DistanceProbe`
            do.
        excess_loss: nats per example, positive.
        bracket: levels below and above the wanted one.
        num_chains: independent groups of degraded networks.
        num_draws: networks in each.

    Raises:
        InputError: if the excess loss is not positive, or the dial does not reach it within the bracket.
    """
    from scipy.optimize import root_scalar

    if not (np.isfinite(excess_loss) and excess_loss > 0):
        raise InputError(
            f"excess_loss must be positive, but is {excess_loss:.3g}: a dial cannot lower the loss below that of params; "
            "polish them first if it should be possible"
        )
    floor = float(probe(key, params)["loss"])

    def measure(log_level: float) -> Matched:
        level = float(np.exp(log_level))
        degraded = dial.draw(key, params, level, num_chains=num_chains, num_draws=num_draws)
        return _matched(level, degraded, over_draws(key, with_damage(probe, degraded), degraded.params), floor)

    def gap(log_level: float) -> float:
        return np.log(max(measure(log_level).excess_loss, 1e-12) / excess_loss)

    low, high = np.log(bracket)
    if not gap(low) * gap(high) <= 0:
        reached = [measure(end).excess_loss for end in (low, high)]
        raise InputError(
            f"the dial gives excess losses of {reached[0]:.3g} and {reached[1]:.3g} nats at levels {bracket[0]:.3g} and "
            f"{bracket[1]:.3g}, and {excess_loss:.3g} does not lie between: widen the bracket, or ask for another loss"
        )
    return measure(root_scalar(gap, bracket=(low, high), method="brentq", xtol=1e-3).root)


def with_damage(probe: Probe, degraded: Degraded) -> Probe:
    """Let a probe see the activations of degraded networks as damaged as they are.

    Raises:
        InputError: if they are damaged and the probe has no field for it.
    """
    if isinstance(degraded.damage, NoDamage):
        return probe
    if not hasattr(probe, "damage"):
        raise InputError(
            f"the dial damages activations, which {type(probe).__name__} does not see: take a probe with a field `damage`, "
            "such as BehaviorProbe"
        )
    return replace(probe, damage=degraded.damage)  # pyright: ignore[reportArgumentType]


def match_posterior(
    key: Key[Array, ""],
    dial: TemperedPosterior,
    params: Params,
    probe: Probe,
    excess_loss: float,
    *,
    llc: float,
    num_chains: int,
    num_draws: int,
) -> Matched:
    """Find the nbeta at which the posterior's excess loss is `excess_loss`, up to 10 %.

    Sampling is too dear for `match`; but at nbeta the excess loss is the LLC divided by nbeta, and the LLC varies slowly: a
    guess of it is enough for a first try, whose own LLC is the next guess. After four tries the last one stands, and
    `excess_loss` of the result says where.

    Args:
        key: for the dial.
        dial: whose level is nbeta.
        params: the weights that are degraded.
        probe: measures the "loss" that is matched, which need not be the posterior's.
        excess_loss: nats per example, positive.
        llc: a guess, such as half the number of weights, or the LLC at a neighboring level.
        num_chains: of the dial.
        num_draws: networks in each.

    Raises:
        InputError: if the excess loss or the guess is not positive.
    """
    for name, value in (("excess_loss", excess_loss), ("llc", llc)):
        if not (np.isfinite(value) and value > 0):
            raise InputError(f"{name} must be positive, but is {value:.3g}")
    floor = float(probe(key, params)["loss"])
    for trial in range(_MAX_TRIALS):
        nbeta = llc / excess_loss
        trial_key = jax.random.fold_in(key, trial)
        degraded = dial.draw(trial_key, params, nbeta, num_chains=num_chains, num_draws=num_draws)
        matched = _matched(nbeta, degraded, over_draws(trial_key, probe, degraded.params), floor)
        found = matched.excess_loss
        if abs(np.log(max(found, 1e-12) / excess_loss)) < _TOLERANCE or not found > 0:
            break
        llc = nbeta * found
    return matched


def _matched(level: float, degraded: Degraded, read: dict[str, Array], floor: float) -> Matched:
    per_chain = np.asarray(read["loss"], np.float64).mean(axis=1) - floor
    # Dials without randomness have one network, and of others chains may have been lost.
    count = len(per_chain)
    error = per_chain.std(ddof=1) / np.sqrt(count) if count > 1 else np.nan
    is_comparable = bool(np.mean(read.get("is_above_chance", True)) > 0.5)
    return Matched(level, degraded, float(per_chain.mean()), float(error), is_comparable)


_MAX_TRIALS, _TOLERANCE = 4, 0.1

"""Alignments of a trained network along the tempered posterior and every rival dial, all at the same excess losses."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from slt_interp.degradation.compression import Checkpoints
from slt_interp.degradation.dials import Degraded, TemperedPosterior
from slt_interp.degradation.matching import match, with_damage
from slt_interp.errors import InputError
from slt_interp.models.mlp import MLP
from slt_interp.probes.draws import over_draws
from slt_interp.probes.interchange import InterchangeProbe
from slt_interp.studies.matched_dials import BRACKETS, REACHED, make_rivals
from slt_interp.studies.networks import SmoothedCrossEntropy, describe
from slt_interp.taps import NO_DAMAGE, Damage
from slt_interp.tree import Params, dot, register_dataclass


@partial(register_dataclass, data_fields=["data", "damage"], meta_fields=["network", "smoothing"])
@dataclass(frozen=True)
class DamagedLoss:
    """The probe `(key, params) -> {"loss"}`: smoothed cross-entropy of a network whose activations may be damaged, in nats."""

    network: MLP
    smoothing: float
    data: dict[str, Array]
    damage: Damage = NO_DAMAGE

    def __call__(self, key: Key[Array, ""], params: Params) -> dict[str, Float[Array, ""]]:
        """Measure at one weight vector."""
        logits = self.network.apply(params, self.data["inputs"], self.damage(key))
        return {"loss": SmoothedCrossEntropy(self.network, self.smoothing).of_logits(logits, self.data["labels"])}


@partial(register_dataclass, data_fields=["center", "loss", "interchange", "damage"], meta_fields=[])
@dataclass(frozen=True)
class _Readings:
    """Everything that is read off one degraded network, as one probe."""

    center: Params
    loss: DamagedLoss
    interchange: dict[str, InterchangeProbe]
    damage: Damage = NO_DAMAGE

    def __call__(self, key: Key[Array, ""], params: Params) -> dict[str, Array]:
        loss_key, probe_key = jax.random.split(key)
        moved = jax.tree.map(jnp.subtract, params, self.center)
        by_site = {site: replace(p, damage=self.damage)(probe_key, params) for site, p in self.interchange.items()}
        return {
            **replace(self.loss, damage=self.damage)(loss_key, params),
            "squared_distance": dot(moved, moved),
            "accuracy": next(iter(by_site.values()))["accuracy"],
            **{f"iia {site}": read["iia"] for site, read in by_site.items()},
        }


def compare_dials(
    key: Key[Array, ""],
    posterior: TemperedPosterior,
    loss: DamagedLoss,
    params: Params,
    probes: dict[str, InterchangeProbe],
    checkpoints: Checkpoints,
    nbetas: tuple[float, ...],
    *,
    num_chains: int,
    num_draws: int,
    rival_draws: int,
) -> dict[str, Any]:
    """Draw the posterior at every nbeta, set every rival to its excess loss, and measure the loss and all alignments.

    Args:
        key: for the dials and what is read of them.
        posterior: the dial that sets the levels.
        loss: measures the loss, with damaged activations, too.
        params: the trained weights.
        probes: by site.
        checkpoints: of the training, the last one of which need not be `params`.
        nbetas: of the posterior, the mildest damage first.
        num_chains: of the posterior, and independent groups of other dials.
        num_draws: of each chain of the posterior.
        rival_draws: of each group of other dials.

    Returns:
        "init_loss" (nats), "center_iia" (of the trained network, by site), and "levels": for each "nbeta", "excess_loss",
        "estimate" of the LLC, and of all "dials" what was measured, None where a dial does not come near the excess loss.
    """
    posterior_key, rival_key, probe_key = jax.random.split(key, 3)
    probe = _Readings(params, loss, probes)
    undamaged = over_draws(probe_key, probe, jax.tree.map(lambda w: w[None, None], params))
    init_loss = float(undamaged["loss"][0, 0])
    labeled = SmoothedCrossEntropy(loss.network, loss.smoothing)
    rivals = make_rivals(loss.network, params, loss.data["inputs"], posterior.localization, labeled, loss.data)
    rivals |= {"checkpoints": checkpoints}
    brackets = BRACKETS | {"checkpoints": (1.0, float(checkpoints.steps[-1]))}

    def measure(degraded: Degraded, level: float) -> dict[str, Any]:
        found = over_draws(probe_key, with_damage(probe, degraded), degraded.params)
        read = {name: np.asarray(values, np.float64) for name, values in found.items()}
        return {
            "level": level,
            **_over_chains("excess_loss", read["loss"] - init_loss),
            **_over_chains("accuracy", read["accuracy"]),
            "rms_distance": float(np.sqrt(read["squared_distance"].mean())),
            "sites": {site: _over_chains("iia", read[f"iia {site}"]) for site in probes},
        }

    levels = []
    for i, nbeta in enumerate(nbetas):
        drawn = posterior.draw(jax.random.fold_in(posterior_key, i), params, nbeta, num_chains=num_chains, num_draws=num_draws)
        assert drawn.estimate is not None, "posterior draws come with an estimate"
        dials: dict[str, Any] = {"posterior": measure(drawn, nbeta)}
        excess = dials["posterior"]["excess_loss"]
        for j, (name, dial) in enumerate(rivals.items()):
            dials[name] = None
            level_key = jax.random.fold_in(jax.random.fold_in(rival_key, i), j)
            counts = {"num_chains": num_chains, "num_draws": rival_draws}
            try:
                matched = match(level_key, dial, params, loss, excess, bracket=brackets[name], **counts)
            except InputError:
                # Nowhere does the dial damage the network so little, or so much.
                continue
            if excess / REACHED <= matched.excess_loss <= excess * REACHED:
                dials[name] = measure(matched.degraded, matched.level)
        levels.append({"nbeta": nbeta, "excess_loss": excess, "estimate": describe(drawn.estimate), "dials": dials})
    return {
        "init_loss": init_loss,
        "center_iia": {site: float(undamaged[f"iia {site}"][0, 0]) for site in probes},
        "levels": levels,
    }


def _over_chains(name: str, values: Float[np.ndarray, "chain draw"]) -> dict[str, Any]:
    """Mean over chains, its standard error with the chain as the unit (none for one network), and the chain means."""
    per_chain = values.mean(axis=1)
    count = len(per_chain)
    error = per_chain.std(ddof=1) / np.sqrt(count) if count > 1 else None
    return {name: per_chain.mean(), f"{name}_std_error": error, f"{name}_per_chain": per_chain}

"""Every dial at the same excess losses, and how well each tells circuits from illusions: what studies of dials share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from slt_interp.degradation.compression import LowRank, Pruning, Quantization, fisher_saliency
from slt_interp.degradation.dials import ActivationNoise, Degraded, Dial, TemperedPosterior, WeightNoise
from slt_interp.degradation.laplace import Laplace
from slt_interp.degradation.matching import BehaviorProbe, Matched, match, match_posterior
from slt_interp.degradation.scores import bootstrapped_auroc, half_life, scaled_effect
from slt_interp.degradation.survival import Untapped
from slt_interp.errors import InputError
from slt_interp.estimators.volume import behavioral_kl
from slt_interp.posterior import LossFn
from slt_interp.samplers.diagnostics import split_rhat
from slt_interp.taps import Network
from slt_interp.tree import Params, dimension

Reading = dict[str, Any]
"""Of a dial at a level: target, excess_loss, level, accuracy, is_comparable, and of each of the cells a `cell_reading`."""

REFERENCE = "posterior"


class Posterior(NamedTuple):
    """A tempered posterior, and the probe of the loss at which it is matched."""

    dial: TemperedPosterior
    behavior: BehaviorProbe


def make_rivals(
    network: Network, params: Params, inputs: Array, localization: float, labeled_loss: LossFn, data: dict[str, Array]
) -> dict[str, Dial]:
    """Make the rivals of the posterior: noise, compression, and the Gaussian of its shape.

    Args:
        network: whose outputs on `inputs` are the behavior.
        params: the weights that are damaged.
        inputs: of the examples.
        localization: of the Gaussian.
        labeled_loss: of which Fisher saliency is taken, on `data`.
        data: the examples with labels.
    """
    loss_fn, reference = behavioral_kl(Untapped(network), params, inputs)
    return {
        "weight_noise": WeightNoise(),
        "weight_noise_per_layer": WeightNoise(per_layer=True),
        "activation_noise": ActivationNoise(),
        # The Gaussian of one shape, whose displacements the level multiplies.
        "laplace": Laplace.at(loss_fn, params, reference, localization).scaled(_LAPLACE_NBETA),
        "pruning": Pruning(),
        "fisher_pruning": Pruning(fisher_saliency(labeled_loss, data)),
        "quantization": Quantization(),
        "low_rank": LowRank(),
    }


def walk(
    key: Key[Array, ""],
    posteriors: Mapping[str, Posterior],
    rivals: Mapping[str, Dial],
    params: Params,
    behavior: BehaviorProbe,
    levels: Sequence[float],
    read: Callable[[Degraded], Reading],
    *,
    num_chains: int,
    num_draws: int,
) -> dict[str, list[Reading | None]]:
    """Set every dial to every excess loss and read it there.

    Args:
        key: for the dials.
        posteriors: by name.
        rivals: by name, among those of `make_rivals`.
        params: the weights that are damaged.
        behavior: measures the loss at which rivals are matched.
        levels: excess losses that rise, nats per example.
        read: what to measure.
        num_chains: of every dial that draws.
        num_draws: of each chain.

    Returns:
        For every dial a reading at each level, None where the dial does not come near it.
    """
    counts = {"num_chains": num_chains, "num_draws": num_draws}
    found: dict[str, list[Reading | None]] = {name: [None] * len(levels) for name in (*posteriors, *rivals)}

    def keep(name: str, i: int, matched: Matched) -> None:
        if not levels[i] / REACHED <= matched.excess_loss <= levels[i] * REACHED:
            return
        found[name][i] = read(matched.degraded) | {
            "target": levels[i],
            "excess_loss": matched.excess_loss,
            "std_error": matched.std_error,
            "level": matched.level,
        }

    start = 0.5 * dimension(params)
    for index, (name, posterior) in enumerate(posteriors.items()):
        llc = start
        # From the strongest damage on; each level's LLC is the next one's guess, and the first one's that of other posteriors.
        for i in reversed(range(len(levels))):
            level_key = jax.random.fold_in(jax.random.fold_in(key, index), i)
            matched = match_posterior(level_key, posterior.dial, params, posterior.behavior, levels[i], llc=llc, **counts)
            llc = max(matched.level * matched.excess_loss, 1.0)
            start = llc if i == len(levels) - 1 else start
            keep(name, i, matched)
            estimate = matched.degraded.estimate
            if (reading := found[name][i]) is not None and estimate is not None:
                reading["num_chains"] = estimate.diagnostics["num_chains_used"]
    for index, (name, dial) in enumerate(rivals.items()):
        rival_key = jax.random.fold_in(key, len(posteriors) + index)
        for i, level in enumerate(levels):
            try:
                matched = match(rival_key, dial, params, behavior, level, bracket=BRACKETS[name], **counts)
            except InputError:
                # Nowhere does the dial damage the network so little, or so much.
                continue
            keep(name, i, matched)
    return found


def cell_reading(
    effect: Float[np.ndarray, "chain draw"], random: Float[np.ndarray, "chain draw"], accuracy: Float[np.ndarray, "chain draw"]
) -> dict[str, Any]:
    """Take chain means: F~, F and F of random maps, and the R-hat of F where it varies and draws suffice."""
    means = [values.mean(axis=1) for values in (effect, random, accuracy)]
    has_rhat = effect.shape[1] >= 4 and np.ptp(effect) > 0
    return {
        "scaled": np.round(scaled_effect(*means), 4),
        "effect": np.round(means[0], 4),
        "random": np.round(means[1], 4),
        "rhat": split_rhat(effect) if has_rhat else None,
    }


def score_dials(
    levels: Sequence[float], found: Sequence[Mapping[str, list[Reading | None]]], cells: Sequence[str], seed: int
) -> dict[str, Any]:
    """Score every dial over all networks, and keep the curves from which that can be done again.

    Args:
        levels: excess losses.
        found: of every network, what `walk` gives.
        cells: what was measured.
        seed: of the bootstrap.

    Returns:
        "dials", for each what `score_dial` gives and how well it was matched and sampled; "curves", for each dial and cell the
        scaled effect by network, level and chain, None where it is not comparable.
    """
    dials, curves = {}, {}
    for name in found[0]:
        readings = [network[name] for network in found]
        curves[name] = {
            cell: [[None if r is None or not r["is_comparable"] else r["cells"][cell]["scaled"] for r in rs] for rs in readings]
            for cell in cells
        }
        present = [r for rs in readings for r in rs if r is not None]
        rhats = [r["cells"][cell]["rhat"] for r in present for cell in cells if r["cells"][cell]["rhat"] is not None]
        dials[name] = score_dial(np.array(levels), curves[name], np.random.default_rng(seed)) | {
            "not_reached": 1 - len(present) / sum(map(len, readings)),
            "not_comparable": sum(not r["is_comparable"] for r in present) / max(1, len(present)),
            "loss_error": max((abs(r["excess_loss"] / r["target"] - 1) for r in present), default=None),
            "rhat": float(np.median(rhats)) if rhats else None,
            "rhat_above_limit": sum(rhat > RHAT_LIMIT for rhat in rhats) / len(rhats) if rhats else None,
        }
    return {"dials": dials, "curves": curves}


def score_dial(
    levels: Float[np.ndarray, " level"], curves: Mapping[str, list[list[Any]]], rng: np.random.Generator
) -> dict[str, Any]:
    """Score one dial from the scaled effects of each cell, by network, level and chain.

    Scores are means over levels of means over chains, on one grid for all networks: the levels that at least 9 of 10 networks
    have, if they are half of all; networks that miss one of them have no score.
    """
    means = {
        cell: np.array([[np.nan if chains is None else np.mean(chains) for chains in network] for network in networks])
        for cell, networks in curves.items()
    }
    common = np.isfinite(means["genuine"]).mean(axis=0) >= _COMMON
    if common.sum() < len(levels) / 2:
        common[:] = False
    no_score = np.full(len(means["genuine"]), np.nan)
    scores = {cell: values[:, common].mean(axis=1) if common.any() else no_score for cell, values in means.items()}
    entry: dict[str, Any] = {"levels_used": levels[common]}
    pairs = (("", "genuine", "planted"), ("_pinned", "genuine", "pinned"), ("_redundant", "redundant", "planted"))
    for suffix, over, under in pairs:
        if over in scores and under in scores:
            interval = bootstrapped_auroc(scores[over], scores[under], rng)
            ends = zip(("", "_low", "_high"), interval, strict=True)
            entry |= {f"auroc{suffix}{end}": value for end, value in ends}
    both = np.isfinite(scores["genuine"]) & np.isfinite(scores["planted"])
    gaps = (scores["genuine"] - scores["planted"])[both]
    entry["num_networks"] = int(both.sum())
    entry["paired"] = float(np.mean(np.where(gaps == 0, 0.5, gaps > 0))) if both.any() else None
    entry["score"] = {cell: float(s[both].mean()) if both.any() else None for cell, s in scores.items()}
    entry["half_lives"] = {cell: _half_lives(levels[common], values[:, common][both]) for cell, values in means.items()}
    censored = [entry["half_lives"][cell]["censored"] for cell in ("genuine", "planted")]
    entry["censored"] = float(np.mean(censored)) if both.any() else None
    return entry


def _half_lives(levels: Float[np.ndarray, " level"], curves: Float[np.ndarray, "network level"]) -> dict[str, Any]:
    """Take the median over networks, and the shares that are below half already at the first level and not yet at the last."""
    lives = np.array([half_life(levels, curve) for curve in curves])
    if not len(lives):
        return {"median": None, "below_at_once": None, "censored": None}
    median = float(np.median(lives))
    return {
        "median": median if 0 < median < np.inf else None,
        "below_at_once": float(np.mean(lives == 0)),
        "censored": float(np.mean(np.isinf(lives))),
    }


def rhat_by_chance(num_chains: int, num_draws: int, seed: int) -> float | None:
    """Find in which share of runs the R-hat of white noise is above the limit: what must be expected of perfect chains."""
    if num_draws < 4:
        return None
    noise = np.random.default_rng(seed).normal(size=(_NUM_NOISE, num_chains, num_draws))
    return float(np.mean([split_rhat(series) > RHAT_LIMIT for series in noise]))


BRACKETS = {
    "weight_noise": (1e-4, 3.0),
    "weight_noise_per_layer": (1e-4, 3.0),
    "activation_noise": (1e-4, 10.0),
    "laplace": (1e-3, 1e3),
    "pruning": (1e-4, 1.0),
    "fisher_pruning": (1e-4, 1.0),
    "quantization": (1e-4, 1.0),
    "low_rank": (1e-6, 0.999),
    "checkpoints": (1.0, 1e9),
}
"""Levels between which each dial is searched."""

REACHED = 1.5
"""A dial stands at a level if its excess loss is that up to this factor; those that move in steps may not come near."""

LOWEST_ACCURACY = 0.9
"""Networks that keep a smaller share of their accuracy are not compared."""

RHAT_LIMIT = 1.1

_COMMON = 0.9
_LAPLACE_NBETA = 1e3
_NUM_NOISE = 500

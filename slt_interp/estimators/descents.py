"""What the descents of all seeds of a subset simulation say together: one volume, its error, and whether to trust it.

The volume of a seed is right in the mean (see `subset`), so that its log is too small in the mean by half the log's variance,
if it is normal. The variance is a sum over pieces of the way down, each of many levels, and so almost independent of the
others: between seeds, families of copies and of copies of copies are seen, and many pieces tell it well even from four seeds.
What lasts all the way down, as the shares of basins between which particles do not move, they do not see; seeds that spread
far more than their families tell give that away.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from slt_interp.bases import Base, FloatGrid
from slt_interp.estimators.llc import DO_NOT_TRUST, OK
from slt_interp.estimators.volume_estimate import REFUSED, VolumeEstimate, rounding_warnings, whole_set
from slt_interp.estimators.walks import NUM_STEPS
from slt_interp.tree import Params

ROUNDING = 8 * float(np.finfo(np.float32).eps)
"""Losses that differ by no more than this part of them are equal."""


class Descents(NamedTuple):
    """What a round knows.

    Attributes:
        log_volume, variance: of every seed, NaN where a threshold was not reached; the variance is that between families.
        independent: what the variance would be if all particles were independent.
        marks: log volumes at losses on the way, decreasing, which all seeds came by.
        labels: by (seed, threshold), the labels of the particles within, and how many have each.
        lowest: the lowest loss of any particle, above that at the trained weights.
        num_levels: of the seed that went deepest.
        num_moves: of all particles together.
        progress: mean of what moves return, from the last one at every level.
    """

    log_volume: Float[np.ndarray, "seed threshold"]
    variance: Float[np.ndarray, "seed threshold"]
    independent: Float[np.ndarray, "seed threshold"]
    marks: Float[np.ndarray, "seed mark"]
    labels: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]
    lowest: float
    num_levels: int
    num_moves: int
    progress: float


class Combined(NamedTuple):
    """Seeds of all rounds together, each (threshold,).

    Attributes:
        log_volume: mean over seeds, and half of a seed's variance.
        std_error: of that; it falls with more seeds.
        bias_error: what half the variance is likely off, which falls with more particles.
        spread: standard deviation between seeds.
        explained: what families of copies explain of it.
    """

    log_volume: Float[np.ndarray, " threshold"]
    std_error: Float[np.ndarray, " threshold"]
    bias_error: Float[np.ndarray, " threshold"]
    spread: Float[np.ndarray, " threshold"]
    explained: Float[np.ndarray, " threshold"]


def combine(rounds: list[Descents]) -> Combined:
    """Average log volumes over the seeds of all rounds, and add half of a seed's variance."""
    values, variances = (np.concatenate([getattr(r, name) for r in rounds]) for name in ("log_volume", "variance"))
    spread, explained = values.std(axis=0, ddof=1), np.sqrt(variances.mean(axis=0))
    variance, error_of_variance = np.mean([_variance_between_seeds(r) for r in rounds], axis=0)
    of_mean = np.maximum(np.maximum(spread, explained) ** 2, variance) / len(values)
    return Combined(
        np.minimum(values.mean(axis=0) + variance / 2, 0.0),
        np.sqrt(of_mean + error_of_variance / len(rounds) / 4),
        _BIAS_ERROR * variance / 2,
        spread,
        explained,
    )


def _variance_between_seeds(found: Descents) -> Float[np.ndarray, "2 threshold"]:
    """Sum the variances of the pieces of log V from mark to mark and to the threshold; also return that sum's squared error."""
    variances = []
    for values in found.log_volume.T:
        # A mark is above a threshold where every seed has more volume there.
        above = [mark for mark in found.marks.T if np.all(mark > values)]
        pieces = np.diff(np.stack([np.zeros(len(values)), *above, values]), axis=0).var(axis=1, ddof=1)
        variances.append((pieces.sum(), 2 * np.sum(pieces**2) / (len(values) - 1)))
    return np.array(variances).T


def conclude(
    rounds: list[Descents], thresholds: np.ndarray, init_loss: float, base: Base | FloatGrid, params: Params
) -> VolumeEstimate:
    """Turn all rounds into one answer with a verdict; see `subset_simulation`."""
    value, std_error, bias_error, spread, explained = combine(rounds)
    error = np.hypot(std_error, bias_error)
    per_seed = np.concatenate([r.log_volume for r in rounds])
    correction = value - per_seed.mean(axis=0)
    per_seed += np.nan_to_num(correction)
    independent = np.sqrt(np.concatenate([r.independent for r in rounds]).mean(axis=0))
    is_count = isinstance(base, FloatGrid)
    lowest = min(r.lowest for r in rounds)
    warnings, status = rounding_warnings(thresholds, init_loss), OK
    unreached = np.isnan(value)
    if unreached.any():
        status = REFUSED
        warnings.append(
            f"no seed could go below {lowest:.4g} above the loss at params, or not every one: the volume at thresholds up to "
            f"{thresholds[unreached].max():.3g} is unknown; raise the thresholds, or move the base measure nearer to params"
        )
    with np.errstate(invalid="ignore"):
        torn = (spread > _TORN) & (spread > _TORN_RATIO * explained)
        loose = (spread > _LOOSE) & (spread > _LOOSE_RATIO * explained) & ~torn
    if torn.any() or loose.any():
        status = REFUSED if torn.any() or unreached.any() else DO_NOT_TRUST
        worst = int(np.argmax(np.where(torn | loose, spread / explained, 0.0)))
        warnings.append(
            f"at threshold {thresholds[worst]:.3g} the seeds spread by {spread[worst]:.2g} nats where {explained[worst]:.2g} "
            "are expected: the particles move too little between levels, and the volume may read too small; raise "
            "num_moves, then num_particles of subset_simulation"
        )
    ratio = float(np.nanmax((explained / independent) ** 2, initial=0.0))
    if ratio > _MAX_INFLATION:
        status = DO_NOT_TRUST if status == OK else status
        warnings.append(
            f"copies of a particle stay alike (their fractions vary {ratio:.1f} times as much as independent ones would): "
            "raise num_moves of subset_simulation"
        )
    total = base.log_total(params) if isinstance(base, FloatGrid) else 0.0
    value, error = np.where(torn, np.nan, value), np.where(torn, np.nan, error)
    return VolumeEstimate(
        thresholds,
        value + total,
        error,
        "subset simulation",
        whole_set(-lowest if lowest < -ROUNDING * abs(init_loss) else 0.0),
        status,
        tuple(warnings),
        {
            "lowest_excess_loss": lowest,
            "num_seeds": len(per_seed),
            "num_levels": max(r.num_levels for r in rounds),
            "num_steps": NUM_STEPS * sum(r.num_moves for r in rounds),
            "spread": spread.tolist(),
            "expected_spread": explained.tolist(),
            "correction": correction.tolist(),
            "error_of_correction": bias_error.tolist(),
            "variance_inflation": ratio,
            "progress": float(np.mean([r.progress for r in rounds])),
        },
        per_seed + total,
        _by_label(rounds, value + total, error),
        is_count,
    )


def _by_label(
    rounds: list[Descents], log_volume: np.ndarray, std_error: np.ndarray
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Split log volumes by the share of each label, averaged over seeds."""
    found = [r.labels for r in rounds if r.labels]
    names = sorted({int(name) for labels in found for values, _ in labels.values() for name in values})
    num_seeds = len(rounds[0].log_volume)
    split = {}
    for name in names:
        shares = np.full((len(found) * num_seeds, len(log_volume)), np.nan)
        for i, labels in enumerate(found):
            for (s, t), (values, counts) in labels.items():
                shares[i * num_seeds + s, t] = counts[values == name].sum() / counts.sum()
        mean, error = shares.mean(axis=0), shares.std(axis=0, ddof=1) / np.sqrt(len(shares))
        with np.errstate(divide="ignore", invalid="ignore"):
            split[name] = log_volume + np.log(mean), np.hypot(std_error, error / mean)
    return split


_BIAS_ERROR = 0.3
"""As a part of half the variance: about what that is off in a quadratic of 60 dimensions with 100 particles and 8 moves."""

_TORN, _TORN_RATIO = 3.0, 4.0
"""Between seeds, in nats and as a multiple of what is expected: no number is given."""

_LOOSE, _LOOSE_RATIO = 0.3, 2.5
"""A number is given, and not trusted."""

_MAX_INFLATION = 2.0

"""What the descents of all seeds of a subset simulation say together: one volume, its error, and whether to trust it.

Each seed knows its log volumes, and their variances from families of copies. Families of families are seen in the spread
between seeds only: errors are the larger of the two, and seeds that spread far more than their families tell are what
under-mixing looks like, which always makes volumes too small.
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
        labels: by (seed, threshold), the labels of the particles within, and how many have each.
        lowest: the lowest loss of any particle, above that at the trained weights.
        num_levels: of the seed that went deepest.
        num_moves: of all particles together.
        progress: mean of what moves return, from the last one at every level.
    """

    log_volume: Float[np.ndarray, "seed threshold"]
    variance: Float[np.ndarray, "seed threshold"]
    independent: Float[np.ndarray, "seed threshold"]
    labels: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]
    lowest: float
    num_levels: int
    num_moves: int
    progress: float


def combine(rounds: list[Descents]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Average log volumes over the seeds of all rounds.

    Returns:
        Means and their errors, the spread between seeds, and the spread that their families explain, each (threshold,).
    """
    values, variances = (np.concatenate([getattr(r, name) for r in rounds]) for name in ("log_volume", "variance"))
    spread, explained = values.std(axis=0, ddof=1), np.sqrt(variances.mean(axis=0))
    return values.mean(axis=0), np.maximum(spread, explained) / np.sqrt(len(values)), spread, explained


def conclude(
    rounds: list[Descents], thresholds: np.ndarray, init_loss: float, base: Base | FloatGrid, params: Params
) -> VolumeEstimate:
    """Turn all rounds into one answer with a verdict; see `subset_simulation`."""
    value, error, spread, explained = combine(rounds)
    per_seed = np.concatenate([r.log_volume for r in rounds])
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
            "are expected: the particles move too little between levels, and the volume reads too small; raise num_moves, then "
            "num_particles of subset_simulation"
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


_TORN, _TORN_RATIO = 3.0, 4.0
"""Between seeds, in nats and as a multiple of what is expected: no number is given."""

_LOOSE, _LOOSE_RATIO = 0.3, 2.5
"""A number is given, and not trusted."""

_MAX_INFLATION = 2.0

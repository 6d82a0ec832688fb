"""What is read from a ladder of temperatures, with standard errors: curves over its rungs, and volumes or their refusal."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class LLCCurve:
    """The local learning coefficient at every rung above the base.

    Attributes:
        nbetas: increasing.
        llc, std_error: E[nbeta (L - L*)].
        heat_capacity, heat_capacity_std_error: nbeta^2 Var(L), which needs no L*; it equals the LLC where nbeta (L - L*) is
            gamma distributed, and peaks at a transition.
    """

    nbetas: Float[np.ndarray, " rung"]
    llc: Float[np.ndarray, " rung"]
    std_error: Float[np.ndarray, " rung"]
    heat_capacity: Float[np.ndarray, " rung"]
    heat_capacity_std_error: Float[np.ndarray, " rung"]


@dataclass(frozen=True)
class LogPartition:
    """log E_base exp(-nbeta (L - L*)) at every rung, 0 at nbeta 0, with standard errors."""

    nbetas: Float[np.ndarray, " rung"]
    log_z: Float[np.ndarray, " rung"]
    std_error: Float[np.ndarray, " rung"]


@dataclass(frozen=True)
class LogVolume:
    """log of the base measure's mass of {L <= L(w*) + threshold}, in nats.

    Attributes:
        thresholds: above the loss at the weights, nats per example.
        log_volume, std_error: by weighted draws; NaN where refused.
        family_gap: by how much chains from the base and from the weights differ, nats.
        half_gap: by how much the first and the second half of the draws differ, nats.
        saddle_point: the same from energies alone, by inverting the partition function at its saddle point; it is good to about
            1 / (12 (1 + LLC)) nats.
        warnings: why numbers are refused.
    """

    thresholds: Float[np.ndarray, " threshold"]
    log_volume: Float[np.ndarray, " threshold"]
    std_error: Float[np.ndarray, " threshold"]
    family_gap: Float[np.ndarray, " threshold"]
    half_gap: Float[np.ndarray, " threshold"]
    saddle_point: Float[np.ndarray, " threshold"]
    warnings: tuple[str, ...]


def refuse_doubtful(
    thresholds: Float[np.ndarray, " threshold"],
    values: Float[np.ndarray, " threshold"],
    std_error: Float[np.ndarray, " threshold"],
    *,
    family_gap: Float[np.ndarray, " threshold"],
    half_gap: Float[np.ndarray, " threshold"],
    saddle_point: Float[np.ndarray, " threshold"],
    smallest_exchange: float,
) -> LogVolume:
    """Refuse numbers on which a ladder disagrees with itself by more than a nat or two, or whose rungs hardly swap.

    Chains from the base are compared with those from the weights, halves of the draws with one another, and weighted draws with
    the saddle point: a volume above a third is counted among draws of the base, and needs none.
    """
    saddle_gap = np.where(values > np.log(_COUNTED), 0.0, np.abs(values - saddle_point))
    reasons, refused = [], np.full(len(values), not smallest_exchange >= LEAST_EXCHANGE)
    if refused.any():
        reasons.append(f"neighbors swap with a probability of {smallest_exchange:.2g} only: take more draws")
    for gap, limit, text in (
        (
            family_gap,
            _MAX_GAP,
            "chains from the base and from the weights differ by up to {} nats, as after a first-order transition: take more "
            "draws, or a narrower base measure",
        ),
        (
            half_gap,
            _MAX_GAP,
            "the first and the second half of the draws differ by up to {} nats: chains are on their way; take more draws",
        ),
        (
            saddle_gap,
            _MAX_SADDLE_GAP,
            "weighted draws and the saddle point differ by up to {} nats: take more draws, or method='subset' where losses "
            "take few values",
        ),
    ):
        if np.any(gap > limit):
            reasons.append(text.format(f"{np.nanmax(gap):.2g}"))
        refused |= ~(gap <= limit)
    if np.any(np.isnan(saddle_gap)):
        reasons.append("there is no saddle point within the ladder: raise max_nbeta")
    values, std_error = (np.where(refused, np.nan, x) for x in (values, std_error))
    return LogVolume(thresholds, values, std_error, family_gap, half_gap, saddle_point, tuple(reasons))


_COUNTED = 1 / 3
_MAX_GAP, _MAX_SADDLE_GAP = 2.0, 1.0
LEAST_EXCHANGE = 0.05
"""Neighbors that swap less often leave no number to give."""

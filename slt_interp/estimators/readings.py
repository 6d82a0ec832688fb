"""What is read from a ladder of temperatures, with standard errors: curves over its rungs, and volumes."""

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
        log_volume, std_error: by weighted draws.
        family_gap: by how much chains from the base and from the weights differ, nats.
        half_gap: by how much the first and the second half of the draws differ, nats.
        saddle_point: the same from energies alone, by inverting the partition function at its saddle point; it is good to about
            1 / (12 (1 + LLC)) nats.
    """

    thresholds: Float[np.ndarray, " threshold"]
    log_volume: Float[np.ndarray, " threshold"]
    std_error: Float[np.ndarray, " threshold"]
    family_gap: Float[np.ndarray, " threshold"]
    half_gap: Float[np.ndarray, " threshold"]
    saddle_point: Float[np.ndarray, " threshold"]

"""Two phases on a ladder of temperatures, as at a first-order transition: where they coexist, and whether chains change."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class TwoPhases(NamedTuple):
    """Where draws are of two phases.

    Attributes:
        rung: where nbeta L scatters most.
        llc, variance: of nbeta L there.
        changes: how often one of a chain's replicas came back to the rung in the other phase, per chain.
    """

    rung: int
    llc: float
    variance: float
    changes: float


def find_two_phases(
    nbetas: Float[np.ndarray, " rung"],
    losses: Float[np.ndarray, "rung chain draw"],
    replica: Int[np.ndarray, "rung chain draw"] | None,
) -> TwoPhases | None:
    """Find the rung above the base at which draws are of two phases, the widest; None if they are nowhere.

    That nbeta L scatters more than in one phase is not enough, as it may have long tails: there are two groups as well.

    Args:
        nbetas: increasing, the first 0.
        losses: above the lowest.
        replica: which of a chain's replicas was at the rung; None if rungs do not swap.
    """
    energies = nbetas[1:, None, None] * losses[1:]
    llc, variance = energies.mean(axis=(1, 2)), energies.var(axis=(1, 2))
    is_wide = variance > _WIDE * (1 + np.maximum(llc, 0.0))
    for i in np.argsort(np.where(is_wide, -variance, 0.0))[: is_wide.sum()]:
        edge, distance = two_groups(energies[i])
        is_high = energies[i] > edge
        # A few draws of one chain are no phase.
        in_chains = [int(x.any(axis=1).sum()) for x in (is_high, ~is_high)]
        if distance > _DISTINCT and min(in_chains) > 1:
            changes = _changes(is_high, None if replica is None else replica[i + 1])
            return TwoPhases(int(i) + 1, float(llc[i]), float(variance[i]), changes)
    return None


def two_groups(values: Float[np.ndarray, "..."]) -> tuple[float, float]:
    """Split values where two groups scatter least around their means (k-means for two).

    Returns:
        The edge between the groups, and the distance of their means in units of the sum of their standard deviations: 1.3 for a
        normal distribution, 1.4 for an exponential one, 1.7 for a uniform one.

    >>> edge, distance = two_groups(np.concatenate([np.linspace(0, 1, 100), np.linspace(5, 6, 20)]))
    >>> round(edge, 2), round(distance, 1)
    (3.0, 8.4)
    """
    ordered = np.sort(values, axis=None)
    sizes, sums = np.arange(1, len(ordered)), np.cumsum(ordered)
    gaps = (sums[-1] - sums[:-1]) / (len(ordered) - sizes) - sums[:-1] / sizes
    at = int(np.argmax(sizes * (len(ordered) - sizes) * gaps**2))
    low, high = ordered[: at + 1], ordered[at + 1 :]
    scatter = low.std() + high.std()
    return float(ordered[at : at + 2].mean()), float(gaps[at] / scatter) if scatter else np.inf


def _changes(is_high: np.ndarray, replica: Int[np.ndarray, "chain draw"] | None) -> float:
    """Count changes of replicas rather than of what is at the rung: by swaps that changes where all replicas are stuck."""
    replica = np.zeros(is_high.shape, int) if replica is None else replica
    order = np.argsort(replica, axis=1, kind="stable")
    of_replica, phase = (np.take_along_axis(x, order, axis=1) for x in (replica, is_high))
    changed = (phase[:, 1:] != phase[:, :-1]) & (of_replica[:, 1:] == of_replica[:, :-1])
    return float(changed.sum() / len(changed))


_WIDE = 3.0
"""A variance of nbeta L, in units of 1 + LLC.

It is the LLC less its derivative by log nbeta: at most twice the LLC where that falls by no more than itself per e-fold.
"""

_DISTINCT = 2.0
"""Groups are two if they are farther apart; normal phases 4 standard deviations apart are 2.1."""

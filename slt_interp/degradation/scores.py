"""How well a dial tells circuits from illusions: scores of survival curves, and how often a circuit's is the higher one."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

_Array = np.ndarray


class Interval(NamedTuple):
    """A number with a bootstrap interval."""

    value: float
    low: float
    high: float


def scaled_effect(
    effect: Float[_Array, " chain"], random: Float[_Array, " chain"], accuracy: Float[_Array, " chain"]
) -> Float[_Array, " chain"]:
    """Compute F~ = (F - F_random) / (accuracy - F_random) of chain means: 1 for a circuit that is all there.

    The denominator is taken over all chains, so that the mean over chains is a ratio of means.

    >>> scaled_effect(np.array([0.5, 0.7]), np.zeros(2), np.ones(2)).tolist()
    [0.5, 0.7]
    """
    return (effect - random) / (accuracy.mean() - random.mean())


def auroc(genuine: Float[_Array, " network"], illusion: Float[_Array, " other"]) -> float:
    """Compute the chance that a circuit's score is above an illusion's, ties counted half (the area under the ROC curve).

    >>> auroc(np.array([0.9, 0.8]), np.array([0.8, 0.1]))
    0.875
    """
    if not (len(genuine) and len(illusion)):
        return float("nan")
    difference = genuine[:, None] - illusion
    return float(np.mean((difference > 0) + 0.5 * (difference == 0)))


def bootstrapped_auroc(
    genuine: Float[_Array, " network"], illusion: Float[_Array, " network"], rng: np.random.Generator
) -> Interval:
    """Compute `auroc` with a 95 % percentile interval over networks, each of which has both: they are drawn together.

    Networks without one of the two (NaN) are left out. Where nearly all circuits are above all illusions, resampling knows
    nothing of the networks that were not seen: the interval reaches at least to that of Clopper and Pearson for n of n
    networks, .025^(1 / n), and by symmetry at the other end.

    References:
        Efron and Tibshirani (1993), An introduction to the bootstrap, section 13.3.
        Clopper and Pearson (1934), The use of confidence or fiducial limits illustrated in the case of the binomial.

    >>> bootstrapped_auroc(np.ones(20), np.zeros(20), np.random.default_rng(0)).low.__round__(3)
    0.832
    """
    has_both = np.isfinite(genuine) & np.isfinite(illusion)
    genuine, illusion = genuine[has_both], illusion[has_both]
    count = len(genuine)
    value = auroc(genuine, illusion)
    if count < 2:
        return Interval(value, float("nan"), float("nan"))
    drawn = rng.integers(0, count, (_RESAMPLINGS, count))
    low, high = np.quantile([auroc(genuine[chosen], illusion[chosen]) for chosen in drawn], [0.025, 0.975])
    edge = 0.025 ** (1 / count)
    return Interval(value, float(min(low, edge)), float(max(high, 1 - edge)))


def half_life(excess_loss: Float[_Array, " level"], curve: Float[_Array, " level"]) -> float:
    """Find the excess loss at which a scaled effect has fallen to a half, linear between levels in the log of the excess loss.

    Returns:
        inf if it never has, and 0 if it has at the first level: both are censored.

    >>> half_life(np.array([0.01, 0.1]), np.array([0.75, 0.25])).__round__(4)
    0.0316
    """
    below = np.flatnonzero(curve <= 0.5)
    if not len(below):
        return float("inf")
    i = int(below[0])
    if i == 0:
        return 0.0
    part = (curve[i - 1] - 0.5) / (curve[i - 1] - curve[i])
    return float(np.exp((1 - part) * np.log(excess_loss[i - 1]) + part * np.log(excess_loss[i])))


_RESAMPLINGS = 2000

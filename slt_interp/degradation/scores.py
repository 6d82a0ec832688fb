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


def scaled_effect(effect: _Array, random: _Array, accuracy: _Array) -> _Array:
    """Compute F~ = (F - F_random) / (accuracy - F_random): 1 for a circuit that is all there, 0 for what any map does.

    >>> float(scaled_effect(np.array(0.5), np.array(0.0), np.array(1.0)))
    0.5
    """
    return (effect - random) / (accuracy - random)


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
    genuine: Float[_Array, " network"],
    illusion: Float[_Array, " network"],
    rng: np.random.Generator,
    *,
    confidence: float = 0.95,
) -> Interval:
    """Compute `auroc` with a percentile interval over networks, each of which has both: they are drawn together.

    Networks without one of the two (NaN) are left out. With all circuits above all illusions, every resampling says 1: the
    lower end is then that of an exact binomial interval for the share of networks, (1 - confidence)^(1 / n) at n of n.

    References:
        Efron and Tibshirani (1993), An introduction to the bootstrap, section 13.3; Clopper and Pearson (1934).

    >>> bootstrapped_auroc(np.ones(20), np.zeros(20), np.random.default_rng(0)).low.__round__(3)
    0.861
    """
    has_both = np.isfinite(genuine) & np.isfinite(illusion)
    genuine, illusion = genuine[has_both], illusion[has_both]
    count = len(genuine)
    if count < 2:
        return Interval(auroc(genuine, illusion), float("nan"), float("nan"))
    drawn = rng.integers(0, count, (_RESAMPLINGS, count))
    values = [auroc(genuine[chosen], illusion[chosen]) for chosen in drawn]
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    edge = (1 - confidence) ** (1 / count)
    low, high = (edge if low == 1 else low), (1 - edge if high == 0 else high)
    return Interval(auroc(genuine, illusion), float(low), float(high))


def half_life(excess_loss: Float[_Array, " level"], curve: Float[_Array, " level"], start: float) -> float:
    """Find the excess loss at which a curve has fallen to half of what it was at the weights themselves, inf if it never has.

    Between levels the curve is taken as linear in the logarithm of the excess loss; where it is below half at the first level,
    that level is an upper bound, and is returned.

    >>> half_life(np.array([0.01, 0.1]), np.array([0.75, 0.25]), 1.0).__round__(4)
    0.0316
    """
    below = np.flatnonzero(curve <= start / 2)
    if not len(below):
        return float("inf")
    i = int(below[0])
    if i == 0:
        return float(excess_loss[0])
    part = (curve[i - 1] - start / 2) / (curve[i - 1] - curve[i])
    return float(np.exp((1 - part) * np.log(excess_loss[i - 1]) + part * np.log(excess_loss[i])))


_RESAMPLINGS = 2000

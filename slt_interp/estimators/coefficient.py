"""The learning coefficient and its multiplicity, from energies and partition functions at several temperatures.

Resolution of singularities makes Z(nbeta) = E_base exp(-nbeta K) a sum over charts in which K is, up to smooth factors, a
product of powers of k weights: a normal crossing. Of such a product under a uniform base, -log K is a sum of k exponential
variables, whose rates are the poles of the crossing, and Z falls about like the divided difference of x -> exp(-x s) over these
poles, where s is log nbeta plus a constant (a factor Gamma(x) is neglected but for that constant). The smallest pole is the
learning coefficient, and how many are equal to it is the multiplicity m: m equal ones alone give s^(m - 1) exp(-coefficient s).
With f the divided difference over the poles' distances from the smallest, the energy at t, log nbeta above the first rung, is

    E(t) = -d log Z / dt = coefficient - f'(t + b) / f(t + b) + a exp(-delta t),

where the last term stands for the leading correction, of this or of other crossings; increments of -log Z between rungs are
its integrals. What is not known (the poles, b, a, delta, and from which rung on the law holds) is averaged over: coefficient
and amplitude are linear and integrated in closed form, the rest lies on a small grid. Near poles look like equal ones: with
errors of 1 %, two that are 1/12 apart are hardly told from a double one below an nbeta of 1e7. Arithmetic helps: where K
vanishes to order 2k and the volume element to order h along a divisor of the resolution, the pole is (h + 1) / (2k), so that
laws whose coefficient lies at a fraction of small k are the more probable ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement
from math import factorial

import numpy as np
from jaxtyping import Float

from slt_interp.errors import InputError

_Array = np.ndarray

MAX_POLES = 4
"""So many near one another are considered, and multiplicities up to this."""

MIN_RUNGS = 4
"""So many energies and three increments are enough for the coefficient, the shape of f and an amplitude."""


@dataclass(frozen=True)
class LearningCoefficient:
    """The learning coefficient for each multiplicity, and how probable that is; `print` it for the verdict.

    Attributes:
        probability: of multiplicity 1, 2, ...
        coefficients, std_errors: for each multiplicity.
        warnings: every reason for doubt.
    """

    probability: Float[_Array, " multiplicity"]
    coefficients: Float[_Array, " multiplicity"]
    std_errors: Float[_Array, " multiplicity"]
    warnings: tuple[str, ...] = ()

    @property
    def multiplicity(self) -> int:
        """The most probable."""
        return int(self.probability.argmax()) + 1

    @property
    def coefficient(self) -> float:
        """Of the most probable multiplicity."""
        return float(self.coefficients[self.multiplicity - 1])

    @property
    def std_error(self) -> float:
        """Of `coefficient`, if that is the multiplicity."""
        return float(self.std_errors[self.multiplicity - 1])

    @property
    def is_resolved(self) -> bool:
        """Whether the draws tell the multiplicity."""
        return bool(self.probability.max() >= _RESOLVED)

    def covers(self, coefficient: float, multiplicity: int) -> bool:
        """Whether a pair is among those that the draws do not exclude at 95 %."""
        if not 1 <= multiplicity <= len(self.probability) or self.probability[multiplicity - 1] < 1 - _RESOLVED:
            return False
        i = multiplicity - 1
        return bool(abs(self.coefficients[i] - coefficient) <= 1.96 * self.std_errors[i])

    def __str__(self) -> str:
        order = np.argsort(-self.probability)
        found = [
            f"{self.coefficients[i]:.4g} +- {self.std_errors[i]:.2g} at multiplicity {i + 1} (probability {share:.2g})"
            for i, share in zip(order, self.probability[order], strict=True)
            if share >= 1 - _RESOLVED
        ]
        verdict = [] if self.is_resolved else ["the draws do not tell the multiplicity: take more, or a larger max_nbeta"]
        if verdict and len(self.probability) == MAX_POLES:
            verdict.append(f"multiplicities above {MAX_POLES}, whose coefficients would be larger, are not considered")
        return "\n- ".join([f"Learning coefficient {', or '.join(found)}", *verdict, *self.warnings])


OF_CONSTANT_LOSS = LearningCoefficient(np.ones(1), np.zeros(1), np.zeros(1))
"""log Z does not fall at all: coefficient 0, multiplicity 1, and nothing to estimate."""


def fit_coefficient(
    log_nbetas: Float[_Array, " rung"],
    energies: Float[_Array, " rung"],
    increments: Float[_Array, " rung-1"],
    covariance: Float[_Array, "reading reading"],
    max_poles: int = MAX_POLES,
) -> LearningCoefficient:
    """Average over laws for Z(nbeta), each weighted by how well it explains energies and increments of -log Z together.

    A multiplicity m has prior probability in proportion to 2^-m; m to `max_poles` poles are as probable as one another, and so
    are all sets of their distances, six from 1/12 to 1, which are also the powers of a correction. The zero of f lies about
    4.5 below log nbeta of the first rung, within a factor of 2; a correction has an amplitude of about half the largest energy,
    or none. A law may begin to hold at any rung: each reading left out costs a factor of e, as in Akaike's criterion.

    The coefficient is positive, and as probably as not a fraction (h + 1) / (2k) with k up to 12: a k has a probability in
    proportion to 1 / k^2, and all h are as probable as one another, so that a fraction weighs the sum of 1 / k^3 over the k
    that it has. This weighs laws against one another, and says nothing where errors are above 1/2; the coefficient of a law and
    its error are as the readings have them.

    Args:
        log_nbetas: increasing, at least `MIN_RUNGS`, the first where the posterior leaves the base measure.
        energies: E[nbeta (L - L*)].
        increments: of -log Z from each rung to the next.
        covariance: of energies and increments, in this order.
        max_poles: of a crossing, at most the dimension of the weights.

    Returns:
        Coefficients, standard errors and probabilities of multiplicity 1 to `max_poles`; coefficient 0 of multiplicity 1 where
        energies are all 0, as those of a constant loss.

    Raises:
        InputError: for fewer rungs than `MIN_RUNGS`, unless energies are all 0.

    References:
        Watanabe (2009), Algebraic Geometry and Statistical Learning Theory, chapters 4 and 6, for crossings and expansion of Z;
        Jay and Neil (2021), Bayesian model averaging for analysis of lattice field theory results, arXiv:2008.01069, for the
        weights of laws that are fitted to a part of the readings.

    >>> t = np.log(np.geomspace(1e2, 1e6, 7))
    >>> truth = 0.5 - 1 / (t + 2), np.diff(0.5 * t - np.log(t + 2))
    >>> found = fit_coefficient(t, *truth, 1e-8 * np.eye(13))
    >>> found.multiplicity, round(found.coefficient, 2)
    (2, 0.5)
    """
    from scipy.stats import chi2

    if not np.any(energies):
        return OF_CONSTANT_LOSS
    if len(log_nbetas) < MIN_RUNGS:
        raise InputError(
            f"a learning coefficient needs energies at {MIN_RUNGS} rungs, but there are {len(log_nbetas)}: add rungs"
        )
    t, readings = log_nbetas - log_nbetas[0], np.concatenate([energies, increments])
    fits = list(_fits(t, readings, covariance, 0.5 * np.abs(energies).max(), max_poles))
    multiplicity, log_weight, coefficient, std_error, squares, freedom = np.concatenate(fits, axis=1)
    weight = np.exp(log_weight - log_weight.max())
    found = []
    for m in range(1, max_poles + 1):
        of_m = multiplicity == m
        share = np.exp(np.where(of_m, log_weight - log_weight[of_m].max(), -np.inf))
        share /= share.sum()
        mean = share @ coefficient
        found.append((weight[of_m].sum() / weight.sum(), mean, np.sqrt(share @ (std_error**2 + (coefficient - mean) ** 2))))
    best = weight.argmax()
    return LearningCoefficient(*np.array(found).T, warnings=_warnings(float(chi2.sf(squares[best], freedom[best]))))


def _fits(
    t: Float[_Array, " rung"],
    readings: Float[_Array, " reading"],
    covariance: Float[_Array, "reading reading"],
    amplitude: float,
    max_poles: int,
) -> Iterator[Float[_Array, "6 crossing"]]:
    """Fit laws of every first rung, multiplicity, normal crossing and correction.

    Yields multiplicity, log weight, coefficient, its standard error, and the law's chi-squared and degrees of freedom.
    """
    num_rungs = len(t)
    crossings = [_crossings(m, max_poles, t) for m in range(1, max_poles + 1)]
    for start in range(num_rungs - MIN_RUNGS + 1):
        kept = np.r_[start:num_rungs, num_rungs + start : 2 * num_rungs - 1]
        whiten = np.linalg.inv(np.linalg.cholesky(covariance[np.ix_(kept, kept)]))
        for m, (falls, prior, num_fitted) in enumerate(crossings, start=1):
            residuals = whiten @ (readings - falls)[:, kept].T
            for decay in (0.0, *_GAPS):
                columns = whiten @ np.stack([_powers(0.0, t[start:]), _powers(decay, t[start:])][: 2 if decay else 1], axis=1)
                precision = columns.T @ columns + np.diag([0.0, amplitude**-2][: 2 if decay else 1])
                solution = np.linalg.solve(precision, columns.T @ residuals)
                squares = np.sum(residuals**2, axis=0) - np.sum(solution * (precision @ solution), axis=0)
                log_weight = -0.5 * squares - 0.5 * np.linalg.slogdet(precision)[1] - (len(readings) - len(kept))
                log_weight += np.log(prior * 0.5**m) + (-np.log(2 * len(_GAPS) * amplitude) if decay else np.log(0.5))
                std_error, freedom = np.sqrt(np.linalg.inv(precision)[0, 0]), len(kept) - num_fitted
                log_weight += np.log(np.maximum(_density_of_poles(solution[0], std_error), _TINY))
                yield np.stack(np.broadcast_arrays(m, log_weight, solution[0], std_error, squares, freedom))


def _density_of_poles(pole: Float[_Array, " law"], std_error: float) -> Float[_Array, " law"]:
    """Average the prior density of a positive pole over a normal distribution; 1 where that is wide, and 0 far below 0."""
    from scipy.special import ndtr

    orders = np.arange(1, _LARGEST_ORDER + 1)[:, None]
    # In units of the distance between the fractions of one k, the first of which is 1.
    place, width = 2 * orders * pole, 2 * orders * std_error
    fractions = np.round(place) + np.arange(-2, 3)[:, None, None]
    with np.errstate(under="ignore"):
        terms = np.exp(-0.5 * ((place - fractions) / width) ** 2) * (fractions >= 1)
        near = terms.sum(axis=0) / (width * np.sqrt(2 * np.pi))
        # By Poisson's sum, of which two terms are left; below the first fraction there is none.
        far = 1 + 2 * np.exp(-2 * (np.pi * width) ** 2) * np.cos(2 * np.pi * place)
        far *= ndtr((place - 0.5) / width)
    shares = orders**-2.0 / np.sum(orders**-2.0)
    return 0.5 * ndtr(pole / std_error) + 0.5 * np.sum(shares * np.where(width < 0.4, near, far), axis=0)


def _powers(decay: float, t: Float[_Array, " rung"]) -> Float[_Array, " reading"]:
    """Read an energy exp(-decay t): itself, and its integrals between rungs."""
    energy = np.exp(-decay * t)
    return np.concatenate([energy, -np.diff(energy) / decay if decay else np.diff(t)])


def _crossings(
    multiplicity: int, max_poles: int, t: Float[_Array, " rung"]
) -> tuple[Float[_Array, "crossing reading"], Float[_Array, " crossing"], Float[_Array, " crossing"]]:
    """Read -f'(t + b) / f(t + b) of crossings whose first poles are equal, weigh them, and count coefficient and b."""
    z = np.linspace(-2.5, 2.5, _NUM_OFFSETS)
    s = t + _OFFSET * np.exp(_OFFSET_SPREAD * z)[:, None]
    of_offset = np.exp(-0.5 * z**2) / np.sum(np.exp(-0.5 * z**2))
    falls, prior, num_fitted = [], [], []
    for num_poles in range(multiplicity, max_poles + 1):
        further = list(combinations_with_replacement(_GAPS, num_poles - multiplicity))
        for gaps in further:
            poles = (0.0,) * multiplicity + gaps
            # The first pole is 0, so that a derivative of f is its divided difference over the others.
            value, slope = _divided_difference(poles, s), _divided_difference(poles[1:], s)
            falls.append(-np.concatenate([slope / value, np.diff(np.log(value), axis=1)], axis=1))
            prior.append(of_offset / len(further) / (max_poles + 1 - multiplicity))
            num_fitted.append(np.full(len(z), 1.0 + (num_poles > 1)))
    return np.concatenate(falls), np.concatenate(prior), np.concatenate(num_fitted)


def _divided_difference(poles: tuple[float, ...], s: Float[_Array, "..."]) -> Float[_Array, "..."]:
    """Take the divided difference of x -> exp(-x s) over increasing poles, made positive; 0 over none."""
    if not poles:
        return np.zeros_like(s)
    if poles[0] == poles[-1]:
        return s ** (len(poles) - 1) / factorial(len(poles) - 1) * np.exp(-poles[0] * s)
    return (_divided_difference(poles[:-1], s) - _divided_difference(poles[1:], s)) / (poles[-1] - poles[0])


def _warnings(probability: float) -> tuple[str, ...]:
    if probability < _MIN_PROBABILITY:
        return (
            f"no law fits: readings so far from the best have a probability of {probability:.1g}; the base measure holds "
            "several phases, or max_nbeta does not reach the asymptotic regime",
        )
    return ()


_GAPS = (1 / 12, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 1.0)
_LARGEST_ORDER = 12
_TINY = 1e-300
_OFFSET, _OFFSET_SPREAD, _NUM_OFFSETS = 4.5, 0.6, 81
"""The posterior leaves the base at the first rung, where log Z is still of order 1: f has its zero not far below it.

The numbers are of the catalogue's double poles, in half of which it lies 3 to 7 below, in all from 1 above to 14 below: a
summary of known problems, not a derivation.
"""

_RESOLVED, _MIN_PROBABILITY = 0.95, 1e-3

"""What a Gaussian approximation of the loss predicts, from Hessian eigenvalues h_i alone.

With L(w) - L* = 1/2 sum h_i w_i^2 everything the package measures by sampling has a closed form. At a singular point the
true loss is not of that form, and these predictions are what the sampled values are compared with.
"""

import numpy as np
from jaxtyping import Float


def gaussian_llc(
    eigenvalues: Float[np.ndarray, "*batch i"], weights: Float[np.ndarray, "*batch i"], nbeta: float, localization: float
) -> Float[np.ndarray, "*batch"]:
    """E[nbeta (L - L*)] under the tempered posterior of a quadratic loss: 1/2 sum nbeta h / (nbeta h + gamma).

    Args:
        eigenvalues: Hessian eigenvalues, nats per squared unit of weight.
        weights: how many directions each eigenvalue stands for.
        nbeta: n times the inverse temperature.
        localization: gamma.

    Returns:
        The prediction; NaN where some nbeta h + gamma <= 0, because then no such Gaussian exists.

    >>> gaussian_llc(np.array([1.0, 0.0]), np.ones(2), nbeta=99.0, localization=1.0).item()
    0.495
    """
    k = nbeta * np.asarray(eigenvalues, dtype=np.float64)
    proper = np.where(weights != 0, k + localization > 0, True).all(axis=-1)
    ratio = np.where(k + localization > 0, k / np.where(k + localization > 0, k + localization, 1.0), 0.0)
    return np.where(proper, 0.5 * np.sum(weights * ratio, axis=-1), np.nan)


def log_ellipsoid_mass(
    thresholds: Float[np.ndarray, " threshold"], scales: Float[np.ndarray, " i"], weights: Float[np.ndarray, " i"]
) -> Float[np.ndarray, " threshold"]:
    """Log probability that sum_i a_i z_i^2 <= threshold, for standard normal z: a weighted chi-squared law.

    The Laplace transform sum_i -1/2 log(1 + 2 s a_i) is inverted numerically along a contour through a saddle point on the
    real axis: of the lower tail up to the mean, of the upper tail beyond it, so that the smaller of the two keeps full
    relative accuracy, also far below the smallest float. The contour is a parabola around the singularities, all of which are
    on the negative axis, so that its integrand decays like a Gaussian; where many equal scales would make the
    integrand grow along it, it is the vertical line, on which they make it decay. Either way the trapezoidal rule
    converges geometrically.

    Args:
        thresholds: positive.
        scales: the a_i, at least 0.
        weights: how often each a_i occurs; need not be whole.

    References:
        Rice (1980), Distribution of quadratic forms in normal random variables: evaluation by numerical integration.
        Weideman and Trefethen (2007), Parabolic and hyperbolic contours for computing the Bromwich integral.

    >>> log_ellipsoid_mass(np.array([2.0]), np.array([1.0]), np.array([2.0])).round(6).tolist()  # log(1 - exp(-1))
    [-0.458675]
    """
    scales, weights = np.asarray(scales, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    present = (scales > 0) & (weights > 0)
    scales, weights = scales[present], weights[present]
    if scales.size == 0:
        return np.zeros(len(thresholds))
    unit = scales.max()
    mean = np.sum(weights * scales) / unit
    values = []
    for threshold in np.asarray(thresholds, dtype=np.float64) / unit:
        tail = _log_tail(float(threshold), scales / unit, weights, lower=threshold <= mean)
        values.append(tail if threshold <= mean else np.log1p(-np.exp(min(tail, 0.0))))
    return np.array(values)


def _log_tail(threshold: float, scales: np.ndarray, weights: np.ndarray, *, lower: bool) -> float:
    """Log probability of the tail below (or above) `threshold`, for scales of at most 1."""
    from scipy.optimize import root_scalar

    sign = 1.0 if lower else -1.0

    def slope(s: float) -> float:
        return threshold - 1 / s - np.sum(weights * scales / (1 + 2 * s * scales))

    def log_integrand(s: np.ndarray) -> np.ndarray:
        return s * threshold - np.log(sign * s) - 0.5 * np.log1p(2 * np.multiply.outer(s, scales)) @ weights

    if lower:
        # At the saddle s * threshold lies between 1 and 1 + sum(weights) / 2.
        bracket, vertex = (0.5 / threshold, (2 + weights.sum()) / threshold), 0.0
    else:
        bracket, vertex = (-0.5 * (1 - 1e-12), -1e-12 / threshold), -0.5
    saddle = root_scalar(slope, bracket=bracket, method="brentq", xtol=1e-300, rtol=1e-14).root
    reach = saddle - vertex
    peak = log_integrand(np.array([saddle + 0j]))[0].real
    width = 1 / np.sqrt(1 / saddle**2 + 2 * np.sum(weights * (scales / (1 + 2 * saddle * scales)) ** 2))
    spacing = min(width, reach, abs(saddle)) / reach / _NODES_PER_WIDTH

    def log_parabola(u: np.ndarray) -> np.ndarray:
        return log_integrand(vertex + reach * (1 + 1j * u) ** 2) + np.log(2 * reach * (1 + 1j * u)) - peak

    def log_line(u: np.ndarray) -> np.ndarray:
        return log_integrand(saddle + 1j * reach * u) + np.log(reach) - peak

    for contour in (log_parabola, log_line):
        end = 16 * spacing
        while np.real(contour(np.array([end])) - contour(np.zeros(1)))[0] > -_DIGITS:
            end *= 1.25
        values = contour(spacing * np.arange(np.ceil(end / spacing) + 1))
        if np.all(np.real(values) <= np.real(values[0]) + 1e-9):
            break
    integrand = np.real(np.exp(values))
    integral = spacing * (integrand.sum() - 0.5 * integrand[0]) / np.pi
    return float(peak + np.log(integral))


_DIGITS = 40.0
"""The contour ends where the integrand has fallen by exp(-40), below rounding."""

_NODES_PER_WIDTH = 8
"""The trapezoidal rule is off by exp(-2 pi x distance to the next singularity / spacing): below rounding from 6 on."""

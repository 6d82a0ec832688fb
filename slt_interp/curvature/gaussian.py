"""What a Gaussian approximation of the loss predicts, from Hessian eigenvalues h_i alone.

With L(w) - L* = 1/2 sum h_i w_i^2 everything the package measures by sampling has a closed form. At a singular point the
true loss is not of that form, and these predictions are what the sampled values are compared with.
"""

from typing import NamedTuple

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
    thresholds: Float[np.ndarray, " threshold"],
    scales: Float[np.ndarray, " i"],
    weights: Float[np.ndarray, " i"],
    noncentralities: Float[np.ndarray, " i"] | None = None,
    tilt: float = 0.0,
) -> Float[np.ndarray, " threshold"]:
    """Log probability that sum_i a_i (z_i + d_i)^2 + tilt z_0 <= threshold, for standard normal z.

    Without shifts d_i and tilt a weighted chi-squared law. Its Laplace transform
    sum_i -1/2 log(1 + 2 s a_i) - s a_i d_i^2 / (1 + 2 s a_i) + (tilt s)^2 / 2 is inverted numerically along a contour through a
    saddle point on the real axis: of the lower tail up to the mean, of the upper tail beyond it, so that the smaller of the
    two keeps full relative accuracy, also far below the smallest float. The contour is a parabola around the singularities,
    all of which are on the negative axis, so that its integrand decays like a Gaussian; where many equal scales, or a tilt,
    would make the integrand grow along it, it is the vertical line, on which they make it decay. Either way the trapezoidal
    rule converges geometrically.

    Args:
        thresholds: any without noncentralities, positive; negative ones have mass with a tilt only.
        scales: the a_i, at least 0.
        weights: how often each a_i occurs; need not be whole.
        noncentralities: sum of d_i^2 over the weights of each a_i; none by default.
        tilt: standard deviation of what is linear in z.

    References:
        Rice (1980), Distribution of quadratic forms in normal random variables: evaluation by numerical integration.
        Weideman and Trefethen (2007), Parabolic and hyperbolic contours for computing the Bromwich integral.

    >>> log_ellipsoid_mass(np.array([2.0]), np.array([1.0]), np.array([2.0])).round(6).tolist()  # log(1 - exp(-1))
    [-0.458675]
    """
    scales, weights = np.asarray(scales, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    shifts = np.zeros(len(scales)) if noncentralities is None else np.asarray(noncentralities, dtype=np.float64)
    thresholds = np.asarray(thresholds, dtype=np.float64)
    present = (scales > 0) & (weights > 0)
    scales, weights, shifts = scales[present], weights[present], shifts[present]
    if scales.size == 0:
        return _log_normal_cdf(thresholds, tilt)
    unit = scales.max()
    law = _Form(scales / unit, weights, shifts, tilt / unit)
    mean = np.sum((weights + shifts) * law.scales)
    values = []
    for threshold in thresholds / unit:
        if threshold <= 0 and not tilt:
            values.append(-np.inf)
            continue
        tail = _log_tail(float(threshold), law, lower=threshold <= mean)
        values.append(min(tail, 0.0) if threshold <= mean else np.log1p(-np.exp(min(tail, 0.0))))
    return np.array(values)


class _Form(NamedTuple):
    """A quadratic form of normal variables: see `log_ellipsoid_mass`; scales of at most 1."""

    scales: np.ndarray
    weights: np.ndarray
    shifts: np.ndarray
    tilt: float


def _log_normal_cdf(thresholds: np.ndarray, scale: float) -> np.ndarray:
    from scipy.special import log_ndtr

    if scale:
        return log_ndtr(thresholds / scale)
    with np.errstate(divide="ignore"):
        return np.log((thresholds >= 0).astype(np.float64))


def _log_tail(threshold: float, form: _Form, *, lower: bool) -> float:
    """Log probability of the tail below (or above) `threshold`."""
    from scipy.optimize import root_scalar

    scales, weights, shifts, tilt = form
    sign = 1.0 if lower else -1.0

    def slope(s: float) -> float:
        damped = scales / (1 + 2 * s * scales)
        return threshold - 1 / s - np.sum(weights * damped + shifts * damped**2 / scales) + s * tilt**2

    def log_integrand(s: np.ndarray) -> np.ndarray:
        product = np.multiply.outer(s, scales)
        shifted = (product / (1 + 2 * product)) @ shifts
        return s * threshold - np.log(sign * s) - 0.5 * np.log1p(2 * product) @ weights - shifted + 0.5 * (s * tilt) ** 2

    if lower:
        # Without a tilt, at the saddle s * threshold lies between 1 and 1 + sum(weights) / 2 + sum(shifts) / 8.
        largest = (2 + weights.sum() + shifts.sum()) / (threshold if threshold > 0 else tilt)
        while slope(largest) < 0:
            largest *= 2
        smallest = 0.5 / threshold if threshold > 0 else 0.5 * largest
        while slope(smallest) > 0:
            smallest /= 2
        bracket, vertex = (smallest, largest), 0.0
    else:
        bracket, vertex = (-0.5 * (1 - 1e-12), -1e-12 / threshold), -0.5
    saddle = root_scalar(slope, bracket=bracket, method="brentq", xtol=1e-300, rtol=1e-14).root
    reach = saddle - vertex
    peak = log_integrand(np.array([saddle + 0j]))[0].real
    damped = scales / (1 + 2 * saddle * scales)
    curvature = 1 / saddle**2 + np.sum(2 * weights * damped**2 + 4 * shifts * damped**3 / scales) + tilt**2
    width = 1 / np.sqrt(curvature)
    spacing = min(width, reach, abs(saddle)) / reach / _NODES_PER_WIDTH

    def log_parabola(u: np.ndarray) -> np.ndarray:
        return log_integrand(vertex + reach * (1 + 1j * u) ** 2) + np.log(2 * reach * (1 + 1j * u)) - peak

    def log_line(u: np.ndarray) -> np.ndarray:
        return log_integrand(saddle + 1j * reach * u) + np.log(reach) - peak

    for contour in (log_line,) if tilt else (log_parabola, log_line):
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

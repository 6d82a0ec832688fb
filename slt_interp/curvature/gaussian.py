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

    The Laplace transform sum_i -1/2 log(1 + 2 s a_i) is inverted numerically along a parabola through the saddle point on the
    positive axis. The contour avoids every singularity (all are on the negative axis), its integrand decays like a
    Gaussian, and the trapezoidal rule converges geometrically; the saddle point keeps full *relative* accuracy at
    probabilities far below the smallest float.

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
    from scipy.optimize import root_scalar

    scales, weights = np.asarray(scales, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    scales, weights = scales[scales > 0], weights[scales > 0]
    if scales.size == 0:
        return np.zeros(len(thresholds))

    def log_integrand(s: np.ndarray, threshold: float) -> np.ndarray:
        return s * threshold - np.log(s) - 0.5 * np.log1p(2 * np.multiply.outer(s, scales)) @ weights

    def one(threshold: float) -> float:
        def slope(log_s: float) -> float:
            s = np.exp(log_s)
            return s * threshold - 1 - np.sum(weights * s * scales / (1 + 2 * s * scales))

        # At the saddle s * threshold lies between 1 and 1 + sum(weights) / 2.
        low, high = -np.log(threshold), np.log1p(0.5 * weights.sum()) - np.log(threshold)
        saddle = np.exp(root_scalar(slope, bracket=(low - 1e-9, high + 1e-9), method="brentq", xtol=1e-12).root)
        peak = log_integrand(np.array([saddle + 0j]), threshold)[0].real
        reach = np.sqrt(_DIGITS / (saddle * threshold))
        u = np.linspace(-reach, reach, _NODES)
        s = saddle * (1 + 1j * u) ** 2
        # ds/du = 2i saddle (1 + iu); the factor 1 / (2 pi i) leaves saddle (1 + iu) / pi.
        values = np.exp(log_integrand(s, threshold) - peak) * saddle * (1 + 1j * u) / np.pi
        return float(peak + np.log(np.trapezoid(values.real, u)))

    return np.array([one(float(threshold)) for threshold in np.asarray(thresholds, dtype=np.float64)])


_DIGITS = 40.0
"""The contour ends where exp(s * threshold) alone has fallen by exp(-40)."""

_NODES = 2001

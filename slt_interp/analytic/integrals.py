"""One- and two-dimensional integrals behind the exact answers, in float64 and without randomness.

Most are trapezoid sums over logarithms, where integrands are analytic and fall off at both ends: there the trapezoid rule
converges exponentially. The others are Gauss-Legendre sums over panels that shrink geometrically toward given points.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

Edges = Float[np.ndarray, " edge"]


def log_product_density(
    dims: Sequence[int], powers: Sequence[float], localization: float, log_floor: float
) -> tuple[Float[np.ndarray, " node"], Float[np.ndarray, " node"]]:
    """Density of T = sum_i powers_i log |u_i| for independent u_i ~ N(0, I / localization) in R^dims_i.

    Args:
        dims: dimensions of the u_i.
        powers: their exponents.
        localization: precision of every coordinate.
        log_floor: where T may end below: what lies 2^-56 lower in probability is left out.

    Returns:
        Equidistant T, and the probability at each (they sum to 1).
    """
    first, weights = 0.0, np.ones(1)
    for dim, power in zip(dims, powers, strict=True):
        highest = power * 0.5 * np.log(2 * (40 + dim) / localization)
        lowest = min(log_floor, highest) - 40 * power / dim
        t = np.arange(np.floor(lowest / _SPACING), np.ceil(highest / _SPACING) + 1) * _SPACING
        log_radius = t / power
        log_density = dim * log_radius - 0.5 * localization * np.exp(2 * log_radius)
        density = np.exp(log_density - log_density.max())
        first, weights = first + t[0], np.convolve(weights, density / density.sum())
    return first + _SPACING * np.arange(len(weights)), weights


def product_moments(
    dims: Sequence[int], powers: Sequence[float], scale: float, nbeta: float, localization: float
) -> tuple[float, float]:
    """Log partition function log E[exp(-nbeta K)], and E[nbeta K], of K = scale prod_i |u_i|^powers_i."""
    log_strength = np.log(nbeta * scale)
    log_typical = sum(p * 0.5 * np.log(d / localization) for d, p in zip(dims, powers, strict=True))
    t, weights = log_product_density(dims, powers, localization, min(0.0, -log_strength - max(0.0, log_typical)))
    energy = np.exp(np.minimum(t + log_strength, 700.0))
    tilted = weights * np.exp(-energy)
    return float(np.log(tilted.sum())), float((tilted * energy).sum() / tilted.sum())


def product_log_volume(dims: Sequence[int], powers: Sequence[float], scale: float, threshold: float) -> float:
    """Log P(scale prod_i |u_i|^powers_i <= threshold) for u_i ~ N(0, I)."""
    from scipy.special import gammainc

    log_threshold = np.log(threshold / scale)
    nodes, weights = log_product_density(dims[1:], powers[1:], 1.0, min(0.0, log_threshold))
    log_radius = (log_threshold - nodes) / powers[0]
    return float(np.log(np.sum(weights * gammainc(dims[0] / 2, 0.5 * np.exp(2 * np.minimum(log_radius, 300.0))))))


def log_mass(log_transform: Callable[[complex], complex], threshold: float) -> float:
    """Log P(K <= threshold) from log E[exp(-s K)], which must be analytic in s off the negative axis.

    The Bromwich integral of exp(s threshold) E[exp(-s K)] / s, along Talbot's contour through the saddle point on the real
    axis, where its logarithm is smallest.

    References:
        Talbot (1979), The accurate numerical inversion of Laplace transforms.
    """
    from scipy.optimize import minimize_scalar

    def exponent(s: complex) -> complex:
        return s * threshold + log_transform(s) - np.log(s)

    at = minimize_scalar(lambda log_s: exponent(np.exp(log_s)).real, bracket=(-np.log(threshold), 3 - np.log(threshold)))
    saddle, height = np.exp(at.x), at.fun
    # Symmetric in the angle: the upper half tells all. The weight is ds / d angle over i.
    angles = (np.arange(_TALBOT_NODES) + 0.5) * np.pi / _TALBOT_NODES
    cotangent = 1 / np.tan(angles)
    contour = saddle * angles * (cotangent + 1j)
    slope = saddle * (1 + 1j * (angles + (angles * cotangent - 1) * cotangent))
    terms = np.array([np.exp(exponent(s) - height) for s in contour]) * slope
    return float(height + np.log(terms.real.sum() / _TALBOT_NODES))


def line_mean(
    value: Callable[[np.ndarray], np.ndarray], log_weight: Callable[[np.ndarray], np.ndarray], panels: Edges
) -> float:
    """Mean of `value` on a line under exp(log_weight), by Gauss-Legendre between successive `panels`."""
    x, log_lengths = panel_nodes(panels)
    return weighted_mean(value(x), log_weight(x) + log_lengths)


def plane_mean(
    value: Callable[[float, np.ndarray], np.ndarray],
    log_weight: Callable[[float, np.ndarray], np.ndarray],
    outer: Edges,
    inner: Callable[[float], Edges],
) -> float:
    """Mean of `value` on the plane under exp(log_weight): Gauss-Legendre in x, and in y between panels that x decides."""
    values, log_weights = [], []
    for x, log_length in zip(*panel_nodes(outer), strict=True):
        y, log_lengths = panel_nodes(inner(x))
        values.append(value(x, y))
        log_weights.append(log_length + log_lengths + log_weight(x, y))
    return weighted_mean(np.concatenate(values), np.concatenate(log_weights))


def geometric_panels(points: Sequence[float], low: float, high: float, smallest: float) -> Edges:
    """Make edges between low and high whose distances from each of the points double, from `smallest` on."""
    steps = smallest * 2.0 ** np.arange(np.ceil(np.log2((high - low) / smallest)) + 1)
    edges = [low, high, *(edge for p in points for edge in (p, *(p + steps), *(p - steps)))]
    edges = np.unique(np.clip(edges, low, high))
    return edges[np.concatenate([[True], np.diff(edges) > 1e-3 * smallest])]


def panel_nodes(edges: Edges) -> tuple[Float[np.ndarray, " node"], Float[np.ndarray, " node"]]:
    """Make the nodes of Gauss-Legendre sums between successive edges, and the logarithms of their weights."""
    nodes, weights = _legendre()
    middle, half = (edges[1:] + edges[:-1]) / 2, np.diff(edges) / 2
    return (middle[:, None] + half[:, None] * nodes).ravel(), np.log(half[:, None] * weights).ravel()


def sinh_nodes(reach: float, smallest: float) -> tuple[Float[np.ndarray, " node"], Float[np.ndarray, " node"]]:
    """Make nodes on (0, reach) for even functions, equidistant in asinh(x / smallest), and the logarithms of their weights.

    The trapezoid rule of an analytic function that has no scale below `smallest`, and vanishes beyond `reach`.
    """
    t = (np.arange(np.ceil(np.arcsinh(reach / smallest) / _SINH_SPACING)) + 0.5) * _SINH_SPACING
    return smallest * np.sinh(t), np.log(smallest * np.cosh(t))


def weighted_mean(values: Float[np.ndarray, " node"], log_weights: Float[np.ndarray, " node"]) -> float:
    """Mean of `values` under weights known up to a factor, by their logarithms."""
    weights = np.exp(log_weights - log_weights.max())
    return float(np.sum(weights * values) / np.sum(weights))


_SPACING = 0.05
_SINH_SPACING = 0.1
_TALBOT_NODES = 400


@functools.cache
def _legendre() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(16)

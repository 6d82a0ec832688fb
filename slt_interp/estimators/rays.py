"""Volumes by rays from the trained weights: the mass of the part of a sublevel set that is seen from there.

A ray goes from w* along A u, u uniform on the unit sphere, until the loss first exceeds a threshold, at radius R(u). In polar
coordinates the mass of all the rays is the mean over u of

    |S| |det A| int_0^R r^(d-1) p(w* + r A u) dr,   |S| = 2 pi^(d/2) / Gamma(d/2), p the base density,

whatever A and wherever the base measure has its center; one ray serves every threshold. A only decides how much the rays
differ. Where the sublevel set is an ellipsoid A turns it into a ball, and all rays say the same. Where it is not, R^d makes a
few rays carry the whole mean: the effective sample size and the tail of the weights (Pareto's k) tell, and then the number is
too small and its error, too.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Key

from slt_interp.bases import Ball, Base, Box, Gaussian
from slt_interp.curvature.spectrum import dense_hessian
from slt_interp.data import Batch
from slt_interp.errors import InputError
from slt_interp.estimators.llc import DO_NOT_TRUST, OK
from slt_interp.estimators.volume_estimate import VolumeEstimate, check_thresholds, rounding_warnings
from slt_interp.posterior import LocalPosterior, LossFn, check_target
from slt_interp.samplers.chains import choose_block_size
from slt_interp.tree import Params, broadcast, check_key


def ray_volume(
    key: Key[Array, ""],
    loss_fn: LossFn,
    params: Params,
    data: Batch,
    thresholds: Any,
    *,
    base: Base,
    num_rays: int = 2000,
    precondition: bool = True,
) -> VolumeEstimate:
    """Estimate log volumes of the part of the sublevel set that is star-shaped around `params`.

    Up to 512 weights A is the square root of the covariance of the tempered posterior of the quadratic loss with the Hessian
    at params, at the temperature where its mean excess loss is the geometric mean of the thresholds; in flat directions that
    is the base measure. Beyond, A is the base measure's scale, as a warning says.

    Args:
        key: typed PRNG key.
        loss_fn: any scalar function `(params, batch) -> scalar`; thresholds are in its units.
        params: the trained weights, where the rays start.
        data: passed to the loss whole.
        thresholds: above the loss at params, increasing.
        base: `Gaussian`, `Box` or `Ball`.
        num_rays: rays; each takes 65 losses, and 14 more per threshold.
        precondition: whether the Hessian has a say in A.

    References:
        Scherlis and Belrose (2025), Estimating the probability of sampling a trained neural network at random,
        arXiv:2501.18812 (the estimator, without its errors).
        Vehtari et al. (2024), Pareto smoothed importance sampling, arXiv:1507.02646 (k, and its limit of 0.7).

    >>> found = ray_volume(jax.random.key(0), lambda w, batch: jnp.sum(w**2) / 2, jnp.zeros(2), None, [1e-3],
    ...                    base=Gaussian(0.0, 1.0))
    >>> found.status, bool(abs(found.log_volume[0] - np.log(1 - np.exp(-1e-3))) < 1e-4)
    ('ok', True)
    """
    check_key(key)
    thresholds = check_thresholds(thresholds)
    if num_rays < 20:
        raise InputError(f"num_rays must be at least 20, but is {num_rays}")
    if not isinstance(base, (Gaussian, Box, Ball)):
        raise InputError(f"rays need a base measure with a density, not a {type(base).__name__}: give a Gaussian, Box or Ball")
    target = LocalPosterior(loss_fn, params, 1.0, base)
    check_target(target, params, data)
    start = target.position(params)
    flat, _ = ravel_pytree(start)
    size = flat.size
    scale = np.sqrt(np.asarray(ravel_pytree(base.variance(start))[0], np.float64))
    matrix = np.diag(scale) if size <= MAX_FULL else scale
    log_det = np.sum(np.log(scale))
    if precondition and size <= MAX_FULL:
        matrix, log_det = _preconditioner(
            dense_hessian(loss_fn, params, data)[0], scale, float(np.exp(np.log(thresholds).mean()))
        )
    directions = np.asarray(jax.random.normal(key, (num_rays, size)), np.float64)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    ways = directions @ matrix.T if matrix.ndim == 2 else directions * matrix
    profile = _profile(base, start, ways)
    init_loss = float(target.loss(start, data))
    crossings, comes_back = _first_crossings(
        target,
        jnp.asarray(ways, flat.dtype),
        jnp.asarray(profile.end, flat.dtype),
        jnp.asarray(init_loss + thresholds, jnp.result_type(float)),
        data,
        block_size=_block_size(target, params, data, num_rays),
    )
    radii = np.asarray(crossings, np.float64)
    is_saturated = radii >= profile.end[:, None] * (1 - 1e-6)
    log_weights = _log_sphere(size) + log_det + profile.log_density + _log_radial(profile, radii, size)
    found = _conclude(
        log_weights, is_saturated.mean(axis=0), np.asarray(comes_back).mean(axis=0), thresholds, init_loss, profile
    )
    if not precondition or size <= MAX_FULL:
        return found
    plain = (
        f"params has {size} weights, and beyond {MAX_FULL} the Hessian does not make rays alike: use method='tempering' or "
        "'subset', which count what they miss"
    )
    return replace(found, warnings=(*found.warnings, plain))


MAX_FULL = 512
"""Up to this dimension the preconditioner is a whole matrix."""


class _Profile(NamedTuple):
    """Log base density along rays: log_density - rate r - curvature r^2 / 2 up to the radius `end`, beyond which is no mass."""

    log_density: float
    rate: Float[np.ndarray, " ray"]
    curvature: Float[np.ndarray, " ray"]
    end: Float[np.ndarray, " ray"]


def pareto_k(weights: Float[np.ndarray, " ray"]) -> float:
    """Fit the shape k of a generalized Pareto distribution to the largest weights: moments of order 1 / k do not exist.

    References:
        Zhang and Stephens (2009), A new and efficient estimation method for the generalized Pareto distribution.

    >>> bool(pareto_k(np.random.default_rng(0).pareto(1.0, 10_000)) > 0.7)
    True
    """
    ordered = np.sort(weights)
    num_tail = int(min(0.2 * len(ordered), 3 * np.sqrt(len(ordered))))
    excess = ordered[-num_tail:] - ordered[-num_tail - 1]
    if not excess[0] > 0 and not excess[-1] > 0:
        return -np.inf
    # k does not depend on the scale; and equal weights have excesses of 0, or of rounding alone.
    excess = np.maximum(excess / excess[-1], np.finfo(np.float64).eps)
    num_points = 30 + int(np.sqrt(num_tail))
    quartile = excess[int(num_tail / 4 + 0.5) - 1]
    theta = 1 / excess[-1] + (1 - np.sqrt(num_points / (np.arange(num_points) + 0.5))) / (3 * quartile)
    shapes = np.mean(np.log1p(-theta[:, None] * excess), axis=1)
    likelihood = num_tail * (np.log(-theta / shapes) - shapes - 1)
    posterior = np.exp(likelihood - likelihood.max())
    mean = np.sum(theta * posterior) / posterior.sum()
    # Drawn toward 1/2, with the weight of ten observations.
    return float((np.mean(np.log1p(-mean * excess)) * num_tail + 0.5 * 10) / (num_tail + 10))


def _preconditioner(hessian: np.ndarray, scale: np.ndarray, threshold: float) -> tuple[np.ndarray, float]:
    """Square root of scale (1 + nbeta scale H scale)^-1 scale, where the mean loss is `threshold`, and its log determinant."""
    from scipy.optimize import root_scalar

    values, vectors = np.linalg.eigh(scale[:, None] * hessian * scale)
    values = np.maximum(values, 0.0)

    def excess(log_nbeta: float) -> float:
        return float(np.log(0.5 * np.sum(values / (1 + np.exp(log_nbeta) * values)) / threshold))

    # Where the base measure alone keeps the mean loss that low, the Hessian has nothing to say.
    nbeta = 0.0
    bracket = (np.log(1e-6 / max(values.max(), 1e-300)), np.log(len(values) / threshold))
    if values.any() and excess(bracket[0]) > 0:
        nbeta = np.exp(root_scalar(excess, bracket=bracket, method="brentq").root)
    roots = (1 + nbeta * values) ** -0.5
    return scale[:, None] * (vectors * roots), float(np.sum(np.log(scale)) + np.sum(np.log(roots)))


def _profile(base: Base, start: Params, ways: np.ndarray) -> _Profile:
    place, size = np.asarray(ravel_pytree(start)[0], np.float64), ways.shape[1]

    def flatten(value: Any) -> np.ndarray:
        wide = jax.tree.map(lambda x, c: jnp.broadcast_to(jnp.asarray(x, c.dtype), c.shape), broadcast(value, start), start)
        return np.asarray(ravel_pytree(wide)[0], np.float64)

    zero = np.zeros(len(ways))
    if isinstance(base, Gaussian):
        scale = flatten(base.scale)
        offset, speed = (place - flatten(base.center)) / scale, ways / scale
        log_density = -0.5 * offset @ offset - np.sum(np.log(scale)) - 0.5 * size * np.log(2 * np.pi)
        rate, curvature = speed @ offset, np.sum(speed**2, axis=1)
        peak = _peak(rate, curvature, size)
        return _Profile(float(log_density), rate, curvature, peak + _reach(peak, curvature, size))
    if isinstance(base, Box):
        low, high = flatten(base.low), flatten(base.high)
        with np.errstate(divide="ignore"):
            end = np.min(np.where(ways > 0, high - place, low - place) / np.where(ways == 0, -1e-300, ways), axis=1)
        return _Profile(-float(np.sum(np.log(high - low))), zero, zero, end)
    assert isinstance(base, Ball)
    radius = flatten(base.radius)
    offset, speed = (place - flatten(base.center)) / radius, ways / radius
    b, a = speed @ offset, np.sum(speed**2, axis=1)
    end = (np.sqrt(b**2 + a * (1 - offset @ offset)) - b) / a
    return _Profile(-float(np.sum(np.log(radius)) + _log_sphere(size) - np.log(size)), zero, zero, end)


def _log_sphere(size: int) -> float:
    """Log area of the unit sphere."""
    from scipy.special import gammaln

    return float(np.log(2) + 0.5 * size * np.log(np.pi) - gammaln(size / 2))


def _peak(rate: np.ndarray, curvature: np.ndarray, size: int) -> np.ndarray:
    """Where r^(d-1) exp(-rate r - curvature r^2 / 2) is largest."""
    root = np.sqrt(rate**2 + 4 * curvature * (size - 1))
    # On a line, where the rate is 0, the form that is not chosen is 0 / 0.
    with np.errstate(invalid="ignore"):
        return np.where(rate > 0, 2 * (size - 1) / (root + np.abs(rate)), (root - rate) / (2 * curvature))


def _reach(peak: np.ndarray, curvature: np.ndarray, size: int) -> np.ndarray:
    """How far beyond the peak the integrand has fallen by exp(-40) or more."""
    from scipy.optimize import brentq

    by_power = brentq(lambda m: (size - 1) * (m - np.log1p(m)) - _FALL, 0.0, 100.0 + 2 * _FALL) if size > 1 else np.inf
    with np.errstate(invalid="ignore"):
        return np.fmin(np.sqrt(2 * _FALL / curvature), peak * by_power if size > 1 else np.inf)


_FALL = 40.0


def _log_radial(profile: _Profile, radii: Float[np.ndarray, "ray threshold"], size: int) -> Float[np.ndarray, "ray threshold"]:
    """Log of int_0^R r^(d-1) exp(-rate r - curvature r^2 / 2) dr, by Gauss-Legendre around the largest value within."""
    with np.errstate(divide="ignore"):
        if not profile.curvature.any():
            return size * np.log(radii) - np.log(size)
        rate, curvature = profile.rate[:, None], profile.curvature[:, None]
        top = np.maximum(np.minimum(_peak(rate, curvature, size), radii), 1e-150)
        slope = np.maximum((size - 1) / top - curvature * top - rate, 0.0)
        bend = (size - 1) / top**2 + curvature
        # Below the top the log integrand is concave with at least this curvature; the form that does not cancel.
        fall = 2 * _FALL / (slope + np.sqrt(slope**2 + 2 * _FALL * bend))
        pieces = [(np.maximum(top - fall, 0.0), top), (top, np.minimum(radii, top + _reach(top, curvature, size)))]
        nodes, weights = np.polynomial.legendre.leggauss(_NODES)
        logs = []
        for low, high in pieces:
            half = np.maximum(high - low, 0.0)[..., None] / 2
            r = low[..., None] + half * (1 + nodes)
            log_values = (size - 1) * np.log(r) - rate[..., None] * r - curvature[..., None] * r**2 / 2
            logs.append(log_values + np.log(half * weights))
        found = np.logaddexp.reduce(np.concatenate(logs, axis=-1), axis=-1)
    return np.where(radii > 0, found, -np.inf)


_NODES = 80


class _Bracket(NamedTuple):
    """Radii on both sides of a crossing, and the losses there."""

    low: Float[Array, ""]
    high: Float[Array, ""]
    low_loss: Float[Array, ""]
    high_loss: Float[Array, ""]


@partial(jax.jit, static_argnames=("block_size",))
def _first_crossings(
    target: LocalPosterior,
    ways: Float[Array, "ray i"],
    ends: Float[Array, " ray"],
    levels: Float[Array, " threshold"],
    data: Batch,
    *,
    block_size: int,
) -> tuple[Float[Array, "ray threshold"], Bool[Array, "ray threshold"]]:
    """Find the radius up to which the loss stays within each level, and whether it comes back to the level farther out.

    The radius is the end of the ray where the loss never leaves. Radii in a ratio of 1.3 are tried outward: an excursion of the
    loss within one interval is overlooked. The first interval with a crossing is halved 14 times, to 2e-5 of the radius, and
    then cut by the secant through the losses at its ends: what is left is the square of that where the loss is smooth, and
    that where it jumps.
    """
    start, unravel = ravel_pytree(target.position(target.center))
    ratios = jnp.concatenate([jnp.zeros(1), _RATIO ** -jnp.arange(_NUM_RADII - 1, 0, -1.0), jnp.ones(1)])

    def one_ray(at: tuple) -> tuple[Array, Array]:
        way, end = at

        def loss(radius: Array) -> Array:
            return target.loss(unravel(start + radius * way), data)

        grid = end * ratios
        losses = jax.lax.map(loss, grid)

        def one_level(level: Array) -> tuple[Array, Array]:
            outside = ~(losses <= level)
            first = jnp.argmax(outside)
            last = jnp.maximum(first - 1, 0)

            def halve(_: Array, bracket: _Bracket) -> _Bracket:
                radius = (bracket.low + bracket.high) / 2
                value = loss(radius)
                is_in = value <= level
                return _Bracket(
                    low=jnp.where(is_in, radius, bracket.low),
                    high=jnp.where(is_in, bracket.high, radius),
                    low_loss=jnp.where(is_in, value, bracket.low_loss),
                    high_loss=jnp.where(is_in, bracket.high_loss, value),
                )

            around = _Bracket(grid[last], grid[first], losses[last], losses[first])
            low, high, low_loss, high_loss = jax.lax.fori_loop(0, _NUM_HALVINGS, halve, around)
            share = (level - low_loss) / (high_loss - low_loss)
            # A loss that is not finite outside tells nothing of where within.
            crossing = low + (high - low) * jnp.where(jnp.isfinite(high_loss), jnp.nan_to_num(share), 0.5)
            comes_back = jnp.any(~outside & (jnp.arange(len(grid)) > first) & outside.any())
            return jnp.where(outside.any(), crossing, end), comes_back

        return jax.lax.map(one_level, levels)

    return jax.lax.map(one_ray, (ways, ends), batch_size=block_size)


_RATIO, _NUM_RADII, _NUM_HALVINGS = 1.3, 64, 14


def _block_size(target: LocalPosterior, params: Params, data: Batch, num_rays: int) -> int:
    """As in `subset`: all together where sixteen fit the cache of a CPU."""
    fitting = choose_block_size(16, None, target, params, data)
    return num_rays if fitting == 16 else fitting


def _conclude(
    log_weights: Float[np.ndarray, "ray threshold"],
    saturation: Float[np.ndarray, " threshold"],
    returning: Float[np.ndarray, " threshold"],
    thresholds: np.ndarray,
    init_loss: float,
    profile: _Profile,
) -> VolumeEstimate:
    count, top = len(log_weights), log_weights.max(axis=0)
    top = np.where(np.isfinite(top), top, 0.0)
    weights = np.exp(log_weights - top)
    mean = weights.mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ess = weights.sum(axis=0) ** 2 / np.sum(weights**2, axis=0)
        log_volume, std_error = top + np.log(mean), weights.std(axis=0, ddof=1) / mean / np.sqrt(count)
    shapes = np.array([pareto_k(column) for column in weights.T])
    unreliable = ~(ess >= _MIN_ESS) | (shapes > _MAX_SHAPE)
    # Weights that differ by rounding have a tail of nothing but noise.
    unreliable &= ~(ess > 0.99 * count)
    warnings = rounding_warnings(thresholds, init_loss)
    if unreliable.any():
        worst = int(np.argmax(np.where(unreliable, shapes, -np.inf)))
        warnings.append(
            f"at threshold {thresholds[worst]:.3g} the {count} rays are worth {ess[worst]:.0f} (Pareto k {shapes[worst]:.2f}, "
            f"{_MAX_SHAPE} is the limit): a few long rays carry the mean, and the volume reads too small; use method='subset'"
        )
    if np.any(saturation > 0.5):
        warnings.append(
            f"at threshold {thresholds[-1]:.3g} {saturation[-1]:.0%} of the rays end with the base measure before the loss "
            "reaches the threshold: what is measured there is the base measure, not the basin"
        )
    if returning.any():
        worst = int(returning.argmax())
        warnings.append(
            f"at threshold {thresholds[worst]:.3g} {returning[worst]:.1%} of the rays enter the sublevel set again farther "
            "out: it is not star-shaped around params, and only the near part is counted; use method='subset'"
        )
    return VolumeEstimate(
        thresholds,
        log_volume,
        std_error,
        "rays",
        "the part of the sublevel set that straight lines from params reach without leaving it (it can only be smaller than "
        "the whole), within the base measure",
        DO_NOT_TRUST if unreliable.any() or returning.max() > _MAX_RETURNING else OK,
        tuple(warnings),
        {
            "ess": ess.tolist(),
            "pareto_k": shapes.tolist(),
            "saturation": saturation.tolist(),
            "returning": returning.tolist(),
            "log_base_density_at_center": profile.log_density,
            "num_losses": count * (1 + _NUM_RADII + _NUM_HALVINGS * len(thresholds)),
        },
    )


_MAX_RETURNING = 0.01
"""Share of rays that may come back to the set before the volume is not to be trusted; any do cause a warning."""

_MIN_ESS = 100
_MAX_SHAPE = 0.7

"""Rivals of `estimate_volume`: blackjax's nested slice sampler, and the published ray estimator, restated with its defects."""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key

from slt_interp.analytic import AnalyticProblem
from slt_interp.bases import Gaussian
from slt_interp.data import Batch
from slt_interp.errors import InputError
from slt_interp.posterior import LossFn
from slt_interp.tree import Params


class PeerVolume(NamedTuple):
    """Log volumes and standard errors, NaN where there is none, and how often the loss was computed; no gradients."""

    log_volume: Float[np.ndarray, " threshold"]
    std_error: Float[np.ndarray, " threshold"]
    num_losses: int


def nested_sampling(
    key: Key[Array, ""],
    problem: AnalyticProblem,
    thresholds: Float[np.ndarray, " threshold"],
    *,
    num_live: int,
    max_losses: float,
) -> PeerVolume:
    """Run `blackjax.nss` on the likelihood exp(-L), and read the prior mass above a likelihood from its dead points.

    A tenth of the live points die at once, and max(5, 2 d) slices make a new one, as its documentation advises. The death of
    one of m points takes 1 / m from log X, with variance 1 / m^2. Ends when all live points are below the smallest threshold,
    or after `max_losses`: then thresholds that a live point is above have no number.

    References:
        Skilling (2006), Nested sampling for general Bayesian computation.
        Yallup, Kroupa and Handley (2026), arXiv:2601.23252 (the slice sampler).
    """
    from blackjax.ns.base import NSInfo
    from blackjax.ns.utils import compute_num_live

    base, center = problem.base, problem.center
    assert base is not None
    init_loss = float(problem.loss_fn(center, problem.data))
    init, advance = _nested_sampler(problem, num_live)
    init_key, run_key = jax.random.split(key)
    state = init(jax.vmap(lambda k: base.sample(k, center))(jax.random.split(init_key, num_live)), rng_key=run_key)
    dead, num_losses, step = [], num_live, 0
    while num_losses < max_losses and -float(state.particles.loglikelihood.min()) - init_loss > thresholds[0]:
        state, (died, count) = advance(state, jax.random.fold_in(run_key, step))
        dead.append(jax.device_get(died))
        num_losses, step = num_losses + int(count), step + 1
    everything = [*dead, jax.device_get(state.particles._replace(position=None))]
    particles = jax.tree.map(lambda *x: np.concatenate(x), *everything)
    num_live_at = np.asarray(compute_num_live(NSInfo(particles, update_info=particles)), np.float64)
    excess = np.sort(-np.asarray(particles.loglikelihood, np.float64))[::-1] - init_loss
    highest = -float(state.particles.loglikelihood.min()) - init_loss
    values = []
    for threshold in thresholds:
        steps = 1 / num_live_at[excess > threshold]
        values.append((-steps.sum(), np.sqrt(np.sum(steps**2))) if highest <= threshold else (np.nan, np.nan))
    log_volume, std_error = np.array(values).T
    return PeerVolume(log_volume, std_error, num_losses)


@functools.lru_cache(maxsize=1)
def _nested_sampler(problem: AnalyticProblem, num_live: int) -> tuple[Callable, Callable]:
    """Make initial states and the jitted step, once for all seeds."""
    import blackjax

    base = problem.base
    assert base is not None
    algorithm = blackjax.nss(
        logprior_fn=lambda params: -base.potential(params),
        loglikelihood_fn=lambda params: -problem.loss_fn(params, problem.data),
        num_inner_steps=max(5, 2 * problem.dimension),
        num_delete=num_live // 10,
    )

    @jax.jit
    def advance(state: Any, key: Key[Array, ""]) -> tuple[Any, tuple[Any, Array]]:
        info: Any
        state, info = algorithm.step(key, state)
        slices = info.update_info
        # Both ends of the first bracket, every end that was moved out, every point that was tried.
        num_losses = jnp.sum(2 + slices.num_expansions + slices.num_shrink)
        return state, (info.particles._replace(position=None), num_losses)

    return algorithm.init, advance


def published_rays(
    key: Key[Array, ""],
    problem: AnalyticProblem,
    threshold: float,
    *,
    num_rays: int = 1000,
    tolerance: float = 1e-2,
    max_steps: int = 100,
) -> PeerVolume:
    """Restate the published estimator: random rays from the weights, whose radii are bisected, averaged in log space.

    The base measure is N(0, sigma^2 I), wherever the weights are. The mean over rays u, uniform on the sphere, is of
    |S| int_0^R(u) r^(d-1) N(w* + r u; 0, sigma^2 I) dr, with R(u) where the loss is `threshold` above that at the weights. Of
    what is wrong with it this is kept: the radius is not the one that was accepted but half of its bracket farther on; the
    search ends for all rays at once, or after `max_steps` without a word; a loss that rises and falls along a ray is taken
    for one that rises; there is no error bar, and no sign of how few rays carry the mean. The integral is another: the
    published one approximates the logarithm of the integrand by a parabola, and refuses where that is poor, as it is in low
    dimension. The preconditioners that it may be given, one of them applied transposed, are left out.

    References:
        Scherlis and Belrose (2025), Estimating the probability of sampling a trained neural network at random,
        arXiv:2501.18812.
    """
    sigma = _sigma(problem)
    center, _ = ravel_pytree(problem.center)
    size = center.size

    place = np.asarray(center, np.float64)
    directions = np.asarray(jax.random.normal(key, (num_rays, size)), np.float64)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    init_loss = float(problem.loss_fn(problem.center, problem.data))

    def excess(radii: np.ndarray) -> np.ndarray:
        points = place + radii[:, None] * directions
        losses = _losses(problem.loss_fn, problem.center, problem.data, jnp.asarray(points, center.dtype))
        return np.asarray(losses, np.float64) - init_loss

    radii, low, high = np.ones(num_rays), np.zeros(num_rays), np.full(num_rays, np.inf)
    found, steps = excess(radii), 0
    while steps < max_steps and np.any(np.abs(found - threshold) > tolerance * threshold):
        found = excess(radii)
        low, high = np.where(found < threshold, radii, low), np.where(found > threshold, radii, high)
        radii = np.where(np.isinf(high), 2 * radii, (low + high) / 2)
        steps += 1
    estimates = _log_sphere(size) + _log_radial(directions @ place, float(place @ place), radii, sigma, size)
    value = np.logaddexp.reduce(estimates) - np.log(num_rays)
    return PeerVolume(np.array([value]), np.array([np.nan]), num_rays * (1 + steps))


@partial(jax.jit, static_argnames=("loss_fn",))
def _losses(loss_fn: LossFn, params: Params, data: Batch, points: Float[Array, "ray i"]) -> Float[Array, " ray"]:
    _, unravel = ravel_pytree(params)
    return jax.lax.map(lambda w: loss_fn(unravel(w), data), points, batch_size=100)


def _sigma(problem: AnalyticProblem) -> float:
    base = problem.base
    if not isinstance(base, Gaussian) or np.ndim(base.scale) or np.any(base.center):
        raise InputError(f"the published ray estimator knows the base measure N(0, sigma^2 I) alone, not {base}")
    return float(base.scale)


def _log_sphere(size: int) -> float:
    from scipy.special import gammaln

    return float(np.log(2) + 0.5 * size * np.log(np.pi) - gammaln(size / 2))


def _log_radial(slope: np.ndarray, square: float, radii: np.ndarray, sigma: float, size: int) -> Float[np.ndarray, " ray"]:
    """Log of int_0^R r^(d-1) N(w* + r u; 0, sigma^2 I) dr, given w*.u and |w*|^2, by Gauss-Legendre between panels in log r."""

    def log_integrand(log_r: np.ndarray) -> np.ndarray:
        r = np.exp(log_r)
        square_norm = square + 2 * slope[:, None, None] * r + r**2
        return size * log_r - square_norm / (2 * sigma**2) - 0.5 * size * np.log(2 * np.pi * sigma**2)

    # The mass ends well before this, and begins e^-40 below its peak.
    end = np.log(np.minimum(radii, np.sqrt(square) + sigma * (np.sqrt(size) + 12)))
    peak = np.log((np.sqrt(slope**2 + 4 * size * sigma**2) - slope) / 2)
    begin = np.minimum(end, peak) - 60 / size - 1.5
    edges = begin[:, None] + (end - begin)[:, None] * np.linspace(0, 1, _NUM_PANELS + 1)
    nodes, weights = np.polynomial.legendre.leggauss(16)
    half = np.diff(edges)[..., None] / 2
    at = edges[:, :-1, None] + half * (1 + nodes)
    return np.logaddexp.reduce((log_integrand(at) + np.log(half * weights)).reshape(len(radii), -1), axis=1)


_NUM_PANELS = 48

"""Settings that can be derived: nbeta, the window of localizations, and SGLD's step size from the curvature that is met."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key

from slt_interp.curvature.operators import hvp
from slt_interp.curvature.spectrum import Spectrum
from slt_interp.data import Batch
from slt_interp.errors import InputError
from slt_interp.posterior import LocalPosterior
from slt_interp.samplers.chains import sample
from slt_interp.samplers.sgld import SGLD
from slt_interp.tree import Params, Real, dot, norm, normal_like


def customary_nbeta(num_examples: int | None) -> float:
    """Return n / log n, the inverse temperature of WBIC (Watanabe 2013), with n the size of the whole dataset.

    >>> round(customary_nbeta(1000), 2)
    144.76
    """
    if num_examples is None or num_examples < 3:
        raise InputError(
            f"nbeta has no default with {num_examples or 'no'} examples: give nbeta, the number of examples times the "
            "inverse temperature"
        )
    return num_examples / float(np.log(num_examples))


class Window(NamedTuple):
    """Localizations between which an LLC is both local and nearly unbiased.

    Attributes:
        lowest: below it flat directions spread further than 0.3 times the norm of the weights; NaN for weights of norm 0.
        highest: above it the localization takes more than 2 % from what curvature resolves; infinite if it resolves nothing.
        localization: the lowest, or a tenth of the highest where curvature resolves every direction; 1, in units of the
            weights, where all of these are zero.
        note: why there is no window, in words; None if there is one.
    """

    lowest: float
    highest: float
    localization: float
    note: str | None


def local_window(spectrum: Spectrum, nbeta: float, center_norm: float) -> Window:
    """Find the localizations at which an LLC estimate is about the neighborhood of the weights and hardly biased.

    With k = nbeta h, curvature resolves the directions with k > 1 and h above ten times its Lanczos residual. `highest` is the
    largest gamma with sum gamma / (k + gamma) <= 2 % of sum k / (k + gamma) over these; `lowest` is where the others, flat,
    spread by 0.3 |w*| together: their number over (0.3 |w*|)^2.
    """
    k, weights, is_resolved = _resolved(spectrum, nbeta)
    gammas = np.geomspace(1e-9, 1e15, 2401)[:, None]
    taken = np.sum(np.where(is_resolved, weights * gammas / (k + gammas), 0.0), axis=1)
    left = np.sum(np.where(is_resolved, weights * k / (k + gammas), 0.0), axis=1)
    highest = float(gammas[taken <= 0.02 * left].max(initial=gammas[0, 0])) if is_resolved.any() else np.inf
    if center_norm == 0:
        note = "the weights are all zero and set no scale: the localization is 1 in their units; give one that fits the problem"
        return Window(np.nan, highest, 1.0, note)
    num_flat = float(np.sum(weights[~is_resolved]))
    lowest = num_flat / (0.3 * center_norm) ** 2
    if lowest <= highest:
        # Where curvature resolves every direction nothing asks for a weak localization, and a stronger one bars other minima.
        return Window(lowest, highest, max(lowest, highest / 10) if num_flat < 0.5 else lowest, None)
    note = (
        f"there is no local window at this nbeta: a localization of {lowest:.3g} or more keeps the chains near the weights, "
        f"one of {highest:.3g} or less leaves the estimate as it is; {lowest:.3g} was taken, and a larger nbeta would open it"
    )
    return Window(lowest, highest, lowest, note)


def resolved_localization_effect(spectrum: Spectrum, nbeta: float, localization: float) -> tuple[float, float]:
    """Predict what the localization does to E[nbeta (L - L*)] in the directions that curvature resolves.

    Returns:
        The bias, -1/2 sum gamma / (k + gamma), and the slope in log gamma, -1/2 sum k gamma / (k + gamma)^2.
    """
    k, weights, is_resolved = _resolved(spectrum, nbeta)
    k, weights = k[is_resolved], weights[is_resolved]
    ratio = localization / (k + localization)
    return float(-0.5 * np.sum(weights * ratio)), float(-0.5 * np.sum(weights * ratio * (1 - ratio)))


def settled_step_size(
    key: Key[Array, ""],
    target: LocalPosterior,
    params: Params,
    batches: Callable[[Key[Array, ""]], Batch],
    *,
    tolerance: float = 0.01,
) -> float:
    """Choose SGLD's step_size so that discretization adds about `tolerance` times the estimate, and chains are stable.

    On a quadratic loss the step adds (step_size / 8) nbeta tr H to E[nbeta (L - L*)], and chains diverge beyond
    4 / (nbeta h + gamma), h the largest curvature. Both are measured where chains live, not only at the center, where at
    a singular point they may vanish: first at points of the base measure, drawn in until nbeta (L - L*) there is at
    most the dimension, then twice at the ends of short chains that run with the step so far. Steps stay below half the
    limit of stability. Minibatch noise is not allowed for.
    """
    batch_key, point_key, *keys = jax.random.split(key, 2 + 1 + 2 * _PILOT_ROUNDS)
    batch = batches(batch_key)
    points = _draw_in(target, target.position(params), point_key, batch)
    step_size = _largest_step(keys[0], target, params, points, batch, tolerance)
    for chain_key, curvature_key in zip(keys[1::2], keys[2::2], strict=True):
        pilot = sample(
            chain_key,
            SGLD(target, step_size),
            params,
            batches,
            num_chains=_PILOT_CHAINS,
            num_draws=1,
            thinning=_PILOT_STEPS,
            num_burnin=_PILOT_STEPS,
            progress=False,
        )
        step_size = _largest_step(curvature_key, target, params, pilot.state.params, batch, tolerance)
    return step_size


def predicted_step_bias(key: Key[Array, ""], target: LocalPosterior, step_size: Real, points: Params, batch: Batch) -> float:
    """Predict what SGLD's step_size adds to E[nbeta (L - L*)]: (step_size / 8) nbeta tr H, the first order of its exact law.

    What minibatch noise adds is not in it; see `predicted_noise_bias`.

    Args:
        key: for the trace estimate.
        target: what was sampled.
        step_size: the kernel's.
        points: draws, (chain, ...), over which the trace is averaged.
        batch: examples on which curvature is measured.
    """
    traces = _measure_curvature(key, target, points, batch)[2]
    return float(step_size) * float(target.nbeta) * float(jnp.mean(traces)) / 8


def predicted_noise_bias(
    key: Key[Array, ""],
    target: LocalPosterior,
    step_size: Real,
    points: Params,
    batches: Callable[[Key[Array, ""]], Batch],
) -> float:
    """Predict what minibatch noise of covariance V adds to E[nbeta (L - L*)]: (step_size / 8) tr V, or less.

    To first order it is (step_size / 8) sum_i v_i nbeta h_i / (nbeta h_i + gamma): tr V counts flat directions in full.

    Args:
        key: for 8 batches, on which the gradient of the potential is compared.
        target: what was sampled, with its control variate if there is one.
        step_size: the kernel's.
        points: draws, (chain, ...), over which V is averaged.
        batches: what the kernel saw.
    """
    return float(step_size) * float(_minibatch_noise(key, target, points, batches)) / 8


def _resolved(spectrum: Spectrum, nbeta: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return k = nbeta h, how many directions each stands for, and whether curvature resolves them."""
    values = np.maximum(spectrum.ritz_values, 0.0)
    is_resolved = (nbeta * values > 1) & (values > 10 * spectrum.residuals)
    return (nbeta * values).ravel(), (spectrum.weights / len(values)).ravel(), is_resolved.ravel()


_PILOT_ROUNDS, _PILOT_CHAINS, _PILOT_STEPS = 2, 4, 100

_POWER_ITERATIONS, _TRACE_PROBES, _NOISE_BATCHES = 12, 4, 8

_MAX_HALVINGS = 40


def _draw_in(target: LocalPosterior, center: Params, key: Key[Array, ""], batch: Batch) -> Params:
    """Draw points from the base measure in toward the center until their mean energy is at most the dimension."""
    keys = jax.random.split(key, _PILOT_CHAINS)
    drawn = jax.vmap(lambda k: target.restrict(target.displacement(target.base.sample(k, center))))(keys)
    highest = float(_losses(target, jax.tree.map(lambda w: w[None], center), batch)[0])
    highest += float(target.dimension()) / float(target.nbeta)
    points = center
    for halvings in range(_MAX_HALVINGS):
        points = jax.tree.map(lambda w, x, scale=0.5**halvings: w + scale * x, center, drawn)
        if float(jnp.mean(_losses(target, points, batch))) <= highest:
            break
    return points


@jax.jit
def _losses(target: LocalPosterior, points: Params, batch: Batch) -> Float[Array, " point"]:
    return jax.lax.map(lambda point: target.loss(point, batch), points)


def _largest_step(
    key: Key[Array, ""], target: LocalPosterior, params: Params, points: Params, batch: Batch, tolerance: float
) -> float:
    around = jax.tree.map(lambda w, x: jnp.concatenate([w[None], x]), params, points)
    measured = _measure_curvature(key, target, around, batch)
    losses, curvatures, traces = (np.asarray(x, np.float64) for x in measured)
    usable = np.isfinite(losses) & np.isfinite(curvatures) & np.isfinite(traces)
    if not usable[0]:
        raise InputError("the loss or its curvature is not finite at params: check loss_fn there, on one batch")
    away = usable[1:]
    if not away.any():
        away, losses, curvatures, traces = np.ones(1, bool), *(np.repeat(x[:1], 2) for x in (losses, curvatures, traces))
    nbeta = float(target.nbeta)
    # On one batch, so that its noise drops out of the difference.
    energy = nbeta * float(losses[1:][away].mean() - losses[0])
    precisions = target.restrict(jax.tree.map(lambda v: 1 / v, target.base.variance(target.position(params))))
    stiffness = max(float(jnp.max(x)) for x in jax.tree.leaves(precisions))
    stiffest = nbeta * max(curvatures[0], curvatures[1:][away].mean()) + stiffness
    added_per_step = nbeta * max(traces[0], traces[1:][away].mean()) / 8
    if energy <= 0 or added_per_step <= 0:
        # Nothing to weigh the bias against: keep it to the tolerance in the stiffest direction.
        return 4 * tolerance / stiffest
    return min(2.0 / stiffest, tolerance * energy / added_per_step)


@jax.jit
def _minibatch_noise(
    key: Key[Array, ""], target: LocalPosterior, points: Params, batches: Callable[[Key[Array, ""]], Batch]
) -> Float[Array, ""]:
    """Mean over points of the trace of the covariance that minibatches give the gradient of the potential."""

    def one(point: Params) -> Array:
        keys = jax.random.split(key, _NOISE_BATCHES)
        gradients = jax.lax.map(lambda key: target.value_and_grad(point, batches(key))[1], keys)
        return jnp.sum(jnp.var(jax.vmap(lambda g: ravel_pytree(g)[0])(gradients), axis=0, ddof=1))

    return jnp.mean(jax.lax.map(one, points))


@jax.jit
def _measure_curvature(
    key: Key[Array, ""], target: LocalPosterior, points: Params, batch: Batch
) -> tuple[Float[Array, " point"], Float[Array, " point"], Float[Array, " point"]]:
    """Loss, largest absolute Hessian eigenvalue and trace (Hutchinson's estimate) of the loss at each point.

    Over the sampled coordinates only. The eigenvalue is a power iteration's, a lower bound.
    """

    def one(arguments: tuple[Key[Array, ""], Params]) -> tuple[Array, Array, Array]:
        key, point = arguments
        start_key, trace_key = jax.random.split(key)

        def product(vector: Params) -> Params:
            return target.restrict(hvp(target.loss, point, batch, vector))

        def iterate(_: int, carry: tuple[Params, Array]) -> tuple[Params, Array]:
            image = product(carry[0])
            size = norm(image)
            return jax.tree.map(lambda x: (x / jnp.where(size > 0, size, 1.0)).astype(x.dtype), image), size

        def probe(key: Key[Array, ""]) -> Array:
            z = target.restrict(normal_like(key, point))
            return dot(z, product(z)) / dot(z, z) * jnp.asarray(target.dimension())

        start = target.restrict(normal_like(start_key, point))
        start = jax.tree.map(lambda x: (x / norm(start)).astype(x.dtype), start)
        largest = jax.lax.fori_loop(0, _POWER_ITERATIONS, iterate, (start, jnp.zeros(())))[1]
        trace = jnp.mean(jax.lax.map(probe, jax.random.split(trace_key, _TRACE_PROBES)))
        return target.loss(point, batch), largest, trace

    return jax.lax.map(one, (jax.random.split(key, jax.tree.leaves(points)[0].shape[0]), points))

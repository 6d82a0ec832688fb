"""What the Metropolis kernels share: the leapfrog step, its energy error, and how step and metric adapt.

Coordinates are scaled by sigma, one number each: w moves by sigma times the momentum, and the momentum is standard normal; a
`Whitening` also knows directions.
During warm-up sigma_i^2 = min(base variance, 1 / mean (dU/dw_i)^2). By Stein's identity E[(dU/dw_i)^2] is the mean curvature
of U in that direction, so this works where the Hessian at the center is zero; the mean favors recent steps, so that the
way from the center is forgotten. The step size follows the acceptance probability by dual averaging (numpyro's).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, Key

from slt_interp.data import Batch
from slt_interp.posterior import LocalPosterior
from slt_interp.tree import Params, Real, dimension, dot


class Whitening(NamedTuple):
    """A metric that knows directions: r moves w by sigma (1 + sum_k factors_k u_k u_k^T) r, u_k unit vectors.

    Attributes:
        scale: sigma, like the weights.
        directions: the u_k, orthonormal, each the flattened weights long.
        factors: by how much each direction is stretched, less 1.
    """

    scale: Params
    directions: Float[Array, "direction dimension"]
    factors: Float[Array, " direction"]


class Adaptation(NamedTuple):
    """What warm-up has learned so far: steps, mean squared gradients, and numpyro's state of dual averaging."""

    num_steps: Int[Array, ""]
    squares: Params
    averaging: tuple


class MetropolisState(NamedTuple):
    """Position of a chain with loss and gradient there, the leapfrog step and the metric in use, and what adapts them.

    The metric is None where the kernel itself has one.
    """

    params: Params
    loss: Float[Array, ""]
    gradient: Params
    step_size: Float[Array, ""]
    scale: Params | None
    adaptation: Adaptation


class Point(NamedTuple):
    """A point of a trajectory."""

    params: Params
    momentum: Params
    loss: Float[Array, ""]
    gradient: Params


def start(
    target: LocalPosterior, params: Params, batch: Batch, step_size: Real, *, has_metric: bool = False
) -> MetropolisState:
    """Start a chain at `params`, in float32 or better, with a leapfrog step as given; sigma is 1 if the kernel has none."""
    position = target.position(params)
    loss, gradient = target.value_and_grad(position, batch)
    step_size = jnp.asarray(step_size, loss.dtype)
    log_step, scale = jnp.log(step_size), None
    if not has_metric:
        # The first sigma of a warm-up is the base measure's, and the first step in weights the one that was given.
        logs = jax.tree.map(lambda v: jnp.sum(jnp.log(v)) / 2, target.base.variance(position))
        log_step = log_step - sum(jax.tree.leaves(logs)) / dimension(position)
        scale = jax.tree.map(jnp.ones_like, position)
    _, _, *rest = _dual_averaging()[0](log_step + jnp.log(10.0))
    squares = jax.tree.map(jnp.zeros_like, position)
    adaptation = Adaptation(jnp.zeros((), int), squares, (log_step, log_step, *rest))
    return MetropolisState(position, loss, gradient, step_size, scale, adaptation)


def trial(target: LocalPosterior, state: MetropolisState) -> MetropolisState:
    """Put the step and the metric in use that warm-up tries next; a kernel's own metric stays."""
    state = state._replace(step_size=jnp.exp(state.adaptation.averaging[0]))
    if state.scale is None:
        return state
    return state._replace(scale=learned_scale(target, state.params, state.adaptation.squares))


@jax.jit
def learned_scale(target: LocalPosterior, params: Params, squares: Params) -> Params:
    """Turn mean squared gradients into sigma."""
    return jax.tree.map(lambda v, g: jnp.sqrt(1 / jnp.maximum(1 / v, g)), target.base.variance(params), squares)


@jax.jit
def balanced_scale(target: LocalPosterior, params: Params, squares: Params, places: Params) -> tuple[Params, Float[Array, ""]]:
    """Find one number per coordinate where directions are not known: sigma neither as narrow nor as long as a bent valley.

    Mean squared gradients tell how narrow it is in a coordinate, which may be long there, too: with sigma of `learned_scale`
    chains hardly move along. Sigma squared is the geometric mean of that and of the squared distance from the weights, averaged
    over each array (few chains do not tell it of a coordinate; in nutpie variances of many draws do). Where coordinates of one
    array are independent and differ in width, sigma is too long for the narrow ones, and the step shorter for it.

    Args:
        target: the posterior.
        params: the trained weights.
        squares: mean squared gradients of the potential, like the weights.
        places: where chains are, (chain, ...).

    Returns:
        sigma, and the factor by which the step of `learned_scale` changes: the variance of a short trajectory's energy error is
        as the sum of (step^2 sigma^2 curvature)^3, which is cautious for longer ones.

    References:
        Seyboldt, Carlson and Carpenter (2026): the diagonal metric of least Fisher divergence, for nutpie.
    """
    width, narrow = target.base.variance(params), learned_scale(target, params, squares)
    spread = jax.tree.map(lambda w, c, v: jnp.minimum(jnp.mean((w - c) ** 2 / v), 1.0), places, params, width)
    sigma = jax.tree.map(lambda s, r, v: jnp.sqrt(s * jnp.maximum(s, jnp.sqrt(r * v))), narrow, spread, width)
    ratios = jax.tree.leaves(jax.tree.map(jnp.divide, sigma, narrow))
    # In units of the largest, whose sixth power may be too large a number for float32.
    largest = jnp.max(jnp.stack([jnp.max(ratio) for ratio in ratios]))
    return sigma, (sum(jnp.sum((ratio / largest) ** 6) for ratio in ratios) / dimension(params)) ** (-1 / 6) / largest


def learn(
    state: MetropolisState,
    acceptance: Float[Array, ""] | None,
    target_acceptance: Real,
    squares: Params,
    use: Bool[Array, ""],
) -> MetropolisState:
    """Learn from one transition, and put the averaged step size in use.

    Args:
        state: after the transition.
        acceptance: the transition's acceptance probability.
        target_acceptance: what it should be on average.
        squares: squared gradient components, averaged over the transition.
        use: whether the step size may learn from it.
    """
    adaptation = state.adaptation
    num_steps = adaptation.num_steps + 1
    # Weights grow with the step's number.
    rate = 2 / (num_steps + 1)
    mean = jax.tree.map(lambda m, g: (m + rate * (g - m)).astype(m.dtype), adaptation.squares, squares)
    updated = _dual_averaging()[1](target_acceptance - jnp.asarray(acceptance), adaptation.averaging)
    averaging = jax.tree.map(
        lambda new, old: jnp.where(use, new, old).astype(jnp.result_type(old)), updated, adaptation.averaging
    )
    return state._replace(step_size=jnp.exp(averaging[1]), adaptation=Adaptation(num_steps, mean, averaging))


def mixed_step(key: Key[Array, ""], step_size: Float[Array, ""]) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    """Draw the step of one transition: half to all of the given one, or, for a quarter of them, down to 3 % of it; say which.

    Thin arms of a singular set are entered by small steps only, which the average acceptance does not show.
    """
    is_whole, smaller = jax.random.uniform(key, (2,))
    is_whole = is_whole < _WHOLE_STEPS
    return step_size * jnp.where(is_whole, 1 - smaller / 2, jnp.exp(-_SMALLEST_STEP * smaller)), is_whole


@jax.jit
def learned_metric(target: LocalPosterior, params: Params, gradients: Params) -> tuple[Whitening, Float[Array, ""]]:
    """Turn a sample of gradients (sample, ...) into a metric, as `whitening` does, with the scale of their mean squares."""
    scale = learned_scale(target, params, jax.tree.map(lambda g: jnp.mean(g**2, axis=0), gradients))
    return whitening(scale, gradients, jax.tree.map(jnp.sqrt, target.base.variance(params)))


def needs_directions(metric: Whitening) -> bool:
    """Whether some direction is stretched by more than a factor of 2 either way: less is not worth its products."""
    return bool(np.any(np.abs(np.log1p(metric.factors)) > np.log(2.0)))


def whitening(scale: Params, gradients: Params, longest: Params) -> tuple[Whitening, Float[Array, ""]]:
    """Find the metric in which U's gradients are uncorrelated, so that U has curvature 1 in every direction on average.

    E[g g^T] is the mean Hessian of U. Its eigenvectors, in units of sigma, are stretched by eigenvalue^(-1/2); what the sample
    is too small to tell apart from 1 is left alone, and no direction is stretched beyond the base measure.

    Args:
        scale: sigma.
        gradients: of the potential, (sample, ...); there are as many directions as samples, or as coordinates if fewer.
        longest: the width of the base measure, like the weights.

    Returns:
        The metric, and the factor by which it allows a longer step.
    """
    samples = jax.vmap(lambda g: ravel_pytree(jax.tree.map(jnp.multiply, scale, g))[0])(gradients)
    count, dimension = samples.shape
    _, singular, directions = jnp.linalg.svd(samples / jnp.sqrt(count), full_matrices=False)
    values = singular**2
    share = ravel_pytree(jax.tree.map(jnp.divide, scale, longest))[0]
    widest = 1 / jnp.linalg.norm(directions * share, axis=1)
    stretch = jnp.minimum(1 / jnp.sqrt(jnp.maximum(values, jnp.finfo(values.dtype).tiny)), widest)
    # So far eigenvalues of a sample covariance scatter, and the outermost a little further.
    scatter = jnp.sqrt(dimension / count)
    low, high = jnp.maximum(1 - scatter, 0.0) ** 2 / 1.2, 1.2 * (1 + scatter) ** 2
    is_known = (values > high) | (values < low)
    # The stiffest direction has limited the step so far.
    allowed = jnp.sqrt(jnp.maximum(jnp.max(values) / high, 1.0))
    return Whitening(scale, directions, jnp.where(is_known, stretch - 1, 0.0)), allowed


def leapfrog(
    target: LocalPosterior, scale: Params | Whitening, point: Point, time_step: Float[Array, ""], batch: Batch
) -> Point:
    """Make one leapfrog step, with one gradient."""

    def kick(momentum: Params, gradient: Params) -> Params:
        return jax.tree.map(lambda r, f: r - (time_step / 2) * f, momentum, apply_metric(target, scale, gradient))

    momentum = kick(point.momentum, point.gradient)
    velocity = _stretch(target, scale, momentum)
    sigma = scale.scale if isinstance(scale, Whitening) else scale
    moved = jax.tree.map(lambda w, r, s: (w + time_step * s * r).astype(w.dtype), point.params, velocity, sigma)
    params = target.hold(moved, point.params)
    loss, gradient = target.value_and_grad(params, batch)
    return Point(params, kick(momentum, gradient), loss, gradient)


def apply_metric(target: LocalPosterior, scale: Params | Whitening, gradient: Params) -> Params:
    """Turn a gradient in the weights into one in the coordinates of the momentum."""
    sigma = scale.scale if isinstance(scale, Whitening) else scale
    return _stretch(target, scale, jax.tree.map(jnp.multiply, sigma, gradient))


def energy_error(target: LocalPosterior, first: Point, last: Point) -> Float[Array, ""]:
    """Subtract the total energy of one point from another's; infinite where it cannot be computed.

    The losses are subtracted first: nbeta times a loss is too large a number for float32.
    """
    kinetic = (dot(last.momentum, last.momentum) - dot(first.momentum, first.momentum)) / 2
    base = target.base.potential(last.params) - target.base.potential(first.params)
    error = target.nbeta * (last.loss - first.loss) + base + kinetic
    return jnp.where(jnp.isnan(error), jnp.inf, error)


def select(condition: Bool[Array, ""], yes: Point, no: Point) -> Point:
    """Take one of two points."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def blend(mean: Any, here: Any, there: Any, fraction: Float[Array, ""]) -> Any:
    """Move averages by a fraction of the way from here to there; what has no weight may be non-finite. `is_finite` stays."""
    return jax.tree.map(
        lambda m, a, b: m if m.dtype == bool else jnp.where(fraction > 0, m + fraction * (b - a), m), mean, here, there
    )


_WHOLE_STEPS, _SMALLEST_STEP = 0.75, 3.5


def _stretch(target: LocalPosterior, scale: Params | Whitening, vector: Params) -> Params:
    if not isinstance(scale, Whitening):
        return vector
    flat, unravel = ravel_pytree(vector)
    # Restricted, the map stays symmetric among the sampled coordinates, whatever the directions.
    return target.restrict(unravel(flat + scale.directions.T @ (scale.factors * (scale.directions @ flat))))


def _dual_averaging() -> tuple:
    from numpyro.infer.hmc_util import dual_averaging

    return dual_averaging()

"""What energies are counted from: the lowest loss near the weights, which training rarely reaches.

In d dimensions draws at nbeta lie about d / (2 nbeta) above their minimum, and none of them shows how low it is; gradients do.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from slt_interp.bases import Ball, Box
from slt_interp.data import Batch, mean_over_blocks
from slt_interp.posterior import LocalPosterior
from slt_interp.tree import Params, broadcast, dot


class Descent(NamedTuple):
    """Where a descent from the weights ended.

    Attributes:
        loss: nats per example; infinite if there was no descent.
        unfinished: by how much nbeta L still fell in the last quarter of its steps, nats, where all were used up; 0 where its
            line search found nothing lower before.
        num_gradients: that it took.
    """

    loss: float = np.inf
    unfinished: float = 0.0
    num_gradients: int = 0


NO_DESCENT = Descent()


def descend(target: LocalPosterior, params: Params, data: Batch, block_size: int | None = None) -> Descent:
    """Go from the weights down to the mode of the coldest rung, `target`.

    The mode of exp(-nbeta L) base(w) rather than the minimum of L, which may be outside the base measure, or at infinity. At
    most `_MAX_STEPS` steps of L-BFGS. The loss is computed in blocks of `block_size` examples, or of all.

    >>> target = LocalPosterior(lambda w, batch: jnp.sum((w - 1.0) ** 2), jnp.zeros(3), nbeta=1e6, localization=1.0)
    >>> descend(target, jnp.zeros(3), None).loss < 1e-6
    True
    """
    from scipy.optimize import OptimizeResult, minimize

    base, position = target.base, target.position(params)
    place = _to_space(base, position) if isinstance(base, Ball) else position
    start, unravel = ravel_pytree(place)
    bounds = None
    if isinstance(base, Box):
        low, high = (ravel_pytree(_filled(wall, position))[0] for wall in (base.low, base.high))
        bounds = np.stack([low, high], axis=1).astype(np.float64)
    nbeta = float(np.asarray(target.nbeta))

    def read(flat: np.ndarray) -> tuple[float, float, np.ndarray]:
        loss, mass, gradient = _evaluate(target, unravel(jnp.asarray(flat, start.dtype)), data, block_size=block_size)
        return float(loss), float(mass), np.asarray(ravel_pytree(gradient)[0], np.float64)

    first, first_mass, _ = read(np.asarray(start))

    def potential(flat: np.ndarray) -> tuple[float, np.ndarray]:
        loss, mass, gradient = read(flat)
        value = nbeta * (loss - first) + mass - first_mass
        if np.isfinite(value) and np.isfinite(gradient).all():
            return value, gradient
        # Above all that a descent accepts, and finite: a line search interpolates, and turns back.
        return 1.0, np.zeros_like(gradient)

    way: list[float] = []

    def note(intermediate_result: OptimizeResult) -> None:
        way.append(float(intermediate_result.fun))

    options = {"maxiter": _MAX_STEPS, "maxfun": 2 * _MAX_STEPS, "ftol": 0.0}
    begin = np.asarray(start, np.float64)
    found = minimize(potential, begin, jac=True, method="L-BFGS-B", bounds=bounds, callback=note, options=options)
    is_cut_short = found.status == 1
    return Descent(read(found.x)[0], way[-1 - len(way) // 4] - way[-1] if is_cut_short else 0.0, found.nfev + 2)


_MAX_STEPS = 200
_INSIDE, _NEAREST = 1 - 1e-6, 0.99
"""Of a ball's radius: what rounding leaves inside, and the nearest to the wall at which a descent begins."""


@partial(jax.jit, static_argnames="block_size")
def _evaluate(
    target: LocalPosterior, place: Params, data: Batch, *, block_size: int | None
) -> tuple[Float[Array, ""], Float[Array, ""], Params]:
    """Evaluate the loss, the base measure's potential, and the gradient of the whole."""
    params, back = place, None
    if isinstance(target.base, Ball):
        params, back = jax.vjp(partial(_to_ball, target.base), place)
    loss, gradient = mean_over_blocks(partial(jax.value_and_grad(target.loss), params), data, block_size)
    gradient = target.potential_gradient(params, gradient)
    return loss, target.base.potential(params), gradient if back is None else back(gradient)[0]


def _to_ball(ball: Ball, place: Params) -> Params:
    """Wrap all of space into a ball, so that a descent needs no wall: its distances are the sines of those outside."""
    center, radius = _filled(ball.center, place), _filled(ball.radius, place)
    # The derivative of a root at 0 is infinite.
    distance = jnp.sqrt(dot(place, place) + 1e-30)
    size = _INSIDE * jnp.sin(distance) / distance
    return jax.tree.map(lambda x, c, r: c + r * size * x, place, center, radius)


def _to_space(ball: Ball, params: Params) -> Params:
    center, radius = _filled(ball.center, params), _filled(ball.radius, params)
    place = jax.tree.map(lambda w, c, r: (w - c) / r, params, center, radius)
    height = jnp.sqrt(dot(place, place) + 1e-30)
    # On the wall itself no direction leads inward.
    return jax.tree.map(lambda x: x * jnp.arcsin(jnp.minimum(height, _NEAREST)) / height, place)


def _filled(values: Params, like: Params) -> Params:
    return jax.tree.map(lambda w, x: jnp.broadcast_to(jnp.asarray(x, w.dtype), w.shape), like, broadcast(values, like))

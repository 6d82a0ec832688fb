"""What energies are counted from: the lowest loss near the weights, which training rarely reaches.

In d dimensions draws at nbeta lie about d / (2 nbeta) above their minimum, and none of them shows how low it is; gradients do.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from slt_interp.data import Batch, mean_over_blocks
from slt_interp.posterior import LocalPosterior
from slt_interp.tree import Params


def nearby_loss(target: LocalPosterior, params: Params, data: Batch, block_size: int | None = None) -> float:
    """Find the lowest loss on a descent from the weights, nats per example, by L-BFGS with at most `_MAX_STEPS` steps.

    Weights outside the base measure do not count. The loss is computed in blocks of `block_size` examples, or of all.

    >>> target = LocalPosterior(lambda w, batch: jnp.sum((w - 1.0) ** 2), jnp.zeros(3), 1.0, 1.0)
    >>> nearby_loss(target, jnp.zeros(3), None) < 1e-6
    True
    """
    from scipy.optimize import minimize

    start, unravel = ravel_pytree(target.position(params))
    losses = []

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = unravel(jnp.asarray(flat, start.dtype))
        loss, gradient, is_inside = _descent(target, weights, data, block_size=block_size)
        if is_inside and np.isfinite(loss):
            losses.append(float(loss))
        # A line search turns back from where the loss cannot be computed.
        return float(np.nan_to_num(loss, nan=np.inf)), np.nan_to_num(np.asarray(ravel_pytree(gradient)[0], np.float64))

    minimize(
        objective, np.asarray(start, np.float64), jac=True, method="L-BFGS-B", options={"maxiter": _MAX_STEPS, "ftol": 0.0}
    )
    return min(losses, default=np.inf)


_MAX_STEPS = 200


@partial(jax.jit, static_argnames="block_size")
def _descent(
    target: LocalPosterior, params: Params, data: Batch, *, block_size: int | None
) -> tuple[Float[Array, ""], Params, Array]:
    loss, gradient = mean_over_blocks(partial(jax.value_and_grad(target.loss), params), data, block_size)
    return loss, gradient, jnp.isfinite(target.base.potential(params))

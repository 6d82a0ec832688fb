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
    """Find the loss at the mode of the coldest rung, `target`, by a descent from the weights, nats per example.

    The mode of exp(-nbeta L) base(w) rather than the minimum of L, which may be outside the base measure, or at infinity. At
    most `_MAX_STEPS` steps of L-BFGS. The loss is computed in blocks of `block_size` examples, or of all.

    >>> target = LocalPosterior(lambda w, batch: jnp.sum((w - 1.0) ** 2), jnp.zeros(3), nbeta=1e6, localization=1.0)
    >>> nearby_loss(target, jnp.zeros(3), None) < 1e-6
    True
    """
    from scipy.optimize import minimize

    start, unravel = ravel_pytree(target.position(params))
    nbeta = float(np.asarray(target.nbeta))

    def read(flat: np.ndarray) -> tuple[float, float, Params]:
        loss, base, gradient = _descent(target, unravel(jnp.asarray(flat, start.dtype)), data, block_size=block_size)
        return float(loss), float(base), gradient

    first, _, _ = read(np.asarray(start))

    def potential(flat: np.ndarray) -> tuple[float, np.ndarray]:
        loss, base, gradient = read(flat)
        # A line search turns back from where the loss cannot be computed.
        value = float(np.nan_to_num(nbeta * (loss - first) + base, nan=np.inf))
        return value, np.nan_to_num(np.asarray(ravel_pytree(gradient)[0], np.float64))

    options = {"maxiter": _MAX_STEPS, "ftol": 0.0}
    found = minimize(potential, np.asarray(start, np.float64), jac=True, method="L-BFGS-B", options=options)
    loss, base, _ = read(found.x)
    return loss if np.isfinite(loss + base) else np.inf


_MAX_STEPS = 200


@partial(jax.jit, static_argnames="block_size")
def _descent(
    target: LocalPosterior, params: Params, data: Batch, *, block_size: int | None
) -> tuple[Float[Array, ""], Float[Array, ""], Params]:
    """Evaluate the loss, the base measure's potential, and the gradient of the whole."""
    loss, gradient = mean_over_blocks(partial(jax.value_and_grad(target.loss), params), data, block_size)
    return loss, target.base.potential(params), target.potential_gradient(params, gradient)

"""Products with curvature matrices of a loss, on pytrees."""

import jax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from slt_interp.data import Batch
from slt_interp.posterior import LossFn
from slt_interp.tree import Params


def hvp(loss_fn: LossFn, params: Params, batch: Batch, vector: Params) -> Params:
    """Multiply the Hessian of the loss by a vector, forward over reverse: about the cost of two gradients.

    >>> import jax.numpy as jnp
    >>> hvp(lambda w, batch: jnp.sum(w**3), jnp.array([1.0, 2.0]), None, jnp.array([1.0, 1.0])).tolist()
    [6.0, 12.0]
    """
    return jax.jvp(lambda w: jax.grad(loss_fn)(w, batch), (params,), (vector,))[1]


def flat_hvp(loss_fn: LossFn, params: Params, batch: Batch) -> tuple:
    """Make the Hessian-vector product on flat vectors.

    Returns:
        A function `(vector, params, batch) -> vector` without captured arrays, and the flat parameters.
    """
    flat, unravel = ravel_pytree(params)

    def matvec(vector: Float[Array, " i"], flat: Float[Array, " i"], batch: Batch) -> Float[Array, " i"]:
        product = hvp(loss_fn, unravel(flat), batch, unravel(vector))
        return ravel_pytree(product)[0]

    return matvec, flat

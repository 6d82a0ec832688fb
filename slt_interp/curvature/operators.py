"""Products with curvature matrices of a loss, on pytrees.

Data that are sharded over devices stay so where they go through the loss at once: a loss that is a mean over examples needs
nothing else to run on all devices. Blocks of examples are gathered on each.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from slt_interp.data import Batch, mean_over_blocks
from slt_interp.posterior import LossFn
from slt_interp.tree import Params


def hvp(loss_fn: LossFn, params: Params, batch: Batch, vector: Params, *, block_size: int | None = None) -> Params:
    """Multiply the Hessian of the loss by a vector, forward over reverse: about the cost of two gradients.

    Args:
        loss_fn: `(params, batch) -> scalar`, a mean over examples.
        params: where, any pytree.
        batch: examples, or None.
        vector: a pytree like params.
        block_size: examples that go through the loss at once, all by default; memory is that of one block.

    >>> import jax.numpy as jnp
    >>> hvp(lambda w, batch: jnp.sum(w**3), jnp.array([1.0, 2.0]), None, jnp.array([1.0, 1.0])).tolist()
    [6.0, 12.0]
    """

    def product(block: Batch) -> Params:
        return jax.jvp(lambda w: jax.grad(loss_fn)(w, block), (params,), (vector,))[1]

    return mean_over_blocks(product, batch, block_size)


def gauss_newton_product(
    apply: Callable[[Params, Any], Array],
    output_loss: Callable[[Array, Any], Float[Array, ""]],
    params: Params,
    batch: Batch,
    vector: Params,
    *,
    block_size: int | None = None,
) -> Params:
    """Multiply the generalized Gauss-Newton matrix J' H_out J by a vector; it has no negative eigenvalue if H_out has none.

    Args:
        apply: `(params, batch) -> outputs`, the network.
        output_loss: `(outputs, batch) -> scalar`, a mean over examples.
        params: where, any pytree.
        batch: examples, or None.
        vector: a pytree like params.
        block_size: examples that go through the network at once, all by default.

    References:
        Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient descent.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[1.0, 2.0]])
    >>> def output_loss(y, x): return jnp.mean(y**2) / 2
    >>> gauss_newton_product(lambda w, x: x @ w, output_loss, jnp.zeros(2), x, jnp.array([1.0, 0.0])).tolist()
    [1.0, 2.0]
    """

    def product(block: Batch) -> Params:
        outputs, pushed = jax.jvp(lambda w: apply(w, block), (params,), (vector,))
        bent = jax.jvp(lambda y: jax.grad(output_loss)(y, block), (outputs,), (pushed,))[1]
        return jax.vjp(lambda w: apply(w, block), params)[1](bent)[0]

    return mean_over_blocks(product, batch, block_size)


@partial(jax.jit, static_argnames=("loss_fn", "block_size"))
def flat_hvp(
    loss_fn: LossFn, params: Params, batch: Batch, vector: Float[Array, " i"], block_size: int | None = None
) -> Float[Array, " i"]:
    """Multiply the Hessian by a vector in the order of `ravel_pytree`: one program for all weights of the same shapes."""
    _, unravel = ravel_pytree(params)
    return ravel_pytree(hvp(loss_fn, params, batch, unravel(vector), block_size=block_size))[0]

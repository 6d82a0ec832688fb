"""How far rounding moves a loss: what energies at cold rungs cannot be told below."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slt_interp.data import Batch, mean_over_blocks
from slt_interp.posterior import LocalPosterior
from slt_interp.tree import Params


@partial(jax.jit, static_argnames="block_size")
def loss_rounding(target: LocalPosterior, params: Params, data: Batch, block_size: int | None = None) -> Float[Array, ""]:
    """Estimate the standard deviation of the loss's rounding around some weights, (chain, ...), nats per example.

    What remains of fourth differences along a line of relative steps 2^-12 is not smooth; and a float is rounded itself. The
    loss is computed in blocks of `block_size` examples, or of all.
    """
    steps = 1 + 2.0**-12 * jnp.arange(13)

    def along(params: Params) -> Float[Array, " step"]:
        def at(step: Array) -> Float[Array, ""]:
            weights = jax.tree.map(lambda w: step * w, params)
            return mean_over_blocks(partial(target.loss, weights), data, block_size)

        return jax.lax.map(at, steps)

    losses = jax.lax.map(along, params)
    # The line may lead out of where the loss is finite.
    losses = jnp.where(jnp.isfinite(losses).all(axis=1, keepdims=True), losses, jnp.nan)
    # Independent roundings of variance 1 have fourth differences of variance 1 + 16 + 36 + 16 + 1.
    of_terms = jnp.nanmean(jnp.diff(losses, n=4) ** 2) / 70
    return jnp.nan_to_num(jnp.sqrt(of_terms + (jnp.finfo(losses.dtype).eps * jnp.nanmean(losses)) ** 2 / 12))

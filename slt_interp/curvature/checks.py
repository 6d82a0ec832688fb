"""What is wrong with a Hessian: products that are not symmetric or finite, a saddle point, a kink."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key

from slt_interp.curvature.lanczos import Product
from slt_interp.data import Batch, mean_over_blocks
from slt_interp.errors import InputError
from slt_interp.posterior import LossFn
from slt_interp.tree import Params

NOT_FINITE = "the Hessian of the loss at params is not finite: check the loss there"


def check_symmetric(product: Product, size: int) -> None:
    """Raise InputError if products are not finite, or u.(H v) and v.(H u) differ, as where a custom derivative is none."""
    vectors = np.random.default_rng(0).standard_normal((3, size))
    images = np.stack([np.asarray(product(vector), np.float64) for vector in vectors])
    if not np.isfinite(images).all():
        raise InputError(NOT_FINITE)
    # At a singular point the Hessian may be nothing but rounding, which need not be symmetric.
    forms, sizes = vectors @ images.T, np.linalg.norm(images, axis=1) + _NOT_JUDGED * size**0.5
    asymmetry = np.abs(forms - forms.T) / (sizes[:, None] + sizes)
    if asymmetry.max() > _ASYMMETRY:
        raise InputError(
            f"Hessian-vector products are not symmetric: u.Hv and v.Hu differ by {asymmetry.max():.2g} of |Hu| + |Hv|; check "
            "custom derivatives in the loss, or its precision"
        )


def saddle_warnings(values: Float[np.ndarray, "probe i"], weights: Float[np.ndarray, "probe i"]) -> tuple[str, ...]:
    """Name a saddle point, and how many eigenvalues are negative beyond rounding."""
    negative = values < -10 * np.finfo(np.float32).eps * np.abs(values).max()
    if not np.any(negative & (weights > 0)):
        return ()
    count = np.sum(weights * negative, axis=1).mean()
    return (
        f"the Hessian has negative eigenvalues ({count:.3g} of them, down to {values.min():.3g}; the largest is "
        f"{values.max():.3g}): params is a saddle point, or training has not come to rest, and the volume counts those "
        "directions as flat",
    )


def kink_warnings(key: Key[Array, ""], loss_fn: LossFn, params: Params, data: Batch, block_size: int | None) -> tuple[str, ...]:
    """Tell a point where the gradient jumps, as ReLUs make it at 0: its difference between sides does not fall."""
    sides = np.asarray(_gradients(key, loss_fn, params, data, block_size), np.float64)
    size = max(np.linalg.norm(side) for side in sides)
    wide, narrow = (np.linalg.norm(sides[i] - sides[i + 1]) for i in (0, 2))
    if narrow > 0.5 * wide and narrow > _JUMP * size:
        return (
            "the gradient of the loss jumps at params, as at the kink of a ReLU: there is no Hessian there, and what stands "
            "for it is one of several one-sided ones; move params off the kink, or trust draws only",
        )
    return ()


@partial(jax.jit, static_argnames=("loss_fn", "block_size"))
def _gradients(
    key: Key[Array, ""], loss_fn: LossFn, params: Params, data: Batch, block_size: int | None
) -> Float[Array, "point i"]:
    """Compute gradients on both sides of params, in a random direction: two far from it, and two near."""
    flat, unravel = ravel_pytree(params)
    direction = jax.random.normal(key, flat.shape, flat.dtype) * (jnp.linalg.norm(flat) / flat.size**0.5 + 1e-2)

    def one(step: Array) -> Array:
        point = unravel(flat + step * direction)
        return ravel_pytree(mean_over_blocks(lambda part: jax.grad(loss_fn)(point, part), data, block_size))[0]

    return jax.lax.map(one, jnp.asarray([_WIDE, -_WIDE, _WIDE / 10, -_WIDE / 10], flat.dtype))


_ASYMMETRY, _NOT_JUDGED = 0.05, 1e-4
"""Far above the rounding of a network that computes in bfloat16; curvatures (nats per squared unit) that may be rounding."""

_WIDE, _JUMP = 1e-2, 1e-2
"""A step to either side in units of the weights, and the share of the gradient there that is no rounding."""

"""The one target of the package: the tempered posterior around trained weights.

p(w) ~ exp(-nbeta (L(w) - L(w*))) base(w), where w* is `center` and the base measure keeps the draws near it. At nbeta = 0
only the base measure is left.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from slt_interp.bases import BASES, Base, FloatGrid, Gaussian
from slt_interp.data import Batch, map_blocks
from slt_interp.errors import InputError
from slt_interp.tree import Params, Real, broadcast, check_like, check_params, dimension, dot, register_dataclass

LossFn = Callable[[Params, Any], Float[Array, ""]]
"""Mean negative log-likelihood per example, in nats."""


class ControlVariate(NamedTuple):
    """What the whole data say at the center: see `LocalPosterior.with_control_variate`."""

    center: Params
    loss: Float[Array, ""]
    gradient: Params


@partial(
    register_dataclass,
    data_fields=["center", "nbeta", "localization", "mask", "control"],
    meta_fields=["loss_fn"],
)
@dataclass(frozen=True)
class LocalPosterior:
    """The tempered posterior p(w) ~ exp(-nbeta L(w)) base(w) around `center`.

    Args:
        loss_fn: `(params, batch) -> scalar`, the mean negative log-likelihood per example in nats. It is part of the
            compiled program's identity: hashable, and the same object from call to call, or every call compiles anew.
        center: the trained weights w*, a pytree of floating arrays.
        nbeta: n times the inverse temperature beta, at least 0; n / log n with n the *dataset* size is customary.
        localization: gamma, for the base measure `Gaussian(center, gamma**-0.5)`; or a base measure
            (`Gaussian`, `Box`, `Ball`).
        mask: which coordinates are sampled: booleans, a scalar or array per leaf (None: all of them). The others keep
            their values.
        control: what `with_control_variate` computes; None without.

    Weights below float32 precision are sampled in float32 and cast for the loss: SGLD's noise is smaller than their
    spacing.

    >>> def loss_fn(w, batch): return 0.5 * jnp.sum(w**2)
    >>> target = LocalPosterior(loss_fn, center=jnp.zeros(2), nbeta=10.0, localization=1.0)
    >>> float(target.potential(jnp.ones(2), None))
    11.0
    """

    loss_fn: LossFn
    center: Params
    nbeta: Real
    localization: Real | Base
    mask: PyTree[Real] | None = None
    control: ControlVariate | None = None

    @property
    def base(self) -> Base:
        """The base measure that localizes the posterior."""
        if isinstance(self.localization, BASES):
            return self.localization
        return Gaussian(self.center, jnp.asarray(self.localization) ** -0.5)

    def with_control_variate(self, data: Batch, *, block_size: int = 4096) -> "LocalPosterior":
        """Reduce the noise of minibatches near the center, for a second gradient per step.

        The loss on a batch B becomes L_B(w) - L_B(w*) - g_B(w*).(w - w*) + L_n(w*) + g_n(w*).(w - w*), where n is all of
        `data`: unbiased as before, without any noise at the center, and with gradient g_B(w) - g_B(w*) + g_n(w*).

        Args:
            data: all of the data, from which the batches are drawn.
            block_size: examples per gradient at the center.

        References:
            Baker et al. (2019), Control variates for stochastic gradient MCMC, arXiv:1706.05439.

        >>> def loss_fn(w, batch): return 0.5 * jnp.mean((w - batch) ** 2)
        >>> data = jnp.array([1.0, 2.0, 6.0])
        >>> target = LocalPosterior(loss_fn, jnp.array(3.0), nbeta=1.0, localization=1.0).with_control_variate(data)
        >>> [round(float(target.loss(jnp.array(4.0), data[i : i + 1])), 4) for i in range(3)]  # each the loss on all data
        [2.8333, 2.8333, 2.8333]
        """
        plain, center = replace(self, control=None), self.position(self.center)
        losses, gradients, counts = _center_gradients(plain, center, data, block_size)

        def mean(blocks: Array) -> Array:
            return jnp.tensordot(counts.astype(blocks.dtype), blocks, axes=1) / jnp.sum(counts)

        return replace(self, control=ControlVariate(center, mean(losses), jax.tree.map(mean, gradients)))

    def loss(self, params: Params, batch: Batch) -> Float[Array, ""]:
        """Evaluate the loss in the center's own precision; the result is float32 or better."""
        if self.control is None:
            return self._batch_loss(params, batch)
        center_loss, center_gradient = jax.value_and_grad(self._batch_loss)(self.control.center, batch)
        slope = jax.tree.map(jnp.subtract, self.control.gradient, center_gradient)
        displacement = jax.tree.map(jnp.subtract, params, self.control.center)
        correction = self.control.loss - center_loss + dot(displacement, slope)
        return self._batch_loss(params, batch) + correction

    def potential(self, params: Params, batch: Batch) -> Float[Array, ""]:
        """Evaluate U(w) = nbeta L(w) + base potential, in nats; exp(-U) is the unnormalized density."""
        return jnp.asarray(self.nbeta) * self.loss(params, batch) + self.base.potential(params)

    def value_and_grad(self, params: Params, batch: Batch) -> tuple[Float[Array, ""], Params]:
        """Evaluate the loss and the gradient of the potential; masked coordinates have gradient 0."""
        loss, gradient = jax.value_and_grad(self.loss)(params, batch)
        return loss, self.potential_gradient(params, gradient)

    def potential_gradient(self, params: Params, loss_gradient: Params) -> Params:
        """Turn the gradient of the loss into that of the potential; masked coordinates have gradient 0."""
        total = jax.tree.map(lambda g, b: self.nbeta * g + b, loss_gradient, self.base.gradient(params))
        return self.restrict(total)

    def displacement(self, params: Params) -> Params:
        """Subtract the center: w - w*."""
        return jax.tree.map(lambda w, c: w - c.astype(w.dtype), params, self.center)

    def restrict(self, tree: Params) -> Params:
        """Set the coordinates that are not sampled to zero."""
        if self.mask is None:
            return tree
        return jax.tree.map(lambda x, m: jnp.where(m, x, jnp.zeros_like(x)), tree, broadcast(self.mask, tree))

    def hold(self, moved: Params, params: Params) -> Params:
        """Take the sampled coordinates from `moved` and the others, bit for bit, from `params`."""
        if self.mask is None:
            return moved
        return jax.tree.map(lambda new, old, m: jnp.where(m, new, old), moved, params, broadcast(self.mask, params))

    def move(self, params: Params, velocity: Params, time: Real = 1.0, metric: Params | None = None) -> tuple[Params, Params]:
        """Go along `velocity` for `time`, reflected at the walls of a bounded base: see `Base.move`."""
        if metric is None:
            metric = jax.tree.map(jnp.ones_like, params)
        moved, velocity = self.base.move(params, velocity, time, self.restrict(metric))
        return self.hold(moved, params), velocity

    def dimension(self) -> Real:
        """Count the sampled coordinates."""
        if self.mask is None:
            return dimension(self.center)
        ones = jax.tree.map(lambda c: jnp.ones(c.shape), self.center)
        return sum(jnp.sum(x) for x in jax.tree.leaves(self.restrict(ones)))

    def position(self, params: Params) -> Params:
        """Copy weights into the precision in which they are sampled: float32 or better."""
        return jax.tree.map(lambda w: jnp.array(w, dtype=jnp.promote_types(w.dtype, jnp.float32)), params)

    def _batch_loss(self, params: Params, batch: Batch) -> Float[Array, ""]:
        cast = jax.tree.map(lambda w, c: w.astype(c.dtype), params, self.center)
        value = jnp.asarray(self.loss_fn(cast, batch))
        return value.astype(jnp.promote_types(value.dtype, jnp.float32))


def check_target(target: LocalPosterior, params: Params, batch: Batch) -> None:
    """Check a target once, before anything is compiled.

    Raises:
        TypeError: if `loss_fn` cannot be hashed or does not return a real scalar, or a leaf is not floating.
        InputError: if nbeta is negative, the localization not positive, or `params` outside a bounded base.
        ValueError: if `params` or the mask do not have the structure of `center`.
    """
    check_params(target.center, "center")
    check_params(params)
    check_like(params, target.center, "params", "center")
    _check_mask(target.mask, target.center)
    try:
        hash(target.loss_fn)
    except TypeError as error:
        raise TypeError(
            f"loss_fn must be hashable, but {type(target.loss_fn).__name__} is not ({error}): give a function, or keep "
            "arrays out of the callable and pass them through the batch"
        ) from None
    loss = jax.eval_shape(target.loss_fn, params, batch)
    if not isinstance(loss, jax.ShapeDtypeStruct) or loss.shape != () or not jnp.issubdtype(loss.dtype, jnp.floating):
        given = f"{loss.dtype}{list(loss.shape)}" if isinstance(loss, jax.ShapeDtypeStruct) else type(loss).__name__
        raise TypeError(
            f"loss_fn must return a real scalar, the mean loss per example in nats, but returned {given}: take the "
            "mean over the batch and return nothing else"
        )
    # In numpy: every operation on JAX arrays would be a program of its own in a new process.
    if not np.all((np.asarray(target.nbeta) >= 0) & np.isfinite(np.asarray(target.nbeta))):
        raise InputError(f"nbeta must be finite and not negative, but is {target.nbeta}: n / log n is customary")
    if isinstance(target.localization, FloatGrid):
        raise InputError(
            "a FloatGrid counts numbers and has no density to sample from: give it to estimate_volume with method='subset', "
            "and a Gaussian, Box or Ball here"
        )
    if not isinstance(target.localization, BASES):
        if not np.all(np.asarray(target.localization) > 0):
            raise InputError(
                f"localization must be positive, but is {target.localization}: without it flat directions have no bound; "
                "1 to 1000 is customary"
            )
        return
    variances = map(np.asarray, jax.tree.leaves(target.base.variance(target.position(params))))
    if not all(np.all((v > 0) & np.isfinite(v)) for v in variances):
        raise InputError(
            f"the base measure, a {type(target.base).__name__}, must have a positive finite width in every coordinate: "
            "check its scale, walls or radius"
        )
    if target.base.is_bounded and not jnp.isfinite(target.base.potential(target.position(params))):
        raise InputError(
            f"params lie outside the base measure, a {type(target.base).__name__}: chains start at params, so widen or "
            "move the base measure until it holds them"
        )


@partial(jax.jit, static_argnames=("size",))
def _center_gradients(target: LocalPosterior, center: Params, data: Batch, size: int) -> tuple[Array, Params, Array]:
    (losses, gradients), counts = map_blocks(partial(jax.value_and_grad(target.loss), center), data, size)
    return losses, gradients, counts


def _check_mask(mask: PyTree[Real] | None, center: Params) -> None:
    if mask is None:
        return
    try:
        jax.tree.map(lambda c, m: jnp.broadcast_to(jnp.asarray(m, bool), c.shape), center, broadcast(mask, center))
        selected = any(bool(jnp.any(jnp.asarray(m, bool))) for m in jax.tree.leaves(mask))
    except (ValueError, TypeError) as error:
        detail = str(error).splitlines()[0]
        raise ValueError(
            f"mask must be True or False, alone or for each leaf of center, or a boolean array for each leaf, but does not fit "
            f"({detail}): build it with jax.tree.map over center"
        ) from None
    if not selected:
        raise ValueError("mask selects no coordinate: set it True where weights are to be sampled")

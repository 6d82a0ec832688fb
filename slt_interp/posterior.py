"""The one target of the package: the tempered posterior around trained weights.

p(w) ~ exp(-nbeta (L(w) - L(w*))) base(w), where w* is `center` and the base measure keeps the draws near it. At nbeta = 0
only the base measure is left.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from slt_interp.data import Batch
from slt_interp.errors import InputError
from slt_interp.tree import Params, Real, broadcast, check_like, check_params, dimension, dot, normal_like

LossFn = Callable[[Params, Any], Float[Array, ""]]
"""Mean negative log-likelihood per example, in nats."""


@partial(jax.tree_util.register_dataclass, data_fields=["center", "scale"], meta_fields=[])
@dataclass(frozen=True)
class Gaussian:
    """The base measure N(center, scale^2) with independent coordinates.

    `center` and `scale` (a standard deviation, in units of the weights) are scalars or pytrees like the parameters.

    >>> base = Gaussian(center=jnp.zeros(3), scale=2.0)
    >>> float(base.potential(jnp.array([2.0, 0.0, 2.0])))
    1.0
    """

    center: PyTree[Real]
    scale: PyTree[Real]

    def potential(self, params: Params) -> Float[Array, ""]:
        """Minus the log density in nats, up to a constant: 1/2 sum ((w - center) / scale)^2."""
        standard = jax.tree.map(
            lambda w, c, s: (w - c) / s, params, broadcast(self.center, params), broadcast(self.scale, params)
        )
        return 0.5 * dot(standard, standard)

    def gradient(self, params: Params) -> Params:
        """Gradient of `potential`: (w - center) / scale^2."""
        return jax.tree.map(
            lambda w, c, s: (w - c) / s**2, params, broadcast(self.center, params), broadcast(self.scale, params)
        )

    def sample(self, key: Key[Array, ""], like: Params) -> Params:
        """Draw one point exactly, in the structure and dtypes of `like`."""
        return jax.tree.map(
            lambda z, c, s: (c + s * z).astype(z.dtype),
            normal_like(key, like),
            broadcast(self.center, like),
            broadcast(self.scale, like),
        )


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["center", "nbeta", "localization", "mask"],
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
        localization: gamma, for the base measure `Gaussian(center, gamma**-0.5)`; or a base measure.
        mask: which coordinates are sampled: booleans, a scalar or array per leaf (None: all of them). The others keep
            their values.

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
    localization: Real | Gaussian
    mask: PyTree[Real] | None = None

    @property
    def base(self) -> Gaussian:
        """The base measure that localizes the posterior."""
        if isinstance(self.localization, Gaussian):
            return self.localization
        return Gaussian(self.center, jnp.asarray(self.localization) ** -0.5)

    def loss(self, params: Params, batch: Batch) -> Float[Array, ""]:
        """Evaluate the loss in the center's own precision; the result is float32 or better."""
        cast = jax.tree.map(lambda w, c: w.astype(c.dtype), params, self.center)
        value = jnp.asarray(self.loss_fn(cast, batch))
        return value.astype(jnp.promote_types(value.dtype, jnp.float32))

    def potential(self, params: Params, batch: Batch) -> Float[Array, ""]:
        """Evaluate U(w) = nbeta L(w) + base potential, in nats; exp(-U) is the unnormalized density."""
        return jnp.asarray(self.nbeta) * self.loss(params, batch) + self.base.potential(params)

    def value_and_grad(self, params: Params, batch: Batch) -> tuple[Float[Array, ""], Params]:
        """Evaluate the loss and the gradient of the potential; masked coordinates have gradient 0."""
        loss, gradient = jax.value_and_grad(self.loss)(params, batch)
        total = jax.tree.map(lambda g, b: self.nbeta * g + b, gradient, self.base.gradient(params))
        return loss, self.restrict(total)

    def displacement(self, params: Params) -> Params:
        """Subtract the center: w - w*."""
        return jax.tree.map(lambda w, c: w - c.astype(w.dtype), params, self.center)

    def restrict(self, tree: Params) -> Params:
        """Set the coordinates that are not sampled to zero."""
        if self.mask is None:
            return tree
        return jax.tree.map(lambda x, m: jnp.where(m, x, jnp.zeros_like(x)), tree, broadcast(self.mask, tree))

    def dimension(self) -> Real:
        """Count the sampled coordinates."""
        if self.mask is None:
            return dimension(self.center)
        ones = jax.tree.map(lambda c: jnp.ones(c.shape), self.center)
        return sum(jnp.sum(x) for x in jax.tree.leaves(self.restrict(ones)))

    def position(self, params: Params) -> Params:
        """Copy weights into the precision in which they are sampled: float32 or better."""
        return jax.tree.map(lambda w: jnp.array(w, dtype=jnp.promote_types(w.dtype, jnp.float32)), params)


def check_target(target: LocalPosterior, params: Params, batch: Batch) -> None:
    """Check a target once, before anything is compiled.

    Raises:
        TypeError: if `loss_fn` cannot be hashed or does not return a real scalar, or a leaf is not floating.
        InputError: if nbeta is negative or the localization not positive.
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
    if not jnp.all((jnp.asarray(target.nbeta) >= 0) & jnp.isfinite(jnp.asarray(target.nbeta))):
        raise InputError(f"nbeta must be finite and not negative, but is {target.nbeta}: n / log n is customary")
    if not isinstance(target.localization, Gaussian) and not jnp.all(jnp.asarray(target.localization) > 0):
        raise InputError(
            f"localization must be positive, but is {target.localization}: without it flat directions have no bound; "
            "1 to 1000 is customary"
        )


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

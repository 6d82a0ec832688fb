"""Base measures: what a local posterior is when the loss says nothing.

A base measure has a density exp(-potential), exact draws, a variance that sets the scale of its coordinates, and a way of
moving inside it: bounded ones (`Box`, `Ball`) reflect a straight path at their walls. Metropolis kernels need no
reflection, since the potential outside is infinite. Center, scale, low, high and radius are scalars or pytrees like the
parameters.

`FloatGrid` counts the weights that a floating-point format has. It has no density, and only subset simulation takes it.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree, UInt32

from slt_interp.tree import Params, Real, broadcast, dimension, dot, normal_like, register_dataclass, uniform_like


class Base(Protocol):
    """What a target needs of its base measure."""

    is_bounded: ClassVar[bool]

    def potential(self, params: Params) -> Float[Array, ""]:
        """Minus the log density in nats, up to a constant; infinite outside a bounded base."""
        ...

    def gradient(self, params: Params) -> Params:
        """Gradient of `potential` inside."""
        ...

    def variance(self, like: Params) -> Params:
        """Variance of each coordinate, in the structure of `like`."""
        ...

    def sample(self, key: Key[Array, ""], like: Params) -> Params:
        """Draw one point exactly, in the structure and dtypes of `like`."""
        ...

    def move(self, params: Params, velocity: Params, time: Real, metric: Params) -> tuple[Params, Params]:
        """Go from `params` along `velocity` for `time`, off the walls: the new position and the velocity there.

        `metric` is the diagonal of the velocity's covariance, up to a factor: a reflection that preserves it keeps both the
        base measure and the law of Gaussian velocities.
        """
        ...


@partial(register_dataclass, data_fields=["center", "scale"], meta_fields=[])
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
    is_bounded: ClassVar[bool] = False

    def potential(self, params: Params) -> Float[Array, ""]:
        """Minus the log density in nats, up to a constant: 1/2 sum ((w - center) / scale)^2."""
        standard = _map(lambda w, c, s: (w - c) / s, params, self.center, self.scale)
        return 0.5 * dot(standard, standard)

    def gradient(self, params: Params) -> Params:
        """Gradient of `potential`: (w - center) / scale^2."""
        return _map(lambda w, c, s: (w - c) / s**2, params, self.center, self.scale)

    def variance(self, like: Params) -> Params:
        """Variance of each coordinate: scale^2."""
        return _map(lambda w, s: jnp.full_like(w, jnp.asarray(s) ** 2), like, self.scale)

    def sample(self, key: Key[Array, ""], like: Params) -> Params:
        """Draw one point exactly, in the structure and dtypes of `like`."""
        return _map(lambda z, c, s: (c + s * z).astype(z.dtype), normal_like(key, like), self.center, self.scale)

    def move(self, params: Params, velocity: Params, time: Real, metric: Params) -> tuple[Params, Params]:
        """Go straight: there are no walls."""
        del metric
        return jax.tree.map(lambda w, v: (w + time * v).astype(w.dtype), params, velocity), velocity


@partial(register_dataclass, data_fields=["low", "high"], meta_fields=[])
@dataclass(frozen=True)
class Box:
    """The uniform distribution on low <= w <= high.

    >>> base = Box(low=-1.0, high=1.0)
    >>> position, velocity = base.move(jnp.array([0.5, 0.0]), jnp.array([1.0, 0.25]), 1.0, jnp.ones(2))
    >>> position.tolist(), velocity.tolist()
    ([0.5, 0.25], [-1.0, 0.25])
    """

    low: PyTree[Real]
    high: PyTree[Real]
    is_bounded: ClassVar[bool] = True

    def potential(self, params: Params) -> Float[Array, ""]:
        """0 inside, infinite outside."""
        inside = _map(lambda w, low, high: jnp.all((w >= low) & (w <= high)), params, self.low, self.high)
        return _wall(jnp.all(jnp.stack(jax.tree.leaves(inside))))

    def gradient(self, params: Params) -> Params:
        """Gradient of `potential` inside: 0."""
        return jax.tree.map(jnp.zeros_like, params)

    def variance(self, like: Params) -> Params:
        """Variance of each coordinate: (high - low)^2 / 12."""
        return _map(lambda w, low, high: jnp.full_like(w, (high - low) ** 2 / 12), like, self.low, self.high)

    def sample(self, key: Key[Array, ""], like: Params) -> Params:
        """Draw one point exactly, in the structure and dtypes of `like`."""
        return _map(lambda u, low, high: (low + (high - low) * u).astype(u.dtype), uniform_like(key, like), self.low, self.high)

    def move(self, params: Params, velocity: Params, time: Real, metric: Params) -> tuple[Params, Params]:
        """Go along `velocity`, each coordinate folded back at its walls; a diagonal metric changes nothing."""
        del metric

        def fold(w: Array, v: Array, low: Real, high: Real) -> tuple[Array, Array]:
            free = (w + time * v).astype(w.dtype)
            width, depth = high - low, free - low
            # Differences of near numbers, so that no number near a wall is rounded to the wall.
            lengths = jnp.floor(depth / width)
            is_turned = jnp.mod(lengths, 2.0) == 1
            folded = jnp.where(is_turned, (lengths + 1) * width - depth, depth - lengths * width)
            folded = jnp.clip(low + folded, low, high).astype(w.dtype)
            inside = (free >= low) & (free <= high)
            return jnp.where(inside, free, folded), jnp.where(inside | ~is_turned, v, -v)

        moved = _map(fold, params, velocity, self.low, self.high)
        return jax.tree.transpose(jax.tree.structure(params), jax.tree.structure((0, 0)), moved)


@partial(register_dataclass, data_fields=["center", "radius"], meta_fields=[])
@dataclass(frozen=True)
class Ball:
    """The uniform distribution on |(w - center) / radius| <= 1: a ball, or an ellipsoid when `radius` is a pytree.

    >>> base = Ball(center=0.0, radius=2.0)
    >>> position, velocity = base.move(jnp.array([1.0, 0.0]), jnp.array([2.0, 0.0]), 1.0, jnp.ones(2))
    >>> position.tolist(), velocity.tolist()
    ([1.0, 0.0], [-2.0, 0.0])
    """

    center: PyTree[Real]
    radius: PyTree[Real]
    is_bounded: ClassVar[bool] = True

    def potential(self, params: Params) -> Float[Array, ""]:
        """0 inside, infinite outside."""
        return _wall(self._height(params) <= 1)

    def gradient(self, params: Params) -> Params:
        """Gradient of `potential` inside: 0."""
        return jax.tree.map(jnp.zeros_like, params)

    def variance(self, like: Params) -> Params:
        """Variance of each coordinate: radius^2 / (dimension + 2)."""
        return _map(lambda w, r: jnp.full_like(w, jnp.asarray(r) ** 2 / (dimension(like) + 2)), like, self.radius)

    def sample(self, key: Key[Array, ""], like: Params) -> Params:
        """Draw one point exactly, in the structure and dtypes of `like`."""
        direction_key, radius_key = jax.random.split(key)
        direction = normal_like(direction_key, like)
        size = jax.random.uniform(radius_key) ** (1 / dimension(like)) / jnp.sqrt(dot(direction, direction))
        return _map(lambda z, c, r: (c + r * size * z).astype(z.dtype), direction, self.center, self.radius)

    def move(self, params: Params, velocity: Params, time: Real, metric: Params) -> tuple[Params, Params]:
        """Go along `velocity`, reflected wherever the path meets the wall."""

        def fly(params: Params, velocity: Params, time: Real) -> Params:
            return jax.tree.map(lambda w, v: (w + time * v).astype(w.dtype), params, velocity)

        def is_outside(carry: tuple) -> Array:
            position, velocity, left, bounces = carry
            return (self._height(fly(position, velocity, left)) > 1) & (bounces < _MAX_BOUNCES)

        def bounce(carry: tuple) -> tuple:
            position, velocity, left, bounces = carry
            across = _map(lambda v, r: v / r, velocity, self.radius)
            place = _map(lambda w, c, r: (w - c) / r, position, self.center, self.radius)
            # The later root of |place + t across|^2 = 1, in the form that does not cancel.
            a, b, c = dot(across, across), dot(place, across), jnp.minimum(dot(place, place) - 1, 0.0)
            root = jnp.sqrt(b**2 - a * c)
            hit = jnp.clip(jnp.where(b > 0, -c / (b + root), (root - b) / a), 0.0, left)
            position = fly(position, velocity, hit)
            normal = _map(lambda w, c, r: (w - c) / r**2, position, self.center, self.radius)
            pushed = jax.tree.map(jnp.multiply, metric, normal)
            factor = 2 * jnp.maximum(dot(normal, velocity), 0.0) / dot(normal, pushed)
            velocity = jax.tree.map(lambda v, n: (v - factor * n).astype(v.dtype), velocity, pushed)
            return position, velocity, left - hit, bounces + 1

        start = (params, velocity, jnp.asarray(time, jnp.result_type(float)), 0)
        position, velocity, left, _ = jax.lax.while_loop(is_outside, bounce, start)
        end = fly(position, velocity, left)
        # Rounding, and paths that graze the wall too often to follow, are pulled inside.
        outside = self._height(end) > 1
        place = _map(lambda w, c, r: (w - c) / r, end, self.center, self.radius)
        moving = jax.tree.map(lambda x, m: jnp.where(m > 0, x, 0.0), place, metric)
        free, fixed = dot(moving, moving), dot(place, place) - dot(moving, moving)
        shrink = jnp.sqrt(jnp.clip((1 - 1e-5 - fixed) / jnp.where(outside, free, 1.0), 0.0, 1.0))
        pull = outside & (free > 0)
        pulled = _map(
            lambda w, m, c: jnp.where(pull & (m > 0), c + shrink * (w - c), w).astype(w.dtype), end, metric, self.center
        )
        return pulled, velocity

    def _height(self, params: Params) -> Float[Array, ""]:
        place = _map(lambda w, c, r: (w - c) / r, params, self.center, self.radius)
        return dot(place, place)


@partial(register_dataclass, data_fields=["radius"], meta_fields=["dtype"])
@dataclass(frozen=True)
class FloatGrid:
    """The counting measure of the floating-point numbers of `dtype` within `radius` of each weight.

    Numbers are counted by value: zero once, infinities not. Of another kind than the other bases, it has no density and no
    center of its own: a point is a place on the grid, in each coordinate an unsigned 32-bit number counted from the lowest
    number of the grid, and neighbors are one rounding apart, so that most of the numbers are near zero.

    >>> grid = FloatGrid("float16", radius=0.25)
    >>> center = jnp.ones(2)
    >>> round(float(np.exp(grid.log_total(center[:1]))))  # 512 from .75 to 1, and 257 from there
    769
    >>> grid.at(grid.sample_places(jax.random.key(0), center), center).shape
    (2,)
    """

    dtype: Any
    radius: PyTree[Real]

    def log_total(self, center: Params) -> float:
        """Log number of configurations around `center`, in nats."""
        _, counts = self._range(center)
        return sum(float(np.sum(np.log(np.asarray(n, np.float64)))) for n in jax.tree.leaves(counts))

    def sample_places(self, key: Key[Array, ""], center: Params) -> PyTree[UInt32[Array, "..."]]:
        """Draw places, all equally probable, in the structure of `center`."""
        _, counts = self._range(center)
        return _with_keys(lambda key, n: jax.random.randint(key, n.shape, 0, n, jnp.uint32), key, counts)

    def at(self, places: PyTree[UInt32[Array, "..."]], center: Params) -> Params:
        """Turn places into numbers, in the dtypes of `center`."""
        lowest, _ = self._range(center)
        index = jax.tree.map(lambda low, place: low + jax.lax.bitcast_convert_type(place, jnp.int32), lowest, places)
        return jax.tree.map(lambda i, c: _to_float(i, self.dtype).astype(c.dtype), index, center)

    def shift_places(
        self, key: Key[Array, ""], places: PyTree[UInt32[Array, "..."]], center: Params, size: Real, share: Real
    ) -> PyTree[UInt32[Array, "..."]]:
        """Propose other places: a random `share` of the coordinates goes `size` widths of the grid up or down, off its ends.

        Sizes are half-normal, at least one place. As likely as its reverse.
        """

        def shift(key: Key[Array, ""], place: Array, count: Array) -> Array:
            size_key, sign_key, share_key = jax.random.split(key, 3)
            size_here = jnp.abs(jax.random.normal(size_key, place.shape)) * size * count.astype(jnp.float32)
            jump = jnp.minimum(jnp.ceil(jnp.minimum(size_here, 2.0**31)).astype(jnp.uint32), count - 1)
            # Folded about half a place beyond the ends; unsigned numbers must not pass below zero on the way.
            up = jnp.where(jump < count - place, place + jump, count - 1 - (jump - (count - place)))
            down = jnp.where(jump <= place, place - jump, jump - place - 1)
            moved = jnp.where(jax.random.bernoulli(sign_key, shape=place.shape), up, down)
            return jnp.where(jax.random.uniform(share_key, place.shape) < share, moved, place)

        _, counts = self._range(center)
        return _with_keys(shift, key, places, counts)

    def _range(self, center: Params) -> tuple[PyTree[Array], PyTree[Array]]:
        """Index of the lowest number of the grid in every coordinate, and how many there are."""

        def ends(c: Array, radius: Real) -> tuple[Array, Array]:
            c = c.astype(jnp.promote_types(c.dtype, jnp.float32))
            radius = jnp.broadcast_to(jnp.asarray(radius, c.dtype), c.shape)
            top = _to_index(jnp.asarray(jnp.finfo(self.dtype).max, self.dtype))
            low, high = (jnp.clip(_to_index((c + r).astype(self.dtype)), -top, top) for r in (-radius, radius))
            # The nearest number to an end may lie beyond it.
            low = low + (c - _to_float(low, self.dtype).astype(c.dtype) > radius)
            high = high - (_to_float(high, self.dtype).astype(c.dtype) - c > radius)
            return low, jax.lax.bitcast_convert_type(high - low, jnp.uint32) + 1

        pairs = _map(ends, center, self.radius)
        return jax.tree.transpose(jax.tree.structure(center), jax.tree.structure((0, 0)), pairs)


BASES = (Gaussian, Box, Ball)

_MAX_BOUNCES = 100


def _wall(inside: Array) -> Float[Array, ""]:
    return jnp.where(inside, 0.0, jnp.inf)


def _map(function: Any, params: Params, *others: PyTree[Real]) -> Any:
    """Map over the leaves of `params` and what belongs to them, each a scalar or a pytree like `params`."""
    return jax.tree.map(function, params, *(broadcast(other, params) for other in others))


def _with_keys(function: Any, key: Key[Array, ""], tree: Params, *others: Params) -> Any:
    """Map over leaves with a key for each."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    rest = [structure.flatten_up_to(other) for other in others]
    return structure.unflatten([function(*parts) for parts in zip(keys, leaves, *rest, strict=True)])


def _to_index(x: Array) -> Array:
    """Give floating-point numbers their place in the order of all; both zeros have 0."""
    width = jnp.finfo(x.dtype).bits
    bits = jax.lax.bitcast_convert_type(x, f"int{width}").astype(jnp.int32)
    magnitude = bits & (2 ** (width - 1) - 1)
    return jnp.where(bits < 0, -magnitude, magnitude)


def _to_float(index: Array, dtype: Any) -> Array:
    magnitude = jax.lax.bitcast_convert_type(jnp.abs(index).astype(f"int{jnp.finfo(dtype).bits}"), dtype)
    return jnp.where(index < 0, -magnitude, magnitude)

"""Moves that leave a base measure restricted to a sublevel set {loss <= level} exactly as it is.

`Reflective` is Galilean Monte Carlo for continuous bases. With velocities v ~ N(0, base variance), a step drifts from w to
w' and is taken if w' lies inside. If not, the velocity is reflected there on the gradient of the loss, and drift goes on to
w''; where that is outside, too, w stays and v is turned around. Drift and reflection preserve the joint measure of position and
velocity and are undone by themselves from the end with the velocity reversed, and so is each of the three outcomes: every
step keeps the restricted measure, whatever the loss and the step size. Drift goes straight in a bounded base, off its
walls, and around the center on an ellipse in a Gaussian one, so that no step is ever weighed by a density.

`GridWalk` changes random sets of coordinates of floating-point numbers by random numbers of places, folded at the ends of the
grid: proposals are symmetric, and one is taken where the loss is at most the level.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from slt_interp.bases import FloatGrid, Gaussian
from slt_interp.data import Batch
from slt_interp.posterior import LocalPosterior
from slt_interp.tree import Params, Real, broadcast, dimension, dot, normal_like, register_dataclass


class Particle(NamedTuple):
    """A position and its loss."""

    position: PyTree[Array]
    loss: Float[Array, ""]


@partial(register_dataclass, data_fields=["target"], meta_fields=[])
@dataclass(frozen=True)
class Reflective:
    """Walk in the base measure of `target` below a level of its loss, `NUM_STEPS` steps with one velocity.

    References:
        Skilling (2012), Bayesian computation in big spaces: nested sampling and Galilean Monte Carlo.
        Neal (2003), Slice sampling, section 7 (reflection).
        Murray, Adams and MacKay (2010), Elliptical slice sampling, arXiv:1001.0175.

    >>> target = LocalPosterior(lambda w, batch: jnp.sum(w**2), jnp.zeros(2), nbeta=1.0, localization=1.0)
    >>> walk, here = Reflective(target), Particle(jnp.zeros(2), jnp.zeros(()))
    >>> there, _ = walk.move(jax.random.key(0), here, 1e-3, 0.1, None)
    >>> 0 < float(there.loss) <= 1e-3
    True
    """

    target: LocalPosterior
    goal: ClassVar[float] = 0.4
    """Share of steps that need no reflection when the step size is right: in a ball all reflections succeed, and none of them
    changes the loss."""
    largest_step: ClassVar[float] = 1.5

    def sample(self, key: Key[Array, ""], data: Batch) -> Particle:
        """Draw from the base measure, without restriction."""
        position = self.target.base.sample(key, self.target.position(self.target.center))
        return Particle(position, self.target.loss(position, data))

    def params(self, position: Params) -> Params:
        """Turn a position into weights."""
        return position

    def move(
        self, key: Key[Array, ""], particle: Particle, level: Real, step: Real, data: Batch
    ) -> tuple[Particle, Float[Array, ""]]:
        """Draw a velocity and go `NUM_STEPS` steps; also return the share of them that needed no reflection.

        Args:
            key: typed PRNG key.
            particle: inside.
            level: highest loss allowed.
            step: time of a step; velocities cross a standard deviation of the base measure per unit of time.
            data: what the loss wants.
        """
        target, variance = self.target, self.target.base.variance(particle.position)
        velocity_key, step_key = jax.random.split(key)
        velocity = jax.tree.map(lambda z, v: z * jnp.sqrt(v), normal_like(velocity_key, particle.position), variance)
        # At random, so that no orbit closes on itself.
        time = step * jax.random.uniform(step_key, minval=0.5)

        def one(carry: tuple, _: None) -> tuple[tuple, None]:
            particle, velocity, free = carry
            ahead, speed = self._drift(particle.position, velocity, time)
            loss = target.loss(ahead, data)

            def bounce() -> tuple:
                slope = jax.grad(target.loss)(ahead, data)
                steepest = jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in jax.tree.leaves(slope)]))
                # To unit size first, or the square of a small gradient would be zero.
                normal = jax.tree.map(lambda x: x / jnp.where(steepest > 0, steepest, 1.0), slope)
                pushed = jax.tree.map(jnp.multiply, variance, normal)
                factor = 2 * dot(normal, speed) / jnp.maximum(dot(normal, pushed), _TINY)
                reflected = jax.tree.map(lambda v, p: v - factor * p, speed, pushed)
                end, last = self._drift(ahead, reflected, time)
                end_loss = target.loss(end, data)
                is_inside = end_loss <= level
                back = jax.tree.map(jnp.negative, velocity)
                return (
                    _select(is_inside, Particle(end, end_loss), particle),
                    _select(is_inside, last, back),
                    free,
                )

            return jax.lax.cond(loss <= level, lambda: (Particle(ahead, loss), speed, free + 1), bounce), None

        (particle, _, free), _ = jax.lax.scan(one, (particle, velocity, jnp.zeros(())), length=NUM_STEPS)
        return particle, free / NUM_STEPS

    def _drift(self, params: Params, velocity: Params, time: Real) -> tuple[Params, Params]:
        base = self.target.base
        if not isinstance(base, Gaussian):
            return base.move(params, velocity, time, base.variance(params))
        cosine, sine = jnp.cos(time), jnp.sin(time)
        center = broadcast(base.center, params)
        moved = jax.tree.map(lambda w, v, c: (c + (w - c) * cosine + v * sine).astype(w.dtype), params, velocity, center)
        turned = jax.tree.map(lambda w, v, c: (v * cosine - (w - c) * sine).astype(v.dtype), params, velocity, center)
        return moved, turned


@partial(register_dataclass, data_fields=["target", "grid", "center"], meta_fields=[])
@dataclass(frozen=True)
class GridWalk:
    """Walk on the floating-point numbers of `grid` around `center`, `NUM_STEPS` proposals; positions are places on the grid."""

    target: LocalPosterior
    grid: FloatGrid
    center: Params
    goal: ClassVar[float] = 0.3
    """Share of proposals to accept."""
    largest_step: ClassVar[float] = 1.0

    def sample(self, key: Key[Array, ""], data: Batch) -> Particle:
        """Draw a place from all of the grid."""
        places = self.grid.sample_places(key, self.center)
        return Particle(places, self.target.loss(self.params(places), data))

    def params(self, position: PyTree[Array]) -> Params:
        """Turn places into weights."""
        return self.grid.at(position, self.center)

    def move(
        self, key: Key[Array, ""], particle: Particle, level: Real, step: Real, data: Batch
    ) -> tuple[Particle, Float[Array, ""]]:
        """Make `NUM_STEPS` proposals; also return the share that was accepted.

        `step` is their size as a part of the grid's width; as many as not are far smaller, and of few coordinates.
        """

        def one(carry: tuple, key: Key[Array, ""]) -> tuple[tuple, None]:
            particle, accepted = carry
            size_key, share_key, move_key = jax.random.split(key, 3)
            size = step * jnp.exp(-_SIZES * jnp.maximum(jax.random.uniform(size_key, minval=-1.0), 0.0))
            share = dimension(self.center) ** -jax.random.uniform(share_key)
            places = self.grid.shift_places(move_key, particle.position, self.center, size, share)
            loss = self.target.loss(self.params(places), data)
            is_inside = loss <= level
            return (_select(is_inside, Particle(places, loss), particle), accepted + is_inside), None

        keys = jax.random.split(key, NUM_STEPS)
        (particle, accepted), _ = jax.lax.scan(one, (particle, jnp.zeros(())), keys)
        return particle, accepted / NUM_STEPS


NUM_STEPS = 8

_TINY = 1e-37
"""A gradient of zero reflects nothing: the path goes straight on, which is as reversible."""

_SIZES = 6.0


def _select(condition: Array, yes: PyTree[Array], no: PyTree[Array]) -> PyTree[Array]:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)

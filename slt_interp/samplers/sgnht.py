"""The stochastic gradient Nose-Hoover thermostat: momentum whose friction adapts to the gradients' noise."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from slt_interp.data import Batch
from slt_interp.posterior import LocalPosterior
from slt_interp.samplers.kernel import Info, inspect
from slt_interp.tree import Params, Real, dot, normal_like, register_dataclass


class SGNHTState(NamedTuple):
    """Position of a chain, its velocity half a kick behind, and the thermostat: a friction per unit of time."""

    params: Params
    velocity: Params
    thermostat: Float[Array, ""]


@partial(register_dataclass, data_fields=["target", "step_size", "friction"], meta_fields=[])
@dataclass(frozen=True)
class SGNHT:
    """Sample by Langevin dynamics whose friction x is driven by the temperature, one gradient per step, no adaptation.

    dw = v dt;  dv = -grad U dt - x v dt + sqrt(2 friction) dW;  dx = (|v|^2 / d - 1) dt, with d sampled coordinates,

    in the symmetric splitting BADODAB with h = sqrt(step_size), written with the gradient first as in `SGHMC`; O is exact:
    v <- c v + sqrt(friction (1 - c^2) / x) N(0, 1), c = exp(-x h). In continuous time the law of w is the target's, that
    of x N(friction, 1 / d), and constant gradient noise of variance v only raises the mean of x by h v / 2: the
    thermostat takes it out where it is the same in every coordinate.

    The law in discrete time, on a quadratic and for many coordinates, where x stands still at the value that keeps the
    mean squared velocity at 1: with T = friction / x, P_i = T + h^2 v_i / ((1 - c^2)(1 - h^2 s_i / 4)),

        Var(w_i) = (P_i (1 + c)^2 + T (1 - c)(3 + c)) / (4 s_i),  x such that mean_i P_i (1 + c^2) + T (1 - c^2) = 2,

    stable iff step_size s_i < 4. On full batches x = friction and Var(w_i) = 1 / s_i, exactly. (The names are `SGHMC`'s,
    whose law this is with the temperature T.) The thermostat is slow where gradients are noisy: it moves by
    |v|^2 / d - 1 per unit of time, so that a burn-in takes some hundreds of units.

    Args:
        target: the distribution to sample.
        step_size: epsilon = h^2, in squared units of the weights, as SGLD's; the masses are 1.
        friction: per unit of time: the strength of the injected noise, and where the thermostat starts.

    References:
        Ding et al. (2014), Bayesian sampling using stochastic gradient thermostats.
        Leimkuhler and Shang (2016), Adaptive thermostats for noisy gradient systems, arXiv:1505.06889.

    >>> target = LocalPosterior(lambda w, batch: 0.5 * jnp.sum(w**2), jnp.zeros(2), nbeta=1.0, localization=1.0)
    >>> kernel = SGNHT(target, step_size=0.1)
    >>> state = kernel.init(jax.random.key(0), jnp.zeros(2), None)
    >>> float(kernel.step(jax.random.key(1), state, None)[1].loss)
    0.0
    """

    target: LocalPosterior
    step_size: Real
    friction: Real = 10.0
    full_batch: ClassVar[bool] = False

    def init(self, key: Key[Array, ""], params: Params, batch: Batch) -> SGNHTState:
        """Start a chain at `params`, in float32 or better, with a velocity at random and the thermostat at `friction`."""
        del batch
        position = self.target.position(params)
        return SGNHTState(position, self.target.restrict(normal_like(key, position)), jnp.asarray(self.friction, float))

    def step(self, key: Key[Array, ""], state: SGNHTState, batch: Batch) -> tuple[SGNHTState, Info]:
        """Make one transition, with one gradient on `batch`."""
        loss, gradient = self.target.value_and_grad(state.params, batch)
        time_step = jnp.sqrt(jnp.asarray(self.step_size))

        def heat(velocity: Params) -> Float[Array, ""]:
            return (time_step / 2) * (dot(velocity, velocity) / self.target.dimension() - 1)

        noise = self.target.restrict(normal_like(key, state.params))
        velocity = jax.tree.map(lambda v, g: v - time_step * g, state.velocity, gradient)
        params, velocity = self.target.move(state.params, velocity, time_step / 2)
        thermostat = state.thermostat + heat(velocity)
        kept = jnp.exp(-thermostat * time_step)
        # friction (1 - c^2) / x, which is 2 friction h where x is 0, and positive where x is negative.
        exponent = -2 * thermostat * time_step
        spread = (
            2
            * self.friction
            * time_step
            * jnp.where(exponent == 0, 1.0, jnp.expm1(exponent) / jnp.where(exponent == 0, 1.0, exponent))
        )
        velocity = jax.tree.map(lambda v, z: kept * v + jnp.sqrt(spread) * z, velocity, noise)
        thermostat = thermostat + heat(velocity)
        params, velocity = self.target.move(params, velocity, time_step / 2)
        return SGNHTState(params, velocity, thermostat), inspect(self.target, state.params, loss, gradient)

    adapt = step

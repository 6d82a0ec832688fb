"""Stochastic gradient Langevin dynamics."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from slt_interp.data import Batch
from slt_interp.posterior import LocalPosterior
from slt_interp.samplers.kernel import Info, inspect
from slt_interp.tree import Params, Real, normal_like, register_dataclass


class SGLDState(NamedTuple):
    """Position of a chain, steps made, and the last noise where the next step uses it again."""

    params: Params
    num_steps: Int[Array, ""]
    noise: Params | None


@partial(register_dataclass, data_fields=["target", "step_size"], meta_fields=["leimkuhler_matthews"])
@dataclass(frozen=True)
class SGLD:
    """Sample by stochastic gradient Langevin dynamics, one gradient per step, no adaptation.

    w <- w - (step_size / 2) (nbeta grad L_B(w) + grad base potential(w)) + N(0, step_size)

    `step_size` is the epsilon of Lau et al.; blackjax's `sgld` calls epsilon / 2 its step size. Nothing corrects
    the discretization. On a quadratic loss with curvatures h_i, with k_i = nbeta h_i, s_i = k_i + gamma, and v_i the
    variance of the minibatch gradient nbeta g_B, the stationary law is exactly

        Var(w_i) = (1 + step_size v_i / 4) / (s_i (1 - step_size s_i / 4)),  stable iff step_size s_i < 4,

    so that E[nbeta (L - L*)] is too large by about (step_size / 8) sum k_i (1 + v_i / s_i). With `leimkuhler_matthews` the
    noise is sqrt(step_size) (z_t + z_{t+1}) / 2, each z used twice, and the law at any stable step is

        Var(w_i) = (1 + step_size v_i / (4 (1 - step_size s_i / 4))) / s_i,

    exact on full batches; on singular losses it helps little at large steps.

    Args:
        target: the distribution to sample.
        step_size: epsilon, in squared units of the weights: a number, or a function of the number of steps made, such as an
            optax schedule (the same object from call to call, or every call compiles anew).
        leimkuhler_matthews: whether to average successive noises.

    References:
        Welling and Teh (2011), Bayesian learning via stochastic gradient Langevin dynamics.
        Lau et al. (2023), The local learning coefficient, arXiv:2308.12108, algorithm 1.
        Leimkuhler and Matthews (2013), Rational construction of stochastic numerical methods, arXiv:1203.5428.

    >>> target = LocalPosterior(lambda w, batch: 0.5 * jnp.sum(w**2), jnp.zeros(2), nbeta=1.0, localization=1.0)
    >>> kernel = SGLD(target, step_size=0.1)
    >>> state = kernel.init(jax.random.key(0), jnp.zeros(2), None)
    >>> state, info = kernel.step(jax.random.key(1), state, None)
    >>> float(info.loss)
    0.0
    """

    target: LocalPosterior
    step_size: Real | Callable[[Any], Any]
    leimkuhler_matthews: bool = False
    full_batch: ClassVar[bool] = False

    def __post_init__(self):
        if callable(self.step_size) and not isinstance(self.step_size, jax.tree_util.Partial):
            # A pytree without leaves: the function is part of the program, as loss_fn is.
            object.__setattr__(self, "step_size", jax.tree_util.Partial(self.step_size))

    def step_size_at(self, num_steps: Int[Array, ""] | int) -> Float[Array, ""]:
        """Evaluate the step size after a number of steps."""
        return jnp.asarray(self.step_size(num_steps) if callable(self.step_size) else self.step_size)

    def init(self, key: Key[Array, ""], params: Params, batch: Batch) -> SGLDState:
        """Start a chain at `params`, in float32 or better."""
        del batch
        position = self.target.position(params)
        noise = self.target.restrict(normal_like(key, position)) if self.leimkuhler_matthews else None
        return SGLDState(position, jnp.zeros((), int), noise)

    def step(self, key: Key[Array, ""], state: SGLDState, batch: Batch) -> tuple[SGLDState, Info]:
        """Make one transition, with one gradient on `batch`."""
        loss, gradient = self.target.value_and_grad(state.params, batch)
        step_size = self.step_size_at(state.num_steps)
        time_step = jnp.sqrt(step_size)
        noise = self.target.restrict(normal_like(key, state.params))
        if self.leimkuhler_matthews:
            # SGHMC that forgets its velocity at once: half a step with the old noise, half a step with the new.
            velocity = jax.tree.map(lambda z, g: z - time_step * g, state.noise, gradient)
            params, _ = self.target.move(state.params, velocity, time_step / 2)
            params, noise = self.target.move(params, noise, time_step / 2)
        else:
            velocity = jax.tree.map(lambda z, g: z - (time_step / 2) * g, noise, gradient)
            params, noise = self.target.move(state.params, velocity, time_step)[0], None
        return SGLDState(params, state.num_steps + 1, noise), inspect(self.target, state.params, loss, gradient)

    adapt = step

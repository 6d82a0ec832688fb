"""Stochastic gradient Hamiltonian Monte Carlo: Langevin dynamics with momentum."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from slt_interp.data import Batch
from slt_interp.posterior import LocalPosterior
from slt_interp.samplers.kernel import Info, inspect
from slt_interp.tree import Params, Real, normal_like, register_dataclass


class SGHMCState(NamedTuple):
    """Position of a chain and its velocity, half a kick behind."""

    params: Params
    velocity: Params


@partial(register_dataclass, data_fields=["target", "step_size", "friction"], meta_fields=[])
@dataclass(frozen=True)
class SGHMC:
    """Sample by underdamped Langevin dynamics in the symmetric splitting BAOAB, one gradient per step, no adaptation.

    With h = sqrt(step_size) and c = exp(-friction h):

        v <- v - h (nbeta grad L_B(w) + grad base potential(w));  w <- w + (h/2) v;
        v <- c v + sqrt(1 - c^2) N(0, 1);  w <- w + (h/2) v.

    Written with the gradient first, so that every step has one batch; the two half kicks of BAOAB around w are one. On a
    quadratic with k_i = nbeta h_i, s_i = k_i + gamma, and v_i the variance of nbeta g_B, the stationary law is exactly

        Var(w_i) = (1 + step_size v_i (1 + c) / (4 (1 - c) (1 - step_size s_i / 4))) / s_i,  stable iff step_size s_i < 4:

    exact on full batches at any stable step and any friction (as c -> 0 it is SGLD with Leimkuhler-Matthews noise). Little
    friction explores flat directions faster and lets minibatch noise in: its share grows as 2 / (friction h). To derive
    it, set the covariance of (w, v) equal to itself after a step: three linear equations.

    Conversion: Chen et al. write eta = h^2 = step_size for the learning rate and alpha = friction h for the momentum decay.
    Their order of updates, and blackjax's, has a bias of first order in h that this one does not have.

    Args:
        target: the distribution to sample.
        step_size: epsilon = h^2, in squared units of the weights, as SGLD's; the masses are 1.
        friction: per unit of time, that is, of h.

    References:
        Chen, Fox and Guestrin (2014), Stochastic gradient Hamiltonian Monte Carlo, arXiv:1402.4102.
        Leimkuhler and Matthews (2013), Rational construction of stochastic numerical methods, arXiv:1203.5428.

    >>> target = LocalPosterior(lambda w, batch: 0.5 * jnp.sum(w**2), jnp.zeros(2), nbeta=1.0, localization=1.0)
    >>> kernel = SGHMC(target, step_size=0.1)
    >>> state = kernel.init(jax.random.key(0), jnp.zeros(2), None)
    >>> float(kernel.step(jax.random.key(1), state, None)[1].loss)
    0.0
    """

    target: LocalPosterior
    step_size: Real
    friction: Real = 10.0
    full_batch: ClassVar[bool] = False

    def init(self, key: Key[Array, ""], params: Params, batch: Batch) -> SGHMCState:
        """Start a chain at `params`, in float32 or better, with a velocity at random."""
        del batch
        position = self.target.position(params)
        return SGHMCState(position, self.target.restrict(normal_like(key, position)))

    def step(self, key: Key[Array, ""], state: SGHMCState, batch: Batch) -> tuple[SGHMCState, Info]:
        """Make one transition, with one gradient on `batch`."""
        loss, gradient = self.target.value_and_grad(state.params, batch)
        time_step = jnp.sqrt(jnp.asarray(self.step_size))
        kept = jnp.exp(-self.friction * time_step)
        noise = self.target.restrict(normal_like(key, state.params))
        velocity = jax.tree.map(lambda v, g: v - time_step * g, state.velocity, gradient)
        params, velocity = self.target.move(state.params, velocity, time_step / 2)
        velocity = jax.tree.map(lambda v, z: kept * v + jnp.sqrt(1 - kept**2) * z, velocity, noise)
        params, velocity = self.target.move(params, velocity, time_step / 2)
        return SGHMCState(params, velocity), inspect(self.target, state.params, loss, gradient)

    adapt = step

"""Stochastic gradient Langevin dynamics."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from slt_interp.data import Batch
from slt_interp.posterior import LocalPosterior
from slt_interp.samplers.kernel import Info, inspect
from slt_interp.tree import Params, Real, normal_like


class SGLDState(NamedTuple):
    """Position of a chain."""

    params: Params


@partial(jax.tree_util.register_dataclass, data_fields=["target", "step_size"], meta_fields=[])
@dataclass(frozen=True)
class SGLD:
    """Sample by stochastic gradient Langevin dynamics, one gradient per step, no adaptation.

    w <- w - (step_size / 2) (nbeta grad L_B(w) + grad base potential(w)) + N(0, step_size)

    `step_size` is the epsilon of Lau et al.; blackjax's `sgld` calls epsilon / 2 its step size. Nothing corrects
    the discretization. On a quadratic loss with curvatures h_i, with k_i = nbeta h_i, s_i = k_i + gamma, and v_i the
    variance of the minibatch gradient nbeta g_B, the stationary law is exactly

        Var(w_i) = (1 + step_size v_i / 4) / (s_i (1 - step_size s_i / 4)),  stable iff step_size s_i < 4,

    so that E[nbeta (L - L*)] is too large by about (step_size / 8) sum k_i (1 + v_i / s_i).

    Args:
        target: the distribution to sample.
        step_size: epsilon, in squared units of the weights.

    References:
        Welling and Teh (2011), Bayesian learning via stochastic gradient Langevin dynamics.
        Lau et al. (2023), The local learning coefficient, arXiv:2308.12108, algorithm 1.

    >>> target = LocalPosterior(lambda w, batch: 0.5 * jnp.sum(w**2), jnp.zeros(2), nbeta=1.0, localization=1.0)
    >>> kernel = SGLD(target, step_size=0.1)
    >>> state = kernel.init(jax.random.key(0), jnp.zeros(2), None)
    >>> state, info = kernel.step(jax.random.key(1), state, None)
    >>> float(info.loss)
    0.0
    """

    target: LocalPosterior
    step_size: Real

    def init(self, key: Key[Array, ""], params: Params, batch: Batch) -> SGLDState:
        """Start a chain at `params`, in float32 or better."""
        del key, batch
        return SGLDState(self.target.position(params))

    def adapt(self, key: Key[Array, ""], state: SGLDState, batch: Batch) -> tuple[SGLDState, Info]:
        """Make one transition: SGLD has nothing to adapt."""
        return self.step(key, state, batch)

    def step(self, key: Key[Array, ""], state: SGLDState, batch: Batch) -> tuple[SGLDState, Info]:
        """Make one transition, with one gradient on `batch`."""
        loss, gradient = self.target.value_and_grad(state.params, batch)
        noise = self.target.restrict(normal_like(key, state.params))
        step_size = jnp.asarray(self.step_size)
        drift_scale, noise_scale = 0.5 * step_size, jnp.sqrt(step_size)
        params = jax.tree.map(
            lambda w, g, z: (w - drift_scale * g + noise_scale * z).astype(w.dtype), state.params, gradient, noise
        )
        return SGLDState(params), inspect(self.target, state.params, loss, gradient)

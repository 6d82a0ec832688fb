"""Langevin dynamics preconditioned by the gradients' own scale."""

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


class RMSPropSGLDState(NamedTuple):
    """Position of a chain, and the running mean of squared loss gradients that preconditions it."""

    params: Params
    second_moment: Params


@partial(register_dataclass, data_fields=["target", "step_size", "decay", "damping"], meta_fields=[])
@dataclass(frozen=True)
class RMSPropSGLD:
    """Sample by SGLD with a diagonal preconditioner p = 1 / (sqrt(v) + damping), one gradient per step.

    w <- w - (step_size / 2) p (nbeta grad L_B(w) + grad base potential(w)) + N(0, step_size p)

    v <- decay v + (1 - decay) (grad L_B)^2 starts at 1 and moves during warm-up only. A preconditioner that depends on w
    needs a further drift term, which the field leaves out; a frozen one does not, so give `sample` a `num_warmup` of
    several times 1 / (1 - decay), or p stays at its start. v holds gradients of the mean loss, not of the potential.
    With p frozen, the law on a quadratic is SGLD's with step_size p_i in each coordinate:

        Var(w_i) = (1 + step_size p_i v_i / 4) / (s_i (1 - step_size p_i s_i / 4)),  stable iff step_size p_i s_i < 4,

    v_i here the variance of nbeta g_B.

    Args:
        target: the distribution to sample.
        step_size: epsilon of Lau et al., which multiplies p.
        decay: of the running mean.
        damping: what keeps p finite: gradients of the mean loss well below it are not told apart.

    References:
        Li et al. (2016), Preconditioned stochastic gradient Langevin dynamics, arXiv:1512.07666.
        Hitchcock and Hoogland (2025), arXiv:2507.21449.

    >>> target = LocalPosterior(lambda w, batch: 0.5 * jnp.sum(w**2), jnp.zeros(2), nbeta=1.0, localization=1.0)
    >>> kernel = RMSPropSGLD(target, step_size=0.1)
    >>> state = kernel.init(jax.random.key(0), jnp.zeros(2), None)
    >>> kernel.adapt(jax.random.key(1), state, None)[0].second_moment.tolist()
    [0.9900000095367432, 0.9900000095367432]
    """

    target: LocalPosterior
    step_size: Real
    decay: Real = 0.99
    damping: Real = 0.1
    full_batch: ClassVar[bool] = False

    def init(self, key: Key[Array, ""], params: Params, batch: Batch) -> RMSPropSGLDState:
        """Start a chain at `params`, in float32 or better."""
        del key, batch
        position = self.target.position(params)
        return RMSPropSGLDState(position, jax.tree.map(jnp.ones_like, position))

    def adapt(self, key: Key[Array, ""], state: RMSPropSGLDState, batch: Batch) -> tuple[RMSPropSGLDState, Info]:
        """Make one transition, after the gradient has entered the preconditioner."""
        return self._transition(key, state, batch, adapting=True)

    def step(self, key: Key[Array, ""], state: RMSPropSGLDState, batch: Batch) -> tuple[RMSPropSGLDState, Info]:
        """Make one transition, with one gradient on `batch`."""
        return self._transition(key, state, batch, adapting=False)

    def _transition(
        self, key: Key[Array, ""], state: RMSPropSGLDState, batch: Batch, *, adapting: bool
    ) -> tuple[RMSPropSGLDState, Info]:
        loss, loss_gradient = jax.value_and_grad(self.target.loss)(state.params, batch)
        gradient = self.target.potential_gradient(state.params, loss_gradient)
        moment = state.second_moment
        if adapting:
            moment = jax.tree.map(
                lambda v, g: (self.decay * v + (1 - self.decay) * g**2).astype(v.dtype), moment, loss_gradient
            )
        metric = jax.tree.map(lambda v: 1 / (jnp.sqrt(v) + self.damping), moment)
        noise = self.target.restrict(normal_like(key, state.params))
        change = jax.tree.map(
            lambda g, z, p: jnp.sqrt(self.step_size * p) * z - 0.5 * self.step_size * p * g, gradient, noise, metric
        )
        params, _ = self.target.move(state.params, change, metric=metric)
        return RMSPropSGLDState(params, moment), inspect(self.target, state.params, loss, gradient, metric)

"""The Metropolis-adjusted Langevin algorithm."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from slt_interp.data import Batch
from slt_interp.posterior import LocalPosterior
from slt_interp.samplers.hamiltonian import (
    MetropolisState,
    Point,
    blend,
    energy_error,
    leapfrog,
    learn,
    mixed_step,
    select,
    start,
    trial,
)
from slt_interp.samplers.kernel import Info, inspect
from slt_interp.tree import Params, Real, normal_like, register_dataclass


@partial(register_dataclass, data_fields=["target", "step_size", "target_acceptance"], meta_fields=[])
@dataclass(frozen=True)
class MALA:
    """Sample by Langevin steps with a Metropolis test, one gradient per step on the full batch: no discretization bias.

    w' = w - (step_size / 2) sigma^2 grad U(w) + N(0, step_size sigma^2), accepted with probability min(1, exp(-energy error)).

    Steps are drawn at random, step_size the largest (see `hamiltonian.mixed_step`). `Info` is averaged over the two
    ends of a transition with their probabilities. Warm-up adapts the step and sigma; without it sigma is 1 and the step
    the given one.

    Args:
        target: the distribution to sample.
        step_size: epsilon as for SGLD; blackjax's `mala` calls epsilon / 2 its step size. Warm-up starts from it.
        target_acceptance: of whole steps, in warm-up; .574 is optimal in many dimensions.

    References:
        Roberts and Rosenthal (1998), Optimal scaling of discrete approximations to Langevin diffusions.

    >>> target = LocalPosterior(lambda w, batch: 0.5 * jnp.sum(w**2), jnp.zeros(2), nbeta=1.0, localization=1.0)
    >>> kernel = MALA(target, step_size=0.1)
    >>> state = kernel.init(jax.random.key(0), jnp.zeros(2), None)
    >>> bool(kernel.step(jax.random.key(1), state, None)[1].acceptance > 0.9)
    True
    """

    target: LocalPosterior
    step_size: Real
    target_acceptance: Real = 0.574
    full_batch: ClassVar[bool] = True

    def init(self, key: Key[Array, ""], params: Params, batch: Batch) -> MetropolisState:
        """Start a chain at `params`, in float32 or better."""
        del key
        return start(self.target, params, batch, jnp.sqrt(jnp.asarray(self.step_size)))

    def adapt(self, key: Key[Array, ""], state: MetropolisState, batch: Batch) -> tuple[MetropolisState, Info]:
        """Make one transition, and learn step and metric from it."""
        state, info, squares, is_whole = self._transition(key, trial(self.target, state), batch)
        return learn(state, info.acceptance, self.target_acceptance, squares, is_whole), info

    def step(self, key: Key[Array, ""], state: MetropolisState, batch: Batch) -> tuple[MetropolisState, Info]:
        """Make one transition."""
        return self._transition(key, state, batch)[:2]

    def _transition(
        self, key: Key[Array, ""], state: MetropolisState, batch: Batch
    ) -> tuple[MetropolisState, Info, Params, Bool[Array, ""]]:
        step_key, momentum_key, test_key = jax.random.split(key, 3)
        time_step, is_whole = mixed_step(step_key, state.step_size)
        momentum = self.target.restrict(normal_like(momentum_key, state.params))
        here = Point(state.params, momentum, state.loss, state.gradient)
        there = leapfrog(self.target, state.scale, here, time_step, batch)
        probability: Float[Array, ""] = jnp.exp(-jnp.maximum(energy_error(self.target, here, there), 0.0))
        accepted = jax.random.uniform(test_key) < probability

        first, other = (
            (inspect(self.target, point.params, point.loss, point.gradient), jax.tree.map(jnp.square, point.gradient))
            for point in (here, there)
        )
        info, squares = blend(first, first, other, probability)
        chosen = select(accepted, there, here)
        state = state._replace(params=chosen.params, loss=chosen.loss, gradient=chosen.gradient)
        return state, info._replace(acceptance=probability), squares, is_whole

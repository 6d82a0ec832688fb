"""Hamiltonian Monte Carlo that reads every point of its trajectories."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Key

from slt_interp.data import Batch
from slt_interp.posterior import LocalPosterior
from slt_interp.samplers.hamiltonian import (
    MetropolisState,
    Point,
    Whitening,
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


@partial(
    register_dataclass,
    data_fields=["target", "step_size", "target_acceptance", "scale"],
    meta_fields=["num_leapfrog"],
)
@dataclass(frozen=True)
class HMC:
    """Sample by Hamiltonian trajectories on the full batch: no discretization bias, `num_leapfrog` gradients per step.

    A transition proposes the end of a trajectory, which carries chains furthest along slow directions. Each of its points would
    be a proposal as valid, taken with probability min(1, exp(-energy error)): `Info` averages over them what that step would
    read in the mean, which leaves expectations as they are; its acceptance is the mean of those probabilities. Steps are drawn
    at random, step_size the largest, so that no orbit closes on itself (see `hamiltonian.mixed_step`). Warm-up adapts the step
    and sigma; without it sigma is 1 and the step the given one.

    Args:
        target: the distribution to sample.
        step_size: the leapfrog step h, whose square plays the part of SGLD's epsilon; numpyro's and blackjax's step size
            with unit masses. Warm-up starts from it.
        num_leapfrog: leapfrog steps of a trajectory.
        target_acceptance: in warm-up, the mean of min(1, exp(-energy error)) over the points of whole-step trajectories.
        scale: sigma, like the weights, or a `Whitening`; step_size is then a multiple of it, and warm-up adapts the step alone.
            Not given, sigma is learned by each chain for itself.

    References:
        Neal (2011), MCMC using Hamiltonian dynamics, arXiv:1206.1901.
        Nishimura and Dunson (2020), Recycling intermediate steps to improve Hamiltonian Monte Carlo, arXiv:1511.06925.

    >>> target = LocalPosterior(lambda w, batch: 0.5 * jnp.sum(w**2), jnp.zeros(2), nbeta=1.0, localization=1.0)
    >>> kernel = HMC(target, step_size=0.1)
    >>> state = kernel.init(jax.random.key(0), jnp.zeros(2), None)
    >>> float(kernel.step(jax.random.key(1), state, None)[1].num_gradients)
    8.0
    """

    target: LocalPosterior
    step_size: Real
    num_leapfrog: int = 8
    target_acceptance: Real = 0.8
    scale: Params | Whitening | None = None
    full_batch: ClassVar[bool] = True

    def init(self, key: Key[Array, ""], params: Params, batch: Batch) -> MetropolisState:
        """Start a chain at `params`, in float32 or better."""
        del key
        return start(self.target, params, batch, self.step_size, has_metric=self.scale is not None)

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
        scale = state.scale if self.scale is None else self.scale
        first = inspect(self.target, here.params, here.loss, here.gradient), jax.tree.map(jnp.square, here.gradient)

        def advance(_: Array, carry: tuple) -> tuple:
            end, _, means, acceptance = carry
            end = leapfrog(self.target, scale, end, time_step, batch)
            probability = jnp.exp(-jnp.maximum(energy_error(self.target, here, end), 0.0))
            there = inspect(self.target, end.params, end.loss, end.gradient), jax.tree.map(jnp.square, end.gradient)
            means = blend(means, first, there, probability / self.num_leapfrog)
            return end, probability, means, acceptance + probability / self.num_leapfrog

        carry = here, jnp.zeros_like(time_step), first, jnp.zeros_like(time_step)
        end, probability, (info, squares), acceptance = jax.lax.fori_loop(0, self.num_leapfrog, advance, carry)
        chosen = select(jax.random.uniform(test_key) < probability, end, here)
        state = state._replace(params=chosen.params, loss=chosen.loss, gradient=chosen.gradient)
        info = info._replace(num_gradients=self.num_leapfrog * info.num_gradients, acceptance=acceptance)
        return state, info, squares, is_whole

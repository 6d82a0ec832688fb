"""Hamiltonian Monte Carlo that keeps every point of its trajectories."""

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

    A transition is a trajectory of num_leapfrog + 1 points in which the present one has a random place; the next state
    is one of them, drawn with weights exp(-energy). `Info` is averaged over all of them with those weights, which leaves
    expectations as they are and is worth many end points. Half of the trajectories take a smaller step at random (see
    `hamiltonian.mixed_step`). Warm-up adapts the step and sigma; without it sigma is 1 and the step the given one.

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
        Betancourt (2017), A conceptual introduction to Hamiltonian Monte Carlo, arXiv:1701.02434, appendix A.

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
        step_key, momentum_key, place_key, choice_key = jax.random.split(key, 4)
        time_step, is_whole = mixed_step(step_key, state.step_size)
        momentum = self.target.restrict(normal_like(momentum_key, state.params))
        here = Point(state.params, momentum, state.loss, state.gradient)
        num_backward = jax.random.randint(place_key, (), 0, self.num_leapfrog + 1)
        uniforms = jax.random.uniform(choice_key, (self.num_leapfrog,))
        scale = state.scale if self.scale is None else self.scale

        def measure(point: Point) -> tuple[Info, Params]:
            info = inspect(self.target, point.params, point.loss, point.gradient)
            return info, jax.tree.map(jnp.square, point.gradient)

        def advance(i: Array, carry: tuple) -> tuple:
            end, chosen, log_total, info, squares, acceptance = carry
            # First the points before the present one; then from the present one onward.
            end = select(i == num_backward, here, end)
            end = leapfrog(self.target, scale, end, jnp.where(i < num_backward, -time_step, time_step), batch)
            error = energy_error(self.target, here, end)
            log_total = jnp.logaddexp(log_total, -error)
            fraction = jnp.exp(-error - log_total)
            chosen = select(uniforms[i] < fraction, end, chosen)
            new_info, new_squares = measure(end)
            squares = jax.tree.map(lambda a, b: a + jnp.where(fraction > 0, fraction * (b - a), 0.0), squares, new_squares)
            acceptance = acceptance + jnp.exp(-jnp.maximum(error, 0.0)) / self.num_leapfrog
            return end, chosen, log_total, blend(info, new_info, fraction), squares, acceptance

        carry = (here, here, jnp.zeros_like(time_step), *measure(here), jnp.zeros_like(time_step))
        _, chosen, _, info, squares, acceptance = jax.lax.fori_loop(0, self.num_leapfrog, advance, carry)
        state = state._replace(params=chosen.params, loss=chosen.loss, gradient=chosen.gradient)
        info = info._replace(num_gradients=self.num_leapfrog * info.num_gradients, acceptance=acceptance)
        return state, info, squares, is_whole

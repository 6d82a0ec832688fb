"""Rounds: runs that double until an LLC's error bar is small and no check fails, or the budget is spent."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Key

from slt_interp.estimators.families import Families, top_rung
from slt_interp.estimators.llc import DO_NOT_TRUST, OK, LLCEstimate, keep_energy, llc
from slt_interp.estimators.rungs import REJECTED, burnin_steps, place_rungs
from slt_interp.posterior import LocalPosterior
from slt_interp.samplers.draws import Draws, keep_nothing, starting
from slt_interp.samplers.hamiltonian import MetropolisState, learned_scale
from slt_interp.samplers.hmc import HMC
from slt_interp.samplers.kernel import Info, Kernel
from slt_interp.tree import Params

FIRST_ROUND = 100
"""Draws of the first round."""


def in_rounds(
    run: Callable[..., Draws],
    key: Key[Array, ""],
    *,
    kernel: Kernel,
    steps: int,
    init_loss: float,
    precision: float,
    is_full: bool,
    num_warmup: int = 0,
    patience: int | None = None,
    gives_up: bool = False,
    start: Draws | None = None,
) -> tuple[LLCEstimate, Draws]:
    """Double the run until its error bar is small and no check fails, or `steps` are made, warm-up included.

    After `patience` steps flat directions may stay as they are, and if it `gives_up` a run that fails a check ends. Chains go
    on from `start`, which holds no draws, if it is given.
    """
    steps = max(1, steps - num_warmup)
    thinning = -(-steps // _MAX_DRAWS)
    last, num_draws = max(1, steps // thinning), FIRST_ROUND
    draws = None if start is None else replace(start, thinning=thinning)
    collect = keep_energy(kernel.target) if is_full else keep_nothing
    while True:
        num_draws = min(num_draws, last)
        draws = run(
            key,
            kernel,
            num_draws=num_draws,
            num_warmup=num_warmup,
            thinning=thinning,
            collect=collect,
            chunk_size=min(FIRST_ROUND, last) // 2 or 1,
            previous=draws,
        )
        settled, estimate = _without_burnin(draws, init_loss=init_loss)
        error = estimate.std_error
        is_late = patience is not None and draws.num_steps >= patience
        is_precise = error <= precision * abs(estimate.llc)
        if num_draws == last or (is_precise and estimate.status == OK):
            break
        if is_late and (gives_up if estimate.status == DO_NOT_TRUST else is_precise):
            break
        num_draws *= 2
    return estimate, settled


def ladder_in_rounds(
    key: Key[Array, ""],
    target: LocalPosterior,
    families: Families,
    init_loss: float,
    budget: float,
    precision: float,
) -> tuple[tuple[HMC, LLCEstimate, Draws] | None, float]:
    """Read the coldest rung of a ladder whose lowest one is the base measure, from two families of chains.

    The run doubles until its error bar is small and no check fails, or `budget` gradients per chain are spent, those that find
    the ladder included.

    Returns:
        The kernel of all rungs, the estimate and the draws of the coldest one, or None if the rungs are too many for the
        budget; and the gradients per chain that were spent.
    """
    place_key, run_key = jax.random.split(key)
    kernel, starts, spent = place_rungs(place_key, replace(target, localization=target.base), families, max_gradients=budget)
    if kernel is None:
        return None, spent
    rungs = np.size(kernel.target.nbeta)
    last = max(1, int((budget - spent) / (kernel.kernel.num_leapfrog * rungs)) - burnin_steps(kernel))
    num_draws, runs = FIRST_ROUND, None
    while True:
        num_draws = min(num_draws, last)
        runs = families.run(run_key, kernel, num_draws=num_draws, num_burnin=burnin_steps(kernel), previous=runs, starts=starts)
        settled, estimate = _without_burnin(*top_rung(runs, kernel, target), init_loss=init_loss)
        is_precise = estimate.std_error <= precision * abs(estimate.llc)
        if num_draws == last or (is_precise and estimate.status == OK):
            break
        num_draws *= 2
    spent += estimate.diagnostics["gradients_per_chain"]
    estimate.diagnostics["num_rungs"] = rungs
    return (kernel.kernel, estimate, settled), spent


def settle(run: Callable[..., Draws], key: Key[Array, ""], kernel: HMC, draws: Draws, num_steps: int) -> tuple[HMC, Draws, int]:
    """Go on from the ends of `draws`, and let the step suit the place that the chains have reached, in trials of equal length.

    Where most moves are rejected the metric was learned too near the center: sigma is learned anew, without directions, as
    those of one chain are not those of another.

    Returns:
        The kernel; where the chains are, without draws, for it to go on from; and the steps made, `num_steps` at most.
    """
    length = num_steps // _TRIALS
    is_unsuited, draws = False, _at_ends(draws, kernel)
    for trial in range(_TRIALS if length else 0):
        draws = run(
            jax.random.fold_in(key, trial),
            kernel,
            num_draws=length,
            chunk_size=length,
            collect=keep_gradient,
            previous=draws,
        )
        finite = np.flatnonzero(draws.is_finite)
        rejected = 1 - float(np.mean(np.asarray(draws.info.acceptance)[finite]))
        is_unsuited |= rejected > _UNSUITED
        if is_unsuited and trial < _TRIALS - 2:
            squares = jax.tree.map(lambda g, i=finite: jnp.mean(jnp.asarray(g[i]) ** 2, axis=(0, 1)), draws.collected)
            kernel = replace(kernel, scale=learned_scale(kernel.target, kernel.target.position(kernel.target.center), squares))
        # Of what is rejected the square root goes with the step.
        factor = min(2.0, np.sqrt(REJECTED / max(rejected, 1e-6)))
        kernel = replace(kernel, step_size=float(min(1.0, kernel.step_size * factor)))
        draws = _at_ends(draws, kernel)
    return kernel, draws, _TRIALS * length


def keep_gradient(state: MetropolisState, info: Info) -> Params:
    """Keep the gradient of the potential at every draw, a `collect` of `sample`."""
    del info
    return state.gradient


_MAX_DRAWS = 2500

_TRIALS, _UNSUITED = 6, 0.5
"""Trials of a step, and what is rejected where the metric suits another place."""


def _at_ends(draws: Draws, kernel: HMC) -> Draws:
    state = draws.state._replace(step_size=jnp.full_like(draws.state.step_size, kernel.step_size))
    return starting(kernel, state, draws.is_finite)


def _without_burnin(
    draws: Draws, is_from_base: Bool[np.ndarray, " chain"] | None = None, *, init_loss: float
) -> tuple[Draws, LLCEstimate]:
    """Drop the shortest of three parts of a run after which its halves agree."""
    for part in (8, 4, 2):
        cut = draws.loss.shape[1] // part
        settled = replace(
            draws,
            info=jax.tree.map(lambda x, cut=cut: x[:, cut:], draws.info),
            collected=jax.tree.map(lambda x, cut=cut: x[:, cut:], draws.collected),
            num_burnin=draws.num_burnin + cut * draws.thinning,
        )
        estimate = llc(settled, init_loss, is_from_base=is_from_base)
        if abs(estimate.diagnostics["drift"]) <= 2 * estimate.diagnostics["drift_std_error"]:
            break
    return settled, estimate

"""`estimate_llc`: a local learning coefficient with nothing to tune.

1. Localization from a window: weak enough not to take from the estimate, strong enough to stay near the weights.
2. On full batches Hamiltonian Monte Carlo, whose metric is learned by all chains together; on minibatches SGLD with a
   control variate, run again at half the step size.
3. Rounds, each of which doubles the run, until the error bar is small and no check fails, or the budget is spent. Where checks
   still fail at the first look after a fifth of it, a ladder of nbeta, whose draws enter thin arms of a singular set from the
   base measure, or, where the ladder would have too many rungs, long trajectories that go on from where the chains are.
   Burn-in is the shortest of three parts of the run after which nothing drifts.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from slt_interp.bases import BASES
from slt_interp.curvature.spectrum import Spectrum, estimate_spectrum
from slt_interp.data import BATCH_SIZE, MAX_FULL_BATCH, Batch, FullBatch, Minibatches, num_examples
from slt_interp.errors import InputError
from slt_interp.estimators.calibration import (
    customary_nbeta,
    local_window,
    predicted_step_bias,
    resolved_localization_effect,
    settled_step_size,
)
from slt_interp.estimators.families import Families
from slt_interp.estimators.llc import DO_NOT_TRUST, LLCEstimate, mean_loss
from slt_interp.estimators.rounds import in_rounds, keep_gradient, ladder_in_rounds, settle
from slt_interp.estimators.rungs import MAX_WHITENED
from slt_interp.posterior import LocalPosterior, LossFn, check_target
from slt_interp.samplers.chains import chain_mesh, sample
from slt_interp.samplers.draws import Draws, keep_nothing
from slt_interp.samplers.hamiltonian import Whitening, apply_metric, learned_metric, learned_scale, needs_directions
from slt_interp.samplers.hmc import HMC
from slt_interp.samplers.kernel import Kernel
from slt_interp.samplers.sgld import SGLD
from slt_interp.tree import Params, check_key, dimension, dot, norm


def estimate_llc(
    key: Key[Array, ""],
    loss_fn: LossFn,
    params: Params,
    data: Batch,
    *,
    nbeta: float | None = None,
    localization: float | None = None,
    kernel: Callable[[LocalPosterior], Kernel] | None = None,
    mask: PyTree[Array] | None = None,
    num_chains: int = 16,
    precision: float = 0.01,
    max_gradients: int | None = None,
    progress: bool = True,
) -> LLCEstimate:
    """Estimate the local learning coefficient at trained weights.

    Args:
        key: typed PRNG key.
        loss_fn: `(params, batch) -> scalar`, mean negative log-likelihood per example, nats.
        params: the trained weights w*, a pytree of floating arrays.
        data: a pytree of arrays with a leading example axis; None if the loss ignores its batch.
        nbeta: inverse temperature times n; n / log n by default, which needs data.
        localization: gamma, in squared inverse units of *your* weights, or a base measure. By default the weakest that keeps
            flat directions within 0.3 times the norm of the weights (`local_window`); 1 where weights are masked or all zero.
        kernel: maps the target to a kernel, as `functools.partial(SGLD, step_size=1e-5)`. By default, up to 8,192 examples,
            HMC on all of them, with a metric that all chains learn together; beyond that SGLD on 512 at random, with a
            control variate, at two step sizes.
        mask: which coordinates are sampled; see `LocalPosterior`.
        num_chains: independent chains; a ladder takes an even number, half of them from draws of the base measure.
        precision: standard error to reach, as a part of the estimate; above twice the default it is not called ok.
        max_gradients: gradients per chain at most, warm-up and the metric included; pilots that measure a kernel's cost or
            choose SGLD's step, and curvature, are not. By default 200,000 for at most 512 weights, and 20,000 for more.
        progress: whether to show progress bars.

    Returns:
        An `LLCEstimate`; `print` it. It is about E[nbeta (L - L*)] at its own nbeta and localization. `std_error` is Monte
        Carlo error; for SGLD, what the step is predicted to add is in `diagnostics["predicted_step_bias"]`.

    Raises:
        InputError, TypeError, ValueError: one sentence for what cannot be used; see `check_target`.

    >>> def loss_fn(w, batch): return 0.5 * jnp.sum(w**2)
    >>> estimate = estimate_llc(jax.random.key(0), loss_fn, jnp.ones(4) * 1e-3, None, nbeta=1000.0, progress=False)
    >>> estimate.status, abs(estimate.llc - 2.0) < 4 * estimate.std_error + 0.1
    ('ok', True)
    """
    check_key(key)
    count = None if data is None else num_examples(data)
    nbeta = customary_nbeta(count) if nbeta is None else nbeta
    for name, value in (("nbeta", nbeta), ("precision", precision)):
        if not np.all(np.asarray(value) > 0):
            hint = "n / log n is customary" if name == "nbeta" else "0.01 is the default"
            raise InputError(f"{name} must be positive, but is {value}: {hint}")
    budget = _BUDGETS[dimension(params) > MAX_WHITENED] if max_gradients is None else max_gradients
    if budget < 1:
        raise InputError(f"max_gradients must be at least 1, but is {max_gradients}: leave it out for the default")
    names = ("chains", "pilot", "spectrum", "step", "bias", "batch", "long", "settle")
    keys: dict[str, Key[Array, ""]] = dict(zip(names, jax.random.split(key, len(names)), strict=True))
    target = LocalPosterior(loss_fn, params, nbeta, 1.0 if localization is None else localization, mask)
    check_target(target, params, data)
    init_loss, _ = mean_loss(loss_fn, params, data)
    if not np.isfinite(init_loss):
        raise InputError(f"the loss is not finite at params, but {init_loss}: check loss_fn there")
    is_small = count is None or count <= MAX_FULL_BATCH
    spectrum, notes = None, []
    if mask is None and not isinstance(target.localization, BASES):
        seen = data if is_small else Minibatches(data, MAX_FULL_BATCH)(keys["batch"])
        sizes = {"num_matvecs": min(_MATVECS, dimension(params)), "num_probes": min(_PROBES, dimension(params))}
        spectrum = estimate_spectrum(keys["spectrum"], loss_fn, params, seen, **sizes)
        if localization is None:
            window = local_window(spectrum, float(nbeta), float(norm(params)))
            target = replace(target, localization=window.localization)
            notes = [window.note] if window.note else []
    chosen = None if kernel is None else kernel(target)
    is_full = is_small or (chosen is not None and chosen.full_batch)
    batches = FullBatch(data) if is_full else Minibatches(data, BATCH_SIZE)
    run = partial(sample, params=params, batches=batches, num_chains=num_chains, mesh=chain_mesh(num_chains), progress=progress)
    rounds = partial(in_rounds, init_loss=init_loss, precision=precision, is_full=is_full)
    if chosen is not None:
        per_step = 1.0
        if chosen.full_batch:
            # Some take many gradients per step, and NUTS as many as it likes.
            pilot = run(keys["pilot"], chosen, num_draws=1, num_warmup=_PILOT_STEPS)
            per_step = float(np.mean(pilot.num_gradients)) / pilot.num_steps
        steps = int(budget / per_step)
        estimate, draws = rounds(run, keys["chains"], kernel=chosen, steps=steps, num_warmup=steps // 8)
    elif is_full:
        families = Families(params, data, num_chains // 2, progress)
        chosen, estimate, draws, slope = _by_hmc(run, rounds, keys, target, families, budget, precision)
        notes += _slope_note(slope, estimate)
    else:
        target = target.with_control_variate(data)
        step_size = settled_step_size(keys["step"], target, params, batches)
        chosen = SGLD(target, step_size / 2)
        # A control variate takes a second gradient. Half a step goes half as far: twice as many.
        first, _ = rounds(run, keys["long"], kernel=SGLD(target, step_size), steps=budget // 6)
        estimate, draws = rounds(run, keys["chains"], kernel=chosen, steps=budget // 3)
        estimate.diagnostics["gradients_per_chain"] += first.diagnostics["gradients_per_chain"]
        estimate = _with_whole_step(estimate, first)
    if isinstance(chosen, SGLD) and not chosen.leimkuhler_matthews:
        finite = jax.tree.map(lambda x: x[np.flatnonzero(draws.is_finite)], draws.state.params)
        steps = jnp.arange(draws.num_warmup + draws.num_burnin, draws.num_steps)
        step_size = float(jnp.mean(jax.vmap(chosen.step_size_at)(steps)))
        bias = predicted_step_bias(keys["bias"], chosen.target, step_size, finite, batches(keys["batch"]))
        estimate = _with_step_bias(estimate, bias)
    if spectrum is not None:
        estimate = _with_localization_effect(estimate, spectrum)
    estimate = _with_error_limit(estimate)
    return replace(estimate, warnings=(*estimate.warnings, *notes))


_MATVECS, _PROBES = 64, 2

_BUDGETS = 200_000, 20_000
"""Up to that dimension, and above."""

_NUM_LEAPFROG, _LONG_LEAPFROG = 8, (128, 256)
"""Up to `MAX_WHITENED` weights, and above. The narrowest of many thin arms limits the step of all: what crosses an arm in one
trajectory does so in as many gradients as its length has widths, short ones take the square of that."""

_MIN_LONG = 20
"""Fewer long trajectories than this are not worth a change."""

_SETTLING_PART = 5
"""One of so many parts of the long trajectories is spent on their step."""

_METRIC_PART, _MAX_METRIC = 10, 2000
"""The metric is learned in one of so many parts of the budget, and in at most so many gradients."""

_PATIENCE = 5
"""After one of so many parts of the budget a run whose checks still fail is given up for longer trajectories."""

_SCATTER_PER_RUNG, _MORE_RUNGS = 1 / 1.4, 4
"""A ladder has a rung for so many standard deviations of nbeta L, and a few more."""

_MIN_LADDER_DRAWS = 1500

_PILOT_STEPS = 20

_ERROR_LIMIT = 0.02
_STEP_BIAS_LIMIT = 0.03
_LOCALIZATION_LIMIT = 0.02
_SLOPE_LIMIT = 0.02


def _by_hmc(
    run: Callable[..., Draws],
    rounds: Callable[..., tuple[LLCEstimate, Draws]],
    keys: dict[str, Key[Array, ""]],
    target: LocalPosterior,
    families: Families,
    budget: int,
    precision: float,
) -> tuple[HMC, LLCEstimate, Draws, float]:
    """Run HMC on full batches; where checks fail for long, go on otherwise. Also return the slope of `_learn_metric`.

    A ladder of temperatures enters the thin arms and flat directions of a singular set from the base measure. It has about
    sqrt(LLC) log nbeta rungs: where they are too many for the budget, long trajectories take its place.
    """
    learning = max(1, min(budget // _METRIC_PART, _MAX_METRIC) // _NUM_LEAPFROG)
    kernel, slope = _learn_metric(partial(run, keys["pilot"]), target, families.data, learning)
    spent = learning * _NUM_LEAPFROG
    steps, patience = (budget - spent) // _NUM_LEAPFROG, budget // _PATIENCE // _NUM_LEAPFROG
    long = _LONG_LEAPFROG[dimension(target.center) > MAX_WHITENED]
    can_turn = budget >= 2 * long * _MIN_LONG
    estimate, draws = rounds(run, keys["chains"], kernel=kernel, steps=steps, patience=patience, gives_up=can_turn)
    spent += estimate.diagnostics["gradients_per_chain"]
    # Where the loss falls away from the center nothing helps.
    if can_turn and estimate.status == DO_NOT_TRUST and estimate.llc > 0:
        rungs, found = _SCATTER_PER_RUNG * np.sqrt(estimate.llc) * np.log(max(np.e, estimate.nbeta)) + _MORE_RUNGS, None
        if families.num_chains > 1 and (budget - spent) / _NUM_LEAPFROG / rungs >= _MIN_LADDER_DRAWS:
            found, more = ladder_in_rounds(keys["long"], target, families, estimate.init_loss, budget - spent, precision)
            spent += more
        if found is not None:
            kernel, estimate, draws = found
        elif (left := int((budget - spent) / long)) >= _MIN_LONG:
            kernel, draws, settling = settle(
                run, keys["settle"], replace(kernel, num_leapfrog=long), draws, left // _SETTLING_PART
            )
            estimate, draws = rounds(run, keys["long"], kernel=kernel, steps=left - settling, patience=0, start=draws)
            spent += settling * long + estimate.diagnostics["gradients_per_chain"]
    estimate.diagnostics["gradients_per_chain"] = spent
    return kernel, estimate, draws, slope


def _learn_metric(run: Callable[..., Draws], target: LocalPosterior, data: Batch, num_steps: int) -> tuple[HMC, float]:
    """Let all chains learn one metric and one step size: a chain's own would suit the place where it warmed up.

    Half of the steps learn each chain's own, the others collect gradients for the common one.

    Returns:
        The kernel, and nbeta^2 / 2 |M g|^2 for the gradient g of the loss at the center and the metric M: by so much nbeta L
        falls near it, to second order.
    """
    kernel, center = HMC(target, 0.1, num_leapfrog=_NUM_LEAPFROG), target.position(target.center)
    is_large = dimension(center) > MAX_WHITENED
    collecting = 0 if is_large else num_steps // 2
    draws = run(
        kernel,
        num_warmup=num_steps - collecting,
        num_draws=collecting,
        chunk_size=max(1, collecting),
        collect=keep_nothing if is_large else keep_gradient,
    )
    finite = np.flatnonzero(draws.is_finite)
    step_size = np.exp(np.mean(np.log(np.asarray(draws.state.step_size)[finite])))
    if collecting:
        gradients = jax.tree.map(lambda x: x[finite].reshape(-1, *x.shape[2:]), draws.collected)
        whitened, allowed = learned_metric(target, center, gradients)
        metric = whitened.scale
        if needs_directions(whitened):
            metric, step_size = whitened, min(1.0, step_size * allowed)
    else:
        squares = jax.tree.map(lambda x: np.asarray(x)[finite].mean(axis=0), draws.state.adaptation.squares)
        metric = learned_scale(target, center, squares)
    return replace(kernel, step_size=float(step_size), scale=metric), float(_fall(target, metric, center, data))


@jax.jit
def _fall(target: LocalPosterior, metric: Params | Whitening, params: Params, data: Batch) -> Float[Array, ""]:
    """Compute by how much U falls along its gradient, to second order, where its curvature in this metric is 1."""
    steepest = apply_metric(target, metric, target.value_and_grad(params, data)[1])
    return 0.5 * dot(steepest, steepest)


def _slope_note(slope: float, estimate: LLCEstimate) -> list[str]:
    if slope <= _SLOPE_LIMIT * abs(estimate.llc):
        return []
    return [
        f"the gradient at the center is not small: to second order nbeta times the loss falls by {slope:.2g} along it, and the "
        "estimate is that much smaller than at the minimum; polish the weights"
    ]


def _with_whole_step(estimate: LLCEstimate, first: LLCEstimate) -> LLCEstimate:
    """Compare with the run at twice the step size."""
    change, error = first.llc - estimate.llc, float(np.hypot(first.std_error, estimate.std_error))
    extrapolated = estimate.llc - change, float(np.hypot(2 * estimate.std_error, first.std_error))
    companions = {**estimate.companions, "twice the step": (first.llc, first.std_error), "Richardson": extrapolated}
    if abs(change) <= max(3 * error, _STEP_BIAS_LIMIT * abs(estimate.llc)):
        return replace(estimate, companions=companions)
    warning = f"at twice the step size the estimate is {first.llc:.4g}: take a smaller step_size, with max_gradients raised"
    return replace(estimate, companions=companions, warnings=(*estimate.warnings, warning), status=DO_NOT_TRUST)


def _with_step_bias(estimate: LLCEstimate, bias: float) -> LLCEstimate:
    """Add what discretization is predicted to add, with a warning where the error bar does not cover it."""
    diagnostics = {**estimate.diagnostics, "predicted_step_bias": bias}
    if abs(bias) <= max(estimate.std_error, 1e-3 * abs(estimate.llc)):
        return replace(estimate, diagnostics=diagnostics)
    warning = (
        f"discretization is predicted to add {bias:+.2g} to the estimate (minibatch noise not counted), which the error bar "
        "does not show: take a smaller step_size, with max_gradients raised in proportion"
    )
    severe = abs(bias) > _STEP_BIAS_LIMIT * abs(estimate.llc)
    return replace(
        estimate,
        diagnostics=diagnostics,
        warnings=(*estimate.warnings, warning),
        status=DO_NOT_TRUST if severe else estimate.status,
    )


def _with_error_limit(estimate: LLCEstimate) -> LLCEstimate:
    """Do not trust an estimate whose error bar is wide."""
    if not estimate.std_error > _ERROR_LIMIT * abs(estimate.llc):
        return estimate
    part = estimate.std_error / abs(estimate.llc) if estimate.llc else np.inf
    warning = (
        f"the standard error is {part:.1%} of the estimate: raise max_gradients, or lower precision if that stopped the run"
    )
    return replace(estimate, warnings=(*estimate.warnings, warning), status=DO_NOT_TRUST)


def _with_localization_effect(estimate: LLCEstimate, spectrum: Spectrum) -> LLCEstimate:
    """Add what localization takes where curvature resolves it, and say where the estimate depends on it otherwise."""
    bias, slope = resolved_localization_effect(spectrum, estimate.nbeta, estimate.localization)
    diagnostics = {**estimate.diagnostics, "predicted_localization_bias": bias}
    warnings = estimate.warnings
    if "localization doubled" in estimate.companions:
        value, error = estimate.companions["localization doubled"]
        unexplained = value - estimate.llc - np.log(2) * slope
        if abs(unexplained) > max(3 * error, _LOCALIZATION_LIMIT * abs(estimate.llc)):
            warnings += (
                f"the estimate depends on the localization: at twice as much it would be about {value:.4g} +- {error:.2g}; it "
                "is right for this localization, but further from the learning coefficient than its error bar",
            )
    return replace(estimate, diagnostics=diagnostics, warnings=warnings)

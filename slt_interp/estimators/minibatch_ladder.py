"""A ladder of temperatures on data that are too many for every step: SGLD on minibatches, one rung after the other.

No swap can be decided without the loss on all data, so that rungs are run by themselves, from the base downward. One family of
chains starts at each rung where it ended on the last, at first at draws of the base; the other at the trained weights. The loss
on all data is computed for the draws that are kept, and everything is read from these as where neighbors swap. What SGLD's step
adds to energies is predicted, and part of every error.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from slt_interp.data import BATCH_SIZE, MAX_FULL_BATCH, Batch, Minibatches, mean_over_blocks, num_examples
from slt_interp.errors import InputError
from slt_interp.estimators.calibration import predicted_noise_bias, predicted_step_bias, settled_step_size
from slt_interp.estimators.ladder import Ladder
from slt_interp.estimators.rounding import loss_rounding
from slt_interp.estimators.rungs import GROWTH, MAX_RUNGS, SCATTER, first_rung
from slt_interp.posterior import LocalPosterior
from slt_interp.samplers.chains import chain_mesh, sample
from slt_interp.samplers.draws import Draws, starting
from slt_interp.samplers.kernel import Info
from slt_interp.samplers.sgld import SGLD, SGLDState
from slt_interp.tree import Params, dimension, dot


class _Reading(NamedTuple):
    """What is kept of a draw: the loss on all data, |w - w*|^2, and weights and label if they are wanted."""

    loss: Float[Array, ""]
    squared_distance: Float[Array, ""]
    params: Params | None
    labels: Int[Array, ""] | None


def minibatch_ladder(
    key: Key[Array, ""],
    target: LocalPosterior,
    params: Params,
    data: Batch,
    init_loss: float,
    *,
    num_chains: int,
    num_draws: int,
    keep_params: bool,
    labels: Callable[[Params], Int[Array, ""]] | None,
    progress: bool,
    checkpoint: Path | None,
) -> Ladder:
    """Sample rungs up to the nbeta of `target` by SGLD with a control variate; see `temper` for what is the same.

    A draw takes as many steps as use half of the data, and its loss all of them once; a quarter as many as are kept come before
    the first. The next rung lies 1.4 standard deviations of nbeta L further, and triples nbeta at most.

    Raises:
        InputError: if the rungs become more than 400.

    References:
        Baker et al. (2019), Control variates for stochastic gradient MCMC, arXiv:1706.05439.
    """
    first_key, seen_key, base_key, rungs_key = jax.random.split(key, 4)
    top, half = float(np.asarray(target.nbeta)), num_chains // 2
    batches, position = Minibatches(data, BATCH_SIZE), target.position(params)
    collect = jax.tree_util.Partial(_Read(keep_params, labels), target, data)
    run = partial(
        sample,
        params=params,
        batches=batches,
        num_chains=half,
        num_draws=num_draws,
        thinning=-(-num_examples(data) // (2 * BATCH_SIZE)),
        collect=collect,
        mesh=chain_mesh(half),
        progress=progress,
    )
    base_keys = jax.random.split(base_key, (num_chains, num_draws))
    found = [jax.tree.map(np.asarray, _read_base(collect, target, position, base_keys))]
    seen = Minibatches(data, MAX_FULL_BATCH)(seen_key)
    nbeta = min(first_rung(first_key, target, params, seen, top), top / GROWTH**3)
    nbetas, biases, gradients, is_finite = [0.0], [0.0], 0.0, np.ones(num_chains, bool)
    starts = _base_draws(target, position, base_keys[:half, 0])
    # No step leads away from where the loss is infinite.
    starts = jax.tree.map(
        lambda x, w: jnp.where(np.isfinite(found[0].loss[:half, 0]).reshape(-1, *[1] * w.ndim), x, w), starts, position
    )
    controlled = target.with_control_variate(data)
    while nbetas[-1] < top:
        if len(nbetas) > MAX_RUNGS:
            raise InputError(
                f"more than {MAX_RUNGS} rungs reach nbeta {nbeta:.3g} only, of {top:.3g}: narrow the base measure, or end at a "
                "smaller nbeta"
            )
        step_key, bias_key, batch_key, noise_key, *run_keys = jax.random.split(jax.random.fold_in(rungs_key, len(nbetas)), 6)
        rung = replace(controlled, nbeta=nbeta)
        step_size = settled_step_size(step_key, rung, params, batches)
        kernel = SGLD(rung, step_size)
        center = jax.tree.map(lambda w: jnp.broadcast_to(w, (half, *w.shape)), position)
        runs = [
            _run_from(
                run,
                run_key,
                kernel,
                start,
                num_burnin=num_draws // 4 * run.keywords["thinning"],
                # Of as many draws: with more, rungs are others.
                checkpoint=checkpoint and checkpoint / f"{num_draws}-draws" / f"rung-{len(nbetas)}" / name,
            )
            for name, run_key, start in zip(("base", "weights"), run_keys, (starts, center), strict=True)
        ]
        starts = runs[0].state.params
        nbetas.append(nbeta)
        found.append(jax.tree.map(lambda *x: np.concatenate(x), *(draws.collected for draws in runs)))
        # From where the loss on all data is infinite no gradient leads back.
        is_finite &= np.concatenate([draws.is_finite for draws in runs]) & np.isfinite(found[-1].loss).all(axis=1)
        families = np.split(is_finite, 2)
        for family, kept in zip(("draws of the base", "the weights"), families, strict=True):
            if not kept.any():
                raise InputError(
                    f"all chains from {family} became non-finite up to nbeta {nbeta:.3g}: narrow the base measure, or take more"
                )
        # The mean over chains is of those that are not lost.
        ends = jax.tree.map(lambda *x, kept=is_finite: jnp.concatenate(x)[kept], *(draws.state.params for draws in runs))
        bias = predicted_step_bias(bias_key, rung, step_size, ends, batches(batch_key))
        biases.append(bias + predicted_noise_bias(noise_key, rung, step_size, ends, batches))
        gradients += float(np.mean([draws.num_gradients.mean() for draws in runs]))
        losses = np.split(found[-1].loss, 2)
        scatter = nbeta * np.sqrt(np.mean([np.var(x[kept]) for x, kept in zip(losses, families, strict=True)]))
        nbeta = min(top, nbeta * float(np.exp(SCATTER / max(scatter, SCATTER / np.log(GROWTH)))))
    # A chain that was lost at one rung has no start at the next.
    readings = jax.tree.map(lambda *x: np.stack(x)[:, is_finite], *found)
    loss = readings.loss.astype(np.float64)
    levels = np.array(nbetas)
    overlap = np.exp(np.minimum(0.0, np.diff(levels)[:, None, None] * np.diff(loss, axis=0)))
    return Ladder(
        nbetas=levels,
        loss=loss,
        mean_loss=loss,
        squared_distance=readings.squared_distance,
        virial=None,
        is_from_base=(np.arange(num_chains) < half)[is_finite],
        replica=None,
        exchange=overlap.mean(axis=(1, 2)),
        init_loss=init_loss,
        rounding=float(loss_rounding(target, ends, data, MAX_FULL_BATCH)),
        base=target.base,
        dimension=dimension(params),
        params=readings.params,
        num_lost=int(np.sum(~is_finite)),
        gradients_per_chain=gradients,
        labels=readings.labels,
        step_bias=np.array(biases),
    )


def _run_from(run: Callable[..., Draws], key: Key[Array, ""], kernel: SGLD, starts: Params, **settings: Any) -> Draws:
    """Run chains from weights of their own, (chain, ...)."""
    num_chains = len(jax.tree.leaves(starts)[0])
    state = SGLDState(jax.tree.map(jnp.asarray, starts), jnp.zeros(num_chains, int), None)
    return run(key, kernel, previous=starting(kernel, state, np.ones(num_chains, bool)), **settings)


@dataclass(frozen=True)
class _Read:
    """Equal for equal settings, so that every rung runs the same program."""

    keep_params: bool
    labels: Callable[[Params], Array] | None

    def __call__(self, target: LocalPosterior, data: Batch, state: SGLDState, info: Info) -> _Reading:
        del info
        displacement = target.displacement(state.params)
        loss = mean_over_blocks(lambda batch: target.loss(state.params, batch), data, MAX_FULL_BATCH)
        return _Reading(
            jnp.where(jnp.isnan(loss), jnp.inf, loss),
            dot(displacement, displacement),
            state.params if self.keep_params else None,
            None if self.labels is None else self.labels(state.params),
        )


@jax.jit
def _base_draws(target: LocalPosterior, position: Params, keys: Key[Array, " draw"]) -> Params:
    return jax.vmap(lambda key: target.base.sample(key, position))(keys)


@jax.jit
def _read_base(
    collect: Callable[..., _Reading], target: LocalPosterior, position: Params, keys: Key[Array, "chain draw"]
) -> _Reading:
    """Read draws of the base one at a time: together they may be more weights than there is memory for."""

    def one(key: Key[Array, ""]) -> _Reading:
        return collect(SGLDState(target.base.sample(key, position), jnp.zeros((), int), None), None)

    return jax.lax.map(lambda row: jax.lax.map(one, row), keys)

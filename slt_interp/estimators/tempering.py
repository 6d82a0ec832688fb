"""`temper`: draws at a ladder of temperatures, from the base measure to a large nbeta, with nothing to tune.

The rungs, their metrics and steps are those of `place_rungs`; two families of chains, one from draws of the base and one from
the trained weights, run on them and never meet.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Int, Key

from slt_interp.bases import BASES, Base, FloatGrid
from slt_interp.data import BATCH_SIZE, MAX_FULL_BATCH, Batch, is_large, mean_over_blocks, num_examples
from slt_interp.errors import InputError
from slt_interp.estimators.families import Families, joined
from slt_interp.estimators.ladder import Ladder
from slt_interp.estimators.minibatch_ladder import minibatch_ladder
from slt_interp.estimators.reference import descend
from slt_interp.estimators.rounding import loss_rounding
from slt_interp.estimators.rungs import burnin_steps, place_rungs
from slt_interp.estimators.volume_estimate import check_labels
from slt_interp.posterior import LocalPosterior, LossFn, check_target
from slt_interp.samplers.draws import Draws
from slt_interp.samplers.exchange import ReplicaExchange, keep_rungs
from slt_interp.tree import Params, check_key, dimension


def temper(
    key: Key[Array, ""],
    loss_fn: LossFn,
    params: Params,
    data: Batch,
    *,
    base: Base,
    max_nbeta: float,
    num_chains: int = 8,
    num_draws: int = 400,
    keep_params: bool = False,
    labels: Callable[[Params], Int[Array, ""]] | None = None,
    progress: bool = True,
    checkpoint: str | Path | None = None,
) -> Ladder:
    """Sample exp(-nbeta L) base(w) at rungs from nbeta = 0 to `max_nbeta`, by HMC with replica exchange on all data.

    On more than 8,192 examples rungs are run one after the other by SGLD on minibatches of 512, with a control variate and
    without swaps; errors then cover what its step is predicted to add (see `minibatch_ladder` for the cost).

    HMC costs 8 gradients per chain, rung and step, or 32 of more than 512 weights. Before any draw is kept come, for each rung,
    a pilot of 1,200 gradients on fewer rungs, 3,200 by which half of the chains are annealed from the base to the coldest rung,
    trials of 800 to 1,200 (more in many dimensions), and 16 for each rung of the ladder (32). A descent of at most 200 steps
    from the weights, before all that, finds the loss that energies are counted from.

    Args:
        key: typed PRNG key.
        loss_fn: `(params, batch) -> scalar`, mean negative log-likelihood per example, nats.
        params: the trained weights w*, a pytree of floating arrays.
        data: a pytree of arrays with a leading example axis; None if the loss ignores its batch. With more than 8,192 examples
            the loss must be a mean over them.
        base: a probability measure on the weights: `Gaussian`, `Box` or `Ball`.
        max_nbeta: the coldest rung; a volume at threshold eps needs about LLC / eps.
        num_chains: chains, an even number: half start at draws of the base, half at `params`.
        num_draws: steps of the whole ladder that are kept.
        keep_params: keep the weights of every rung and draw: they are what probes need, and memory.
        labels: `(params) -> int`, computed on every draw, splits volumes; see `Ladder.log_volume_by_label`.
        progress: whether to show progress bars.
        checkpoint: a directory for draws and resumption, as in `sample`; on minibatches more draws are another run.

    Returns:
        A `Ladder`; `print` it for the verdict.

    Raises:
        InputError, TypeError, ValueError: one sentence for what cannot be used; see `check_target`.

    >>> import jax.numpy as jnp
    >>> from slt_interp import Gaussian
    >>> def loss_fn(w, batch): return 0.5 * jnp.sum(w**2)
    >>> ladder = temper(jax.random.key(0), loss_fn, jnp.zeros(2), None, base=Gaussian(0.0, 1.0), max_nbeta=100.0, num_draws=100,
    ...                 progress=False)
    >>> volume = ladder.log_volume([0.1])
    >>> bool(abs(volume.log_volume[0] - np.log(1 - np.exp(-0.1))) < 4 * volume.std_error[0])
    True
    """
    return next(
        ladders(
            key,
            loss_fn,
            params,
            data,
            base=base,
            max_nbeta=max_nbeta,
            num_chains=num_chains,
            num_draws=num_draws,
            keep_params=keep_params,
            labels=labels,
            progress=progress,
            checkpoint=checkpoint,
        )
    )


def ladders(
    key: Key[Array, ""],
    loss_fn: LossFn,
    params: Params,
    data: Batch,
    *,
    base: Base,
    max_nbeta: float,
    num_chains: int,
    num_draws: int,
    keep_params: bool = False,
    labels: Callable[[Params], Int[Array, ""]] | None = None,
    progress: bool = True,
    checkpoint: str | Path | None = None,
) -> Iterator[Ladder]:
    """Yield the ladder of `temper`, and then one with twice the draws each time, for as long as more are asked for.

    Without minibatches it is the same ladder, and begins with the draws before.
    """
    check_key(key)
    if isinstance(base, FloatGrid):
        raise InputError("a FloatGrid counts numbers and has no density to temper: call estimate_volume with method='subset'")
    if not isinstance(base, BASES):
        raise InputError(f"base must be a Gaussian, Box or Ball, but is {type(base).__name__}")
    if not (np.isfinite(max_nbeta) and max_nbeta > 0):
        raise InputError(f"max_nbeta must be positive and finite, but is {max_nbeta}: a volume at eps needs about LLC / eps")
    if num_draws < 4:
        raise InputError(f"num_draws must be at least 4, but is {num_draws}: 400 is the default")
    if num_chains < 4 or num_chains % 2:
        raise InputError(f"num_chains must be even and at least 4, but is {num_chains}: two families need an error each")
    target = LocalPosterior(loss_fn, params, float(max_nbeta), base)
    check_target(target, params, data)
    if labels is not None:
        check_labels(labels, target.position(params))
    # Without minibatches the loss need not be a mean over examples.
    block_size = MAX_FULL_BATCH if is_large(data) else None
    init_loss = float(mean_over_blocks(partial(target.loss, target.position(params)), data, block_size))
    if not np.isfinite(init_loss):
        raise InputError(f"the loss is not finite at params, but {init_loss}: check loss_fn there")
    descent = descend(target, params, data, block_size)
    # Of all data, where a step on minibatches takes one of a batch.
    shared = descent.num_gradients / num_chains * (1 if block_size is None else num_examples(data) / BATCH_SIZE)
    place_key, run_key = jax.random.split(key)
    folder = None if checkpoint is None else Path(checkpoint)
    if block_size is not None:
        settings = {"num_chains": num_chains, "keep_params": keep_params, "labels": labels, "progress": progress}
        spent = shared
        while True:
            # Its rungs are found on the way: with more draws they are others, and all are run again.
            ladder = minibatch_ladder(
                run_key, target, params, data, init_loss, num_draws=num_draws, checkpoint=folder, **settings
            )
            spent += ladder.gradients_per_chain
            yield replace(ladder, gradients_per_chain=spent, descent=descent)
            num_draws *= 2
    families = Families(params, data, num_chains // 2, progress)
    kernel, starts, spent = place_rungs(place_key, target, families, folder)
    assert kernel is not None, "without a limit there is always a ladder"
    runs = None
    collect = keep_rungs(kernel.target, keep_params=keep_params, labels=labels)
    while True:
        runs = families.run(
            run_key,
            kernel,
            num_draws=num_draws,
            num_burnin=burnin_steps(kernel),
            starts=starts,
            # What is on disk goes on by itself.
            previous=runs if folder is None else None,
            collect=collect,
            checkpoint=folder and folder / "run",
        )
        yield replace(_ladder(kernel, runs, data, init_loss, shared + spent), descent=descent)
        num_draws *= 2


def _ladder(kernel: ReplicaExchange, runs: tuple[Draws, Draws], data: Batch, init_loss: float, spent: float) -> Ladder:
    readings = joined(runs, lambda draws: draws.collected)

    def by_rung(array: np.ndarray) -> np.ndarray:
        return np.moveaxis(array, 2, 0)

    loss = by_rung(readings.loss).astype(np.float64)
    sizes = [int(draws.is_finite.sum()) for draws in runs]
    is_bounded = kernel.target.base.is_bounded
    coldest = jax.tree.map(lambda x: x[:, -1], joined(runs, lambda draws: draws.state.params))
    return Ladder(
        nbetas=np.asarray(kernel.target.nbeta, np.float64),
        loss=loss,
        mean_loss=by_rung(joined(runs, lambda draws: draws.info.loss)).astype(np.float64),
        squared_distance=by_rung(readings.squared_distance).astype(np.float64),
        virial=None if is_bounded else by_rung(joined(runs, lambda draws: draws.info.virial)).astype(np.float64),
        is_from_base=np.arange(sum(sizes)) < sizes[0],
        replica=by_rung(readings.replica),
        exchange=readings.exchange.mean(axis=(0, 1), dtype=np.float64),
        init_loss=init_loss,
        rounding=float(loss_rounding(kernel.target, coldest, data)),
        base=kernel.target.base,
        dimension=dimension(kernel.target.center),
        params=jax.tree.map(by_rung, readings.params),
        num_lost=sum(len(draws.is_finite) for draws in runs) - sum(sizes),
        gradients_per_chain=spent + float(np.mean([draws.num_gradients.mean() for draws in runs])),
        labels=jax.tree.map(by_rung, readings.labels),
    )

"""The grid of step sizes, nbetas and localizations that people plot to see where an LLC estimate holds still."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from slt_interp.data import Batch, FullBatch, num_examples
from slt_interp.errors import InputError
from slt_interp.estimators.llc import llc, mean_loss
from slt_interp.posterior import LocalPosterior, LossFn, check_target
from slt_interp.samplers.advance import advance, start
from slt_interp.samplers.draws import Draws, keep_nothing
from slt_interp.samplers.sgld import SGLD
from slt_interp.tree import Params, check_key

Grid = Float[np.ndarray, "step_size nbeta localization"]


@dataclass(frozen=True)
class Sweep:
    """SGLD's LLC over a grid, with the axes (step_size, nbeta, localization).

    Attributes:
        step_sizes, nbetas, localizations: the grid.
        llc: estimates; NaN where no chain stayed finite.
        std_error: their Monte Carlo standard errors.
        status: the verdict of each; "diverged" where no chain stayed finite.
    """

    step_sizes: Float[np.ndarray, " step_size"]
    nbetas: Float[np.ndarray, " nbeta"]
    localizations: Float[np.ndarray, " localization"]
    llc: Grid
    std_error: Grid
    status: np.ndarray


def calibration_sweep(
    key: Key[Array, ""],
    loss_fn: LossFn,
    params: Params,
    data: Batch,
    *,
    step_sizes: Any,
    nbetas: Any,
    localizations: Any,
    num_chains: int = 4,
    num_draws: int = 200,
    num_burnin: int = 200,
    thinning: int = 1,
) -> Sweep:
    """Estimate the LLC by SGLD on the full batch at every point of a grid: one compiled program, vmapped over the grid.

    A plateau, over which the estimate depends on none of the three, is what the field looks for by eye. Every point
    starts from the same key.

    Args:
        key: typed PRNG key.
        loss_fn: `(params, batch) -> scalar`, nats per example.
        params: the trained weights.
        data: a pytree of arrays with a leading example axis, or None.
        step_sizes: of SGLD; one axis of the grid.
        nbetas: another axis.
        localizations: the third.
        num_chains: chains per point.
        num_draws: draws per chain.
        num_burnin: steps dropped.
        thinning: steps per draw.

    >>> sweep = calibration_sweep(jax.random.key(0), lambda w, batch: 0.5 * jnp.sum(w**2), jnp.zeros(2), None,
    ...                           step_sizes=[1e-4, 1e-1], nbetas=[100.0], localizations=[1.0])
    >>> sweep.status.ravel().tolist()
    ['do not trust', 'diverged']
    """
    check_key(key)
    if data is not None:
        num_examples(data)
    axes = [np.asarray(values, np.float64) for values in (step_sizes, nbetas, localizations)]
    for name, values in zip(("step_sizes", "nbetas", "localizations"), axes, strict=True):
        if values.ndim != 1 or not np.all(values > 0) or not len(values):
            raise InputError(f"{name} must be a list of positive numbers, but is {values.tolist()}")
    check_target(LocalPosterior(loss_fn, params, axes[1][0], axes[2][0]), params, data)
    grid = jnp.asarray(np.stack([x.ravel() for x in np.meshgrid(*axes, indexing="ij")], axis=1), jnp.result_type(float))
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(num_chains))
    counts = {"num_draws": num_draws, "num_burnin": num_burnin, "thinning": thinning}
    kernels, states, info = _run(loss_fn, params, grid, keys, FullBatch(data), **counts)
    init_loss, _ = mean_loss(loss_fn, params, data)
    info = jax.tree.map(np.asarray, info)
    shape = tuple(len(values) for values in axes)
    values, errors, status = np.full(len(grid), np.nan), np.full(len(grid), np.nan), np.full(len(grid), "diverged", object)
    for i in range(len(grid)):
        here = jax.tree.map(lambda x, i=i: x[i], info)
        is_finite = here.is_finite.all(axis=1)
        if not is_finite.any():
            continue
        kernel, state = (jax.tree.map(lambda x, i=i: x[i], tree) for tree in (kernels, states))
        found = llc(
            Draws(
                here,
                None,
                is_finite,
                here.stiffness.max(axis=1),
                here.num_gradients.sum(axis=1),
                state,
                kernel,
                0,
                num_burnin,
                thinning,
            ),
            init_loss,
        )
        values[i], errors[i], status[i] = found.llc, found.std_error, found.status
    values, errors, status = (x.reshape(shape) for x in (values, errors, status))
    return Sweep(axes[0], axes[1], axes[2], values, errors, status)


@partial(jax.jit, static_argnames=("loss_fn", "num_draws"))
def _run(
    loss_fn: LossFn,
    params: Params,
    grid: Float[Array, "point 3"],
    keys: Key[Array, " chain"],
    batches: FullBatch,
    *,
    num_draws: int,
    num_burnin: int,
    thinning: int,
) -> tuple[SGLD, Any, Any]:
    def one(point: Float[Array, "3"]) -> tuple[SGLD, Any, Any]:
        step_size, nbeta, localization = point
        kernel = SGLD(LocalPosterior(loss_fn, params, nbeta, localization), step_size)
        same: dict[str, Any] = {"collect": jax.tree_util.Partial(keep_nothing), "adapting": False, "block_size": len(keys)}
        states = start(kernel, keys, params, batches)
        # Burn-in is one draw of all its steps: the buffers are those of the run.
        states, _ = advance(kernel, keys, states, 0, 1, num_burnin, batches=batches, capacity=num_draws, **same)
        states, (info, _) = advance(
            kernel, keys, states, num_burnin, num_draws, thinning, batches=batches, capacity=num_draws, **same
        )
        return kernel, states, info

    return jax.vmap(one)(grid)

"""`advance`: the one compiled program under `sample`.

Warm-up, burn-in and kept draws are the same program with other counts, and the counts are data: nothing is compiled
twice. It is pure, so ladders, sweeps and estimates along a training run can map over it.

Randomness: chain c has the key fold_in(key, c), and its step t the key fold_in(that, t). Hence a chain's numbers do
not depend on how many chains there are, how they are grouped into blocks, or where the host loop cuts.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Key, PyTree

from slt_interp.samplers.kernel import Info, Kernel
from slt_interp.tree import Params, Real

Collect = Callable[[Any, Info], PyTree[Array]]
"""`(state, info) -> pytree`: what is kept of a draw besides the scalars of `Info`."""


@functools.partial(jax.jit, static_argnames=("capacity", "adapting", "block_size", "mesh"), donate_argnames=("states",))
def advance(
    kernel: Kernel,
    keys: Key[Array, " chain"],
    states: Any,
    first_step: Real,
    num_draws: Real,
    thinning: Real,
    *,
    batches: Callable[[Key[Array, ""]], Any],
    capacity: int,
    collect: Collect,
    adapting: bool,
    block_size: int,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Any, tuple[Info, PyTree[Array]]]:
    """Make `num_draws * thinning` steps of every chain: the one compiled function under `sample`.

    The counts are data, so that one compilation serves burn-in and every chunk; `capacity` is the length of the
    buffers, of which the first `num_draws` entries are filled. `states` is donated.

    Args:
        kernel: the kernel, with its target.
        keys: one key per chain; step t of a chain uses fold_in(key, t).
        states: the kernel's states, (chain, ...).
        first_step: t of the first step.
        num_draws: draws to make, at most `capacity`.
        thinning: steps per draw.
        batches: the batch function.
        capacity: length of the result's draw axis.
        collect: what to keep of a draw; a pytree, as `jax.tree_util.Partial` makes of any function.
        adapting: whether the steps are `kernel.adapt`.
        block_size: chains vectorized together; the blocks of a device run in turn.
        mesh: spreads the chains over devices.

    Returns:
        The new states, and (info, collected) with axes (chain, capacity, ...).
    """
    shared = (kernel, batches, collect, first_step, num_draws, thinning)
    run = functools.partial(_run_block, capacity=capacity, adapting=adapting, block_size=block_size)
    if mesh is not None:
        # check_vma would reject a user's own lax.scan, whose carry starts unvarying.
        specs = {"in_specs": (P("chain"), P("chain"), P()), "out_specs": P("chain")}
        run = jax.shard_map(run, mesh=mesh, check_vma=False, **specs)
    return run(keys, states, shared)


def _run_block(
    keys: Key[Array, " chain"],
    states: Any,
    shared: tuple,
    *,
    capacity: int,
    adapting: bool,
    block_size: int,
) -> tuple[Any, tuple[Info, PyTree[Array]]]:
    """Do the work of `advance` for the chains of one device."""
    kernel, batches, collect, first_step, num_draws, thinning = shared

    @jax.jit  # traced once, for its shapes and for the loop
    def step(key: Key[Array, ""], t: Real, state: Any) -> tuple[Any, Info]:
        batch_key, step_key = jax.random.split(jax.random.fold_in(key, t))
        return (kernel.adapt if adapting else kernel.step)(step_key, state, batches(batch_key))

    def one_chain(arguments: tuple[Key[Array, ""], Any]) -> tuple[Any, tuple[Info, PyTree[Array]]]:
        key, state = arguments
        info_shape = jax.eval_shape(step, key, first_step, state)[1]
        kept_shape = (info_shape, jax.eval_shape(collect, state, info_shape))
        no_info = _zeros(info_shape)

        def one_draw(i: Array, carry: tuple) -> tuple:
            def one_step(j: Array, carry: tuple) -> tuple:
                _, state, total, _ = carry
                new_state, info = step(key, first_step + i * thinning + j, state)
                return state, new_state, _accumulate(total, info), info

            state, buffers = carry
            start = (state, state, no_info._replace(is_finite=jnp.array(True)), no_info)
            previous, state, total, info = jax.lax.fori_loop(0, thinning, one_step, start)
            mean = jax.tree.map(lambda x: x if x.dtype == bool else x / thinning, total)
            kept = (mean._replace(stiffness=total.stiffness), collect(previous, info))
            return state, jax.tree.map(lambda buffer, x: buffer.at[i].set(x), buffers, kept)

        return jax.lax.fori_loop(0, num_draws, one_draw, (state, _zeros(kept_shape, capacity)))

    # A block of one is not vectorized at all: what is batched takes longer to trace, and to run.
    return jax.lax.map(one_chain, (keys, states), batch_size=None if block_size == 1 else block_size)


@jax.jit
def start(kernel: Kernel, keys: Key[Array, " chain"], params: Params, batches: Callable) -> Any:
    """Make the kernel's state of every chain."""

    def one(key: Key[Array, ""]) -> Any:
        batch_key, init_key = jax.random.split(jax.random.fold_in(key, np.uint32(2**32 - 1)))
        return kernel.init(init_key, params, batches(batch_key))

    return jax.lax.map(one, keys)


def _zeros(shapes: PyTree[jax.ShapeDtypeStruct], *leading: int) -> PyTree[Array]:
    return jax.tree.map(lambda x: jnp.zeros((*leading, *x.shape), x.dtype), shapes)


def _accumulate(total: Info, info: Info) -> Info:
    added = jax.tree.map(lambda a, b: a & b if b.dtype == bool else a + b, total, info)
    return added._replace(stiffness=jnp.where(total.stiffness > 0, total.stiffness, jnp.nan_to_num(info.stiffness, posinf=0.0)))

"""`sample`: run chains of any kernel.

All computation is in one pure, jitted function, `advance`; `sample` is a thin loop on the host over calls of it,
which is where progress, checkpoints and early stopping live. Burn-in, warm-up and kept draws are the same program
with other counts, and the counts are data: nothing is compiled twice.

Randomness: chain c has the key fold_in(key, c), and its step t the key fold_in(that, t). Hence a chain's numbers do
not depend on how many chains there are, how they are grouped into blocks, or where the host loop cuts.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Key, PyTree
from tqdm.auto import tqdm

from slt_interp.data import check_batches
from slt_interp.errors import InputError
from slt_interp.posterior import check_target
from slt_interp.samplers.kernel import Info, Kernel
from slt_interp.storage import Checkpoints, fingerprint
from slt_interp.tree import Params, Real, check_key

Collect = Callable[[Any, Info], PyTree[Array]]

_CPU_BLOCK = 4
"""Chains vectorized together on a CPU; more than a few and their activations leave the cache."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["info", "collected", "is_finite", "state", "kernel"],
    meta_fields=["num_warmup", "num_burnin", "thinning"],
)
@dataclass(frozen=True)
class Draws:
    """What `sample` kept.

    Attributes:
        info: `Info` with axes (chain, draw), each number averaged over the `thinning` steps of its draw.
        collected: what `collect` returned at the last of those steps, a pytree (chain, draw, *event).
        is_finite: for each chain, whether loss and gradient were finite at every step, burn-in included.
        state: the kernel's state after the last step, (chain, ...).
        kernel: the kernel that ran, with its target.
        num_warmup, num_burnin, thinning: the settings, in steps.
    """

    info: Info
    collected: PyTree[np.ndarray]
    is_finite: Bool[np.ndarray, " chain"]
    state: Any
    kernel: Kernel
    num_warmup: int
    num_burnin: int
    thinning: int

    @property
    def loss(self) -> Float[np.ndarray, "chain draw"]:
        """Loss averaged over the steps of each draw, nats per example."""
        return np.asarray(self.info.loss)

    @property
    def num_gradients(self) -> int:
        """Gradients per chain spent on kept draws and on everything before them, for one-gradient kernels."""
        return self.num_warmup + self.num_burnin + self.loss.shape[1] * self.thinning


def keep_params(state: Any, info: Info) -> Params:
    """Keep the weights of every draw: give it to `sample` as `collect`."""
    del info
    return state.params


def keep_nothing(state: Any, info: Info) -> None:
    """Keep no more than the scalars of `Info`."""
    del state, info


def sample(
    key: Key[Array, ""],
    kernel: Kernel,
    params: Params,
    batches: Callable[[Key[Array, ""]], Any],
    *,
    num_chains: int,
    num_draws: int,
    num_warmup: int = 0,
    num_burnin: int = 0,
    thinning: int = 1,
    collect: Collect = keep_nothing,
    chunk_size: int | None = None,
    block_size: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
    checkpoint: str | Path | None = None,
) -> Draws:
    """Run `num_chains` independent chains from `params`.

    Args:
        key: typed PRNG key; the same key gives the same numbers, bit for bit.
        kernel: what makes the steps, with the target inside.
        params: where every chain starts.
        batches: `(key) -> batch`, registered as a pytree: `Minibatches(data, size)` or `FullBatch(data)`.
        num_chains: number of chains.
        num_draws: draws kept per chain.
        num_warmup: steps of `kernel.adapt` before everything else; dropped.
        num_burnin: steps of `kernel.step` after that; dropped.
        thinning: steps per kept draw; the numbers of `Info` are averaged over them.
        collect: `(state, info) -> pytree`, what to keep of each draw besides the scalars. A plain function, and the
            same object from call to call, or every call compiles anew.
        chunk_size: draws between two looks of the host (progress, checkpoint); a twentieth of the run by default. No
            number depends on it.
        block_size: chains vectorized together; by default a few on a CPU, all on an accelerator. Numbers depend on
            it by rounding only.
        mesh: spreads the chains over the devices of its axis `chain` (see `chain_mesh`); one device by default. Numbers
            depend on it by rounding only.
        progress: whether to show a progress bar.
        checkpoint: a directory; each chunk is saved there, and a run that was cut short continues from the last one,
            bit for bit. Give a fresh directory per run: another key, kernel, start, data or `collect` is refused, but of
            `loss_fn` only its name is known.

    Returns:
        The `Draws`. A chain that became non-finite is marked in `is_finite`, and is still there to be looked at.

    Raises:
        TypeError, ValueError: see `check_target`; also for counts below 1 and a checkpoint of another run.

    >>> from slt_interp import SGLD, FullBatch, LocalPosterior
    >>> target = LocalPosterior(lambda w, batch: 0.5 * jnp.sum(w**2), jnp.zeros(2), nbeta=1.0, localization=1.0)
    >>> draws = sample(jax.random.key(0), SGLD(target, 0.1), jnp.zeros(2), FullBatch(None), num_chains=3, num_draws=5,
    ...                progress=False)
    >>> draws.loss.shape
    (3, 5)
    """
    _check_counts(key, num_chains, num_draws, num_warmup, num_burnin, thinning, chunk_size, block_size)
    _check_mesh(mesh, num_chains)
    check_batches(batches)
    target = kernel.target
    check_target(target, params, jax.eval_shape(batches, key))
    if not jnp.all(jnp.asarray(kernel.step_size) > 0):
        raise InputError(f"step_size must be positive, but is {kernel.step_size}")
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(num_chains))
    states = _start(kernel, keys, params, batches)
    original = kernel

    def place(chains: Any) -> Any:
        return chains if mesh is None else jax.device_put(chains, NamedSharding(mesh, P("chain")))

    keys, states = place(keys), place(states)
    # Once, or every chunk would move the data to the device again.
    kernel, batches = jax.device_put((kernel, batches), None if mesh is None else NamedSharding(mesh, P()))
    capacity = min(num_draws, chunk_size or -(-num_draws // 20))
    run = functools.partial(
        advance,
        kernel,
        keys,
        batches=batches,
        capacity=capacity,
        collect=collect,
        block_size=_block_size(num_chains // (1 if mesh is None else mesh.shape["chain"]), block_size),
        mesh=mesh,
    )
    healthy, chunks, done = np.ones(num_chains, dtype=bool), [], 0
    # By the jitted function itself, which then does not trace again.
    chunk_shapes = advance.eval_shape(*run.args, states, 0, 1, 1, adapting=False, **run.keywords)[1]
    checkpoints = None
    if checkpoint is not None:
        shapes = jax.tree.map(lambda x: (x.dtype.name, x.shape[2:]), chunk_shapes)
        identity = fingerprint((key, original, params, batches), shapes, num_chains, num_warmup, num_burnin, thinning)
        checkpoints = Checkpoints(checkpoint, identity)
        for saved in checkpoints.restore((states, healthy, chunk_shapes)):
            states, healthy, chunk = saved
            chunks.append(chunk)
            done += chunk[0].loss.shape[1]
        if done > num_draws:
            raise InputError(f"{checkpoint} already holds {done} draws per chain, more than num_draws = {num_draws}")
        states = place(states)
    with _progress_bar(progress, num_warmup + num_burnin + num_draws * thinning, chunk_shapes[1], num_draws / capacity) as bar:
        if done:
            bar.update(num_warmup + num_burnin + done * thinning)
        else:
            for num_steps, first, adapting in ((num_warmup, 0, True), (num_burnin, num_warmup, False)):
                for start, length in _segments(num_steps, -(-num_steps // 5)):
                    states, chunk = run(states, first + start, 1, length, adapting=adapting)
                    healthy = healthy & np.asarray(chunk[0].is_finite[:, 0])
                    _report(bar, length, chunk[0].loss[:, 0], healthy)
        for start, length in _segments(num_draws - done, capacity):
            if not healthy.any():
                break
            first = num_warmup + num_burnin + (done + start) * thinning
            states, chunk = run(states, first, length, thinning, adapting=False)
            chunk = jax.tree.map(lambda x, length=length: np.asarray(x[:, :length]), chunk)
            healthy = healthy & chunk[0].is_finite.all(axis=1)
            chunks.append(chunk)
            if checkpoints is not None:
                checkpoints.save(done + start + length, (states, healthy, chunk))
            _report(bar, length * thinning, chunk[0].loss[:, -1], healthy)
    if not healthy.any():
        raise InputError(
            f"all {num_chains} chains became non-finite: take a smaller step_size (now {kernel.step_size}), a smaller "
            "nbeta or a larger localization, and check that the loss is finite around params"
        )
    info, collected = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *chunks)
    return Draws(info, collected, healthy, states, original, num_warmup, num_burnin, thinning)


@functools.partial(
    jax.jit, static_argnames=("capacity", "collect", "adapting", "block_size", "mesh"), donate_argnames=("states",)
)
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
        collect: see `sample`.
        adapting: whether the steps are `kernel.adapt`.
        block_size: chains vectorized together; the blocks of a device run in turn.
        mesh: spreads the chains over devices.

    Returns:
        The new states, and (info, collected) with axes (chain, capacity, ...).
    """
    shared = (kernel, batches, first_step, num_draws, thinning)
    run = functools.partial(_run_block, capacity=capacity, collect=collect, adapting=adapting, block_size=block_size)
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
    collect: Collect,
    adapting: bool,
    block_size: int,
) -> tuple[Any, tuple[Info, PyTree[Array]]]:
    """Do the work of `advance` for the chains of one device."""
    kernel, batches, first_step, num_draws, thinning = shared

    def step(key: Key[Array, ""], t: Array, state: Any) -> tuple[Any, Info]:
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
                return state, new_state, jax.tree.map(_accumulate, total, info), info

            state, buffers = carry
            start = (state, state, no_info._replace(is_finite=jnp.array(True)), no_info)
            previous, state, total, info = jax.lax.fori_loop(0, thinning, one_step, start)
            mean = jax.tree.map(lambda x: x if x.dtype == bool else x / thinning, total)
            kept = (mean, collect(previous, info))
            return state, jax.tree.map(lambda buffer, x: buffer.at[i].set(x), buffers, kept)

        return jax.lax.fori_loop(0, num_draws, one_draw, (state, _zeros(kept_shape, capacity)))

    return jax.lax.map(one_chain, (keys, states), batch_size=block_size)


def chain_mesh(num_chains: int) -> jax.sharding.Mesh:
    """Make a mesh for `sample` over as many devices as divide the chains evenly.

    On a CPU there is one device unless `jax.config.update("jax_num_cpu_devices", n)` was called before JAX is used.

    >>> chain_mesh(7).shape["chain"] in (1, 7)
    True
    """
    count = max(n for n in range(1, jax.device_count() + 1) if num_chains % n == 0)
    # Explicit axes, JAX's default, make a user's own x[idx] fail.
    return jax.make_mesh((count,), ("chain",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:count])


@jax.jit
def _start(kernel: Kernel, keys: Key[Array, " chain"], params: Params, batches: Callable) -> Any:
    def one(key: Key[Array, ""]) -> Any:
        batch_key, init_key = jax.random.split(jax.random.fold_in(key, np.uint32(2**32 - 1)))
        return kernel.init(init_key, params, batches(batch_key))

    return jax.lax.map(one, keys)


def _zeros(shapes: PyTree[jax.ShapeDtypeStruct], *leading: int) -> PyTree[Array]:
    return jax.tree.map(lambda x: jnp.zeros((*leading, *x.shape), x.dtype), shapes)


def _accumulate(total: Array, value: Array) -> Array:
    return total & value if value.dtype == bool else total + value


def _block_size(num_chains: int, wanted: int | None) -> int:
    """Find the largest divisor of num_chains up to what was wanted, so that one trace of the loop serves all blocks."""
    if wanted is None:
        wanted = _CPU_BLOCK if jax.default_backend() == "cpu" else num_chains
    return max(size for size in range(1, min(wanted, num_chains) + 1) if num_chains % size == 0)


def _segments(total: int, length: int) -> list[tuple[int, int]]:
    """Cut range(total) into (start, length) pieces."""
    return [(start, min(length, total - start)) for start in range(0, total, length)] if total > 0 else []


def _progress_bar(progress: bool, num_steps: int, collected: PyTree[jax.ShapeDtypeStruct], num_chunks: float) -> tqdm:
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(collected)) * num_chunks / 2**20
    title = f"sample, keeping {kept:.1f} MiB of draws" if kept else "sample"
    return tqdm(total=num_steps, desc=title, unit="step", disable=not progress, leave=False)


def _report(bar: tqdm, num_steps: int, losses: Array, healthy: np.ndarray) -> None:
    lost = "" if healthy.all() else f", {np.sum(~healthy)} OF {len(healthy)} CHAINS NON-FINITE"
    bar.set_postfix_str(f"loss {np.mean(np.asarray(losses)[healthy] if healthy.any() else np.nan):.4g}{lost}")
    bar.update(num_steps)


def _check_mesh(mesh: jax.sharding.Mesh | None, num_chains: int) -> None:
    if mesh is not None and (mesh.axis_names != ("chain",) or num_chains % mesh.size):
        raise InputError(
            f"mesh must have one axis, 'chain', whose size divides num_chains = {num_chains}, but has {dict(mesh.shape)}: use "
            "chain_mesh(num_chains)"
        )


def _check_counts(key: Any, num_chains: int, num_draws: int, num_warmup: int, num_burnin: int, thinning: int, *sizes) -> None:
    check_key(key)
    chunk_size, block_size = sizes
    positive = {"num_chains": num_chains, "num_draws": num_draws, "thinning": thinning}
    optional = {name: size for name, size in (("chunk_size", chunk_size), ("block_size", block_size)) if size is not None}
    for minimum, counts in ((1, positive | optional), (0, {"num_warmup": num_warmup, "num_burnin": num_burnin})):
        for name, count in counts.items():
            if not isinstance(count, int | np.integer) or count < minimum:
                raise InputError(f"{name} must be a whole number of at least {minimum}, but is {count}")

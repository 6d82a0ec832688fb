"""`sample`: run chains of any kernel.

All computation is in one pure, jitted function, `advance`; `sample` is a thin loop on the host over calls of it,
which is where progress, early stopping, draws on disk and checkpoints live.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Key, PyTree
from tqdm.auto import tqdm

from slt_interp.data import FullBatch, check_batches
from slt_interp.errors import InputError
from slt_interp.posterior import LocalPosterior, check_target
from slt_interp.samplers.advance import Collect, advance, start
from slt_interp.samplers.diagnostics import MIN_DRAWS, std_error
from slt_interp.samplers.draws import Draws, keep_nothing, named, stability_warning, step_sizes
from slt_interp.samplers.kernel import Info, Kernel
from slt_interp.storage import Checkpoints, DrawFiles, check_no_draws, fingerprint
from slt_interp.tree import Params, check_key

_CACHE = 3 * 2**19
"""Bytes that the chains vectorized together on a CPU may keep between a loss and its gradient, to stay in the cache."""

_MAX_CPU_BLOCK = 16

_MAX_CHUNK = 2**28
"""Bytes of draws in one chunk at most, where its length is not given."""

_MIN_STEPS = 8
"""Steps between two looks of the host at least: every call takes its memory anew."""


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
    previous: Draws | None = None,
    precision: float | None = None,
    check_every: int = 100,
) -> Draws:
    """Run `num_chains` independent chains from `params`.

    Args:
        key: typed PRNG key; the same key gives the same numbers, bit for bit.
        kernel: what makes the steps, with the target inside.
        params: where every chain starts.
        batches: `(key) -> batch`, registered as a pytree: `Minibatches(data, size)` or `FullBatch(data)`.
        num_chains: number of chains.
        num_draws: draws kept per chain; 0 for a warm-up alone.
        num_warmup: steps of `kernel.adapt` before everything else; dropped.
        num_burnin: steps of `kernel.step` after that; dropped.
        thinning: steps per kept draw; the numbers of `Info` are averaged over them.
        collect: `(state, info) -> pytree`, what to keep of each draw besides the scalars. Arrays that it needs go in
            as `jax.tree_util.Partial(function, arrays)`. The function is part of the program: the same object from
            call to call, or every call compiles anew.
        chunk_size: draws between two looks of the host (progress, checkpoint), of which two lie in memory when draws go to
            disk; by default a twentieth of the run, and at most 256 MiB. No number depends on it.
        block_size: chains vectorized together; by default as many as a CPU's cache holds, all on an accelerator. Numbers
            depend on it by rounding only.
        mesh: spreads the chains over the devices of its axis `chain` (see `chain_mesh`); one device by default. Numbers
            depend on it by rounding only.
        progress: whether to show a progress bar.
        checkpoint: a directory. Draws are written there as they come (see `read_draws`) instead of being kept in memory,
            and a run that was cut short, or is to have more draws, continues from the last chunk, bit for bit. Give a
            fresh directory per run: another key, kernel, start, data, `collect` or `precision` is refused, but of
            functions only the names are known.
        previous: draws of the same call with fewer `num_draws`, in memory: they are kept, and the chains go on from their
            ends, bit for bit as if they had not stopped. Their key and data are not known: give the same. One that holds no
            step at all is where chains start: any counts and a checkpoint may go with it.
        precision: stop early, once the standard error of the mean loss is at most this, in nats per example (LLC units
            are nbeta times that). An error that is looked at until it is small is a little too small.
        check_every: draws between two looks at the precision, whatever the chunks.

    Returns:
        The `Draws`. A chain that became non-finite is marked in `is_finite`, and is still there to be looked at.

    Raises:
        TypeError, ValueError: see `check_target`; also for counts below 1, a full-batch kernel without `FullBatch`, no
            finite chain left and a checkpoint of another run.
        OSError: if draws cannot be written; those before stay, and the same call continues from them.

    >>> from slt_interp import SGLD, FullBatch, LocalPosterior
    >>> target = LocalPosterior(lambda w, batch: 0.5 * jnp.sum(w**2), jnp.zeros(2), nbeta=1.0, localization=1.0)
    >>> draws = sample(jax.random.key(0), SGLD(target, 0.1), jnp.zeros(2), FullBatch(None), num_chains=3, num_draws=5,
    ...                progress=False)
    >>> draws.loss.shape
    (3, 5)
    """
    positive = {"num_chains": num_chains, "thinning": thinning, "check_every": check_every}
    optional = {"chunk_size": chunk_size, "block_size": block_size}
    _check_counts(1, positive | {name: size for name, size in optional.items() if size is not None})
    _check_counts(0, {"num_draws": num_draws, "num_warmup": num_warmup, "num_burnin": num_burnin})
    if precision is not None and not precision > 0:
        raise InputError(f"precision must be positive, but is {precision}: it is a standard error, in nats per example")
    check_key(key)
    _check_mesh(mesh, num_chains)
    _check_kernel(kernel, batches)
    batch = jax.eval_shape(batches, key)
    check_target(kernel.target, params, batch)
    if jax.tree_util.all_leaves([collect]):
        collect = jax.tree_util.Partial(collect)

    def place(chains: Any) -> Any:
        return jax.device_put(chains, None if mesh is None else NamedSharding(mesh, P("chain")))

    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(num_chains))
    states = start(kernel, keys, params, batches)
    # Once, or every chunk would move the data to the device again.
    on_device = jax.device_put((kernel, batches, collect), None if mesh is None else NamedSharding(mesh, P()))
    capacity = chunk_size or max(-(-num_draws // 20), -(-_MIN_STEPS // thinning))
    capacity = max(1, min(num_draws, capacity, num_draws if precision is None else check_every))
    run = functools.partial(
        advance,
        on_device[0],
        place(keys),
        batches=on_device[1],
        collect=on_device[2],
        capacity=capacity,
        block_size=choose_block_size(
            num_chains // (1 if mesh is None else mesh.size), block_size, kernel.target, params, batch
        ),
        mesh=mesh,
    )
    # By the jitted function itself, which then does not trace again.
    chunk_shapes = advance.eval_shape(*run.args, states, 0, 1, 1, adapting=False, **run.keywords)[1]
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((num_chains, *x.shape[2:]), x.dtype), named(*chunk_shapes))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(like))
    if chunk_size is None and capacity * size > _MAX_CHUNK:
        capacity = max(1, _MAX_CHUNK // size)
        run = functools.partial(run, capacity=capacity)
    now = _Now(states, np.ones(num_chains, bool), np.zeros(num_chains), np.zeros(num_chains))
    before, done = num_warmup + num_burnin, 0
    if previous is not None:
        _check_previous(previous, kernel, num_chains, num_draws, (num_warmup, num_burnin, thinning))
        # Copied: they are donated.
        states = jax.tree.map(jnp.copy, previous.state)
        now = _Now(states, *(np.array(x) for x in (previous.is_finite, previous.stiffness, previous.num_gradients)))
    if checkpoint is None:
        kept, checkpoints = _Memory(like, num_draws), None
        if previous is not None:
            done = previous.num_steps
            if previous.loss.shape[1]:
                kept.append(named(previous.info, previous.collected))
    elif previous is not None and previous.num_steps:
        raise InputError("previous and checkpoint are two ways to go on: give one of them")
    else:
        shapes = [(x.dtype.name, x.shape) for x in jax.tree.leaves(like)]
        settings = (shapes, num_chains, num_warmup, num_burnin, thinning, precision and (precision, check_every))
        start_states = () if previous is None else (previous.state,)
        arrays = (key, _with_schedule(kernel), params, batches, collect, *start_states)
        checkpoints = Checkpoints(Path(checkpoint) / "state", fingerprint(arrays, *settings))
        found = checkpoints.restore(now)
        if found is None:
            check_no_draws(Path(checkpoint) / "draws")
            with _explain_full_disk(checkpoint, 0):
                checkpoints.save(0, now)
        done, now = found or (0, now)
        done_draws = max(0, done - before) // thinning
        if done_draws > num_draws:
            raise InputError(f"{checkpoint} already holds {done_draws} draws per chain, more than num_draws = {num_draws}")
        kept = DrawFiles(Path(checkpoint) / "draws", like, done_draws)
    now = now._replace(states=place(now.states))

    with _progress_bar(progress, before + num_draws * thinning, like["collected"], num_draws) as bar:
        bar.update(done)

        def forward(num_draws: int, thinning: int, *, adapting: bool = False, keep: bool = True) -> None:
            """Make so many draws, and note what the host wants to know of them."""
            nonlocal now, done
            states, chunk = run(now.states, done, num_draws, thinning, adapting=adapting)
            info = jax.tree.map(lambda x: np.asarray(x)[:, :num_draws], chunk[0])
            now = _Now(
                states,
                now.is_finite & info.is_finite.all(axis=1),
                np.where(now.stiffness > 0, now.stiffness, _first_positive(info.stiffness)),
                now.num_gradients + thinning * info.num_gradients.sum(axis=1, dtype=np.float64),
            )
            done += num_draws * thinning
            with contextlib.nullcontext() if checkpoint is None else _explain_full_disk(checkpoint, kept.num_draws):
                if keep:
                    kept.append(named(info, jax.tree.map(lambda x: np.asarray(x)[:, :num_draws], chunk[1])))
                if checkpoints is not None:
                    checkpoints.save(done, now)
            _report(bar, num_draws * thinning, info.loss[:, -1], now.is_finite, stability_warning(kernel, now.stiffness, done))

        # Where nothing adapts, warm-up is no other program.
        for end, adapting in ((num_warmup, type(kernel).adapt is not type(kernel).step), (before, False)):
            while done < end and now.is_finite.any():
                forward(1, min(end - done, -(-end // 5)), adapting=adapting, keep=False)
        while kept.num_draws < num_draws and now.is_finite.any():
            length = min(capacity, num_draws - kept.num_draws)
            if precision is not None:
                to_check = -kept.num_draws % check_every
                if kept.num_draws and to_check == 0 and _is_precise(kept.read()["loss"][now.is_finite], precision):
                    break
                length = min(length, to_check or check_every)
            forward(length, thinning)
    if not now.is_finite.any():
        reason = stability_warning(kernel, now.stiffness, done) or (
            f"take a smaller step_size (now {kernel.step_size}), a smaller nbeta or a larger localization, and check that the "
            "loss is finite around params"
        )
        raise InputError(f"all {num_chains} chains became non-finite: {reason}")
    arrays = kept.read()
    collected = arrays.pop("collected")
    return Draws(
        Info(**arrays),
        collected,
        now.is_finite,
        now.stiffness,
        now.num_gradients,
        now.states,
        kernel,
        num_warmup,
        num_burnin,
        thinning,
    )


def chain_mesh(num_chains: int) -> jax.sharding.Mesh:
    """Make a mesh for `sample` over as many devices as divide the chains evenly.

    On a CPU there is one device unless `jax.config.update("jax_num_cpu_devices", n)` was called before JAX is used.

    >>> chain_mesh(7).shape["chain"] in (1, 7)
    True
    """
    count = max(n for n in range(1, jax.device_count() + 1) if num_chains % n == 0)
    # Explicit axes, JAX's default, make a user's own x[idx] fail.
    return jax.make_mesh((count,), ("chain",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:count])


def choose_block_size(num_chains: int, wanted: int | None, target: LocalPosterior, params: Params, batch: Any) -> int:
    """Choose how many of a device's chains are vectorized together.

    That is the largest divisor of their number up to what was wanted: all of them on an accelerator, on a CPU as many as
    its cache holds of what a gradient keeps of the forward pass. `params` and `batch` give shapes only.
    """
    if wanted is None and jax.default_backend() == "cpu":
        kept = _backward_pass.eval_shape(target, params, batch)
        per_chain = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))
        wanted = min(_MAX_CPU_BLOCK, max(1, _CACHE // max(1, per_chain)))
    return max(size for size in range(1, min(wanted or num_chains, num_chains) + 1) if num_chains % size == 0)


@jax.jit
def _backward_pass(target: LocalPosterior, params: Params, batch: Any) -> Any:
    return jax.vjp(lambda params: target.loss(params, batch), params)[1]


class _Now(NamedTuple):
    """Where a run stands; a checkpoint holds it."""

    states: Any
    is_finite: Bool[np.ndarray, " chain"]
    stiffness: Float[np.ndarray, " chain"]
    num_gradients: Float[np.ndarray, " chain"]


class _Memory:
    """Draws in host memory, filled as they come; the same face as `DrawFiles`."""

    def __init__(self, like: PyTree[jax.ShapeDtypeStruct], capacity: int):
        self._arrays = jax.tree.map(lambda x: np.empty((x.shape[0], capacity, *x.shape[1:]), x.dtype), like)
        self.num_draws, self.num_chains = 0, jax.tree.leaves(like)[0].shape[0]

    def append(self, draws: PyTree[np.ndarray]) -> None:
        end = self.num_draws + jax.tree.leaves(draws)[0].shape[1]
        for array, values in zip(jax.tree.leaves(self._arrays), jax.tree.leaves(draws), strict=True):
            array[:, self.num_draws : end] = values
        self.num_draws = end

    def read(self) -> PyTree[np.ndarray]:
        return jax.tree.map(lambda x: x[:, : self.num_draws], self._arrays)


def _with_schedule(kernel: Kernel) -> tuple[Kernel, np.ndarray]:
    """Add to a kernel what tells its schedule from others: a function's name says nothing of its numbers."""
    return kernel, step_sizes(kernel, 10**6)


def _check_previous(previous: Draws, kernel: Kernel, num_chains: int, num_draws: int, counts: tuple[int, int, int]) -> None:
    held, settings = previous.loss.shape, (previous.num_warmup, previous.num_burnin, previous.thinning)
    if (previous.num_steps and settings != counts) or held[0] != num_chains or held[1] > num_draws:
        raise InputError(
            f"previous holds {held[1]} draws of {held[0]} chains with (num_warmup, num_burnin, thinning) = {settings}: give "
            f"the same, and num_draws of at least {held[1]}"
        )
    if fingerprint(_with_schedule(previous.kernel)) != fingerprint(_with_schedule(kernel)):
        raise InputError("previous holds draws of another kernel, or of another target: give the kernel that made them")


def _is_precise(losses: Float[np.ndarray, "chain draw"], precision: float) -> bool:
    """Whether the mean is known to this error; a series that does not vary, or a short one, does not tell."""
    return losses.shape[1] >= 2 * MIN_DRAWS and 0 < std_error(losses) <= precision


def _first_positive(values: Float[np.ndarray, "chain draw"]) -> Float[np.ndarray, " chain"]:
    return np.take_along_axis(values, (values > 0).argmax(axis=1)[:, None], axis=1)[:, 0]


_RANGES = {
    "friction": (0, np.inf),
    "damping": (0, np.inf),
    "num_leapfrog": (0, np.inf),
    "max_tree_depth": (0, np.inf),
    "decay": (0, 1),
    "target_acceptance": (0, 1),
}
"""Open ranges of what kernels may have beside a step size."""


@contextlib.contextmanager
def _explain_full_disk(checkpoint: str | Path, num_draws: int) -> Iterator[None]:
    """Say, when draws cannot be written, what is safe and how to go on."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise OSError(
            f"cannot write to {checkpoint} ({str(error).splitlines()[0]}): the first {num_draws} draws per chain are safe "
            "there; make room and repeat the call, and it goes on from them"
        ) from error


def _progress_bar(progress: bool, num_steps: int, collected: PyTree[jax.ShapeDtypeStruct], num_draws: int) -> tqdm:
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(collected)) * num_draws / 2**20
    title = f"sample, keeping {kept:.1f} MiB of draws" if kept else "sample"
    return tqdm(total=num_steps, desc=title, unit="step", disable=not progress, leave=False)


def _report(bar: tqdm, num_steps: int, losses: np.ndarray, is_finite: np.ndarray, warning: str | None) -> None:
    lost = "" if is_finite.all() else f", {np.sum(~is_finite)} OF {len(is_finite)} CHAINS NON-FINITE"
    unstable = f", UNSTABLE: {warning}" if warning else ""
    bar.set_postfix_str(f"loss {np.mean(losses[is_finite] if is_finite.any() else np.nan):.4g}{lost}{unstable}")
    bar.update(num_steps)


def _check_mesh(mesh: jax.sharding.Mesh | None, num_chains: int) -> None:
    if mesh is not None and (mesh.axis_names != ("chain",) or num_chains % mesh.size):
        raise InputError(
            f"mesh must have one axis, 'chain', whose size divides num_chains = {num_chains}, but has {dict(mesh.shape)}: use "
            "chain_mesh(num_chains)"
        )


def _check_kernel(kernel: Kernel, batches: Any) -> None:
    check_batches(batches)
    name = type(kernel).__name__
    if kernel.full_batch and not isinstance(batches, FullBatch):
        raise InputError(
            f"{name} needs the same data at every step, but was given {type(batches).__name__}: give FullBatch(data), or take "
            "a kernel for minibatches, such as SGLD"
        )
    # A schedule may start at 0.
    sizes = step_sizes(kernel, 0)
    if not np.all(sizes >= 0 if callable(kernel.step_size) else sizes > 0):
        raise InputError(f"step_size must be positive, but is {kernel.step_size}")
    for field, (low, high) in _RANGES.items():
        value = np.asarray(getattr(kernel, field, low + (1 if high == np.inf else high) / 2))
        if not np.all((value > low) & (value < high)):
            raise InputError(f"{field} of {name} must be above {low} and below {high}, but is {value}")


def _check_counts(minimum: int, counts: dict[str, Any]) -> None:
    for name, count in counts.items():
        if not isinstance(count, int | np.integer) or count < minimum:
            raise InputError(f"{name} must be a whole number of at least {minimum}, but is {count}")

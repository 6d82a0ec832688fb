"""Volumes by subset simulation: a population descends through nested sublevel sets of the loss.

Particles are drawn from the base measure. The loss that a fifth of them lie strictly below is the next level: those survive,
are copied to full number, and are moved within the new sublevel set (`walks`). V of a level is the product of these fractions,
and one descent tells V at every threshold on the way, each from the particles of the level above it.

Given the level, what lies strictly below it is as if drawn from there; the particle at the level, and those that tie with it,
are not, and go. So V is right in the mean where moves forget where they began, and nearly so where they do not quite; its log
is too small in the mean by half its variance, which copies that moved too little make larger. `descents` measures the variance,
and makes one answer of all seeds.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key, PyTree
from tqdm.auto import tqdm

from slt_interp.bases import Base, FloatGrid
from slt_interp.data import Batch
from slt_interp.errors import InputError
from slt_interp.estimators.descents import ROUNDING, Descents, combine, conclude
from slt_interp.estimators.volume_estimate import VolumeEstimate, check_labels, check_thresholds, highest_losses, same_loss
from slt_interp.estimators.walks import GridWalk, Particle, Reflective
from slt_interp.posterior import LocalPosterior, LossFn, check_target
from slt_interp.samplers.chains import chain_mesh, choose_block_size
from slt_interp.tree import Params, check_key


def subset_simulation(
    key: Key[Array, ""],
    loss_fn: LossFn,
    params: Params,
    data: Batch,
    thresholds: Any,
    *,
    base: Base | FloatGrid,
    labels: Callable[[Params], Int[Array, ""]] | None = None,
    num_particles: int = 500,
    num_seeds: int = 4,
    num_moves: int = 8,
    precision: float = 0.05,
    max_rounds: int = 10,
    progress: bool = True,
) -> VolumeEstimate:
    """Estimate log volumes by subset simulation from independent seeds, in rounds until errors are small.

    Cost of a round: num_seeds * num_particles * num_moves * 8 steps for each 1.6 nats of log volume; a step is one loss, and
    a gradient and a second loss where the path meets the level. Seeds are spread over as many devices as divide their number.

    Args:
        key: typed PRNG key.
        loss_fn: any scalar function `(params, batch) -> scalar`; thresholds are in its units.
        params: the trained weights.
        data: passed to the loss whole.
        thresholds: above the loss at params, increasing.
        base: `Gaussian`, `Box`, `Ball` or `FloatGrid`.
        labels: `(params) -> int`; the volume is then split among the labels of the particles.
        num_particles: particles of a seed.
        num_seeds: independent seeds of a round, at least 3.
        num_moves: moves of `walks.NUM_STEPS` steps between two levels.
        precision: standard error between seeds to reach, nats, or a tenth of it times |log V| where that is larger.
        max_rounds: rounds at most.
        progress: whether to show a progress bar.

    References:
        Au and Beck (2001), Estimation of small failure probabilities in high dimensions by subset simulation.
        Brehier, Gazeau, Goudenege, Lelievre and Rousset (2016), Unbiasedness of some generalized adaptive multilevel splitting
        algorithms (why the particle at the level must go, and ties with it).

    >>> from slt_interp import Gaussian
    >>> found = subset_simulation(jax.random.key(0), lambda w, batch: jnp.sum(w**2) / 2, jnp.zeros(2), None, [1.0],
    ...                           base=Gaussian(0.0, 1.0), progress=False)
    >>> bool(abs(found.log_volume[0] - np.log(1 - np.exp(-1))) < 4 * found.std_error[0])
    True
    """
    check_key(key)
    thresholds = check_thresholds(thresholds)
    for name, value, least in (
        ("num_particles", num_particles, 20),
        ("num_seeds", num_seeds, 3),
        ("num_moves", num_moves, 1),
        ("max_rounds", max_rounds, 1),
    ):
        if value < least:
            raise InputError(f"{name} must be at least {least}, but is {value}")
    walk = _make_walk(loss_fn, params, data, base)
    init_loss = float(_loss(walk.target, walk.target.position(params), data))
    if not np.isfinite(init_loss):
        raise InputError(f"the loss is not finite at params, but {init_loss}: check loss_fn there")
    if labels is not None:
        check_labels(labels, params)
    mesh = chain_mesh(num_seeds)
    descend = partial(
        _descend,
        jax.device_put((walk, data), NamedSharding(mesh, P())),
        mesh=mesh,
        init_loss=init_loss,
        thresholds=thresholds,
        labels=labels,
        num_particles=num_particles,
        num_moves=num_moves,
        block_size=_choose_block_size(walk.target, params, data, num_seeds // mesh.size * num_particles),
    )
    rounds: list[Descents] = []
    with tqdm(desc="subset simulation", unit="level", disable=not progress, leave=False) as bar:
        for i in range(max_rounds):
            seeds = jnp.arange(i * num_seeds, (i + 1) * num_seeds)
            rounds.append(descend(jax.vmap(partial(jax.random.fold_in, key))(seeds), bar=bar))
            value, error, *_ = combine(rounds)
            # Thresholds that cannot be reached have no error to make smaller.
            if np.all(~(error > precision * np.maximum(1.0, np.abs(value) / 10))):
                break
    return conclude(rounds, thresholds, init_loss, base, params)


_FRACTION = 0.2
_MAX_LEVELS = 2000


def _make_walk(loss_fn: LossFn, params: Params, data: Batch, base: Base | FloatGrid) -> Reflective | GridWalk:
    if not isinstance(base, FloatGrid):
        target = LocalPosterior(loss_fn, params, 1.0, base)
        check_target(target, params, data)
        return Reflective(target)
    target = LocalPosterior(loss_fn, params, 1.0, 1.0)
    check_target(target, params, data)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if jnp.promote_types(leaf.dtype, base.dtype) != leaf.dtype:
            raise InputError(
                f"params{jax.tree_util.keystr(path)} is {leaf.dtype}, which cannot hold every {jnp.dtype(base.dtype)} of the "
                "FloatGrid: convert params to a wider dtype"
            )
    if not all(bool(jnp.all(jnp.asarray(r) >= 0)) for r in jax.tree.leaves(base.radius)):
        raise InputError(f"the radius of a FloatGrid must not be negative, but is {base.radius}")
    return GridWalk(target, base, target.position(params))


def _choose_block_size(target: LocalPosterior, params: Params, data: Batch, count: int) -> int:
    """Choose how many particles are vectorized together: more than chains where the loss is a small one, to save loops.

    A divisor of their number, so that one program serves all blocks.
    """
    fitting = choose_block_size(_FITTING, None, target, params, data)
    most = _SMALL_LOSS_BLOCK if fitting == _FITTING else fitting
    return max(size for size in range(1, min(most, count) + 1) if count % size == 0)


_FITTING, _SMALL_LOSS_BLOCK = 16, 100


def _descend(
    shared: tuple[Reflective | GridWalk, Batch],
    keys: Key[Array, " seed"],
    *,
    mesh: jax.sharding.Mesh,
    init_loss: float,
    thresholds: np.ndarray,
    labels: Callable[[Params], Array] | None,
    num_particles: int,
    num_moves: int,
    block_size: int,
    bar: tqdm,
) -> Descents:
    num_seeds = len(keys)
    unknown = np.full((3, num_seeds, len(thresholds)), np.nan)
    found = Descents(unknown[0], unknown[1], unknown[2], np.empty((num_seeds, 0)), {}, np.inf, 0, 0, np.nan)
    particles = _begin(shared, keys, num_particles=num_particles, block_size=block_size, mesh=mesh)
    steps = jnp.full(num_seeds, _FIRST_STEP)
    families = np.tile(np.arange(num_particles), (num_seeds, 1))
    above, total = np.full(num_seeds, np.inf), np.zeros((3, num_seeds))
    # High enough for any value that a threshold may mean; which particles are inside is decided where all are seen.
    tops = thresholds + same_loss(init_loss + thresholds)
    active, shares, marks = np.ones(num_seeds, bool), [], []
    for depth in range(_MAX_LEVELS):
        # Levels are compared with losses in their own precision; only thresholds are relative to params.
        losses = np.asarray(particles.loss)
        losses = np.where(np.isfinite(losses), losses, np.inf)
        excess = losses.astype(np.float64) - init_loss
        found = found._replace(lowest=min(found.lowest, float(excess.min())))
        levels = np.array([_next_level(row) for row in losses])
        below = levels.astype(np.float64) - init_loss
        read = [(int(s), t) for s in np.flatnonzero(active) for t, e in enumerate(tops) if below[s] < e <= above[s]]
        names = _labels(shared[0], particles.position, labels=labels) if labels is not None and read else None
        for s, t in read:
            inside = losses[s] <= highest_losses(thresholds[t : t + 1], init_loss, losses[s])
            if not inside.any():
                continue
            p, variance, independent = _fraction(inside, families[s])
            found.log_volume[s, t] = total[0, s] + np.log(p)
            found.variance[s, t] = total[1, s] + variance
            found.independent[s, t] = total[2, s] + independent
            if names is not None:
                found.labels[s, t] = np.unique(np.asarray(names)[s][inside], return_counts=True)
        for m, mark in enumerate(marks):
            for s in np.flatnonzero(active & (below < mark) & (mark <= above)):
                found.marks[s, m] = total[0, s] + np.log(np.mean(excess[s] <= mark))
        for s in np.flatnonzero(active):
            p, variance, independent = _fraction(losses[s] <= levels[s], families[s])
            total[:, s] += np.log(p), variance, independent
        is_stuck = ~np.isfinite(levels) | (_spread(losses) <= ROUNDING * np.abs(losses).min(axis=1))
        active = active & (below >= tops[0]) & ~is_stuck
        if not active.any() or depth == _MAX_LEVELS - 1:
            break
        if depth % _BLOCK == _BLOCK - 1 and active.all():
            # Every seed comes by there, at the next level or at a later one.
            marks.append(below[active].min())
            found = found._replace(marks=np.pad(found.marks, ((0, 0), (0, 1)), constant_values=np.nan))
        above = below
        depth_keys = jax.vmap(lambda key, depth=depth: jax.random.fold_in(key, depth + 1))(keys)
        particles, families, steps, progress = _advance(
            shared,
            (depth_keys, particles, jnp.asarray(levels), steps),
            num_moves=num_moves,
            block_size=block_size,
            mesh=mesh,
        )
        families = np.asarray(families)
        shares.append(float(np.mean(progress)))
        bar.update()
        bar.set_postfix(excess_loss=f"{np.median(below):.3g}", refresh=False)
    moves = len(shares) * num_moves * num_seeds * num_particles
    return found._replace(num_levels=len(shares), num_moves=moves, progress=float(np.mean(shares)) if shares else np.nan)


_FIRST_STEP = 0.7
_BLOCK = 16
"""Levels from one mark to the next: more than copies remember, but which of several basins they are in."""


@partial(jax.jit, static_argnames=("num_particles", "block_size", "mesh"))
def _begin(
    shared: tuple[Reflective | GridWalk, Batch],
    keys: Key[Array, " seed"],
    *,
    num_particles: int,
    block_size: int,
    mesh: jax.sharding.Mesh,
) -> Particle:
    def begin(shared: tuple, keys: Key[Array, " seed"]) -> Particle:
        walk, data = shared
        flat = jax.vmap(partial(jax.random.split, num=num_particles))(keys).ravel()
        particles = _in_blocks(lambda key: walk.sample(key, data), flat, block_size)
        return jax.tree.map(lambda x: x.reshape(len(keys), num_particles, *x.shape[1:]), particles)

    return _on_devices(begin, mesh)(shared, keys)


@partial(jax.jit, static_argnames=("num_moves", "block_size", "mesh"))
def _advance(
    shared: tuple[Reflective | GridWalk, Batch],
    seeds: tuple[Key[Array, " seed"], Particle, Float[Array, " seed"], Float[Array, " seed"]],
    *,
    num_moves: int,
    block_size: int,
    mesh: jax.sharding.Mesh,
) -> tuple[Particle, Int[Array, "seed particle"], Float[Array, " seed"], Float[Array, " seed"]]:
    """Copy survivors to full number, and move all of them below the new levels; also say whose copies they are.

    `seeds` are keys, particles, levels and steps.
    """
    return _on_devices(partial(_advance_some, num_moves=num_moves, block_size=block_size), mesh)(shared, seeds)


def _advance_some(shared: tuple, seeds: tuple, *, num_moves: int, block_size: int) -> tuple:
    """Do the work of `_advance` for the seeds of one device."""
    walk, data = shared
    keys, particles, levels, steps = seeds
    num_seeds, num_particles = particles.loss.shape

    def copy(key: Key[Array, ""], particles: Particle, level: Array) -> tuple[Particle, Array]:
        survives = particles.loss <= level
        order = jnp.argsort(jnp.where(survives, jax.random.uniform(key, survives.shape), jnp.inf))
        chosen = order[jnp.arange(num_particles) % jnp.maximum(jnp.sum(survives), 1)]
        return jax.tree.map(lambda x: x[chosen], particles), chosen

    def one(at: tuple) -> tuple[Particle, Array]:
        key, particle, level, step = at
        return walk.move(key, particle, level, step, data)

    def move(carry: tuple, keys: Key[Array, " seed"]) -> tuple[tuple, Array]:
        particles, steps = carry
        each = jax.vmap(partial(jax.random.split, num=num_particles))(keys)
        settings = (jnp.broadcast_to(x[:, None], each.shape) for x in (levels, steps))
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (each, particles, *settings))
        moved, progress = _in_blocks(one, flat, block_size)
        particles = jax.tree.map(lambda x: x.reshape(num_seeds, num_particles, *x.shape[1:]), moved)
        progress = jnp.mean(progress.reshape(num_seeds, num_particles), axis=1)
        # Common to a seed's particles, and so almost independent of each.
        steps = jnp.minimum(steps * jnp.exp(progress - walk.goal), walk.largest_step)
        return (particles, steps), progress

    all_keys = jax.vmap(partial(jax.random.split, num=num_moves + 1))(keys).T
    particles, families = jax.vmap(copy)(all_keys[0], particles, levels)
    (particles, steps), progress = jax.lax.scan(move, (particles, steps), all_keys[1:])
    return particles, families, steps, progress[-1]


def _in_blocks(function: Callable[[Any], Any], xs: PyTree[Array], block_size: int) -> Any:
    """Map over particles. One alone is not vectorized: then it takes a gradient only where its path meets the level."""
    return jax.lax.map(function, xs, batch_size=None if block_size == 1 else block_size)


def _on_devices(function: Callable[[Any, Any], Any], mesh: jax.sharding.Mesh) -> Callable[[Any, Any], Any]:
    """Spread a function of (what is shared, what is each seed's) over the devices of a mesh."""
    return jax.shard_map(function, mesh=mesh, check_vma=False, in_specs=(P(), P("chain")), out_specs=P("chain"))


@jax.jit
def _loss(target: LocalPosterior, params: Params, data: Batch) -> Array:
    return target.loss(params, data)


@partial(jax.jit, static_argnames=("labels",))
def _labels(walk: Reflective | GridWalk, positions: Any, *, labels: Callable[[Params], Array]) -> Array:
    return jax.vmap(jax.vmap(lambda position: labels(walk.params(position))))(positions)


def _next_level(losses: Float[np.ndarray, " particle"]) -> float:
    """Take the largest float below the loss that a fifth lie below, or that loss itself where none does."""
    count = int(_FRACTION * len(losses))
    level = np.partition(losses, count)[count]
    if not np.any(losses < level):
        return level
    under, tiny = np.nextafter(level, -np.inf, dtype=level.dtype), np.finfo(level.dtype).tiny
    # Subnormal numbers are 0 to XLA.
    return under if abs(under) >= tiny else level.dtype.type(-tiny if level <= 0 else 0)


def _spread(losses: Float[np.ndarray, "seed particle"]) -> Float[np.ndarray, " seed"]:
    with np.errstate(invalid="ignore"):
        return losses.max(axis=1) - losses.min(axis=1)


def _fraction(inside: np.ndarray, families: np.ndarray) -> tuple[float, float, float]:
    """Fraction of the particles inside, its relative variance between families of copies, and that of independent ones."""
    count = len(inside)
    p = inside.mean()
    # Half a particle outside is assumed where there is none.
    independent = max(1 - p, 0.5 / count) / (p * count)
    between = np.sum(np.bincount(families, inside - p) ** 2) / (p * count) ** 2
    return float(p), float(max(between, independent)), float(independent)

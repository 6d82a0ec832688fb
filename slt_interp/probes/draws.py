"""Run a probe over posterior draws: one compiled program, vectorized in blocks."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from slt_interp.tree import Params

Probe = Callable[[Key[Array, ""], Params], dict[str, Array]]
"""`(key, params) -> dict of arrays`. A registered dataclass is an argument of the program; a plain function is part of it."""


def over_draws(key: Key[Array, ""], probe: Probe, draws: Params, *, block_size: int = 4) -> dict[str, Array]:
    """Run `probe` at every draw.

    Args:
        key: draw d of chain c gets the key fold_in(fold_in(key, c), d).
        probe: `(key, params) -> dict of arrays`.
        draws: weights with leading axes (chain, draw).
        block_size: draws vectorized together; numbers depend on it by rounding only.

    Returns:
        The probe's dict, its arrays with leading axes (chain, draw).

    >>> weights = {"w": jnp.arange(6.0).reshape(2, 3, 1)}
    >>> over_draws(jax.random.key(0), lambda key, params: {"sum": params["w"].sum()}, weights)["sum"].tolist()
    [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    """
    shapes = {leaf.shape[:2] for leaf in jax.tree.leaves(draws)}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise ValueError(
            f"draws must have leading axes (chain, draw) in every leaf, but their leading shapes are {sorted(shapes)}: give "
            "`Draws.collected` of a run with `collect=keep_params`, or add axes of length 1"
        )
    if jax.tree_util.all_leaves([probe]):
        probe = jax.tree_util.Partial(probe)
    return _over_draws(key, probe, draws, block_size)


@functools.partial(jax.jit, static_argnames=("block_size",))
def _over_draws(key: Key[Array, ""], probe: Probe, draws: Params, block_size: int) -> dict[str, Array]:
    num_chains, num_draws = jax.tree.leaves(draws)[0].shape[:2]
    fold = jax.vmap(jax.vmap(lambda c, d: jax.random.fold_in(jax.random.fold_in(key, c), d), (None, 0)), (0, None))
    keys = fold(jnp.arange(num_chains), jnp.arange(num_draws)).reshape(-1)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), draws)
    results = jax.lax.map(lambda args: probe(*args), (keys, flat), batch_size=block_size)
    return jax.tree.map(lambda x: x.reshape(num_chains, num_draws, *x.shape[1:]), results)

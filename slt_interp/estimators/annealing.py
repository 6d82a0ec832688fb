"""How chains from the base measure come to the cold rungs of a ladder: as populations that are annealed.

Chains that start at a cold rung at draws of the base fall into the next valley, and stay there; a replica that comes down by
swaps takes thousands of steps. A population goes from rung to rung, and at each one loses those that fell into a narrow valley:
members are resampled with the weights exp(-(nbeta' - nbeta) L), and then move.

References:
    Hukushima and Iba (2003), Population annealing and its application to a spin glass.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Key

from slt_interp.data import Batch
from slt_interp.samplers.chains import chain_mesh, choose_block_size
from slt_interp.samplers.exchange import ReplicaExchange
from slt_interp.tree import Params

_PARTICLES, _MOVES = 8, 25
ANNEALING = _PARTICLES * _MOVES
"""Steps for each chain and rung: a population of 8, and 25 moves of each."""


def annealed(key: Key[Array, ""], kernel: ReplicaExchange, num_chains: int, params: Params, data: Batch) -> Params:
    """Find weights for each chain at the rungs of `kernel`: of one member of a population that came down from the base.

    It takes `ANNEALING` steps per chain and rung, with the steps and metrics of `kernel`. `params` are the trained weights.

    Returns:
        The weights, (chain, rung, ...).
    """
    mesh = chain_mesh(num_chains)
    block_size = choose_block_size(num_chains * _PARTICLES, None, kernel.target, params, data)
    keys = jax.device_put(jax.random.split(key, num_chains), NamedSharding(mesh, P("chain")))
    return _anneal(keys, kernel, params, data, mesh=mesh, block_size=block_size)


@partial(jax.jit, static_argnames=("mesh", "block_size"))
def _anneal(
    keys: Key[Array, " chain"],
    kernel: ReplicaExchange,
    params: Params,
    data: Batch,
    *,
    mesh: jax.sharding.Mesh,
    block_size: int,
) -> Params:
    """Resample `_PARTICLES` at each rung and make `_MOVES` steps there; give the first of them, (chain, rung, ...)."""

    def run(keys: Key[Array, " chain"], kernel: ReplicaExchange, params: Params, data: Batch) -> Params:
        nbetas, loss_fn = jnp.asarray(kernel.target.nbeta), kernel.target.loss

        def down(particles: tuple[Params, Array], arguments: tuple) -> tuple[tuple[Params, Array], Params]:
            key, settings, growth = arguments
            positions, losses = particles
            pick_key, move_key = jax.random.split(key)
            # Where the loss is not finite nobody is picked; if that is everywhere, anybody.
            log_weights = jnp.where(jnp.isfinite(losses), -growth * losses, -jnp.inf)
            log_weights = jnp.where(jnp.any(jnp.isfinite(losses)), log_weights, 0.0)
            picked = jax.random.categorical(pick_key, log_weights, shape=losses.shape)
            rung = kernel.at(settings)

            def move(arguments: tuple[Key[Array, ""], Params]) -> tuple[Params, Array]:
                key, position = arguments
                state = rung.init(key, position, data)
                state = jax.lax.fori_loop(0, _MOVES, lambda i, s: rung.step(jax.random.fold_in(key, i), s, data)[0], state)
                return state.params, state.loss

            starts = jax.random.split(move_key, _PARTICLES), jax.tree.map(lambda x: x[picked], positions)
            positions, losses = jax.lax.map(move, starts, batch_size=min(block_size, _PARTICLES))
            # No trajectory leads away from where the loss is infinite: such a chain starts at the given weights, as in `init`.
            left = jax.tree.map(
                lambda x, w: jnp.where(jnp.isfinite(losses[0]), x[0], w), positions, kernel.target.position(params)
            )
            return (positions, losses), left

        def one(key: Key[Array, ""]) -> Params:
            base_key, rung_key = jax.random.split(key)
            first = jax.vmap(lambda key: kernel.draw(key, params))(jax.random.split(base_key, _PARTICLES))
            losses = jax.lax.map(lambda w: loss_fn(w, data), first)
            settings = jax.tree.map(lambda x: x[1:], kernel.settings())
            arguments = jax.random.split(rung_key, len(nbetas) - 1), settings, jnp.diff(nbetas)
            rungs = jax.lax.scan(down, (first, losses), arguments)[1]
            return jax.tree.map(lambda a, b: jnp.concatenate([a[:1], b]), first, rungs)

        return jax.lax.map(one, keys, batch_size=max(1, min(block_size // _PARTICLES, len(keys))))

    specs = {"in_specs": (P("chain"), P(), P(), P()), "out_specs": P("chain")}
    return jax.shard_map(run, mesh=mesh, check_vma=False, **specs)(keys, kernel, params, data)

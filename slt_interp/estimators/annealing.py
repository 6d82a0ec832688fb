"""How chains from the base measure come to the cold rungs of a ladder: as populations that are annealed.

Chains that start at a cold rung at draws of the base fall into the next valley, and stay there; a replica that comes down by
swaps is long on its way. A population goes from rung to rung, and at each one loses those that fell into a narrow valley:
members are resampled with the weights exp(-(nbeta' - nbeta) L), and then move. One population ends in one valley, by chance
where valleys differ at the coldest rungs only. So each chain has two, with an estimate of the partition function each, and
starts where that is large. Chains share none: what their starts make of energies shows in the spread between them.

References:
    Hukushima and Iba (2003), Population annealing and its application to a spin glass.
    Verge et al. (2015), On parallel implementation of sequential Monte Carlo methods: the island particle model,
    arXiv:1306.3911.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Key

from slt_interp.data import Batch
from slt_interp.samplers.chains import chain_mesh, choose_block_size
from slt_interp.samplers.exchange import ReplicaExchange
from slt_interp.tree import Params

_POPULATIONS, _PARTICLES, _GRADIENTS = 2, 8, 200
ANNEALING = _POPULATIONS * _PARTICLES * _GRADIENTS
"""Gradients for each chain and rung: two populations of 8, which move by 200 gradients each: 25 moves of 8 leapfrog steps."""


def annealed(key: Key[Array, ""], kernel: ReplicaExchange, num_chains: int, params: Params, data: Batch) -> Params:
    """Find weights for each chain at the rungs of `kernel`, where populations that came down from the base left their members.

    It takes `ANNEALING` gradients per chain and rung, with the steps and metrics of `kernel`. `params` are the trained weights.

    Returns:
        The weights, (chain, rung, ...).
    """
    count = num_chains * _POPULATIONS * _PARTICLES
    mesh = chain_mesh(count)
    block_size = choose_block_size(count // mesh.size, None, kernel.target, params, data)
    return _anneal(key, kernel, params, data, num_chains=num_chains, mesh=mesh, block_size=block_size)


@partial(jax.jit, static_argnames=("num_chains", "mesh", "block_size"))
def _anneal(
    key: Key[Array, ""],
    kernel: ReplicaExchange,
    params: Params,
    data: Batch,
    *,
    num_chains: int,
    mesh: jax.sharding.Mesh,
    block_size: int,
) -> Params:
    """Resample every population at each rung, and move it there; then let chains choose."""
    populations, moves = num_chains * _POPULATIONS, max(1, _GRADIENTS // kernel.kernel.num_leapfrog)
    count = populations * _PARTICLES

    def move(keys: Key[Array, " particle"], starts: Params, kernel: ReplicaExchange, settings: tuple, data: Batch) -> tuple:
        def one(arguments: tuple[Key[Array, ""], Params]) -> tuple[Params, Array]:
            key, position = arguments
            rung = kernel.at(settings)
            state = rung.init(key, position, data)
            state = jax.lax.fori_loop(0, moves, lambda i, s: rung.step(jax.random.fold_in(key, i), s, data)[0], state)
            return state.params, state.loss

        return jax.lax.map(one, (keys, starts), batch_size=block_size)

    moved = jax.shard_map(
        move, mesh=mesh, check_vma=False, in_specs=(P("chain"), P("chain"), P(), P(), P()), out_specs=P("chain")
    )

    def down(carry: tuple[Params, Array, Array], arguments: tuple) -> tuple[tuple[Params, Array, Array], Params]:
        key, settings, growth = arguments
        positions, losses, log_z = carry
        pick_key, move_key, choose_key = jax.random.split(key, 3)
        # Where the loss is not finite nobody is picked.
        log_weights = jnp.where(jnp.isfinite(losses), -growth * losses, -jnp.inf).reshape(populations, _PARTICLES)
        log_z += jax.nn.logsumexp(log_weights, axis=1)
        picked = jax.vmap(_resampled)(jax.random.split(pick_key, populations), log_weights)
        starts = _taken(positions, (picked + _PARTICLES * jnp.arange(populations)[:, None]).ravel())
        positions, losses = moved(jax.random.split(move_key, count), starts, kernel, settings, data)
        which = jax.random.categorical(choose_key, _known(log_z.reshape(num_chains, _POPULATIONS)))
        chosen = _PARTICLES * (which + _POPULATIONS * jnp.arange(num_chains))
        # No gradient leads away from where the loss is infinite: such a chain starts at the given weights, as in `init`.
        is_finite = jnp.isfinite(losses)[chosen]
        left = jax.tree.map(
            lambda x, w: jnp.where(is_finite.reshape(-1, *[1] * w.ndim), x, w),
            _taken(positions, chosen),
            kernel.target.position(params),
        )
        return (positions, losses, log_z), left

    base_key, rung_key = jax.random.split(key)
    first = jax.vmap(lambda key: kernel.draw(key, params))(jax.random.split(base_key, count))
    losses = jax.lax.map(lambda w: kernel.target.loss(w, data), first)
    nbetas = jnp.asarray(kernel.target.nbeta)
    arguments = jax.random.split(rung_key, len(nbetas) - 1), jax.tree.map(lambda x: x[1:], kernel.settings()), jnp.diff(nbetas)
    rungs = jax.lax.scan(down, (first, losses, jnp.zeros(populations, losses.dtype)), arguments)[1]
    return jax.tree.map(lambda a, b: jnp.moveaxis(jnp.concatenate([a[None, :num_chains], b]), 0, 1), first, rungs)


def _resampled(key: Key[Array, ""], log_weights: Float[Array, " particle"]) -> Int[Array, " particle"]:
    """Pick as many as there are, each as often as its weight says but for less than once (systematically)."""
    shares = jax.nn.softmax(_known(log_weights))
    count, totals = len(shares), jnp.cumsum(shares)
    places = totals[-1] * (jnp.arange(count) + jax.random.uniform(key)) / count
    return jnp.minimum(jnp.searchsorted(totals, places, side="right"), count - 1)


def _known(log_weights: Float[Array, "*population particle"]) -> Float[Array, "*population particle"]:
    """Let anybody be picked where nobody has a weight."""
    return jnp.where(jnp.any(log_weights > -jnp.inf, axis=-1, keepdims=True), log_weights, 0.0)


def _taken(positions: Params, indices: Int[Array, " particle"]) -> Params:
    return jax.tree.map(lambda x: x[indices], positions)

"""Two families of chains on one ladder, from draws of the base measure and from the trained weights, that never meet."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from slt_interp.data import Batch, FullBatch
from slt_interp.estimators.llc import Energy
from slt_interp.posterior import LocalPosterior
from slt_interp.samplers.chains import chain_mesh, choose_block_size, sample
from slt_interp.samplers.draws import Draws, starting
from slt_interp.samplers.exchange import ExchangeState, ReplicaExchange, RungReadings, keep_rungs
from slt_interp.samplers.kernel import Info
from slt_interp.tree import Params

CHUNK = 50
"""Draws between two looks of the host."""


class Place(NamedTuple):
    """Where the chains of a family are: nbeta of rungs, and the weights there, (chain, rung, ...)."""

    nbetas: Float[np.ndarray, " rung"]
    params: Params


@dataclass(frozen=True)
class Families:
    """Runs of one ladder from draws of the base and from given weights: `run(key, kernel, num_draws=...)` gives a pair.

    Attributes:
        params: the weights that the second family starts from.
        data: what every step sees.
        num_chains: of each family.
        progress: whether to show progress bars.
    """

    params: Params
    data: Batch
    num_chains: int
    progress: bool

    def run(
        self,
        key: Key[Array, ""],
        kernel: ReplicaExchange,
        *,
        previous: tuple[Draws, Draws] | None = None,
        starts: tuple[Place, Place] | None = None,
        checkpoint: Path | None = None,
        **counts: Any,
    ) -> tuple[Draws, Draws]:
        """Run both families, or go on with `previous`; `counts` are those of `sample`.

        Without `previous`, chains start at `starts`, each rung at the weights of the nearest rung there.
        """
        above = len(np.asarray(kernel.target.nbeta)) - 1
        fits = choose_block_size(_ALL, None, kernel.target, self.params, self.data)
        # A divisor, or what is left over would be a second program.
        kernel = replace(kernel, block_size=max(size for size in range(1, min(fits, above) + 1) if above % size == 0))
        names, runs = ("base", "weights"), []
        for i, name in enumerate(names):
            of_family, before = replace(kernel, from_base=jnp.asarray(name == "base")), previous and previous[i]
            if before is None and starts is not None:
                before = _at(starts[i], of_family, self.data)
            runs.append(
                sample(
                    jax.random.fold_in(key, i),
                    of_family,
                    self.params,
                    FullBatch(self.data),
                    num_chains=self.num_chains,
                    block_size=None if fits == _ALL else 1,
                    mesh=chain_mesh(self.num_chains),
                    progress=self.progress,
                    previous=before,
                    checkpoint=None if checkpoint is None else checkpoint / name,
                    **({"collect": keep_rungs(kernel.target), "chunk_size": CHUNK} | counts),
                )
            )
        return runs[0], runs[1]


def joined(families: tuple[Draws, Draws], select: Callable[[Draws], Any]) -> Any:
    """Take the same arrays (chain, ...) of both families, one after the other, without chains that became non-finite."""
    is_finite = np.concatenate([draws.is_finite for draws in families])
    return jax.tree.map(lambda x: x[is_finite], _concatenated(families, select))


def top_rung(families: tuple[Draws, Draws], kernel: ReplicaExchange, target: LocalPosterior) -> tuple[Draws, np.ndarray]:
    """Take the coldest rung of both families as draws of `target`, with what `llc` reads companions from.

    Returns:
        The draws, and which chains started at draws of the base.
    """
    readings: RungReadings = _concatenated(families, lambda draws: draws.collected)
    info: Info = _concatenated(families, lambda draws: draws.info)
    scalar = {"is_finite": info.is_finite, "stiffness": info.stiffness, "num_gradients": info.num_gradients}
    is_finite, num_gradients = _concatenated(families, lambda draws: (draws.is_finite, draws.num_gradients))
    first, _ = families
    draws = Draws(
        jax.tree.map(lambda x: x[..., -1], info._replace(**dict.fromkeys(scalar)))._replace(**scalar),
        Energy(readings.loss[..., -1], readings.squared_distance[..., -1]),
        is_finite,
        np.zeros(len(is_finite)),
        num_gradients,
        None,
        replace(kernel.kernel, target=target, step_size=np.asarray(kernel.step_size)[-1]),
        first.num_warmup,
        first.num_burnin,
        first.thinning,
    )
    return draws, np.arange(len(is_finite)) < len(first.is_finite)


def nearest_rungs(nbetas: Any, others: Any) -> Int[np.ndarray, " rung"]:
    """Find for each rung the nearest of others in log nbeta; the base measure is near itself alone."""
    logs, other_logs = (np.log(np.maximum(x, 1e-30)) for x in (np.asarray(nbetas), np.asarray(others)))
    return np.abs(logs[:, None] - other_logs).argmin(axis=1)


_ALL = 2**10
"""More chains than are ever vectorized together on a CPU."""


def _concatenated(families: tuple[Draws, Draws], select: Callable[[Draws], Any]) -> Any:
    return jax.tree.map(lambda *x: np.concatenate(x), *map(select, families))


def _at(place: Place, kernel: ReplicaExchange, data: Batch) -> Draws:
    """Put chains on the rungs of `kernel`, with no step made."""
    nearest = nearest_rungs(kernel.target.nbeta, place.nbetas)
    params = jax.tree.map(lambda x: np.asarray(x)[:, nearest], place.params)
    state = _starts(kernel, params, data)
    return starting(kernel, state, np.ones(len(state.num_steps), bool))


@jax.jit
def _starts(kernel: ReplicaExchange, params: Params, data: Batch) -> ExchangeState:
    return jax.lax.map(lambda params: kernel.init_at(params, data), params)

"""Where the rungs of a ladder belong, and with which metric and step chains move there.

A pilot on rungs that triple nbeta learns each rung's metric and how widely nbeta L scatters there. The ladder proper has a rung
wherever the scatter, integrated over log nbeta, has grown by a fixed amount: neighbors then swap equally often. The family from
the base is annealed. Trial runs settle the steps, and put rungs between neighbors that hardly swap, or that lie in a
first-order transition, where one family is in one phase and one in the other. All go on from where the last one ended.

In many dimensions trajectories are longer: along a bent valley of a network's weights, chains then forget sooner where they
were, for the same gradients.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key

from slt_interp.data import Batch
from slt_interp.errors import InputError
from slt_interp.estimators.annealing import ANNEALING, annealed
from slt_interp.estimators.families import CHUNK, Families, Place, joined, nearest_rungs
from slt_interp.estimators.rounding import loss_rounding
from slt_interp.posterior import LocalPosterior
from slt_interp.samplers.draws import Draws
from slt_interp.samplers.exchange import ExchangeState, ReplicaExchange, RungReadings, keep_rungs
from slt_interp.samplers.hamiltonian import balanced_scale, learned_metric, needs_directions
from slt_interp.samplers.hmc import HMC
from slt_interp.samplers.kernel import Info
from slt_interp.tree import Params, dimension

MAX_WHITENED = 512
"""Above this dimension a metric has one number per coordinate: directions would cost more than gradients."""

MIN_EXCHANGE = 0.15
"""Neighbors that swap less often get a rung between them."""

BURNIN = 16
"""Gradients before the first draw at a rung, for each rung of the ladder."""

TRIAL = 400
"""Gradients of a trial at a rung."""

FEWEST = 2400
"""Gradients at a rung for the fewest draws that are worth a ladder."""


def burnin_steps(kernel: ReplicaExchange) -> int:
    """Count steps before the first draw, so that a replica may have come from anywhere on the ladder."""
    return np.size(kernel.target.nbeta) * _burnin(kernel.kernel.num_leapfrog)


def _burnin(num_leapfrog: int) -> int:
    return max(1, BURNIN // num_leapfrog)


def place_rungs(
    key: Key[Array, ""],
    target: LocalPosterior,
    families: Families,
    checkpoint: Path | None = None,
    max_gradients: float = np.inf,
) -> tuple[ReplicaExchange | None, tuple[Place, Place], float]:
    """Place the rungs of a ladder up to the nbeta of `target`, with their metrics and steps.

    Args:
        key: typed PRNG key.
        target: the coldest rung; its base measure is the lowest.
        families: what runs.
        checkpoint: a directory for resumption.
        max_gradients: per chain, for trials, burn-in and the fewest draws on the ladder; a pilot is always run.

    Returns:
        The kernel, or None if its rungs are too many for `max_gradients`; where chains go on; and the gradients per chain that
        were spent.

    Raises:
        InputError: if there would be more than 400 rungs.
    """
    base_key, pilot_key, anneal_key, trial_key = jax.random.split(key, 4)
    top = float(np.asarray(target.nbeta))
    first = min(first_rung(base_key, target, families.params, families.data, top), top / GROWTH**3)
    tripled = np.concatenate([[0.0], np.geomspace(first, top, 1 + int(np.ceil(np.log(top / first) / np.log(GROWTH) - 1e-6)))])
    pilot, places, spent = _pilot(pilot_key, target, families, tripled, checkpoint and checkpoint / "pilot")
    reached = _reached(pilot, tripled)
    count = 2 + max(1, int(np.ceil(reached[-1] - 1e-6)))
    length = _num_leapfrog(target)
    trial = max(_LEAST_TRIAL, TRIAL // length)
    late = slice(trial // 2, None)
    # Of both families together: one of them is annealed.
    each = ANNEALING / 2 + length * (_NUM_TRIALS * trial + _burnin(length) * count) + FEWEST
    if spent + count * each > max_gradients:
        return None, places, spent
    most = min(MAX_RUNGS, (max_gradients - spent) / each)
    if count > MAX_RUNGS:
        rounding = float(loss_rounding(target, jax.tree.map(lambda x: x[:, -1], places[1].params), families.data))
        raise InputError(
            f"a ladder up to nbeta {top:.3g} would need {count:,} rungs, and at most {MAX_RUNGS} are run: at cold rungs "
            "energies differ widely between chains, as where there are several minima, or where floats round the loss (here "
            f"by {rounding:.1g} nats); narrow the base measure, or end at a smaller nbeta"
        )
    kernel = _kernel(target, pilot, _spaced(reached, tripled, count))
    nbetas = np.asarray(kernel.target.nbeta, np.float64)
    places = Place(nbetas, annealed(anneal_key, kernel, families.num_chains, families.params, families.data)), places[1]
    spent += (count - 1) * ANNEALING / 2
    for attempt in range(_NUM_TRIALS):
        nbetas = np.asarray(kernel.target.nbeta, np.float64)
        folder = checkpoint and checkpoint / f"trial-{attempt}"
        runs = families.run(jax.random.fold_in(trial_key, attempt), kernel, starts=places, num_draws=trial, checkpoint=folder)
        places = _places(runs, nbetas)
        spent += float(np.mean([draws.num_gradients.mean() for draws in runs]))
        # Half of a trial forgets on which rungs chains were before. Of what is rejected the square root goes with the step.
        rejected = 1 - joined(runs, lambda draws: np.asarray(draws.info.acceptance)[:, late]).mean(axis=(0, 1))
        factor = np.clip(np.sqrt(REJECTED / np.maximum(rejected, 1e-6)), 0.5, 1.5)
        steps = np.minimum(1.0, kernel.step_size * factor.astype(np.float32))
        kernel = replace(kernel, kernel=replace(kernel.kernel, step_size=steps))
        exchange = joined(runs, lambda draws: draws.collected.exchange[:, late]).mean(axis=(0, 1))
        parts = _phase_parts([np.asarray(run.collected.loss)[run.is_finite][:, late] for run in runs], nbetas)
        parts = _limited(np.where(exchange < MIN_EXCHANGE, np.maximum(parts, 2), parts), most - len(nbetas))
        is_settled = np.all(parts == 1)
        if attempt and is_settled:
            break
        if not is_settled and attempt < _NUM_TRIALS - 1:
            pilot = pilot._replace(nbetas=nbetas, scale=kernel.kernel.scale, step_size=steps)
            kernel = _kernel(target, pilot, _divided(nbetas, parts))
    return kernel, places, spent


GROWTH = 3.0
SCATTER = 1.4
"""Standard deviations of nbeta L between neighbors: a third of the swaps succeed."""

_BASE_DRAWS, _FIRST_ESS = 1024, 0.3

MAX_RUNGS = 400
"""The cost of a ladder grows with the square of its rungs; a hundred directions over a dozen e-folds need a hundred."""

_UNSETTLED = 20.0
"""Both families together scatter at most by this factor more (in squares) than the lesser one, or one has not settled."""

_APART = 2.0
"""Families disagree where both together scatter more than this many times as widely as the narrower."""

_TORN = 2.0
"""Two phases coexist where the scatter of nbeta L, times a gap of log nbeta, is more than this: one phase has 1.4."""

_ROOM = 12
"""So many rungs may be put into a transition at once, or a third of the ladder if that is more."""

_LONG = 32
_PILOT_WARMUP = 100

_NUM_TRIALS, _LEAST_TRIAL = 3, 24
REJECTED = 0.16
"""Rejected by `HMC.step` where whole steps reject 0.2: the quarter that are smaller reject 0.05."""


class _Pilot(NamedTuple):
    """What a pilot has learned at each of its rungs: metric, step, mean and variance of the loss."""

    nbetas: Float[np.ndarray, " rung"]
    scale: Any
    step_size: Float[np.ndarray, " rung"]
    mean: Float[np.ndarray, " rung"]
    variance: Float[np.ndarray, " rung"]


class _PilotReadings(NamedTuple):
    readings: RungReadings
    gradient: Params | None


def first_rung(key: Key[Array, ""], target: LocalPosterior, params: Params, data: Batch, top: float) -> float:
    """Find the nbeta at which draws of the base, reweighted, are worth 0.3 times their number."""
    losses = np.asarray(_base_losses(target, params, data, jax.random.split(key, _BASE_DRAWS)), np.float64)
    losses = losses[np.isfinite(losses)]
    if len(losses) < _BASE_DRAWS / 100:
        raise InputError(
            f"the loss is finite at {len(losses)} of {_BASE_DRAWS} draws of the base measure: narrow the base, or check loss_fn"
        )
    losses -= losses.min()

    def share(log_nbeta: float) -> float:
        weights = np.exp(-np.exp(log_nbeta) * losses)
        return weights.sum() ** 2 / (weights**2).sum() / len(weights)

    low, high = np.log(top) - 100, np.log(top)
    if share(high) >= _FIRST_ESS:
        return top
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) > _FIRST_ESS else (low, middle)
    return float(np.exp(low))


@jax.jit
def _base_losses(target: LocalPosterior, params: Params, data: Batch, keys: Key[Array, " draw"]) -> Float[Array, " draw"]:
    def one(key: Key[Array, ""]) -> Float[Array, ""]:
        position = target.position(params)
        return target.loss(target.hold(target.base.sample(key, position), position), data)

    return jax.lax.map(one, keys)


def _pilot(
    key: Key[Array, ""], target: LocalPosterior, families: Families, nbetas: np.ndarray, checkpoint: Path | None
) -> tuple[_Pilot, tuple[Place, Place], float]:
    center = target.position(families.params)
    is_large = dimension(center) > MAX_WHITENED
    width = target.base.variance(center)
    logs = sum(float(np.sum(np.log(v))) / 2 for v in jax.tree.leaves(width)) / dimension(center)
    rungs = replace(target, nbeta=np.asarray(nbetas, np.float32))
    kernel = ReplicaExchange(HMC(rungs, np.full(len(nbetas), 0.5 * np.exp(logs), np.float32)))
    runs = families.run(
        key,
        kernel,
        num_warmup=_PILOT_WARMUP,
        num_draws=CHUNK,
        collect=jax.tree_util.Partial(_pilot_readings if is_large else _pilot_gradients, rungs),
        checkpoint=checkpoint,
    )
    members = _settled([np.asarray(run.collected.readings.loss)[run.is_finite] for run in runs])

    def by_rung(select: Callable[[Draws], Any], axis: int) -> Any:
        """Take arrays (rung, chain, ...) of the chains that have settled there; `axis` is that of the rungs."""

        def take(x: np.ndarray) -> np.ndarray:
            return np.stack([np.take(x, r, axis=axis)[chains] for r, chains in enumerate(members)])

        return jax.tree.map(lambda x: take(np.asarray(x)), joined(runs, select))

    steps = np.exp(np.log(by_rung(lambda draws: draws.state.rungs.step_size, 1)).mean(axis=1))
    if is_large:
        squares = by_rung(lambda draws: draws.state.rungs.adaptation.squares, 1)
        squares = jax.tree.map(lambda x: x.mean(axis=1), squares)
        places = by_rung(lambda draws: draws.state.params, 1)
        scale, allowed = jax.lax.map(lambda x: balanced_scale(target, center, *x), (squares, places))
    else:
        gradients = by_rung(lambda draws: draws.collected.gradient, 2)
        gradients = jax.tree.map(lambda x: x.reshape(len(x), -1, *x.shape[3:]), gradients)
        scale, allowed = jax.lax.map(partial(learned_metric, target, center), gradients)
        if not needs_directions(scale):
            scale, allowed = scale.scale, 1.0
    loss = by_rung(lambda draws: draws.collected.readings.loss, 2)[1:].astype(np.float64)
    # Of the base itself the loss may be infinite.
    mean, variance = (np.concatenate([[np.nan], f(loss, axis=(1, 2))]) for f in (np.mean, np.var))
    spent = float(np.mean([draws.num_gradients.mean() for draws in runs]))
    pilot = _Pilot(nbetas, scale, np.minimum(1.0, steps * np.asarray(allowed)), mean, variance)
    return pilot, _places(runs, nbetas), spent


def _settled(losses: list[Float[np.ndarray, "chain draw rung"]]) -> Int[np.ndarray, "rung chain"]:
    """Tell which chains to learn from at each rung: all, or twice over those of one family where the other is on its way.

    Chains that start at draws of the base may be far above where they belong when a pilot ends. What they scatter would put a
    hundred times too many rungs there, and their gradients would make its metric as much too narrow. The family that scatters
    less is then the settled one; if it is not, as at a transition, trials find neighbors that do not swap.
    """
    first, count = len(losses[0]), sum(map(len, losses))
    members = [np.arange(count), np.resize(np.arange(first), count), np.resize(np.arange(first, count), count)]
    chosen = [0]
    for rung in range(1, losses[0].shape[-1]):
        here = [x[..., rung].astype(np.float64) for x in losses]
        apart = [x.var() for x in here]
        is_unsettled = np.concatenate(here).var() > _UNSETTLED * min(apart)
        chosen.append(1 + int(np.argmin(apart)) if is_unsettled else 0)
    return np.stack([members[i] for i in chosen])


def _pilot_readings(target: LocalPosterior, state: ExchangeState, info: Info) -> _PilotReadings:
    return _PilotReadings(keep_rungs(target)(state, info), None)


def _pilot_gradients(target: LocalPosterior, state: ExchangeState, info: Info) -> _PilotReadings:
    return _PilotReadings(keep_rungs(target)(state, info), state.rungs.gradient)


def _reached(pilot: _Pilot, nbetas: np.ndarray) -> Float[np.ndarray, " rung"]:
    """Count steps to each rung of the pilot: of equal scatter of nbeta L, and never larger than the pilot's."""
    logs, heat = np.log(nbetas[1:]), nbetas[1:] ** 2 * pilot.variance[1:]
    # What falls between two rungs of the pilot, as at a transition, shows in the difference of their means.
    fall = np.maximum(-np.diff(pilot.mean[1:]) / np.diff(logs), 0.0)
    between = np.sqrt(fall * np.sqrt(nbetas[1:-1] * nbetas[2:]))
    scatter = np.maximum((np.sqrt(heat[1:]) + np.sqrt(heat[:-1])) / 2, between)
    return np.concatenate([[0.0], np.cumsum(np.maximum(scatter / SCATTER, 1 / np.log(GROWTH)) * np.diff(logs))])


def _spaced(reached: np.ndarray, nbetas: np.ndarray, count: int) -> Float[np.ndarray, " rung"]:
    """Space `count` rungs evenly in what `_reached` counts."""
    inner = np.exp(np.interp(np.linspace(0, reached[-1], count - 1), reached, np.log(nbetas[1:])))
    return np.concatenate([[0.0], inner[:-1], nbetas[-1:]])


def _phase_parts(losses: list[Float[np.ndarray, "chain draw rung"]], nbetas: np.ndarray) -> Int[np.ndarray, " pair"]:
    """Tell into how many parts gaps are divided where two phases coexist: one where there is one phase.

    Phases that differ by D in nbeta L swap places between neighbors with probability exp(-D (ratio of their nbetas - 1)); both
    together scatter by D / 2. A gap gets a part for each unit of scatter, where the pilot allowed 1.4 of what one phase
    scatters. Only above a rung at which the families agree is it a transition: below, one of them has not arrived.
    """
    energies = [nbetas * np.where(np.isfinite(x), x, 0.0).reshape(-1, len(nbetas)).astype(np.float64) for x in losses]
    together = np.concatenate(energies).std(axis=0)
    agrees = np.flatnonzero(together <= _APART * np.min([x.std(axis=0) for x in energies], axis=0))
    wide = np.maximum(together[1:-1], together[2:]) * np.diff(np.log(nbetas[1:]))
    is_torn = (wide > _TORN) & (np.arange(1, len(nbetas) - 1) < agrees.max(initial=0))
    parts = np.concatenate([[1], np.where(is_torn, np.ceil(wide), 1).astype(int)])
    return _limited(parts, max(_ROOM, len(nbetas) // 3))


def _limited(parts: Int[np.ndarray, " pair"], room: float) -> Int[np.ndarray, " pair"]:
    """Put no more rungs into gaps than there is room for, into the widest first."""
    order, added = np.argsort(-parts, kind="stable"), parts - 1
    before = np.cumsum(added[order]) - added[order]
    added[order] = np.clip(int(room) - before, 0, added[order])
    return 1 + added


def _divided(nbetas: np.ndarray, parts: Int[np.ndarray, " pair"]) -> Float[np.ndarray, " rung"]:
    """Put rungs into gaps at equal ratios; next to the base, where there is no ratio, at a quarter."""
    added = [nbetas[1:2] / 4] if parts[0] > 1 else []
    for low, high, count in zip(nbetas[1:-1], nbetas[2:], parts[1:], strict=True):
        added.append(np.geomspace(low, high, count + 1)[1:-1])
    return np.sort(np.concatenate([nbetas, *added]))


def _num_leapfrog(target: LocalPosterior) -> int:
    return _LONG if dimension(target.center) > MAX_WHITENED else HMC.num_leapfrog


def _kernel(target: LocalPosterior, pilot: _Pilot, nbetas: np.ndarray) -> ReplicaExchange:
    """Give each rung the metric and the step of the pilot's nearest."""
    nearest = nearest_rungs(nbetas, pilot.nbetas)
    scale, steps = jax.tree.map(lambda x: np.asarray(x)[nearest], (pilot.scale, pilot.step_size))
    rungs = replace(target, nbeta=np.asarray(nbetas, np.float32))
    return ReplicaExchange(HMC(rungs, steps, num_leapfrog=_num_leapfrog(target), scale=scale))


def _places(runs: tuple[Draws, Draws], nbetas: np.ndarray) -> tuple[Place, Place]:
    return Place(nbetas, runs[0].state.params), Place(nbetas, runs[1].state.params)

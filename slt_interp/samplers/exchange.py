"""Replica exchange: one chain is a whole ladder of temperatures, whose neighbors swap their positions.

The lowest rung is the base measure itself (nbeta = 0), drawn afresh at every step, so that new regions keep entering the
ladder there and travel upward. To `sample` it is a kernel like any other, and a chain's random numbers, checkpoints, devices
and blocks are as ever; the arrays of its state and of its `Info` have a leading rung axis.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from slt_interp.data import Batch
from slt_interp.posterior import LocalPosterior
from slt_interp.samplers.hamiltonian import MetropolisState, Whitening, start
from slt_interp.samplers.hmc import HMC
from slt_interp.samplers.kernel import Info, inspect
from slt_interp.tree import Params, Real, dot, register_dataclass


class ExchangeState(NamedTuple):
    """A ladder: the state of every rung, which replica is there, and how likely its neighbors were to swap.

    Attributes:
        rungs: HMC's states, (rung, ...).
        replica: the number of the replica at each rung; a fresh draw of the base takes over the number of the one it replaces.
        exchange: probability with which rungs r and r + 1 would have swapped after the last step.
        num_steps: steps so far; even ones try the swaps of even r.
    """

    rungs: MetropolisState
    replica: Int[Array, " rung"]
    exchange: Float[Array, " pair"]
    num_steps: Int[Array, ""]

    @property
    def params(self) -> Params:
        """The weights of every rung, (rung, ...)."""
        return self.rungs.params


class RungReadings(NamedTuple):
    """What `keep_rungs` keeps of a draw.

    Attributes:
        loss, squared_distance: of the states themselves.
        replica, exchange: see `ExchangeState`.
        params: the weights of every rung, (rung, ...), if they are wanted.
        labels: what a function of the weights says of every rung, if there is one.
    """

    loss: Float[Array, " rung"]
    squared_distance: Float[Array, " rung"]
    replica: Int[Array, " rung"]
    exchange: Float[Array, " pair"]
    params: Params | None = None
    labels: Int[Array, " rung"] | None = None


@partial(register_dataclass, data_fields=["kernel", "from_base"], meta_fields=["block_size"])
@dataclass(frozen=True)
class ReplicaExchange:
    """Run HMC at every rung of a ladder and swap neighbors after every step, on the full batch.

    Rungs r and r + 1 swap with probability min(1, exp((nbeta_{r+1} - nbeta_r) (L_{r+1} - L_r))), even r at even steps and odd r
    at odd ones, which carries replicas through the ladder faster than random pairs.

    Args:
        kernel: `HMC` whose `target.nbeta`, `step_size` and `scale` (or None) have a leading rung axis; the first nbeta is 0.
        from_base: whether every rung starts at a draw of the base measure, wherever loss and gradient are finite there, rather
            than at the given weights.
        block_size: rungs vectorized together, within each of the chains that are.

    References:
        Hukushima and Nemoto (1996), Exchange Monte Carlo method and application to spin glass simulations,
        arXiv:cond-mat/9512035.
        Syed et al. (2022), Non-reversible parallel tempering: a scalable highly parallel MCMC scheme, arXiv:1905.02939.

    >>> target = LocalPosterior(lambda w, batch: jnp.sum(w**4), jnp.zeros(2), jnp.array([0.0, 1.0, 9.0]), localization=1.0)
    >>> kernel = ReplicaExchange(HMC(target, jnp.full(3, 0.3)))
    >>> state = kernel.init(jax.random.key(0), jnp.zeros(2), None)
    >>> kernel.step(jax.random.key(1), state, None)[1].loss.shape
    (3,)
    """

    kernel: HMC
    from_base: Bool[Array, ""] | bool = False
    block_size: int = 1
    full_batch: ClassVar[bool] = True

    @property
    def target(self) -> LocalPosterior:
        """The target of all rungs: its nbeta has a rung axis."""
        return self.kernel.target

    @property
    def step_size(self) -> Real:
        """The leapfrog step of every rung."""
        return self.kernel.step_size

    def init(self, key: Key[Array, ""], params: Params, batch: Batch) -> ExchangeState:
        """Start every rung, the lowest one at a draw of the base measure."""
        num_rungs = jnp.size(self.target.nbeta)

        def one(arguments: tuple[Key[Array, ""], Array, tuple]) -> MetropolisState:
            key, rung, settings = arguments
            kernel, draw = self.at(settings), self.draw(key, params)
            drawn, given = (kernel.init(key, w, batch) for w in (draw, self.target.position(params)))
            # No gradient leads away from where the loss is infinite, and a start need not be typical.
            is_finite = jnp.isfinite(drawn.loss) & jnp.isfinite(dot(drawn.gradient, drawn.gradient))
            is_drawn = (rung == 0) | (jnp.asarray(self.from_base) & is_finite)
            return jax.tree.map(lambda a, b: jnp.where(is_drawn, a, b), drawn, given)

        arguments = jax.random.split(key, num_rungs), jnp.arange(num_rungs), self.settings()
        return self._first(jax.lax.map(one, arguments))

    def init_at(self, params: Params, batch: Batch) -> ExchangeState:
        """Start every rung at weights of its own, (rung, ...)."""

        def one(arguments: tuple[tuple, Params]) -> MetropolisState:
            settings, position = arguments
            rung = self.at(settings)
            return start(rung.target, position, batch, rung.step_size, has_metric=rung.scale is not None)

        return self._first(jax.lax.map(one, (self.settings(), params)))

    def adapt(self, key: Key[Array, ""], state: ExchangeState, batch: Batch) -> tuple[ExchangeState, Info]:
        """Make one transition of every rung, which adapts its step and metric, and swap."""
        return self._transition(key, state, batch, adapting=True)

    def step(self, key: Key[Array, ""], state: ExchangeState, batch: Batch) -> tuple[ExchangeState, Info]:
        """Make one transition of every rung and swap."""
        return self._transition(key, state, batch, adapting=False)

    def _transition(
        self, key: Key[Array, ""], state: ExchangeState, batch: Batch, *, adapting: bool
    ) -> tuple[ExchangeState, Info]:
        move_key, base_key, swap_key = jax.random.split(key, 3)
        num_rungs = len(state.replica)
        lowest, others = (jax.tree.map(lambda x, part=part: x[part], state.rungs) for part in (0, slice(1, None)))

        def move(arguments: tuple[Key[Array, ""], tuple, MetropolisState]) -> tuple[MetropolisState, Info, Params]:
            key, settings, rung = arguments
            kernel = self.at(settings)
            moved, info = (kernel.adapt if adapting else kernel.step)(key, rung, batch)
            base = kernel.target.base.gradient(moved.params)
            return moved, info, jax.tree.map(lambda g, b: (g - b) / kernel.target.nbeta, moved.gradient, base)

        settings = jax.tree.map(lambda x: x[1:], self.settings())
        arguments = jax.random.split(move_key, num_rungs - 1), settings, others
        moved, info, slopes = self._map(move, arguments)
        # What is known of the lowest rung belongs to the state that was handed over, as everywhere.
        flat = replace(self.target, nbeta=0.0)
        first = inspect(flat, lowest.params, lowest.loss, lowest.gradient)._replace(acceptance=jnp.ones(()))
        fresh = self.draw(base_key, lowest.params)
        loss, slope = jax.value_and_grad(self.target.loss)(fresh, batch)
        loss = jnp.where(jnp.isnan(loss), jnp.inf, loss)
        drawn = lowest._replace(params=fresh, loss=loss, gradient=flat.potential_gradient(fresh, slope))

        def stack(bottom: Any, rest: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.concatenate([jnp.asarray(a, b.dtype)[None], b]), bottom, rest)

        rungs, slopes, info = stack(drawn, moved), stack(slope, slopes), stack(first, info)
        state = self._swap(swap_key, state._replace(rungs=rungs), slopes)
        finite = info.is_finite[1:].all()
        return state, info._replace(is_finite=finite, stiffness=jnp.zeros(()), num_gradients=jnp.sum(info.num_gradients))

    def _swap(self, key: Key[Array, ""], state: ExchangeState, slopes: Params) -> ExchangeState:
        """Swap neighbors; `slopes` are the gradients of the loss alone, from which those of the potentials follow."""
        nbeta, loss = jnp.asarray(self.target.nbeta), state.rungs.loss
        log_ratio = jnp.diff(nbeta) * jnp.diff(loss)
        probability = jnp.where(jnp.isnan(log_ratio), 0.0, jnp.exp(jnp.minimum(log_ratio, 0.0)))
        is_tried = jnp.arange(len(probability)) % 2 == state.num_steps % 2
        swaps = is_tried & (jax.random.uniform(key, probability.shape) < probability)
        none = jnp.zeros(1, bool)
        come_down, go_up = jnp.concatenate([swaps, none]), jnp.concatenate([none, swaps])
        source = jnp.arange(len(nbeta)) + come_down - go_up
        params, slopes = jax.tree.map(lambda x: x[source], (state.rungs.params, slopes))
        gradients = jax.vmap(lambda n, w, g: replace(self.target, nbeta=n).potential_gradient(w, g))(nbeta, params, slopes)
        is_new = come_down | go_up
        # Rungs that stay keep their gradient to the last bit.
        gradients = jax.tree.map(
            lambda new, old: jnp.where(is_new.reshape(-1, *[1] * (new.ndim - 1)), new, old), gradients, state.rungs.gradient
        )
        rungs = state.rungs._replace(params=params, loss=loss[source], gradient=gradients)
        return ExchangeState(rungs, state.replica[source], probability, state.num_steps + 1)

    def _first(self, rungs: MetropolisState) -> ExchangeState:
        num_rungs = jnp.size(self.target.nbeta)
        return ExchangeState(rungs, jnp.arange(num_rungs), jnp.ones(num_rungs - 1), jnp.zeros((), int))

    def settings(self) -> tuple[Real, Real, Params | Whitening | None]:
        """Give what differs between rungs, for `at`: nbeta, step size and metric, (rung, ...)."""
        return jnp.asarray(self.target.nbeta), jnp.asarray(self.kernel.step_size), self.kernel.scale

    def at(self, settings: tuple[Real, Real, Params | Whitening | None]) -> HMC:
        """Make the kernel of one rung."""
        nbeta, step_size, scale = settings
        return replace(self.kernel, target=replace(self.target, nbeta=nbeta), step_size=step_size, scale=scale)

    def draw(self, key: Key[Array, ""], like: Params) -> Params:
        """Draw weights of the base measure, of the structure and dtypes of `like`."""
        center = self.target.position(self.target.center)
        return self.target.hold(self.target.base.sample(key, self.target.position(like)), center)

    def _map(self, function: Callable, arguments: Any) -> Any:
        """Map over rungs in blocks; one block alone needs no loop, whose body would be compiled apart."""
        count = len(jax.tree.leaves(arguments)[0])
        if self.block_size >= count:
            return jax.vmap(function)(arguments)
        return jax.lax.map(function, arguments, batch_size=None if self.block_size == 1 else self.block_size)


def keep_rungs(
    target: LocalPosterior, *, keep_params: bool = False, labels: Callable[[Params], Array] | None = None
) -> Callable[[ExchangeState, Info], RungReadings]:
    """Make the `collect` that a ladder's readings need, with weights and the labels of weights if they are wanted."""
    return jax.tree_util.Partial(_Readings(keep_params, labels), target)


@dataclass(frozen=True)
class _Readings:
    """Equal for equal settings, so that another ladder of the kind compiles nothing."""

    keep_params: bool
    labels: Callable[[Params], Array] | None

    def __call__(self, target: LocalPosterior, state: ExchangeState, info: Info) -> RungReadings:
        del info
        displacements = jax.vmap(lambda w: target.restrict(target.displacement(w)))(state.params)
        return RungReadings(
            state.rungs.loss,
            jax.vmap(dot)(displacements, displacements),
            state.replica,
            state.exchange,
            state.params if self.keep_params else None,
            None if self.labels is None else jax.vmap(self.labels)(state.params),
        )

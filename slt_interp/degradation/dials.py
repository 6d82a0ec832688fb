"""Dials: ways to damage a network by degrees.

A dial maps (key, weights, level) to degraded networks with axes (chain, draw). Probes are run along several dials at
matched loss, to tell what the loss holds from what any damage of that size would destroy.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from slt_interp.bases import Gaussian
from slt_interp.data import FullBatch, Minibatches, num_examples
from slt_interp.errors import InputError
from slt_interp.estimators.calibration import settled_step_size
from slt_interp.estimators.ladder import Ladder
from slt_interp.estimators.llc import LLCEstimate, llc, mean_loss
from slt_interp.posterior import LocalPosterior, LossFn
from slt_interp.samplers.chains import chain_mesh, sample
from slt_interp.samplers.draws import keep_params
from slt_interp.samplers.kernel import Kernel
from slt_interp.samplers.sgld import SGLD
from slt_interp.taps import INPUTS, NO_DAMAGE, Damage, NoDamage, Tap, compose
from slt_interp.tree import Params, register_dataclass


class Degraded(NamedTuple):
    """Degraded networks.

    Attributes:
        params: weights, with leading axes (chain, draw); the chain is the unit of replication.
        damage: of activations, for probes to take over; each draw's own key decides it.
        estimate: for posterior draws, the LLC estimate of the same chains, with its verdict and warnings.
    """

    params: Params
    damage: Damage = NO_DAMAGE
    estimate: LLCEstimate | None = None


class Dial(Protocol):
    """What studies need of a dial."""

    def draw(self, key: Key[Array, ""], params: Params, level: float, *, num_chains: int, num_draws: int) -> Degraded:
        """Degrade the network to a level; equal keys give equal random numbers at every level."""
        ...


@dataclass(frozen=True)
class WeightNoise:
    """Independent Gaussian noise on every weight; the level is its standard deviation.

    Args:
        per_layer: whether the level is in units of the root mean square of each array of weights.

    >>> noisy = WeightNoise().draw(jax.random.key(0), {"w": jnp.zeros(5)}, 0.1, num_chains=2, num_draws=3)
    >>> noisy.params["w"].shape
    (2, 3, 5)
    """

    per_layer: bool = False

    def draw(self, key: Key[Array, ""], params: Params, level: float, *, num_chains: int, num_draws: int) -> Degraded:
        """Draw around `params`."""
        keys = jax.random.split(key, (num_chains, num_draws))
        return Degraded(_noisy(keys, params, jnp.float32(level), self.per_layer))


@dataclass(frozen=True)
class ActivationNoise:
    """Gaussian noise on activations, fresh for every example; the level is its standard deviation in units of their size.

    That is the root mean square over examples and units of a site.

    Args:
        sites: where; every site but the inputs if not given.

    >>> degraded = ActivationNoise().draw(jax.random.key(0), {"w": jnp.zeros(5)}, 0.1, num_chains=2, num_draws=3)
    >>> degraded.params["w"].shape, degraded.damage(jax.random.key(1))("layer1", jnp.ones((4, 8))).shape
    ((2, 3, 5), (4, 8))
    """

    sites: tuple[str, ...] | None = None

    def draw(self, key: Key[Array, ""], params: Params, level: float, *, num_chains: int, num_draws: int) -> Degraded:
        """Repeat the weights; what damages their activations follows from the keys that a probe is given."""
        del key
        repeated = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_chains, num_draws, *jnp.shape(x))), params)
        return Degraded(repeated, NoisyActivations(jnp.float32(level), self.sites))


@partial(register_dataclass, data_fields=["level"], meta_fields=["sites"])
@dataclass(frozen=True)
class NoisyActivations:
    """The damage of `ActivationNoise`."""

    level: Float[Array, ""]
    sites: tuple[str, ...] | None

    def __call__(self, key: Key[Array, ""]) -> Tap:
        """Make the tap that a key decides; every site has noise of its own."""

        def tap(site: str, activation: Array) -> Array:
            if site == INPUTS if self.sites is None else site not in self.sites:
                return activation
            noise = jax.random.normal(jax.random.fold_in(key, zlib.crc32(site.encode())), activation.shape)
            return activation + self.level * jnp.sqrt(jnp.mean(activation**2)) * noise

        return tap


@dataclass(frozen=True)
class Composed:
    """Two dials one after the other: `first` where it stands, and around each of its draws `second`, whose level is the level.

    Args:
        first: any dial.
        first_level: where it stands.
        second: a dial that gives one network for a key, whatever the weights: all but `TemperedPosterior`.
    """

    first: Dial
    first_level: float
    second: Dial

    def draw(self, key: Key[Array, ""], params: Params, level: float, *, num_chains: int, num_draws: int) -> Degraded:
        """Degrade twice."""
        first_key, second_key, damage_key = jax.random.split(key, 3)
        first = self.first.draw(first_key, params, self.first_level, num_chains=num_chains, num_draws=num_draws)
        counts = jax.tree.leaves(first.params)[0].shape[:2]

        def one(key: Key[Array, ""], params: Params) -> Params:
            return jax.tree.map(lambda x: x[0, 0], self.second.draw(key, params, level, num_chains=1, num_draws=1).params)

        drawn = jax.vmap(jax.vmap(one))(jax.random.split(second_key, counts), first.params)
        # Damage of activations knows nothing of weights.
        second = self.second.draw(damage_key, params, level, num_chains=1, num_draws=1).damage
        real = [damage for damage in (first.damage, second) if not isinstance(damage, NoDamage)]
        damage = _Both(*real) if len(real) == 2 else (*real, NO_DAMAGE)[0]
        return Degraded(drawn, damage, first.estimate)


@partial(register_dataclass, data_fields=["first", "second"], meta_fields=[])
@dataclass(frozen=True)
class _Both:
    first: Damage
    second: Damage

    def __call__(self, key: Key[Array, ""]) -> Tap:
        first_key, second_key = jax.random.split(key)
        return compose(self.first(first_key), self.second(second_key))


@dataclass(frozen=True)
class TemperedPosterior:
    """Draws from the local posterior; the level is nbeta: the lower, the more damage.

    nbeta sets the loss and `localization` the distance.

    Args:
        loss_fn: mean negative log-likelihood per example, nats; or one of a behavior only, which then alone is held.
        data: the examples that define the loss.
        localization: gamma.
        kernel: maps a target to a kernel, such as `functools.partial(HMC, step_size=0.1)`; it runs on all examples, and adapts
            in the first half of the steps dropped. If not given, SGLD on minibatches, with a step size of its own choice.
        batch_size: examples per step of SGLD.
        num_burnin: steps dropped.
        thinning: steps per draw.
        tolerance: share of the excess loss that discretization of SGLD may add; see `settled_step_size`.
        progress: whether to show a progress bar.
    """

    loss_fn: LossFn
    data: PyTree[Array]
    localization: float
    kernel: Callable[[LocalPosterior], Kernel] | None = None
    batch_size: int = 512
    num_burnin: int = 2000
    thinning: int = 100
    tolerance: float = 0.1
    progress: bool = True

    def draw(self, key: Key[Array, ""], params: Params, level: float, *, num_chains: int, num_draws: int) -> Degraded:
        """Sample around `params` at nbeta = level; chains that became non-finite are left out, as the estimate says."""
        chain_key, step_key = jax.random.split(key)
        target, num_warmup = LocalPosterior(self.loss_fn, params, level, self.localization), 0
        if self.kernel is None:
            batches = Minibatches(self.data, min(self.batch_size, num_examples(self.data)))
            kernel = SGLD(target, settled_step_size(step_key, target, params, batches, tolerance=self.tolerance))
        else:
            batches, kernel, num_warmup = FullBatch(self.data), self.kernel(target), self.num_burnin // 2
        draws = sample(
            chain_key,
            kernel,
            params,
            batches,
            num_chains=num_chains,
            num_draws=num_draws,
            num_warmup=num_warmup,
            num_burnin=self.num_burnin - num_warmup,
            thinning=self.thinning,
            collect=keep_params,
            mesh=chain_mesh(num_chains),
            progress=self.progress,
        )
        init_loss, _ = mean_loss(self.loss_fn, params, self.data)
        finite = jax.tree.map(lambda x: x[draws.is_finite], draws.collected)
        return Degraded(finite, estimate=llc(draws, init_loss))


@dataclass(frozen=True)
class TemperedLadder:
    """Draws of a `Ladder` as a dial, sampled already; the level is nbeta, and the rung nearest to it in log nbeta is taken.

    Chains of both families take part, those from the weights and those from the base: look at the ladder's status first.

    Args:
        ladder: of `temper(..., keep_params=True)` around the weights that the dial is given.
    """

    ladder: Ladder

    def draw(self, key: Key[Array, ""], params: Params, level: float, *, num_chains: int, num_draws: int) -> Degraded:
        """Take evenly spaced draws of each chain, first of those from the weights; more than were kept are refused."""
        del key, params
        nbetas = self.ladder.nbetas
        rung = 1 + int(np.argmin(np.abs(np.log(nbetas[1:] / level))))
        _, chains, draws = self.ladder.loss.shape
        if num_chains > chains or num_draws > draws:
            raise InputError(
                f"the ladder has {chains} chains of {draws} draws, but {num_chains} of {num_draws} are asked for: ask for "
                "fewer, or run temper for longer"
            )
        order = np.argsort(self.ladder.is_from_base, kind="stable")[:num_chains]
        kept = np.linspace(0, draws - 1, num_draws).astype(int)
        return Degraded(jax.tree.map(lambda x: x[order][:, kept], self.ladder.draws(rung)))


@partial(jax.jit, static_argnames="per_layer")
def _noisy(keys: Key[Array, "chain draw"], params: Params, level: Array, per_layer: bool) -> Params:
    scale = jax.tree.map(lambda x: level * jnp.sqrt(jnp.mean(x**2)), params) if per_layer else level
    return jax.vmap(jax.vmap(lambda key: Gaussian(params, scale).sample(key, params)))(keys)

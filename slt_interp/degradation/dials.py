"""Dials: ways to damage a network by degrees.

A dial maps (key, weights, level) to degraded networks with axes (chain, draw). Probes are run along several dials at
matched loss, to tell what the loss holds from what any damage of that size would destroy.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from slt_interp.bases import Gaussian
from slt_interp.data import Minibatches, num_examples
from slt_interp.estimators.calibration import settled_step_size
from slt_interp.estimators.llc import LLCEstimate, llc, mean_loss
from slt_interp.posterior import LocalPosterior, LossFn
from slt_interp.samplers.chains import chain_mesh, sample
from slt_interp.samplers.draws import keep_params
from slt_interp.samplers.sgld import SGLD
from slt_interp.taps import Tap, no_tap
from slt_interp.tree import Params


class Degraded(NamedTuple):
    """Degraded networks.

    Attributes:
        params: weights, with leading axes (chain, draw); the chain is the unit of replication.
        tap: composed with the probe's own, for dials that damage activations.
        estimate: for posterior draws, the LLC estimate of the same chains, with its verdict and warnings.
    """

    params: Params
    tap: Tap = no_tap
    estimate: LLCEstimate | None = None


class Dial(Protocol):
    """What studies need of a dial."""

    def draw(self, key: Key[Array, ""], params: Params, level: float, *, num_chains: int, num_draws: int) -> Degraded:
        """Degrade the network to a level; equal keys give equal random numbers at every level."""
        ...


@dataclass(frozen=True)
class WeightNoise:
    """Independent Gaussian noise on every weight; the level is its standard deviation.

    >>> noisy = WeightNoise().draw(jax.random.key(0), {"w": jnp.zeros(5)}, 0.1, num_chains=2, num_draws=3)
    >>> noisy.params["w"].shape
    (2, 3, 5)
    """

    def draw(self, key: Key[Array, ""], params: Params, level: float, *, num_chains: int, num_draws: int) -> Degraded:
        """Draw around `params`."""
        keys = jax.random.split(key, (num_chains, num_draws))
        return Degraded(_noisy(keys, params, jnp.float32(level)))


@dataclass(frozen=True)
class TemperedPosterior:
    """Draws from the local posterior by SGLD; the level is nbeta: the lower, the more damage.

    nbeta sets the loss and `localization` the distance.

    Args:
        loss_fn: mean negative log-likelihood per example, nats.
        data: the examples that define the loss.
        localization: gamma.
        batch_size: examples per step.
        num_burnin: steps dropped.
        thinning: steps per draw.
        tolerance: share of the excess loss that discretization may add; see `settled_step_size`.
        progress: whether to show a progress bar.
    """

    loss_fn: LossFn
    data: PyTree[Array]
    localization: float
    batch_size: int = 512
    num_burnin: int = 2000
    thinning: int = 100
    tolerance: float = 0.1
    progress: bool = True

    def draw(self, key: Key[Array, ""], params: Params, level: float, *, num_chains: int, num_draws: int) -> Degraded:
        """Sample around `params` at nbeta = level; chains that became non-finite are left out, as the estimate says."""
        chain_key, step_key = jax.random.split(key)
        target = LocalPosterior(self.loss_fn, params, level, self.localization)
        batches = Minibatches(self.data, min(self.batch_size, num_examples(self.data)))
        step_size = settled_step_size(step_key, target, params, batches, tolerance=self.tolerance)
        draws = sample(
            chain_key,
            SGLD(target, step_size),
            params,
            batches,
            num_chains=num_chains,
            num_draws=num_draws,
            num_burnin=self.num_burnin,
            thinning=self.thinning,
            collect=keep_params,
            mesh=chain_mesh(num_chains),
            progress=self.progress,
        )
        init_loss, _ = mean_loss(self.loss_fn, params, self.data)
        finite = jax.tree.map(lambda x: x[draws.is_finite], draws.collected)
        return Degraded(finite, estimate=llc(draws, init_loss))


@jax.jit
def _noisy(keys: Key[Array, "chain draw"], params: Params, level: Array) -> Params:
    return jax.vmap(jax.vmap(lambda key: Gaussian(params, level).sample(key, params)))(keys)

"""The losses whose gradients the samplers spend their time on.

Weights and data are drawn at random: throughput does not depend on training, as long as nothing diverges.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slt_interp import FullBatch, LocalPosterior, Minibatches
from slt_interp.models.mlp import MLP
from slt_interp.models.transformer import Transformer
from slt_interp.posterior import LossFn
from slt_interp.tree import Params


@dataclass(frozen=True)
class Workload:
    """A loss with its data, and how it is sampled."""

    loss_fn: LossFn
    params: Params
    data: dict[str, Array]
    batch_size: int
    num_chains: int

    @property
    def num_examples(self) -> int:
        """Examples in the data."""
        return len(jax.tree.leaves(self.data)[0])

    @property
    def nbeta(self) -> float:
        """The customary n / log n."""
        return self.num_examples / math.log(self.num_examples)

    def target(self) -> LocalPosterior:
        """Make the posterior around the weights, with localization 100."""
        return LocalPosterior(self.loss_fn, self.params, self.nbeta, 100.0)

    def minibatches(self) -> Minibatches:
        """Make the batch function of the minibatch kernels."""
        return Minibatches(self.data, self.batch_size)

    def full_batch(self) -> FullBatch:
        """Make data for the full-batch kernels: as many examples as a minibatch, so that gradients cost the same."""
        return FullBatch(jax.tree.map(lambda x: x[: self.batch_size], self.data))


def deep_linear() -> Workload:
    """Four square layers of width 32 without biases, squared error."""
    *weight_keys, x_key, noise_key = jax.random.split(jax.random.key(0), 6)
    # Orthogonal weights keep the largest curvature at 4, far inside the stability of step 1e-4.
    params = [jax.random.orthogonal(key, 32) for key in weight_keys]
    x = jax.random.normal(x_key, (10_000, 32))
    y = _linear(params, x) + jax.random.normal(noise_key, x.shape)
    return Workload(_deep_linear_loss, params, {"x": x, "y": y}, batch_size=512, num_chains=4)


def mlp() -> Workload:
    """16-64-64-2 ReLU network, cross-entropy."""
    return _classification(_MLP, _mlp_loss, num_examples=20_000, batch_size=256, num_chains=8)


def small_mlp() -> Workload:
    """16-16-16-16-2 ReLU network of 850 parameters, cross-entropy."""
    return _classification(_SMALL_MLP, _small_mlp_loss, num_examples=2048, batch_size=64, num_chains=4)


def transformer() -> Workload:
    """Two layers of width 64 with 4 heads on sequences of 16 tokens out of 64, next-token cross-entropy."""
    params_key, data_key = jax.random.split(jax.random.key(0))
    tokens = jax.random.randint(data_key, (4096, 17), 0, 64)
    return Workload(_transformer_loss, _TRANSFORMER.init(params_key), {"tokens": tokens}, batch_size=64, num_chains=4)


WORKLOADS: dict[str, Callable[[], Workload]] = {"deep_linear": deep_linear, "mlp": mlp, "transformer": transformer}

_MLP = MLP((16, 64, 64, 2))
_SMALL_MLP = MLP((16, 16, 16, 16, 2))
_TRANSFORMER = Transformer(vocab=64, length=16, layers=2, width=64, heads=4)


def _classification(network: MLP, loss_fn: LossFn, num_examples: int, batch_size: int, num_chains: int) -> Workload:
    params_key, data_key = jax.random.split(jax.random.key(0))
    x = jax.random.normal(data_key, (num_examples, 16))
    data = {"x": x, "y": (x[:, 0] * x[:, 1] > 0).astype(jnp.int32)}
    return Workload(loss_fn, network.init(params_key), data, batch_size, num_chains)


def _linear(params: Params, x: Array) -> Array:
    for weights in params:
        x = x @ weights
    return x


def _deep_linear_loss(params: Params, batch: dict[str, Array]) -> Float[Array, ""]:
    return 0.5 * jnp.mean(jnp.sum((_linear(params, batch["x"]) - batch["y"]) ** 2, axis=-1))


def _mlp_loss(params: Params, batch: dict[str, Array]) -> Float[Array, ""]:
    return _cross_entropy(_MLP.apply(params, batch["x"]), batch["y"])


def _small_mlp_loss(params: Params, batch: dict[str, Array]) -> Float[Array, ""]:
    return _cross_entropy(_SMALL_MLP.apply(params, batch["x"]), batch["y"])


def _transformer_loss(params: Params, batch: dict[str, Array]) -> Float[Array, ""]:
    tokens = batch["tokens"]
    return _cross_entropy(_TRANSFORMER.apply(params, tokens[:, :-1]), tokens[:, 1:])


def _cross_entropy(logits: Float[Array, "*example label"], labels: Array) -> Float[Array, ""]:
    correct = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - correct)

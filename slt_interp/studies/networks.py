"""What studies of trained networks share: networks, losses, and how weights and estimates go into a run directory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from slt_interp.data import Batch, Minibatches
from slt_interp.estimators.llc import LLCEstimate
from slt_interp.models.mlp import MLP
from slt_interp.posterior import LossFn
from slt_interp.storage import Arrays
from slt_interp.tasks import digits
from slt_interp.tasks import hierarchical_equality as equality
from slt_interp.tree import Params


@dataclass(frozen=True)
class SmoothedCrossEntropy:
    """Mean cross-entropy to smoothed labels, nats per example; its smallest value is the entropy of the targets.

    With hard labels the loss has no minimum: on separable data weights grow without bound.
    """

    network: MLP
    smoothing: float

    def __call__(self, params: Params, batch: dict[str, Array]) -> Float[Array, ""]:
        """Compute the loss on {"inputs": (example, input), "labels": (example,)}."""
        return self.of_logits(self.network.apply(params, batch["inputs"]), batch["labels"])

    def of_logits(self, logits: Float[Array, "example class"], labels: Int[Array, " example"]) -> Float[Array, ""]:
        """Compute the loss of outputs, whatever was done to the network on the way."""
        log_probabilities = jax.nn.log_softmax(logits)
        right = jnp.take_along_axis(log_probabilities, labels[:, None], axis=1)[:, 0]
        return -jnp.mean((1 - self.smoothing) * right + self.smoothing * log_probabilities.mean(axis=1))

    @property
    def floor(self) -> float:
        """Entropy of the smoothed targets, nats: no network has a smaller loss."""
        others = self.network.widths[-1] - 1
        wrong = self.smoothing / (others + 1)
        right = 1 - others * wrong
        return float(-right * np.log(right) - others * wrong * np.log(wrong)) if wrong > 0 else 0.0


@dataclass(frozen=True)
class HalfSquares:
    """Half the mean squared error of a network with one output: cross-entropy to a teacher with unit noise, less its floor."""

    network: MLP

    def __call__(self, params: Params, batch: dict[str, Array]) -> Float[Array, ""]:
        """Compute the loss on {"inputs": (example, input), "outputs": (example,)}."""
        return 0.5 * jnp.mean((self.network.apply(params, batch["inputs"])[:, 0] - batch["outputs"]) ** 2)


NETWORKS = ("digits", "hierarchical equality", "tanh regression", "ReLU regression")

SMOOTHING = 0.1
"""Of the labels of networks that classify."""


class Network(NamedTuple):
    """What is trained on what."""

    network: MLP
    loss_fn: LossFn
    batches: Callable[[Key[Array, ""]], Batch]
    data: dict[str, Array]
    test: dict[str, Array]


def make_network(name: str, key: Array) -> Network:
    """Make one of `NETWORKS`, the data that define its loss, and fresh ones."""
    if name == "digits":
        network = MLP((digits.NUM_INPUTS, 16, digits.NUM_CLASSES))
        data, test = digits.digits()
        return Network(network, SmoothedCrossEntropy(network, SMOOTHING), Minibatches(data, _BATCH_SIZE), data, test)
    if name == "hierarchical equality":
        network = MLP((equality.NUM_INPUTS, 16, 16, 16, 2))
        data, test = (equality.FreshExamples(size)(jax.random.fold_in(key, size)) for size in (1024, 8192))
        batches = equality.FreshExamples(8 * _BATCH_SIZE)
        return Network(network, SmoothedCrossEntropy(network, SMOOTHING), batches, data, test)
    activation = jnp.tanh if name == "tanh regression" else jax.nn.relu
    teacher, network = MLP((4, 2, 1), activation), MLP((4, 8, 1), activation)
    teacher_key, train_key, test_key = jax.random.split(key, 3)
    # Wide enough that units bend.
    weights = jax.tree.map(lambda w: 2 * w, teacher.init(teacher_key))

    def examples(key: Array, count: int) -> dict[str, Array]:
        x = jax.random.normal(key, (count, 4))
        return {"inputs": x, "outputs": teacher.apply(weights, x)[:, 0]}

    data = examples(train_key, 1024)
    return Network(network, HalfSquares(network), Minibatches(data, _BATCH_SIZE), data, examples(test_key, 8192))


def pack(params: Params) -> Arrays:
    """Name the leaves of a pytree of weights for an .npz file."""
    return {
        f"params{jax.tree_util.keystr(path)}": np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def unpack(network: MLP, arrays: Arrays) -> Params:
    """Read weights back into the structure of a network."""
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(lambda path, _: jnp.asarray(arrays[f"params{jax.tree_util.keystr(path)}"]), shapes)


def describe(estimate: LLCEstimate) -> dict[str, Any]:
    """Make an estimate ready for results.json, without its chains."""
    fields = (
        "llc",
        "std_error",
        "init_loss",
        "init_loss_std_error",
        "nbeta",
        "localization",
        "ess",
        "rhat",
        "status",
        "warnings",
    )
    return {**{name: getattr(estimate, name) for name in fields}, "diagnostics": dict(estimate.diagnostics)}


_BATCH_SIZE = 128

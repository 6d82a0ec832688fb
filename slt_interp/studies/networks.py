"""What studies of trained networks share: their loss, and how weights and estimates go into a run directory."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from slt_interp.estimators.llc import LLCEstimate
from slt_interp.models.mlp import MLP
from slt_interp.storage import Arrays
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
        log_probabilities = jax.nn.log_softmax(self.network.apply(params, batch["inputs"]))
        right = jnp.take_along_axis(log_probabilities, batch["labels"][:, None], axis=1)[:, 0]
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

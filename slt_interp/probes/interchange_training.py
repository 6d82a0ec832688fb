"""Interchange training, which puts a circuit into a network: where it is then is known, not found.

Weights are trained so that interchange interventions along given directions of one site have the effect that the causal model
says, and the task is learned beside it. The network trained so is the positive control of every search for circuits.

References:
    Geiger et al. (2022), Inducing causal structure for interpretable neural networks, arXiv:2112.00826, equation 1: the
    counterfactual loss; there, too, it is added to that of the task.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import optax
from jaxtyping import Array, Float, Int, Key

from slt_interp.data import Counterfactuals
from slt_interp.probes.descent import descend
from slt_interp.probes.interchange import AnyAlignment, interchange
from slt_interp.taps import Network
from slt_interp.tree import Params


class InterchangeTraining(NamedTuple):
    """What interchange training gives.

    Attributes:
        params: final weights.
        losses: sum of both losses at every step, nats per example.
    """

    params: Params
    losses: Float[Array, " step"]


@functools.partial(jax.jit, static_argnames=("network", "site", "counterfactuals", "num_steps", "stop_after", "batch_size"))
def train_interchange(
    key: Key[Array, ""],
    network: Network,
    params: Params,
    site: str,
    alignment: AnyAlignment,
    counterfactuals: Callable[[Key[Array, ""], int], Counterfactuals],
    *,
    num_steps: int = 2000,
    stop_after: int | None = None,
    batch_size: int = 512,
    learning_rate: float = 1e-2,
    label_smoothing: float = 0.0,
) -> InterchangeTraining:
    """Train a network to have a circuit in given directions of one site. Maps over keys and weights.

    The loss is the cross-entropy of the patched network to the causal model's counterfactual labels, plus that of the network
    as it is to the labels of the base inputs: three forward passes and their gradients for every example, one more for each
    variable above one.

    Args:
        key: for training examples.
        network: anything with `apply` and `sites`.
        params: its initial weights.
        site: where the circuit is to be.
        alignment: rotation and masks of the directions that each variable is to have.
        counterfactuals: `(key, size) -> Counterfactuals`, a plain function.
        num_steps: Adam steps, with a learning rate that falls to 0 along a cosine.
        stop_after: end after so many of them, with a checkpoint of the whole training.
        batch_size: fresh examples per step.
        learning_rate: Adam's.
        label_smoothing: s in [0, 1): targets are (1 - s) of the label and s of all classes alike. Without, logits grow for as
            long as one trains, and the loss has no minimum.

    Raises:
        InputError: if there is no such site, or the alignment does not fit it.

    >>> from slt_interp.models.mlp import MLP
    >>> from slt_interp.probes.interchange import Alignment, block_masks
    >>> from slt_interp.tasks.hierarchical_equality import draw_counterfactuals
    >>> network, key = MLP((16, 4, 2)), jax.random.key(0)
    >>> alignment = Alignment(jax.numpy.eye(4), block_masks((2, 2), 4))
    >>> train_interchange(
    ...     key, network, network.init(key), "layer1", alignment, draw_counterfactuals, num_steps=3
    ... ).losses.shape
    (3,)
    """

    def cross_entropy(logits: Float[Array, "example class"], labels: Int[Array, " example"]) -> Float[Array, ""]:
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
        return optax.softmax_cross_entropy(logits, targets).mean()

    def loss(params: Params, key: Key[Array, ""], done: Float[Array, ""]) -> Float[Array, ""]:
        del done
        batch = counterfactuals(key, batch_size)
        patched = interchange(network, params, site, alignment, batch)
        return cross_entropy(patched, batch.labels) + cross_entropy(network.apply(params, batch.base), batch.base_labels)

    return InterchangeTraining(
        *descend(key, loss, params, num_steps=num_steps, learning_rate=learning_rate, stop_after=stop_after)
    )

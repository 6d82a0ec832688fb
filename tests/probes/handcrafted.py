"""A network whose circuit is known: layer1 units 0-7 carry (a = b), units 8-15 carry (c = d), with R = I."""

import jax.numpy as jnp
import numpy as np

from slt_interp.models.mlp import MLP
from slt_interp.probes.interchange import Alignment, block_masks

NETWORK = MLP((16, 16, 2, 2, 2))


def handcrafted_params(sharpness=1000.0):
    """Return layer1 = relu(a-b, b-a, c-d, d-c); layer2 = relu(1 - k sum); layer3 = relu(+-(e1 - e2)); logits.

    With sharpness k pairs count as equal within |difference|_1 < .5 / k, which fresh pairs are with probability
    (.5 / k)^4 / 4!: never at 1000, once in 400 at 1, where gradients are not dead.
    """
    difference = np.zeros((16, 16), np.float32)
    for pair in range(2):
        for i in range(4):
            first, second = 8 * pair + i, 8 * pair + 4 + i
            difference[first, 8 * pair + i], difference[second, 8 * pair + i] = 1, -1
            difference[first, 8 * pair + 4 + i], difference[second, 8 * pair + 4 + i] = -1, 1
    equality = -sharpness * np.kron(np.eye(2), np.ones((8, 1))).astype(np.float32)
    layers = [
        (difference, np.zeros(16)),
        (equality, np.ones(2)),
        (np.array([[1, -1], [-1, 1]]), np.zeros(2)),
        (np.array([[8, -8], [8, -8]]), np.array([-4, 4])),
    ]
    return {"layers": {i: {"kernel": jnp.float32(w), "bias": jnp.float32(b)} for i, (w, b) in enumerate(layers)}}


def input_alignment():
    """Return an exact alignment of the inputs of a network that is right: columns a - b, then c - d, then the sums."""
    pair = np.kron(np.array([[1, 1], [-1, 1]]), np.eye(4)) / np.sqrt(2)
    columns = [8 * p + 4 * kind + i for kind in range(2) for p in range(2) for i in range(4)]
    return Alignment(jnp.float32(np.kron(np.eye(2), pair)[:, columns]), block_masks((4, 4), 16))

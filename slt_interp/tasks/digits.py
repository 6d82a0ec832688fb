"""Handwritten digits, 8 x 8 pixels: scikit-learn's bundled copy of the test set of UCI's optical recognition data."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

NUM_INPUTS, NUM_CLASSES = 64, 10


@functools.cache
def digits(num_test: int = 360) -> tuple[dict[str, Array], dict[str, Array]]:
    """Load {"inputs": (example, 64) between 0 and 1, "labels": (example,)}: 1,797 - num_test for training, the rest for tests.

    >>> train, test = digits()
    >>> train["inputs"].shape, test["labels"].shape
    ((1437, 64), (360,))
    """
    from sklearn.datasets import load_digits

    inputs, labels = load_digits(return_X_y=True)
    # By a fixed shuffle: the file is ordered by writer.
    order = np.random.default_rng(0).permutation(len(labels))
    data: Any = {"inputs": jnp.asarray(inputs[order] / 16, jnp.float32), "labels": jnp.asarray(labels[order], jnp.int32)}
    train = {name: x[:-num_test] for name, x in data.items()}
    return train, {name: x[-num_test:] for name, x in data.items()}

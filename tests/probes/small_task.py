"""Hierarchical equality with entities of two numbers, quick to learn."""

import jax
import jax.numpy as jnp

from slt_interp.tasks.causal import CausalModel, intervened


def left_equality(x):
    return (x[:, 0:2] == x[:, 2:4]).all(axis=1)


def right_equality(x):
    return (x[:, 4:6] == x[:, 6:8]).all(axis=1)


MODEL = CausalModel((left_equality, right_equality), lambda values, x: (values[0] == values[1]).astype(jnp.int32))


def draw_small(key, size):
    """Draw base inputs of 8 numbers, two sources, and what the model answers."""
    pattern_key, input_key = jax.random.split(key)
    equal = jax.random.bernoulli(pattern_key, shape=(size, 3, 2, 1))
    first, second = jax.random.uniform(input_key, (2, size, 3, 2, 2), minval=-1.0)
    inputs = jnp.stack([first, jnp.where(equal, first, second)], axis=3).reshape(size, 3, 8)
    return intervened(MODEL, inputs[:, 0], inputs[:, 1:])

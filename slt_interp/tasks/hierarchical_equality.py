"""Hierarchical equality, the task to say whether (a = b) is the same as (c = d).

Inputs are four vectors [a; b; c; d] with fresh entries U(-1, 1); the four patterns of (a = b, c = d) occur equally
often. The high-level causal model has two variables, left = (a = b) and right = (c = d), and the label is
(left = right). From Geiger et al. (2023), Finding alignments between interpretable causal variables and distributed
neural representations, arXiv:2303.02536, section 4.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from slt_interp.data import Counterfactuals
from slt_interp.tree import register_dataclass

ENTITY_SIZE = 4
NUM_INPUTS = 4 * ENTITY_SIZE
VARIABLES = ("left", "right")


def draw_inputs(
    key: Key[Array, ""], left: Bool[Array, " *example"], right: Bool[Array, " *example"]
) -> Float[Array, "*example 16"]:
    """Draw inputs with the wanted equalities: a = b where `left`, c = d where `right`."""
    # Drawn flat: XLA compiles a generator of several axes many times slower.
    numbers = jax.random.uniform(key, (NUM_INPUTS * left.size,), minval=-1.0)
    a, b, c, d = numbers.reshape(4, *left.shape, ENTITY_SIZE)
    b = jnp.where(left[..., None], a, b)
    d = jnp.where(right[..., None], c, d)
    return jnp.concatenate([a, b, c, d], axis=-1)


def labels(left: Bool[Array, " *example"], right: Bool[Array, " *example"]) -> Int[Array, " *example"]:
    """Compute the task's output from the causal model's variables: 1 where left = right."""
    return (left == right).astype(jnp.int32)


@partial(register_dataclass, data_fields=[], meta_fields=["size"])
@dataclass(frozen=True)
class FreshExamples:
    """A batch function of ever new examples: `size` of them, a quarter of each pattern.

    >>> batch = FreshExamples(8)(jax.random.key(0))
    >>> batch["inputs"].shape, batch["labels"].tolist()
    ((8, 16), [1, 0, 0, 1, 1, 0, 0, 1])
    """

    size: int

    @jax.jit
    def __call__(self, key: Key[Array, ""]) -> dict[str, Array]:
        """Draw {"inputs": (size, 16), "labels": (size,)}."""
        pattern = jnp.arange(self.size) % 4
        left, right = pattern // 2 == 1, pattern % 2 == 1
        return {"inputs": draw_inputs(key, left, right), "labels": labels(left, right)}


@partial(jax.jit, static_argnames=("size",))
def draw_counterfactuals(key: Key[Array, ""], size: int) -> Counterfactuals:
    """Draw base inputs and, for each variable, a source input from which its value is to be taken.

    All 16 combinations of base and source patterns occur for each variable; the label is what the causal model says
    when both variables are taken from their sources.

    >>> draw_counterfactuals(jax.random.key(0), 32).sources.shape
    (32, 2, 16)
    """
    pattern_key, input_key = jax.random.split(key)
    left, right = jax.random.bernoulli(pattern_key, shape=(6 * size,)).reshape(2, size, 3)
    base, *sources = jnp.moveaxis(draw_inputs(input_key, left, right), 1, 0)
    return Counterfactuals(
        base=base,
        sources=jnp.stack(sources, axis=1),
        labels=labels(left[:, 1], right[:, 2]),
        base_labels=labels(left[:, 0], right[:, 0]),
    )


@partial(jax.jit, static_argnames=("size",))
def draw_scrubbing(key: Key[Array, ""], size: int) -> Counterfactuals:
    """Draw base inputs, for each variable a source with the *same* value of it, and a last source of any values.

    What the source of one variable has for the other is drawn anew. Labels are those of the base, which no value changes.

    >>> draw_scrubbing(jax.random.key(0), 32).sources.shape
    (32, 3, 16)
    """
    pattern_key, input_key = jax.random.split(key)
    left, right = jax.random.bernoulli(pattern_key, shape=(8 * size,)).reshape(2, size, 4)
    left, right = left.at[:, 1].set(left[:, 0]), right.at[:, 2].set(right[:, 0])
    base, *sources = jnp.moveaxis(draw_inputs(input_key, left, right), 1, 0)
    answers = labels(left[:, 0], right[:, 0])
    return Counterfactuals(base=base, sources=jnp.stack(sources, axis=1), labels=answers, base_labels=answers)

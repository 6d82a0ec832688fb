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
from slt_interp.tasks.causal import CausalModel, intervened
from slt_interp.tree import register_dataclass

ENTITY_SIZE = 4
NUM_INPUTS = 4 * ENTITY_SIZE
VARIABLES = ("left", "right")


def draw_inputs(
    key: Key[Array, ""], left: Bool[Array, " *example"], right: Bool[Array, " *example"], entity_size: int = ENTITY_SIZE
) -> Float[Array, "*example input"]:
    """Draw inputs with the wanted equalities: a = b where `left`, c = d where `right`."""
    # Drawn flat: XLA compiles a generator of several axes many times slower.
    numbers = jax.random.uniform(key, (4 * entity_size * left.size,), minval=-1.0)
    a, b, c, d = numbers.reshape(4, *left.shape, entity_size)
    b = jnp.where(left[..., None], a, b)
    d = jnp.where(right[..., None], c, d)
    return jnp.concatenate([a, b, c, d], axis=-1)


def labels(left: Bool[Array, " *example"], right: Bool[Array, " *example"]) -> Int[Array, " *example"]:
    """Compute the task's output from the causal model's variables: 1 where left = right."""
    return (left == right).astype(jnp.int32)


@partial(register_dataclass, data_fields=[], meta_fields=["size", "entity_size"])
@dataclass(frozen=True)
class FreshExamples:
    """A batch function of ever new examples: `size` of them, a quarter of each pattern.

    >>> batch = FreshExamples(8)(jax.random.key(0))
    >>> batch["inputs"].shape, batch["labels"].tolist()
    ((8, 16), [1, 0, 0, 1, 1, 0, 0, 1])
    """

    size: int
    entity_size: int = ENTITY_SIZE

    @jax.jit
    def __call__(self, key: Key[Array, ""]) -> dict[str, Array]:
        """Draw {"inputs": (size, 4 entity_size), "labels": (size,)}."""
        pattern = jnp.arange(self.size) % 4
        left, right = pattern // 2 == 1, pattern % 2 == 1
        return {"inputs": draw_inputs(key, left, right, self.entity_size), "labels": labels(left, right)}


@partial(jax.jit, static_argnames=("size", "entity_size"))
def draw_counterfactuals(key: Key[Array, ""], size: int, entity_size: int = ENTITY_SIZE) -> Counterfactuals:
    """Draw base inputs and, for each variable, a source input from which its value is to be taken.

    All 16 combinations of base and source patterns occur for each variable; the label is what the causal model says
    when both variables are taken from their sources.

    >>> draw_counterfactuals(jax.random.key(0), 32).sources.shape
    (32, 2, 16)
    """
    pattern_key, input_key = jax.random.split(key)
    left, right = jax.random.bernoulli(pattern_key, shape=(6 * size,)).reshape(2, size, 3)
    base, *sources = jnp.moveaxis(draw_inputs(input_key, left, right, entity_size), 1, 0)
    return Counterfactuals(
        base=base,
        sources=jnp.stack(sources, axis=1),
        labels=labels(left[:, 1], right[:, 2]),
        base_labels=labels(left[:, 0], right[:, 0]),
    )


@partial(jax.jit, static_argnames=("size", "entity_size"))
def draw_scrubbing(key: Key[Array, ""], size: int, entity_size: int = ENTITY_SIZE) -> Counterfactuals:
    """Draw base inputs, for each variable a source with the *same* value of it, and a last source of any values.

    What the source of one variable has for the other is drawn anew. Labels are those of the base, which no value changes.

    >>> draw_scrubbing(jax.random.key(0), 32).sources.shape
    (32, 3, 16)
    """
    pattern_key, input_key = jax.random.split(key)
    left, right = jax.random.bernoulli(pattern_key, shape=(8 * size,)).reshape(2, size, 4)
    left, right = left.at[:, 1].set(left[:, 0]), right.at[:, 2].set(right[:, 0])
    base, *sources = jnp.moveaxis(draw_inputs(input_key, left, right, entity_size), 1, 0)
    answers = labels(left[:, 0], right[:, 0])
    return Counterfactuals(base=base, sources=jnp.stack(sources, axis=1), labels=answers, base_labels=answers)


@dataclass(frozen=True)
class SameValue:
    """Counterfactuals that change nothing, `(key, size) -> Counterfactuals`: sources have the base's value of one variable.

    Args:
        variable: 0 for (a = b), 1 for (c = d).

    >>> SameValue(1)(jax.random.key(0), 8).sources.shape
    (8, 1, 16)
    """

    variable: int
    entity_size: int = ENTITY_SIZE

    def __call__(self, key: Key[Array, ""], size: int) -> Counterfactuals:
        """Draw base inputs and a source for the variable."""
        examples = draw_scrubbing(key, size, self.entity_size)
        return examples._replace(sources=examples.sources[:, self.variable : self.variable + 1])


def left_equality(inputs: Float[Array, "example input"]) -> Bool[Array, " example"]:
    """Tell where a = b."""
    a, b, _, _ = jnp.split(inputs, 4, axis=1)
    return (a == b).all(axis=1)


def right_equality(inputs: Float[Array, "example input"]) -> Bool[Array, " example"]:
    """Tell where c = d."""
    _, _, c, d = jnp.split(inputs, 4, axis=1)
    return (c == d).all(axis=1)


def first_argument(inputs: Float[Array, "example input"]) -> Float[Array, "example entity"]:
    """Read a itself."""
    return jnp.split(inputs, 4, axis=1)[0]


def _second_argument(inputs: Float[Array, "example input"]) -> Float[Array, "example entity"]:
    return jnp.split(inputs, 4, axis=1)[1]


def _from_both(values: tuple[Array, ...], inputs: Array) -> Int[Array, " example"]:
    del inputs
    return labels(*values)


def _from_left(values: tuple[Array, ...], inputs: Array) -> Int[Array, " example"]:
    return labels(values[0], right_equality(inputs))


def _from_right(values: tuple[Array, ...], inputs: Array) -> Int[Array, " example"]:
    return labels(left_equality(inputs), values[0])


def _from_first(values: tuple[Array, ...], inputs: Array) -> Int[Array, " example"]:
    return labels((values[0] == _second_argument(inputs)).all(axis=1), right_equality(inputs))


MODELS = {
    "both equalities": CausalModel((left_equality, right_equality), _from_both),
    "left equality": CausalModel((left_equality,), _from_left),
    "right equality": CausalModel((right_equality,), _from_right),
    "first argument": CausalModel((first_argument,), _from_first),
}
"""Causal models of the task: all give its labels, and differ in what an intervention does."""


@dataclass(frozen=True)
class Interventions:
    """Counterfactuals of a causal model of the task, `(key, size) -> Counterfactuals`; equal for equal models.

    Base inputs and sources have the four patterns at random. Half of the sources have the base's b for their a: an intervention
    on a itself could otherwise make no pair equal.

    >>> Interventions(MODELS["left equality"])(jax.random.key(0), 8).sources.shape
    (8, 1, 16)
    """

    model: CausalModel
    entity_size: int = ENTITY_SIZE

    @partial(jax.jit, static_argnums=(0, 2))
    def __call__(self, key: Key[Array, ""], size: int) -> Counterfactuals:
        """Draw base inputs and a source for every variable."""
        pattern_key, input_key, copy_key = jax.random.split(key, 3)
        count = len(self.model.variables)
        left, right = jax.random.bernoulli(pattern_key, shape=(2 * size * (1 + count),)).reshape(2, size, 1 + count)
        base, *sources = jnp.moveaxis(draw_inputs(input_key, left, right, self.entity_size), 1, 0)
        is_copied = jax.random.bernoulli(copy_key, shape=(count, size))
        b = _second_argument(base)
        pairs = zip(sources, is_copied, strict=True)
        moved = [jnp.where(copied[:, None], _with_first(source, b), source) for source, copied in pairs]
        return intervened(self.model, base, jnp.stack(moved, axis=1))


def _with_first(inputs: Float[Array, "example input"], a: Float[Array, "example entity"]) -> Float[Array, "example input"]:
    """Put another a in, and in b where they were equal."""
    b = jnp.where(left_equality(inputs)[:, None], a, _second_argument(inputs))
    return jnp.concatenate([a, b, *jnp.split(inputs, 4, axis=1)[2:]], axis=1)

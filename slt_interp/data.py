"""Data: batch functions over arrays in memory, and the examples of an intervention.

A batch function maps a key to a batch, and is a pytree. Because the arrays are leaves, they are arguments of a jitted
program, not constants baked into it. Each chain calls its batch function with its own keys, so that minibatches of
different chains are independent.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int, Key, PyTree

from slt_interp.errors import InputError
from slt_interp.noise import random_indices
from slt_interp.tree import register_dataclass

Batch = PyTree[Array] | None
"""A pytree of arrays with a leading example axis, or None for losses without data."""

MAX_FULL_BATCH, BATCH_SIZE = 8192, 512
"""Where nothing else is asked for, more examples than 8,192 are sampled in minibatches of 512."""


@partial(register_dataclass, data_fields=["data"], meta_fields=["size", "replace"])
@dataclass(frozen=True)
class Minibatches:
    """Draw `size` examples at random from `data`, a pytree of arrays with a leading example axis.

    With `replace` (the default, and cheap) examples are drawn independently; without, no example occurs twice in one
    batch. Either way the mean over a batch is an unbiased estimate of the mean over the data.

    >>> Minibatches({"x": jax.numpy.arange(10.0)}, size=4)(jax.random.key(0))["x"].shape
    (4,)
    """

    data: PyTree[Array]
    size: int
    replace: bool = True

    def __call__(self, key: Key[Array, ""]) -> Batch:
        """Draw a batch."""
        num_examples = jax.tree.leaves(self.data)[0].shape[0]
        if self.replace:
            indices = random_indices(key, self.size, num_examples)
        else:
            indices = jax.random.choice(key, num_examples, (self.size,), replace=False)
        return jax.tree.map(lambda x: x[indices], self.data)


@partial(register_dataclass, data_fields=["data"], meta_fields=[])
@dataclass(frozen=True)
class FullBatch:
    """Give all of `data` at every step; `FullBatch(None)` serves losses that have no data.

    >>> FullBatch(None)(jax.random.key(0)) is None
    True
    """

    data: Batch

    def __call__(self, key: Key[Array, ""]) -> Batch:
        """Return all of the data."""
        del key
        return self.data


class Counterfactuals(NamedTuple):
    """Examples of an intervention on every variable at once.

    Attributes:
        base: inputs that are run.
        sources: for each variable, the input that its value is taken from.
        labels: what the causal model answers after the intervention.
        base_labels: what it answers without.
    """

    base: Float[Array, "example input"]
    sources: Float[Array, "example variable input"]
    labels: Int[Array, " example"]
    base_labels: Int[Array, " example"]


def num_examples(data: PyTree[Array]) -> int:
    """Count the examples of `data`, after checking that every leaf has the same number of them.

    >>> num_examples({"x": jax.numpy.zeros((5, 2)), "y": jax.numpy.zeros(5)})
    5

    Raises:
        InputError: if the leaves differ in length, one of them is a scalar, or there are none.
    """
    leaves = jax.tree_util.tree_leaves_with_path(data)
    lengths = {jax.tree_util.keystr(path): _length(leaf) for path, leaf in leaves}
    if not lengths:
        raise InputError(
            "data has no arrays: give a pytree of arrays with a leading example axis, or None if the loss ignores it"
        )
    if len(set(lengths.values())) > 1 or None in lengths.values():
        listed = ", ".join(f"{path or 'the array'}: {'a scalar' if n is None else n}" for path, n in lengths.items())
        raise InputError(f"the leaves of data must share one leading example axis, but have lengths {listed}")
    return next(n for n in lengths.values() if n is not None)


def is_large(data: Batch) -> bool:
    """Whether all arrays of `data` share a leading axis of more than `MAX_FULL_BATCH` examples."""
    lengths = {_length(leaf) for leaf in jax.tree.leaves(data)}
    return len(lengths) == 1 and (lengths.pop() or 0) > MAX_FULL_BATCH


def map_blocks(
    function: Callable[[Batch], PyTree[Array]], data: Batch, size: int
) -> tuple[PyTree[Array], Int[Array, " block"]]:
    """Apply `function` to blocks of at most `size` consecutive examples, one after the other.

    Returns:
        The results, stacked along a leading block axis, and the number of examples in each block.

    >>> map_blocks(lambda x: x.sum(), jax.numpy.arange(5.0), 2)[0].tolist()
    [1.0, 5.0, 4.0]
    """
    head, tail = _blocks(data, size)
    parts, counts = [], []
    if head is not None:
        parts.append(jax.lax.map(function, head))
        counts += [size] * num_examples(head)
    if tail is not None:
        parts.append(jax.tree.map(lambda x: jax.numpy.asarray(x)[None], function(tail)))
        counts.append(num_examples(tail))
    return jax.tree.map(lambda *x: jax.numpy.concatenate(x), *parts), jax.numpy.array(counts)


def mean_over_blocks(function: Callable[[Batch], PyTree[Array]], data: Batch, size: int | None) -> PyTree[Array]:
    """Average `function`, a mean over examples, over blocks of at most `size` examples, holding one result at a time.

    All of `data` goes through at once if `size` is None, or if there are no data.

    >>> float(mean_over_blocks(lambda x: x.mean(), jax.numpy.arange(5.0), 2))
    2.0
    """
    if size is None or data is None:
        return function(data)
    if size < 1:
        raise InputError(f"a block must have at least 1 example, but block_size is {size}")
    (head, tail), count = _blocks(data, size), num_examples(data)
    total = None
    if head is not None:
        zeros = jax.tree.map(
            lambda x: jax.numpy.zeros(x.shape, x.dtype), jax.eval_shape(function, jax.tree.map(lambda x: x[0], head))
        )
        total, _ = jax.lax.scan(lambda sum_, block: (_add(sum_, function(block), size / count), None), zeros, head)
    if tail is not None:
        total = _add(total, function(tail), num_examples(tail) / count)
    return total


def check_batches(batches: object) -> None:
    """Raise InputError if `batches` is a `Minibatches` that cannot be drawn from its data; other kinds pass."""
    if isinstance(batches, Minibatches):
        available = num_examples(batches.data)
        if not 1 <= batches.size <= available:
            raise InputError(
                f"a batch of {batches.size} examples was asked for, but the data have {available}: choose a size "
                f"between 1 and {available}, or FullBatch(data)"
            )
    elif isinstance(batches, FullBatch) and batches.data is not None:
        num_examples(batches.data)


def _blocks(data: PyTree[Array], size: int) -> tuple[PyTree[Array] | None, PyTree[Array] | None]:
    """Split into whole blocks along a leading axis, and the examples that are left; None where there are none."""
    count = num_examples(data)
    whole = count // size
    head = jax.tree.map(lambda x: jax.numpy.asarray(x)[: whole * size].reshape(whole, size, *x.shape[1:]), data)
    tail = jax.tree.map(lambda x: jax.numpy.asarray(x)[whole * size :], data)
    return head if whole else None, tail if count > whole * size else None


def _add(total: PyTree[Array] | None, part: PyTree[Array], weight: float) -> PyTree[Array]:
    weighted = jax.tree.map(lambda x: weight * x, part)
    return weighted if total is None else jax.tree.map(jax.numpy.add, total, weighted)


def _length(leaf: Array) -> int | None:
    shape = jax.numpy.shape(leaf)
    return shape[0] if shape else None

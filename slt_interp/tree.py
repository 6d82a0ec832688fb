"""Vector-space operations and checks on pytrees of parameters.

A pytree of floating arrays is one vector here: it has a dimension, inner products and standard normal draws. Leaf
arithmetic itself is `jax.tree.map`, written where it is used.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from slt_interp.noise import standard_normal

_T = TypeVar("_T")

Real = Array | np.ndarray | np.number | float
"""A number, or a real array, of whatever library."""

Params = PyTree[Float[Array, "..."]]
"""Model weights: any pytree of floating arrays."""


def register_dataclass(cls: type[_T], *, data_fields: Sequence[str], meta_fields: Sequence[str]) -> type[_T]:
    """Register a dataclass as a pytree, as `jax.tree_util.register_dataclass` does, but never mistaken for another class.

    In JAX 0.10 structures of two classes registered there compare equal when their fields agree in number and their meta
    fields in value, whatever the classes: a jitted function may then answer for one with what it compiled for the other.

    Raises:
        TypeError: if the fields named are not those of the class.
    """
    names, known = tuple(data_fields), dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    if {*names, *meta_fields} != {field.name for field in known}:
        raise TypeError(f"data_fields and meta_fields must be the fields of {cls.__name__} together")

    def children(value: _T) -> tuple[Any, ...]:
        return tuple(getattr(value, name) for name in names)

    def meta(value: _T) -> tuple[Any, ...]:
        return tuple(getattr(value, name) for name in meta_fields)

    def flatten_with_keys(value: _T) -> tuple[Any, tuple[Any, ...]]:
        keys = map(jax.tree_util.GetAttrKey, names)
        return tuple(zip(keys, children(value), strict=True)), meta(value)

    def unflatten(settings: tuple[Any, ...], values: Iterable[Any]) -> _T:
        return cls(**dict(zip(names, values, strict=True)), **dict(zip(meta_fields, settings, strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, lambda value: (children(value), meta(value)))
    return cls


def dimension(tree: Params) -> int:
    """Count the coordinates of a pytree.

    >>> dimension({"w": jnp.zeros((3, 2)), "b": jnp.zeros(2)})
    8
    """
    return sum(jnp.size(leaf) for leaf in jax.tree.leaves(tree))


def dot(left: Params, right: Params) -> Float[Array, ""]:
    """Take the inner product of two pytrees of one structure, accumulated in float32 or better.

    >>> float(dot({"a": jnp.ones(3)}, {"a": jnp.arange(3.0)}))
    3.0
    """
    products = jax.tree.map(lambda a, b: jnp.vdot(_accurate(a), _accurate(b)), left, right)
    return sum(jax.tree.leaves(products), start=jnp.zeros(()))


def norm(tree: Params) -> Float[Array, ""]:
    """Take the Euclidean norm of a pytree, accumulated in float32 or better.

    >>> float(norm({"a": jnp.array([3.0, 4.0])}))
    5.0
    """
    return jnp.sqrt(dot(tree, tree))


def normal_like(key: Key[Array, ""], tree: Params) -> Params:
    """Draw standard normal coordinates in the shape of a pytree.

    One call of the generator serves all leaves, in the order of `jax.tree.leaves`: several times cheaper than a key
    per leaf, and the numbers depend on that order alone, not on what the tree is made of.

    >>> {name: leaf.shape for name, leaf in normal_like(jax.random.key(0), {"a": jnp.zeros((2, 3))}).items()}
    {'a': (2, 3)}
    """

    def draw(key: Key[Array, ""], shape: tuple[int], dtype: Any) -> Array:
        return standard_normal(key, *shape) if dtype == jnp.float32 else jax.random.normal(key, shape, dtype)

    return _draw_like(draw, key, tree)


def uniform_like(key: Key[Array, ""], tree: Params) -> Params:
    """Draw coordinates uniform on [0, 1) in the shape of a pytree, as `normal_like` does.

    >>> uniform_like(jax.random.key(0), {"a": jnp.zeros((2, 3))})["a"].shape
    (2, 3)
    """
    return _draw_like(jax.random.uniform, key, tree)


def broadcast(prefix: PyTree[Real], tree: Params) -> PyTree[Real]:
    """Give every leaf of `tree` its value from `prefix`, which is a scalar or a pytree like `tree`.

    >>> broadcast(2.0, {"a": jnp.zeros(3), "b": jnp.zeros(1)})
    {'a': 2.0, 'b': 2.0}
    """
    return jax.tree.broadcast(prefix, tree)


def check_params(params: Params, name: str = "params") -> None:
    """Raise unless `params` is a non-empty pytree of floating arrays.

    Raises:
        TypeError: for a whole flax nnx module (whose leaves may be RNG keys and counters) and for leaves that are
            not floating arrays; the message names the leaf and the fix.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    strange = next((entry for entry in leaves if not _is_floating(entry[1])), None)
    where = "" if strange is None else f" (leaf {jax.tree_util.keystr(strange[0])} is {_describe(strange[1])})"
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(params, nnx.Module):
        raise TypeError(
            f"{name} is a whole flax nnx module, {type(params).__name__}{where}, but a pytree of weights was expected: "
            "split it with `graphdef, params, rest = nnx.split(model, nnx.Param, ...)`, give `params`, and merge in loss_fn"
        )
    if strange is not None:
        raise TypeError(
            f"{name} must be a pytree of floating arrays{where}: give the trainable weights only, and bind the rest in loss_fn"
        )
    if dimension(params) == 0:
        raise TypeError(
            f"{name} has no coordinates ({type(params).__name__} without array elements): give the weights to sample"
        )


def check_key(key: Key[Array, ""]) -> None:
    """Raise TypeError unless `key` is one typed PRNG key."""
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()):
        raise TypeError(f"key must be one typed PRNG key, as jax.random.key(0) makes it, but is {_describe(key)}")


def check_like(tree: Params, reference: Params, name: str, reference_name: str) -> None:
    """Raise ValueError unless two pytrees have one structure and the same leaf shapes; the first difference is named."""
    left = {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    right = {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(reference)}
    for path in [*right, *left]:
        if left.get(path) != right.get(path):
            raise ValueError(
                f"{name} must have the structure of {reference_name}, but at {path or 'the root'} {name} has "
                f"{_shape(left.get(path))} and {reference_name} has {_shape(right.get(path))}"
            )
    if jax.tree.structure(tree) != jax.tree.structure(reference):
        raise ValueError(
            f"{name} must have the structure of {reference_name}, but {name} is {jax.tree.structure(tree)} and "
            f"{reference_name} is {jax.tree.structure(reference)}"
        )


def _draw_like(draw: Callable[..., Array], key: Key[Array, ""], tree: Params) -> Params:
    leaves, structure = jax.tree.flatten(tree)
    flat = draw(key, (dimension(tree),), jnp.result_type(jnp.float32, *leaves))
    parts, start = [], 0
    for leaf in leaves:
        part = flat[start : start + leaf.size]
        parts.append(part.reshape(leaf.shape).astype(leaf.dtype))
        start += leaf.size
    return structure.unflatten(parts)


def _accurate(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _is_floating(leaf: object) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def _describe(leaf: object) -> str:
    dtype = getattr(leaf, "dtype", None)
    return f"{dtype}{list(getattr(leaf, 'shape', ()))}" if dtype is not None else f"a {type(leaf).__name__}"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no leaf" if shape is None else f"shape {shape}"

from dataclasses import make_dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from slt_interp import tree

shapes = st.lists(st.lists(st.integers(0, 3), max_size=3).map(tuple), min_size=1, max_size=4)


@settings(deadline=None, max_examples=20)
@given(shapes)
def test_dot_and_dimension_are_those_of_the_raveled_vector(leaf_shapes):
    rng = np.random.default_rng(0)
    left, right = ([jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in leaf_shapes] for _ in range(2))
    flat = [np.concatenate([np.ravel(x) for x in side]).astype(np.float64) for side in (left, right)]
    assert tree.dimension(left) == flat[0].size
    np.testing.assert_allclose(float(tree.dot(left, right)), flat[0] @ flat[1], rtol=1e-5, atol=1e-5)


def test_normal_like_depends_on_leaf_order_only(key):
    as_list = tree.normal_like(key, [jnp.zeros((2, 3)), jnp.zeros(4)])
    as_dict = tree.normal_like(key, {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4)})
    np.testing.assert_array_equal(as_list[0], as_dict["a"])
    np.testing.assert_array_equal(as_list[1], as_dict["b"])


def test_normal_like_is_standard_normal(key):
    z = np.concatenate(
        [np.ravel(x) for x in jax.tree.leaves(tree.normal_like(key, [jnp.zeros(60_000), jnp.zeros((200, 200))]))]
    )
    assert abs(z.mean()) < 4 / np.sqrt(z.size)
    assert abs(z.var() - 1) < 4 * np.sqrt(2 / z.size)


def test_bf16_norms_accumulate_in_float32():
    x = jnp.ones(100_000, jnp.bfloat16)
    assert float(tree.norm(x)) == pytest.approx(np.sqrt(100_000), rel=1e-6)


class Dropping(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(2, 2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


def test_whole_nnx_module_is_rejected_with_the_leaf_and_the_fix():
    with pytest.raises(TypeError, match=r"whole flax nnx module, Dropping.*dropout.*nnx\.split\(model, nnx\.Param"):
        tree.check_params(Dropping(nnx.Rngs(0)))


def test_nnx_module_without_random_state_is_rejected_too():
    with pytest.raises(TypeError, match=r"whole flax nnx module, Linear,.*nnx\.split"):
        tree.check_params(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    "leaf", [jnp.arange(3), np.zeros(2, bool), 3.0, jax.random.key(0)], ids=["int", "bool", "float", "key"]
)
def test_leaf_that_is_no_floating_array_is_named(leaf):
    with pytest.raises(TypeError, match=r"\['step'\].*trainable weights only"):
        tree.check_params({"w": jnp.zeros(3), "step": leaf})


@pytest.mark.parametrize("empty", [{}, {"w": jnp.zeros((0, 3))}])
def test_params_without_coordinates_are_rejected(empty):
    with pytest.raises(TypeError, match="no coordinates"):
        tree.check_params(empty)


def test_first_difference_between_structures_is_named():
    with pytest.raises(ValueError, match=r"at \['b'\] params has shape \(3,\) and center has shape \(2,\)"):
        tree.check_like({"a": jnp.zeros(1), "b": jnp.zeros(3)}, {"a": jnp.zeros(1), "b": jnp.zeros(2)}, "params", "center")
    with pytest.raises(ValueError, match=r"params is .* and center is"):
        tree.check_like([jnp.zeros(1)], (jnp.zeros(1),), "params", "center")


def test_dataclass_is_registered_with_all_its_fields_or_not_at_all():
    with pytest.raises(TypeError, match="must be the fields of Pair together"):
        tree.register_dataclass(make_dataclass("Pair", ["a", "b"]), data_fields=["a"], meta_fields=[])
    kind = tree.register_dataclass(make_dataclass("Pair", ["a", "b"]), data_fields=["a"], meta_fields=["b"])
    assert jax.tree.map(lambda x: x + 1, kind(1, "kept")) == kind(2, "kept")
    assert jax.tree_util.keystr(jax.tree.leaves_with_path(kind(1, "kept"))[0][0]) == ".a"

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp.degradation.canonical import canonicalize
from slt_interp.degradation.planted import plant
from slt_interp.errors import InputError
from slt_interp.models.mlp import MLP
from slt_interp.probes.interchange import Alignment, block_masks
from tests.probes.handcrafted import NETWORK, handcrafted_params

RELU, TANH = MLP((5, 7, 6, 3)), MLP((5, 7, 6, 3), jnp.tanh)


def weights(network, key):
    """Weights with biases, which the initialization sets to 0."""
    params = network.init(key)
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.fold_in(key, x.size), x.shape), params)


def moved(params, seed, *, scales):
    """Permute, and rescale, the units of both hidden layers."""
    rng = np.random.default_rng(seed)
    layers = [{name: np.array(x) for name, x in params["layers"][i].items()} for i in range(3)]
    for i, width in enumerate((7, 6)):
        order, factor = rng.permutation(width), np.exp(rng.normal(size=width)) if scales else np.ones(width)
        layers[i]["kernel"], layers[i]["bias"] = (layers[i]["kernel"] * factor)[:, order], (layers[i]["bias"] * factor)[order]
        layers[i + 1]["kernel"] = (layers[i + 1]["kernel"] / factor[:, None])[order]
    return {"layers": dict(enumerate(layers))}


def sizes(layer):
    return np.hypot(np.linalg.norm(layer["kernel"], axis=0), np.abs(layer["bias"]))


def distance(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a, b)))


@pytest.mark.parametrize(("network", "is_homogeneous"), [(RELU, True), (RELU, False), (TANH, False)])
def test_networks_that_differ_by_symmetries_end_at_distance_0(key, network, is_homogeneous):
    reference = weights(network, key)
    other = moved(reference, 1, scales=is_homogeneous)
    assert distance(other, reference) > 0.1
    # Rounding of float32 weights of order 1.
    assert distance(canonicalize(other, reference, is_homogeneous=is_homogeneous), reference) < 1e-5


def test_canonical_weights_compute_the_same_function(key):
    reference, other = weights(RELU, key), weights(RELU, jax.random.key(9))
    inputs = jax.random.normal(key, (50, 5))
    found = jax.tree.map(jnp.float32, canonicalize(other, reference, is_homogeneous=True))
    np.testing.assert_allclose(RELU.apply(found, inputs), RELU.apply(other, inputs), atol=1e-5)
    for i in range(2):
        np.testing.assert_allclose(*(sizes(p["layers"][i]) for p in (found, reference)), rtol=1e-5)


def test_dead_units_keep_their_weights(key):
    reference = weights(RELU, key)
    dead = jax.tree.map(np.array, reference)
    dead["layers"][0]["kernel"][:, 2], dead["layers"][0]["bias"][2] = 0.0, 0.0
    found = canonicalize(dead, reference, is_homogeneous=True)
    assert distance(found, dead) < 1e-5


def test_units_of_equal_input_are_told_apart_by_what_reads_them(key):
    # A planted twin copies its neurons' incoming weights, and has units that are constant alike.
    planted = plant(NETWORK, handcrafted_params(sharpness=1.0), "layer1", Alignment(jnp.eye(16), block_masks((8, 8), 16)), 0)
    noise = np.random.default_rng(0)
    noisy = jax.tree.map(lambda x: np.asarray(x) + 1e-4 * noise.normal(size=x.shape), planted.params)
    found = canonicalize(noisy, planted.params, is_homogeneous=True)
    # Weights of order 10 are scaled by what noise does to the size of a unit.
    assert distance(found, planted.params) < 0.02


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"w": np.ones(3)}, "canonicalize knows multilayer perceptrons only"),
        (MLP((5, 4, 6, 3)), "params has kernels of shapes"),
    ],
)
def test_other_weights_are_refused(key, params, message):
    params = params.init(key) if isinstance(params, MLP) else params
    with pytest.raises(InputError, match=message):
        canonicalize(params, RELU.init(key), is_homogeneous=True)

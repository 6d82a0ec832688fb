import jax
import jax.numpy as jnp
import numpy as np

from slt_interp.models.mlp import MLP
from slt_interp.tree import check_params, dimension


def test_weights_are_a_plain_pytree_of_850_numbers(key):
    network = MLP((16, 16, 16, 16, 2))
    params = network.init(key)
    check_params(params)
    assert dimension(params) == 850
    assert jax.tree.structure(params) == jax.tree.structure(network.init(jax.random.key(1)))


def test_equal_networks_share_compiled_functions(key):
    traces = []

    def run(network, params, x):
        traces.append(1)
        return network.apply(params, x)

    jitted = jax.jit(run, static_argnums=0)
    params = MLP((3, 4, 2)).init(key)
    jitted(MLP((3, 4, 2)), params, jnp.ones((5, 3)))
    jitted(MLP((3, 4, 2)), params, jnp.zeros((5, 3)))
    assert len(traces) == 1


def test_one_example_and_any_axes_of_examples(key):
    network = MLP((3, 4, 4, 2))
    params, inputs = network.init(key), jax.random.normal(key, (5, 6, 3))
    whole = network.apply(params, inputs)
    assert whole.shape == (5, 6, 2)
    np.testing.assert_allclose(network.apply(params, inputs[1, 2]), whole[1, 2], rtol=1e-5)
    np.testing.assert_allclose(network.apply(params, inputs[1]), whole[1], rtol=1e-5)


def test_network_maps_over_weights(key):
    network = MLP((3, 4, 2))
    params = jax.vmap(network.init)(jax.random.split(key, 6))
    logits = jax.vmap(network.apply, in_axes=(0, None))(params, jnp.ones((5, 3)))
    one = network.apply(jax.tree.map(lambda x: x[2], params), jnp.ones((5, 3)))
    np.testing.assert_allclose(logits[2], one, rtol=1e-6)

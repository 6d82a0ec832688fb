import jax
import jax.numpy as jnp
import numpy as np

from slt_interp.models.mlp import MLP
from slt_interp.taps import compose, no_tap, record, replace

NETWORK = MLP((5, 4, 3, 2))


def test_taps_that_change_nothing_are_exact_no_ops(key):
    params, inputs = NETWORK.init(key), jax.random.normal(key, (7, 5))
    plain = NETWORK.apply(params, inputs)
    recorded, activations = record(NETWORK, params, inputs)
    np.testing.assert_array_equal(plain, recorded)
    for site in NETWORK.sites:
        patched = NETWORK.apply(params, inputs, replace(site, lambda h, site=site: activations[site]))
        np.testing.assert_array_equal(plain, patched)
        np.testing.assert_array_equal(plain, NETWORK.apply(params, inputs, compose(no_tap, replace(site, lambda h: h))))


def test_record_gives_every_site_what_the_network_computes(key):
    params, inputs = NETWORK.init(key), jax.random.normal(key, (7, 5))
    logits, activations = record(NETWORK, params, inputs)
    assert tuple(activations) == NETWORK.sites == ("inputs", "layer1", "layer2")
    h = inputs
    np.testing.assert_array_equal(activations["inputs"], h)
    for i, site in enumerate(NETWORK.hidden_sites):
        layer = params["layers"][i]
        h = jnp.maximum(h @ layer["kernel"] + layer["bias"], 0)
        np.testing.assert_allclose(activations[site], h, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logits, h @ params["layers"][2]["kernel"] + params["layers"][2]["bias"], rtol=1e-5, atol=1e-6)


def test_ablation_by_tap_equals_zero_outgoing_weights(key):
    params, inputs = NETWORK.init(key), jax.random.normal(key, (7, 5))
    ablated = NETWORK.apply(params, inputs, replace("layer2", jnp.zeros_like))
    np.testing.assert_allclose(ablated, jnp.broadcast_to(params["layers"][2]["bias"], (7, 2)))

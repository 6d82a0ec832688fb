"""A transported alignment goes where its activations went."""

import jax
import jax.numpy as jnp
import numpy as np

from slt_interp.degradation.transport import transport
from slt_interp.models.mlp import MLP
from slt_interp.probes.alignment import random_rotations
from slt_interp.probes.interchange import Alignment, block_masks, interchange_patch
from slt_interp.taps import record, replace
from slt_interp.tasks.hierarchical_equality import draw_counterfactuals

NETWORK = MLP((16, 6, 2), activation=lambda x: x)


def test_turned_activations_patch_as_before(key):
    turn, before = random_rotations(key, 2, 6)
    params = NETWORK.init(key)
    first, last = params["layers"][0], params["layers"][1]
    moved = {
        "layers": {
            0: {"kernel": first["kernel"] @ turn, "bias": first["bias"] @ turn},
            1: {"kernel": turn.T @ last["kernel"], "bias": last["bias"]},
        }
    }
    examples = draw_counterfactuals(key, 200)
    alignment = Alignment(before, block_masks((1, 2), 6))
    acts = [record(NETWORK, weights, examples.base)[1]["layer1"] for weights in (params, moved)]
    transported = transport(alignment, *acts)

    def patched(weights, alignment):
        patch = interchange_patch(NETWORK, weights, "layer1", alignment, examples)
        return NETWORK.apply(weights, examples.base, replace("layer1", patch))

    # Staying is preferred by 1e-5 of the size of the covariance: by so much over its smallest eigenvalue the turn is off.
    sizes = np.linalg.eigvalsh(np.cov(acts[0].T))
    wanted = patched(params, alignment)
    off = 2 * 1e-5 * np.linalg.norm(sizes) / sizes[0]
    assert off < 1e-3
    np.testing.assert_allclose(patched(moved, transported), wanted, atol=10 * off * np.abs(wanted).max())
    assert np.abs(patched(moved, alignment) - wanted).max() > 0.1


def test_what_does_not_vary_stays_where_it_was(key):
    turn = random_rotations(key, 1, 2)[0]
    varying = jax.random.normal(key, (100, 2))
    before = jnp.concatenate([varying, jnp.ones((100, 2))], axis=1)
    after = jnp.concatenate([varying @ turn, 3 * jnp.ones((100, 2))], axis=1)
    moved = transport(Alignment(jnp.eye(4), block_masks((1,), 4)), before, after).rotation
    # Rounding of 1e-7, over the preference for staying.
    np.testing.assert_allclose(moved[2:, 2:], np.eye(2), atol=1e-2)
    np.testing.assert_allclose(moved[:2, 2:], 0, atol=1e-2)

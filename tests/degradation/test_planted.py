import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp.degradation.matching import BehaviorProbe
from slt_interp.degradation.planted import plant
from slt_interp.errors import InputError
from slt_interp.models.mlp import MLP
from slt_interp.probes.alignment import random_rotations
from slt_interp.probes.dormancy import dormancy_share
from slt_interp.probes.interchange import Alignment, block_masks, interchange
from slt_interp.tasks.hierarchical_equality import draw_counterfactuals
from tests.probes.handcrafted import NETWORK, handcrafted_params

PARAMS = handcrafted_params(sharpness=1.0)
TRUE = Alignment(jnp.eye(16), block_masks((8, 8), 16))


@pytest.fixture
def examples(key):
    return draw_counterfactuals(key, 500)


def random_case(key):
    """A network and an alignment with nothing special about them."""
    network = MLP((16, 12, 9, 2))
    return network, network.init(key), Alignment(random_rotations(key, 1, 12)[0], block_masks((3, 2), 12))


@pytest.mark.parametrize("variable", [0, 1])
def test_planting_changes_no_output_and_patches_along_the_twin_act_as_the_candidate_does(key, examples, variable):
    for network, params, alignment in ((NETWORK, PARAMS, TRUE), random_case(key)):
        planted = plant(network, params, "layer1", alignment, variable)
        np.testing.assert_allclose(
            planted.network.apply(planted.params, examples.base), network.apply(params, examples.base), atol=1e-4
        )
        patched = interchange(network, params, "layer1", alignment, examples)
        for found in (planted.genuine, planted.twin):
            np.testing.assert_allclose(found.rotation.T @ found.rotation, np.eye(len(found.rotation)), atol=1e-5)
            again = interchange(planted.network, planted.params, "layer1", found, examples)
            # Sums of a few dozen float32 products of order 10.
            np.testing.assert_allclose(again, patched, atol=1e-3)


def test_nothing_in_the_loss_holds_what_the_twin_reads(key, examples):
    planted = plant(NETWORK, PARAMS, "layer1", TRUE, 0)
    moved = jax.tree.map(np.array, planted.params)
    moved["layers"][0]["kernel"][:, 16:24] += np.random.default_rng(0).normal(size=(16, 8))
    probe = BehaviorProbe.at(planted.network, planted.params, examples.base)
    assert float(probe(key, jax.tree.map(jnp.asarray, moved))["loss"]) == 0.0
    accuracy = [
        np.mean(interchange(planted.network, moved, "layer1", found, examples).argmax(axis=1) == examples.labels)
        for found in (planted.genuine, planted.twin)
    ]
    assert accuracy[0] > 0.99
    assert accuracy[1] < 0.9


def test_the_whole_effect_of_a_twin_enters_through_dormant_units_and_none_of_a_genuine_one(examples):
    planted = plant(NETWORK, PARAMS, "layer1", TRUE, 0)
    only_left = examples._replace(sources=examples.sources[:, :1])
    shares = [
        float(dormancy_share(planted.network, planted.params, "layer1", Alignment(found.rotation, found.masks[:1]), only_left))
        for found in (planted.genuine, planted.twin)
    ]
    assert shares == pytest.approx([0.0, 1.0], abs=1e-5)


def test_rescaled_units_are_no_more_dormant_than_before(examples):
    factor = np.where(np.arange(16) < 4, 0.01, 1.0)
    scaled = jax.tree.map(np.array, PARAMS)
    scaled["layers"][0]["kernel"] *= factor
    scaled["layers"][1]["kernel"] /= factor[:, None]
    assert float(dormancy_share(NETWORK, scaled, "layer1", TRUE, examples)) == pytest.approx(0.0, abs=1e-5)


def test_a_patch_that_changes_nothing_has_no_dormant_share(examples):
    same = examples._replace(sources=jnp.repeat(examples.base[:, None], 2, axis=1))
    assert np.isnan(dormancy_share(NETWORK, PARAMS, "layer1", TRUE, same))


def test_unknown_variables_and_sites_are_named():
    with pytest.raises(InputError, match="the alignment has variables 0 to 1, but variable is 2"):
        plant(NETWORK, PARAMS, "layer1", TRUE, 2)
    with pytest.raises(InputError, match="nothing can be planted at inputs"):
        plant(NETWORK, PARAMS, "inputs", TRUE, 0)
    with pytest.raises(InputError, match="the network has no site 'layer7'"):
        plant(NETWORK, PARAMS, "layer7", TRUE, 0)

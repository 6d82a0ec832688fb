import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp.errors import InputError
from slt_interp.models.mlp import MLP
from slt_interp.probes.alignment import random_rotations
from slt_interp.probes.interchange import Alignment, InterchangeProbe, block_masks
from slt_interp.probes.localist import closest_localist, localist_search
from slt_interp.tasks.hierarchical_equality import draw_counterfactuals
from tests.probes.handcrafted import NETWORK, handcrafted_params


def permuted(params, order):
    first, second = params["layers"][0], params["layers"][1]
    layers = {
        **params["layers"],
        0: {"kernel": first["kernel"][:, order], "bias": first["bias"][order]},
        1: {"kernel": second["kernel"][order], "bias": second["bias"]},
    }
    return {"layers": layers}


def test_exhaustive_search_finds_a_planted_permutation_of_16_neurons(key):
    order = np.asarray(jax.random.permutation(key, 16))
    found = localist_search(NETWORK, permuted(handcrafted_params(), order), "layer1", (8, 8), draw_counterfactuals(key, 256))
    assert found.masks.shape == (12_870, 2, 16)
    planted = np.stack([order < 8, order >= 8]).astype(float)
    np.testing.assert_array_equal(found.alignment.masks, planted)
    assert found.iia.max() == 1.0
    # Any other choice mixes the variables up in some of 256 examples.
    assert np.sum(found.iia == 1.0) == 1


def test_search_at_a_small_site_tries_every_choice_and_gives_each_its_accuracy(key):
    params, examples = handcrafted_params(), draw_counterfactuals(key, 300)
    found = localist_search(NETWORK, params, "layer2", (1, 1), examples)
    assert found.masks.tolist() == [[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]]
    for masks, iia in zip(found.masks, found.iia, strict=True):
        probe = InterchangeProbe(NETWORK, "layer2", Alignment(jnp.eye(2), jnp.asarray(masks)), examples)
        assert float(probe(key, params)["iia"]) == pytest.approx(float(iia))
    assert found.iia[0] == 1.0


def test_closest_localist_is_the_best_of_all_assignments(key):
    alignment = Alignment(random_rotations(key, 1, 6)[0], block_masks((2, 1), 6))
    within = np.asarray(alignment.masks) @ (np.asarray(alignment.rotation) ** 2).T
    best = max(
        within[0, list(two)].sum() + within[1, one]
        for two in itertools.combinations(range(6), 2)
        for one in set(range(6)) - set(two)
    )
    found = np.asarray(closest_localist(alignment).masks)
    assert found.sum(axis=1).tolist() == [2.0, 1.0]
    assert found.sum(axis=0).max() == 1.0
    assert np.sum(found * within) == pytest.approx(best)


@pytest.mark.parametrize(
    ("network", "sizes", "message"),
    [
        (NETWORK, (9, 9), "18 directions were asked for"),
        (MLP((16, 40, 2)), (8, 8), "at most 100,000 are tried: ask for fewer"),
    ],
)
def test_impossible_searches_are_refused(key, network, sizes, message):
    with pytest.raises(InputError, match=message):
        localist_search(network, network.init(key), "layer1", sizes, draw_counterfactuals(key, 8))

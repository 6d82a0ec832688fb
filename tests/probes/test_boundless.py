import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp.probes.alignment import fit_alignment
from slt_interp.probes.boundless import LearnedBoundaries
from slt_interp.probes.interchange import block_masks
from slt_interp.tasks.hierarchical_equality import draw_counterfactuals
from tests.probes.handcrafted import NETWORK, handcrafted_params


@pytest.mark.parametrize("sizes", [(8, 8), (3, 5), (0, 4), (1, 1, 1)])
def test_search_starts_from_the_sizes_given(key, sizes):
    family, masks = LearnedBoundaries(), block_masks(sizes, 16)
    hard = family.alignment(family.start(key, masks), masks, jnp.ones(())).masks
    # What starts with nothing has half a column, which moves boundaries by less than half of one.
    np.testing.assert_array_equal(hard, masks)


def test_masks_are_products_of_sigmoids_that_harden(key):
    family, masks = LearnedBoundaries(), block_masks((4, 6), 16)
    found = family.start(key, masks)
    k = np.arange(16) + 0.5

    def written_out(begin, end, temperature):
        return 1 / (1 + np.exp(-(k - begin) / temperature)) / (1 + np.exp(-(end - k) / temperature))

    for done, temperature in ((0.0, 0.5), (0.5, 0.3)):
        soft = family.alignment(found, masks, jnp.float32(done)).masks
        # Float32 in the boundaries, 1e-6 of a column or so, over the temperature.
        np.testing.assert_allclose(soft[0], written_out(0, 4, temperature), atol=1e-5)
        np.testing.assert_allclose(soft[1], written_out(4, 10, temperature), atol=1e-5)
        assert (soft.sum(axis=0) <= 1 + 1e-6).all()
    assert set(np.unique(family.alignment(found, masks, jnp.ones(())).masks)) == {0.0, 1.0}


def test_penalty_is_the_share_of_columns_owned(key):
    found = LearnedBoundaries().start(key, block_masks((4, 6), 16))
    assert float(LearnedBoundaries(3.0).penalty(found)) == pytest.approx(3 * 10 / 16, rel=1e-5)
    slope = jax.grad(lambda f: LearnedBoundaries(3.0).penalty(f))(found).log_shares
    assert slope[0] > 0
    assert slope[1] > 0
    assert slope[2] < 0


@pytest.mark.slow
def test_penalized_search_keeps_the_circuit_and_gives_back_directions_that_nothing_reads(key):
    params = handcrafted_params(sharpness=1.0)

    def fitted(penalty):
        family = LearnedBoundaries(penalty)
        return fit_alignment(
            key, NETWORK, params, "layer1", (6, 6), draw_counterfactuals, family=family, num_steps=1000, learning_rate=2e-2
        )

    free, penalized = fitted(0.0), fitted(5.0)
    for fit in (free, penalized):
        assert fit.restart_iia.max() > 0.99
        # What follows reads units 0-7 and 8-15 by their sums only: no variable can do with less than that direction.
        for v in range(2):
            direction = np.kron(np.eye(2)[v], np.ones(8)) / np.sqrt(8)
            coordinates = direction @ np.asarray(fit.alignment.rotation)
            assert np.sum(coordinates**2 * np.asarray(fit.alignment.masks[v])) > 0.95
    assert free.alignment.masks.sum() >= 12
    assert penalized.alignment.masks.sum() <= 8

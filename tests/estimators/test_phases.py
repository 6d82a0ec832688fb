"""Two phases on a ladder."""

import numpy as np
import pytest
from scipy import stats

from slt_interp.estimators.phases import find_two_phases, two_groups

NBETAS = np.array([0.0, 1.0, 10.0, 100.0])


def _losses(values):
    """Losses of 4 chains and 1,000 draws, with nbeta L gamma distributed but for one rung."""
    rng = np.random.default_rng(0)
    losses = rng.gamma(3.0, size=(4, 4, 1000)) / np.maximum(NBETAS, 1e-3)[:, None, None]
    losses[2] = np.resize(values, (4, 1000)) / NBETAS[2]
    return losses


@pytest.mark.parametrize(
    ("law", "distance"),
    [
        # Halves of a normal distribution: means +-sqrt(2 / pi), standard deviations sqrt(1 - 2 / pi).
        (stats.norm, np.sqrt(2 / np.pi) / np.sqrt(1 - 2 / np.pi)),
        # Halves of [0, 1]: .5 apart, of standard deviation .5 / sqrt(12).
        (stats.uniform, np.sqrt(3)),
    ],
)
def test_groups_of_one_phase_are_as_distant_as_halves_of_its_law(law, distance):
    quantiles = law.ppf((np.arange(20_000) + 0.5) / 20_000)
    edge, found = two_groups(quantiles)
    assert edge == pytest.approx(law.mean(), abs=1e-3)
    assert found == pytest.approx(distance, rel=1e-3)


def test_a_small_group_is_found():
    edge, distance = two_groups(np.concatenate([np.linspace(0, 1, 980), np.linspace(9, 10, 20)]))
    assert 1 < edge < 9
    assert distance == pytest.approx(9 / (2 / np.sqrt(12)), rel=0.05)


def test_long_tails_are_no_second_phase():
    # Exponentially distributed with an LLC of 30: a variance of 900, and one group.
    wide = stats.gamma(1.0, scale=30.0).ppf((np.arange(4000) + 0.5) / 4000)
    assert wide.var() > 3 * (1 + wide.mean())
    assert find_two_phases(NBETAS, _losses(np.random.default_rng(1).permutation(wide)), None) is None


def test_a_few_draws_of_one_chain_are_no_phase():
    far = np.full(4000, 5.0)
    far[:10] = 1e3
    assert find_two_phases(NBETAS, _losses(far), None) is None
    far[1000] = 1e3
    assert find_two_phases(NBETAS, _losses(far), None) is not None


def test_chains_change_phase_where_the_same_replica_comes_back_in_the_other():
    # Draws alternate between phases at 10 and 60, and so do two replicas, each of which stays in its own.
    losses = _losses(np.array([10.0, 60.0]) + np.zeros((2000, 2)))
    replica = np.broadcast_to(np.array([0, 1]), (4, 4, 500, 2)).reshape(4, 4, 1000)
    stuck = find_two_phases(NBETAS, losses, replica)
    assert (stuck.rung, stuck.llc, stuck.variance, stuck.changes) == pytest.approx((2, 35.0, 625.0, 0.0))
    # Without swaps a chain is its own replica.
    assert find_two_phases(NBETAS, losses, None).changes == 999
    # One change of each replica, half way.
    crossed = losses.copy()
    crossed[2, :, 500:] = losses[2, :, 499:-1]
    assert find_two_phases(NBETAS, crossed, replica).changes == 2

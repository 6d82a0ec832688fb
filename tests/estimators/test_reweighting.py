"""Multistate reweighting against exact partition functions, from independent draws of every rung."""

import numpy as np
import pytest
from scipy import stats

from slt_interp.estimators.reweighting import Reweighting, block_rows, controlled

NBETAS = np.concatenate([[0.0], np.geomspace(0.3, 1e3, 10)])
SHAPE = 2.5


def _gamma_ladder(seed, num_chains=8, num_draws=200):
    """Losses of a quadratic in 5 dimensions under N(0, 1): gamma distributed at every rung."""
    rng = np.random.default_rng(seed)
    return Reweighting(NBETAS, rng.gamma(SHAPE, 1 / (1 + NBETAS)[:, None, None], (len(NBETAS), num_chains, num_draws)))


def test_errors_cover_exact_partition_functions_and_masses():
    thresholds = [1.0, 0.1, 0.01]
    scores = []
    for seed in range(25):
        ladder = _gamma_ladder(seed)
        log_z, error = ladder.log_partition()
        exact = -SHAPE * np.log1p(NBETAS)
        scores.append([(log_z[rung] - exact[rung]) / error[rung] for rung in (1, 5, 10)])
        for threshold in thresholds:
            inside = ladder.losses <= threshold
            value, error = ladder.log_mass(inside), ladder.log_mass_error(inside)
            scores[-1].append((value - stats.gamma(SHAPE).logcdf(threshold)) / error)
    scores = np.array(scores)
    # An error is at least that of 80 blocks, with which a score has a variance of 1.03, the mean of its squares over 25 ladders
    # a standard error of sqrt(2 / 25) = .28, and its own mean one of sqrt(1.03 / 25) = .2.
    assert np.all(np.abs(scores.mean(axis=0)) < 4 * 0.2)
    assert np.all((scores**2).mean(axis=0) < 1.03 + 4 * 0.28)
    # Errors three times too large would give a ninth of that.
    assert np.all((scores**2).mean(axis=0) > 1 / 9)


def test_chains_that_are_alike_by_chance_have_the_error_of_their_draws():
    # Draws are dealt among the chains in the order of their size: their means are the same, draws within them independent.
    free = _gamma_ladder(0)
    dealt = np.sort(free.losses.reshape(len(NBETAS), -1)).reshape(len(NBETAS), -1, free.losses.shape[1]).swapaxes(1, 2)
    alike = Reweighting(NBETAS, np.random.default_rng(1).permuted(dealt, axis=2))
    errors = [(ladder.log_partition()[1][1:], ladder.log_mass_error(ladder.losses <= 0.1)) for ladder in (free, alike)]
    # 80 blocks give an error to 8 %, 8 chains to 27 %.
    for of_free, of_alike in zip(*errors, strict=True):
        assert np.all(of_alike > 0.68 * of_free)
        assert np.all(of_alike < 1.5 * of_free)


def test_mass_of_everything_is_one():
    ladder = _gamma_ladder(0)
    assert ladder.log_mass(np.ones_like(ladder.losses, bool)) == pytest.approx(0, abs=1e-6)
    assert ladder.log_mass(np.zeros_like(ladder.losses, bool)) == -np.inf


def test_chains_that_stay_in_two_phases_have_an_error_as_wide_as_these():
    # Half of them are 2 nats per example above the others, 60,000 times 1 / nbeta at the last rung.
    nbetas = np.concatenate([[0.0], np.geomspace(1.0, 3e4, 12)])
    losses = np.random.default_rng(2).gamma(5, 1 / (1 + nbetas)[:, None, None], (13, 4, 50))
    losses[1:, :2] += 2.0
    log_z, error = Reweighting(nbetas, losses).log_partition()
    assert np.all(np.isfinite(log_z))
    assert error[-1] > 1000


def test_infinite_losses_of_the_base_count_as_mass_outside():
    rng = np.random.default_rng(0)
    losses = _gamma_ladder(0).losses.copy()
    losses[0][rng.uniform(size=losses[0].shape) < 0.5] = np.inf
    # Half of the base is out of reach of the other rungs, all of which lose the same factor.
    log_z, error = Reweighting(NBETAS, losses).log_partition()
    assert np.all(np.abs(log_z + SHAPE * np.log1p(NBETAS) + np.log(2))[1:] < 4 * error[1:])


def test_moments_between_rungs_are_those_of_the_exact_law():
    values = np.array([_gamma_ladder(seed).moments(20.0) for seed in range(10)])
    exact = [-SHAPE * np.log1p(20.0), SHAPE / 21.0, SHAPE / 21.0**2]
    assert np.all(np.abs(values.mean(axis=0) - exact) < 4 * values.std(axis=0, ddof=1) / np.sqrt(10))


def test_controls_take_out_what_is_in_proportion_to_them_and_leave_the_rest():
    ladder, families = _gamma_ladder(0), [np.arange(4), np.arange(4, 8)]
    energies = block_rows(NBETAS[1:, None, None] * ladder.losses[1:], 10, families)
    # 2 (1 + nbeta) L is the virial of that quadratic, of mean 5: energies are proportional to it.
    controls = block_rows(2 * (1 + NBETAS[1:, None, None]) * ladder.losses[1:] - 2 * SHAPE, 10, families)
    unrelated = np.random.default_rng(1).normal(size=(82, 9))
    found = controlled(np.concatenate([energies, unrelated], axis=1), controls)
    exact = SHAPE * NBETAS[1:] / (1 + NBETAS[1:])
    np.testing.assert_allclose(found[-2, :10], exact, rtol=1e-12)
    np.testing.assert_allclose(np.delete(found[:, :10], -2, axis=0), 0.0, atol=1e-12)
    # Two coefficients fitted to 80 rows of noise explain 1 / 40 of it, give or take sqrt(2 * 2) / 80 for each of 9.
    explained = 1 - np.mean(found[:80, 10:] ** 2) / np.mean(unrelated[:80] ** 2)
    assert abs(explained - 1 / 40) < 4 * 2 / 80 / 3


def test_controls_explain_increments_of_log_z_block_by_block():
    ladder, families = _gamma_ladder(0), [np.arange(4), np.arange(4, 8)]
    increments = np.diff(ladder.influences(10)[:, 1:], axis=1)
    controls = block_rows(2 * (1 + NBETAS[1:, None, None]) * ladder.losses[1:] - 2 * SHAPE, 10, families)
    rows = np.zeros((82, 19))
    rows[:80, 10:] = increments
    left = np.std(controlled(rows, controls)[:80, 10:]) / np.std(increments)
    # An increment is mostly the mean of the energies at its ends; out of order nothing is explained but by two coefficients.
    assert left < 0.7
    controls[:80] = controls[:80][::-1]
    assert np.std(controlled(rows, controls)[:80, 10:]) / np.std(increments) > 0.9


def test_rungs_that_do_not_overlap_have_the_error_of_their_integral():
    # 1000 dimensions: a rung's energies are 4 % wide, and the next one's are 2.5 times as low.
    shape = 500.0
    losses = np.random.default_rng(3).gamma(shape, 1 / (1 + NBETAS)[:, None, None], (len(NBETAS), 4, 100))
    ladder = Reweighting(NBETAS, losses)
    log_z, error = ladder.log_partition()
    off = np.abs(log_z + shape * np.log1p(NBETAS))[1:]
    assert np.all(off < error[1:])
    # Rectangles above and below: what lies between them is at least half of their distance from one, and at most all of it.
    heights = np.cumsum(np.diff(NBETAS) * -np.diff(shape / (1 + NBETAS)))
    # Means of 400 draws are 1 / sqrt(400 shape) known, of which 4 standard deviations are 1 %.
    assert np.all(error[1:] > 0.98 * heights / 2)
    assert np.all(error[1:] < 1.02 * heights)
    # All draws of the coldest rung lie inside, and none of the next: the mass is its partition function's.
    assert ladder.log_mass_error(ladder.losses <= 1.0) == pytest.approx(error[-1], rel=0.01)


@pytest.mark.parametrize("ratio", [4.0, 8.0, 16.0, 32.0])
def test_errors_cover_from_rungs_that_overlap_to_rungs_that_do_not(ratio):
    nbetas, shape = np.concatenate([[0.0], ratio ** np.arange(4)]), 10.0
    # At 4, of four gaps with a dozen draws in common each, an error is about sqrt(4 / 12), and chains tell it to a quarter.
    # From 8 on neighbors have less than one draw in common, and what is known lies between rectangles.
    heights = np.sum(np.diff(nbetas) * -np.diff(shape / (1 + nbetas)))
    scores = []
    for seed in range(50):
        losses = np.random.default_rng(seed).gamma(shape, 1 / (1 + nbetas)[:, None, None], (5, 8, 50))
        log_z, error = Reweighting(nbetas, losses).log_partition()
        scores.append((log_z[-1] + shape * np.log1p(nbetas[-1])) / error[-1])
        assert error[-1] < (1.0 if ratio == 4 else 1.1 * heights)
    assert np.mean(np.square(scores)) < 1.03 + 4 * np.sqrt(2 / 50)


def test_few_finite_losses_of_the_base_are_a_statistical_error_and_no_bound():
    scores = []
    for seed in range(50):
        losses = np.random.default_rng(seed).gamma(SHAPE, 1 / (1 + NBETAS)[:, None, None], (len(NBETAS), 4, 20))
        losses[0, :, 2:] = np.inf
        log_z, error = Reweighting(NBETAS, losses).log_partition()
        scores.append((log_z[-1] + SHAPE * np.log1p(NBETAS[-1]) + np.log(10)) / error[-1])
    # As above; 8 draws are enough for an error to a quarter, by which squares of scores are larger on average.
    assert 1 / 9 < np.mean(np.square(scores)) < (1 + 1 / 4) * (1.03 + 4 * np.sqrt(2 / 50))

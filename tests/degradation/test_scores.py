import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from slt_interp.degradation.scores import auroc, bootstrapped_auroc, half_life, scaled_effect


def test_auroc_is_the_area_under_the_roc_curve_ties_included():
    rng = np.random.default_rng(0)
    genuine, illusion = rng.integers(2, 9, 40) / 10, rng.integers(0, 7, 30) / 10
    labels = np.r_[np.ones(40), np.zeros(30)]
    assert auroc(genuine, illusion) == pytest.approx(roc_auc_score(labels, np.r_[genuine, illusion]))


def test_intervals_cover_the_exact_auroc_of_two_normals():
    rng, repetitions, count = np.random.default_rng(1), 150, 32
    # P(x > y) for means one apart: Phi(1 / sqrt(2)).
    exact = norm.cdf(1 / np.sqrt(2))
    covered = 0
    for _ in range(repetitions):
        shared = rng.normal(size=count)
        x, y = (np.sqrt(0.5) * (shared + rng.normal(size=count)) for _ in range(2))
        interval = bootstrapped_auroc(x + 1, y, rng)
        covered += interval.low <= exact <= interval.high
    # 4 binomial deviations below 95 %.
    assert covered / repetitions >= 0.95 - 4 * np.sqrt(0.95 * 0.05 / repetitions)


def test_networks_without_one_of_the_two_are_left_out_and_certainty_is_not_claimed():
    genuine, illusion = np.r_[np.ones(10), np.nan], np.r_[np.zeros(10), 0.5]
    interval = bootstrapped_auroc(genuine, illusion, np.random.default_rng(0))
    assert interval == (1.0, pytest.approx(0.025**0.1), 1.0)
    assert np.isnan(bootstrapped_auroc(np.array([np.nan]), np.array([0.0]), np.random.default_rng(0)).value)


def test_half_life_of_an_exponential_curve_is_exact_between_fine_levels():
    levels = np.geomspace(0.01, 1, 400)
    # Linear interpolation in log loss over steps of h = log(100) / 399 errs by at most h^2 / 8 of the curve's bend, below 1e-4.
    assert half_life(levels, np.exp(-levels / 0.2)) == pytest.approx(0.2 * np.log(2), rel=1e-3)
    assert half_life(levels, 0.9 * np.ones(400)) == np.inf
    assert half_life(levels, 0.1 * np.ones(400)) == 0.0


def test_scaled_effect_is_1_for_all_there_is_and_0_for_what_random_maps_do():
    assert scaled_effect(np.array([0.9, 0.2]), np.array([0.2, 0.2]), np.array([0.9, 0.9])) == pytest.approx([1.0, 0.0])


def test_intervals_never_claim_more_for_a_worse_dial():
    rng = np.random.default_rng(0)
    perfect = bootstrapped_auroc(np.ones(32), np.zeros(32), rng)
    worse = bootstrapped_auroc(np.ones(32), np.r_[np.zeros(31), 2.0], rng)
    assert worse.value < perfect.value
    assert worse.low <= perfect.low

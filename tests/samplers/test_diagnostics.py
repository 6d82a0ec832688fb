import warnings

import numpy as np
import pytest

from slt_interp.samplers.diagnostics import bulk_ess, drift, effective_sample_size, split_rhat, std_error, tail_ess


def ar1(correlation, chains=8, draws=4000, seed=0):
    """A stationary AR(1) series of unit variance."""
    rng = np.random.default_rng(seed)
    series = np.empty((chains, draws))
    series[:, 0] = rng.normal(size=chains)
    for t in range(1, draws):
        series[:, t] = correlation * series[:, t - 1] + np.sqrt(1 - correlation**2) * rng.normal(size=chains)
    return series


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_ess_and_error_of_an_autoregressive_series(correlation):
    series = ar1(correlation)
    exact = series.size * (1 - correlation) / (1 + correlation)
    # The estimator's own scatter: about sqrt(4 tau / size) of relative error per chain window, below 15 % here.
    assert effective_sample_size(series) == pytest.approx(exact, rel=0.15)
    assert std_error(series) >= 0.9 / np.sqrt(exact)
    assert abs(split_rhat(series) - 1) < 0.01


def test_standard_errors_cover():
    n = 200
    errors = [(s.mean(), std_error(s)) for s in (ar1(0.8, chains=4, draws=400, seed=seed) for seed in range(n))]
    covered = np.mean([abs(mean) < 1.96 * error for mean, error in errors])
    # Binomial: sd of the share at .95 and n = 200 is .015; the larger of two errors can only cover more.
    assert covered > 0.95 - 4 * 0.0154
    # Nor may they be much too large: the larger of two estimates, one of them from 4 chains, is 1.3 times the truth on average.
    sizes = np.mean([error for _, error in errors])
    exact = np.sqrt((1 + 0.8) / (1 - 0.8) / 1600)
    assert 1.0 < sizes / exact < 1.6


def test_disagreeing_and_drifting_chains_are_seen():
    apart = ar1(0.0) + np.arange(8)[:, None]
    assert split_rhat(apart) > 2
    assert std_error(apart) >= apart.mean(axis=1).std(ddof=1) / np.sqrt(8)
    drifting = ar1(0.0) + np.linspace(0, 1, 4000)
    change, error = drift(drifting)
    assert abs(change - 0.5) < 4 * error


def test_constant_and_short_series_give_no_false_comfort():
    constant = np.full((4, 100), 2.0)
    assert std_error(constant) == 0
    assert np.isnan(effective_sample_size(constant))
    assert np.isnan(split_rhat(constant))
    short = np.random.default_rng(0).normal(size=(1, 3))
    assert np.isnan(std_error(short))


@pytest.mark.parametrize("correlation", [0.0, 0.7])
def test_bulk_and_tail_ess_are_arviz_s(correlation):
    """An independent implementation; the two differ in where they truncate the autocorrelations, by a few percent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # arviz announces its next version on import
        import arviz
    for series in (ar1(correlation, draws=1001), np.exp(3 * ar1(correlation, draws=1000, seed=1))):
        assert bulk_ess(series) == pytest.approx(float(arviz.ess(series, method="bulk")), rel=0.05)
        assert tail_ess(series) == pytest.approx(float(arviz.ess(series, method="tail")), rel=0.05)
    # Heavy tails do not fool ranks: the log-normal series has the same bulk as its logarithm.
    assert bulk_ess(series) == pytest.approx(bulk_ess(np.log(series)))
    assert np.isnan(bulk_ess(np.ones((4, 100))))

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from slt_interp.curvature.gaussian import gaussian_llc, log_ellipsoid_mass

TRUTH = json.loads((Path(__file__).parents[1] / "data" / "volume.json").read_text())["cases"]


@pytest.mark.parametrize("degrees", [1, 2, 3, 10, 100, 850, 10_000, 1_000_000])
def test_equal_weights_are_chi_squared(degrees):
    thresholds = degrees * np.array([1e-6, 1e-3, 0.1, 0.9, 1.0, 1.1, 1.5, 3.0, 30.0])
    exact = stats.chi2(degrees).logcdf(thresholds)
    found = log_ellipsoid_mass(thresholds, np.array([1.0]), np.array([float(degrees)]))
    # scipy underflows to -inf where we do not; rounding of the exponent grows with the size of the logarithms in it.
    keep = np.isfinite(exact)
    np.testing.assert_allclose(found[keep], exact[keep], rtol=1e-10, atol=1e-15 * degrees)
    assert np.all(found <= 0)


def test_isotropic_truth_table_far_below_the_smallest_float():
    for name, degrees in (("quad_iso_gauss_d10", 10), ("quad_iso_gauss_d100", 100)):
        case = next(case for case in TRUTH if case["id"] == name)
        thresholds = np.array([float(eps) for eps in case["logV"]])
        # L = |w|^2 / 2 <= eps is chi-squared <= 2 eps.
        found = log_ellipsoid_mass(thresholds, np.array([0.5]), np.array([float(degrees)]))
        np.testing.assert_allclose(found, list(case["logV"].values()), rtol=1e-10)


def test_unequal_weights_against_monte_carlo():
    scales = np.array([10.0, 3.0, 1.0, 0.1, 1e-3, 0.0])
    draws = (np.random.default_rng(0).normal(size=(1_000_000, 6)) ** 2) @ scales
    for threshold in (0.1, 1.0, 10.0, 60.0):
        share = (draws <= threshold).mean()
        found = np.exp(log_ellipsoid_mass(np.array([threshold]), scales, np.ones(6))[0])
        assert abs(found - share) < 4 * np.sqrt(share * (1 - share) / 1e6)


def test_mass_is_a_distribution_function():
    scales = np.geomspace(1e-6, 1e2, 40)
    values = log_ellipsoid_mass(np.geomspace(1e-8, 1e6, 60), scales, np.ones(40))
    assert np.all(np.diff(values) >= -1e-12)
    assert abs(values[-1]) < 1e-10
    assert log_ellipsoid_mass(np.array([1.0]), np.zeros(3), np.ones(3)).tolist() == [0.0]


def test_gaussian_llc_of_a_proper_and_an_improper_posterior():
    eigenvalues = np.array([2.0, 0.5, 0.0, -0.001])
    expected = 0.5 * np.sum(100 * eigenvalues / (100 * eigenvalues + 10))
    assert gaussian_llc(eigenvalues, np.ones(4), 100.0, 10.0) == pytest.approx(expected)
    assert np.isnan(gaussian_llc(eigenvalues, np.ones(4), 1e5, 10.0))


@pytest.mark.parametrize(("degrees", "noncentrality"), [(1, 0.5), (3, 4.0), (10, 100.0), (850, 1000.0)])
def test_shifted_weights_are_noncentral_chi_squared(degrees, noncentrality):
    thresholds = (degrees + noncentrality) * np.array([1e-3, 0.1, 0.5, 0.9, 1.0, 1.1, 1.5])
    exact = stats.ncx2(degrees, noncentrality).logcdf(thresholds)
    found = log_ellipsoid_mass(thresholds, np.array([1.0]), np.array([float(degrees)]), np.array([noncentrality]))
    # scipy sums a series and underflows where we do not.
    keep = np.isfinite(exact)
    np.testing.assert_allclose(found[keep], exact[keep], rtol=1e-9, atol=1e-12)
    assert np.all((found <= 0) & np.isfinite(found))


@pytest.mark.parametrize("tilt", [0.0, 0.05, 1.0, 10.0])
def test_shifted_and_tilted_forms_against_monte_carlo(tilt):
    scales, shifts, rng = np.array([3.0, 1.0, 0.1]), np.array([0.5, -2.0, 3.0]), np.random.default_rng(0)
    draws = ((rng.normal(size=(500_000, 3)) + shifts) ** 2) @ scales + tilt * rng.normal(size=500_000)
    for threshold in (-5.0, 0.3, 2.0, 8.0, 40.0):
        share = (draws <= threshold).mean()
        found = np.exp(log_ellipsoid_mass(np.array([threshold]), scales, np.ones(3), shifts**2, tilt)[0])
        assert abs(found - share) <= 4 * np.sqrt(found * (1 - found) / 5e5)


def test_a_tilt_alone_is_a_half_space():
    thresholds = np.array([-3.0, 0.0, 2.0])
    found = log_ellipsoid_mass(thresholds, np.zeros(2), np.ones(2), np.zeros(2), 2.0)
    np.testing.assert_allclose(found, stats.norm(0, 2.0).logcdf(thresholds), rtol=1e-12)
    assert log_ellipsoid_mass(thresholds, np.zeros(2), np.ones(2)).tolist() == [-np.inf, 0.0, 0.0]

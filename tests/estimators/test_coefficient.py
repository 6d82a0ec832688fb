"""The learning coefficient from exact energies and partition functions, and from ladders."""

import functools

import numpy as np
import pytest
import scipy.linalg
import scipy.signal
from scipy import stats

from slt_interp.analytic import catalogue
from slt_interp.errors import InputError
from slt_interp.estimators.coefficient import MAX_POLES, _density_of_poles, _divided_difference, fit_coefficient

NBETAS = np.geomspace(30.0, 1e7, 12)


@functools.cache
def _exact(name):
    """Energies at the rungs, and their integrals over log nbeta between them."""
    energy = catalogue()[name].energy
    nodes, weights = np.polynomial.legendre.leggauss(4)
    t = np.log(NBETAS)
    middle, half = (t[1:] + t[:-1])[:, None] / 2, np.diff(t)[:, None] / 2
    inside = np.array([[energy(np.exp(x), 1.0) for x in row] for row in middle + half * nodes])
    return np.array([energy(n, 1.0) for n in NBETAS]), (half[:, 0] * (inside @ weights))


def _noisy(name, seed, relative):
    energies, increments = _exact(name)
    exact = np.concatenate([energies, increments])
    size = relative * np.concatenate([energies, np.sqrt(np.diff(np.log(NBETAS))) * energies[1:]])
    return exact + size * np.random.default_rng(seed).standard_normal(len(exact)), np.diag(size**2)


# Energies to 1 % of their value, and as much per root of log nbeta for their integrals: what a ladder of 8 chains gives.
@pytest.mark.parametrize(
    "name",
    [
        "monomial w1^2 w2^2",
        "monomial w1^2 w2^4",
        "monomial w1^4 w2^4",
        "crossing planes, |u|^2 |v|^2",
        "ring in 2 dimensions",
        "deep linear 2-2-2 of rank 0, deepest point",
        "deep linear 2-5-2 of rank 0, deepest point",
        "ReLU unit",
        # Without fractions it would be .44 for 1 and less for 2.
        "deep linear 3-2-2 of rank 0, deepest point",
        pytest.param("10 singular blocks", marks=pytest.mark.xfail(strict=True, reason="its multiplicity is 11")),
    ],
)
def test_exact_energies_give_back_the_coefficient_and_its_multiplicity(name):
    problem = catalogue()[name]
    most = min(MAX_POLES, problem.dimension)
    found = fit_coefficient(np.log(NBETAS), *_exact(name), _noisy(name, 0, 0.01)[1], most)
    assert found.multiplicity == problem.multiplicity, found
    assert abs(found.coefficient - problem.rlct) < 2 * found.std_error
    assert abs(found.coefficient - problem.rlct) < 0.03 * problem.rlct
    assert not found.warnings
    assert found.probability.sum() == pytest.approx(1)


def test_poles_of_a_cusp_are_too_near_to_be_told_apart():
    # 5/12 and 1/2: its energies are 4 % below the coefficient at nbeta 1e7.
    found = fit_coefficient(np.log(NBETAS), *_exact("cusp"), _noisy("cusp", 0, 0.01)[1], 2)
    assert not found.is_resolved
    assert found.covers(5 / 12, 1)


@pytest.mark.parametrize("poles", [(0.25, 1 / 3), (0.5, 0.75, 1.0), (0.5, 0.5, 0.75), (0.5, 0.5, 0.5)])
def test_crossings_of_known_poles_are_recovered(poles):
    # -log K is a sum of exponential variables: its density by convolution on a fine grid knows no divided difference.
    s = np.linspace(0, 400, 400_001)
    density = np.array([p * np.exp(-p * s) for p in poles])
    density = functools.reduce(lambda a, b: scipy.signal.fftconvolve(a, b)[: len(s)] * s[1], density)
    t = np.log(NBETAS)
    near = t[:, None] + np.linspace(-0.02, 0.02, 3)
    below = np.interp(near, s, np.log(np.maximum(density, 1e-300)))
    energies, increments = (below[:, 0] - below[:, 2]) / 0.04, -np.diff(below[:, 1])
    errors = 0.002 * np.concatenate([energies, np.sqrt(np.diff(t)) * energies[1:]])
    found = fit_coefficient(t, energies, increments, np.diag(errors**2), len(poles))
    multiplicity = poles.count(poles[0])
    assert found.covers(poles[0], multiplicity)
    # Five times the errors: the extrapolation from energies that lie up to a quarter below the coefficient.
    assert found.coefficients[multiplicity - 1] == pytest.approx(poles[0], rel=0.01)


@pytest.mark.parametrize("poles", [(0.0, 0.25), (0.0, 0.0, 1 / 6), (0.0, 0.25, 0.25, 1.0), (0.5, 0.5, 0.5), (1 / 12, 1 / 3)])
def test_divided_differences_are_those_of_a_matrix_exponential(poles):
    # Opitz (1964): the corner of f(A), A with the nodes on its diagonal and ones above it, is the divided difference of f.
    matrix = np.diag(poles) + np.diag(np.ones(len(poles) - 1), 1)
    for s in (0.5, 4.5, 16.0):
        corner = scipy.linalg.expm(-s * matrix)[0, -1]
        assert _divided_difference(poles, np.array(s)) == pytest.approx(abs(corner), rel=1e-9)


@pytest.mark.slow
def test_intervals_cover_in_repeated_experiments():
    # Of 40 intervals of 95 % fewer than 33 cover less than once in 1,000 times.
    name = "monomial w1^2 w2^2"
    covered = 0
    for seed in range(40):
        readings, covariance = _noisy(name, seed, 0.03)
        found = fit_coefficient(np.log(NBETAS), *np.split(readings, [len(NBETAS)]), covariance, max_poles=2)
        covered += found.covers(0.5, 2)
    assert covered >= 33


@pytest.mark.slow
def test_intervals_cover_over_the_catalogue():
    # Nine in ten, the known failure included. A problem's five experiments agree with one another: this is no binomial's limit.
    minutes = "tanh network", "Vandermonde", "Gaussian mixture"  # of quadrature for 56 energies
    small = [p for p in catalogue().values() if p.energy and p.rlct and p.dimension <= 20 and not p.name.startswith(minutes)]
    small = [p for p in small if not (p.base and p.base.is_bounded)]
    covered = []
    for problem in small:
        most = min(MAX_POLES, problem.dimension)
        for seed in range(5):
            readings, covariance = _noisy(problem.name, seed, 0.01)
            found = fit_coefficient(np.log(NBETAS), *np.split(readings, [len(NBETAS)]), covariance, most)
            covered.append(found.covers(problem.rlct, problem.multiplicity))
    assert len(small) > 20
    assert np.mean(covered) >= 0.9


def test_precise_readings_and_constant_losses_divide_by_no_zero():
    t = np.log(NBETAS)
    found = fit_coefficient(t, np.full(12, 5.0), 5.0 * np.diff(t), 1e-14 * np.eye(23))
    assert found.multiplicity == 1
    assert found.coefficient == pytest.approx(5.0, abs=1e-6)
    assert np.all(np.isfinite([found.coefficients, found.std_errors]))
    constant = fit_coefficient(t, np.zeros(12), np.zeros(11), np.zeros((23, 23)))
    assert (constant.coefficient, constant.multiplicity, constant.std_error) == (0.0, 1, 0.0)


def test_too_few_rungs_are_named():
    with pytest.raises(InputError, match="needs energies at 4 rungs, but there are 3"):
        fit_coefficient(np.log(NBETAS[:3]), np.ones(3), np.ones(2), np.eye(5))


def test_multiplicities_that_noise_hides_are_all_given():
    readings, covariance = _noisy("monomial w1^4 w2^4", 0, 0.1)
    found = fit_coefficient(np.log(NBETAS), *np.split(readings, [len(NBETAS)]), covariance)
    assert not found.is_resolved
    assert "do not tell the multiplicity" in str(found)
    assert "above 4" in str(found)
    assert found.covers(0.25, 2)
    assert not found.covers(0.25, 7)


def test_energies_that_go_up_and_down_fit_no_law():
    energies = np.where(np.arange(len(NBETAS)) % 2, 2.0, 3.0)
    increments = np.diff(np.log(NBETAS)) * 2.5
    found = fit_coefficient(np.log(NBETAS), energies, increments, 1e-4 * np.eye(2 * len(NBETAS) - 1))
    assert "no law fits" in str(found)


def test_the_density_of_poles_is_one_in_the_mean_and_high_at_fractions_of_small_denominators():
    # From 1 to 2, far from the end at 0; the fractions of k lie evenly, so that midpoints err where they are narrow only.
    places = 1 + (np.arange(50_000) + 0.5) / 50_000
    for std_error in (0.002, 0.01, 0.03, 0.1):
        assert _density_of_poles(places, std_error).mean() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(
    ("place", "std_error", "tolerance"),
    # A smooth end at 0 is off where fractions are a fraction of an error apart: by a hundredth, where the density is about one.
    [(0.3, 0.02, 1e-6), (0.5, 0.005, 1e-6), (-0.1, 0.03, 1e-6), (2.0, 0.3, 1e-6), (0.01, 0.02, 1e-3), (0.04, 0.1, 0.01)],
)
def test_the_density_of_poles_is_the_sum_over_all_fractions(place, std_error, tolerance):
    def normal(x):
        return np.exp(-0.5 * ((place - x) / std_error) ** 2) / (std_error * np.sqrt(2 * np.pi))

    orders = np.arange(1, 13)
    of_order = [normal(np.arange(1, 400) / (2 * k)).sum() / (2 * k) for k in orders]
    exact = 0.5 * stats.norm.cdf(place / std_error) + 0.5 * np.average(of_order, weights=orders**-2.0)
    assert _density_of_poles(np.array([place]), std_error)[0] == pytest.approx(exact, rel=1e-9, abs=tolerance)

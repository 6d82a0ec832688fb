"""The formulas against tables of exact values that were computed independently of them."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.integrate import dblquad

from slt_interp import analytic
from slt_interp.analytic import integrals

DATA = Path(__file__).parents[1] / "data"
LLC = {case["id"]: case for case in json.loads((DATA / "llc.json").read_text())}
VOLUME = {case["id"]: case for case in json.loads((DATA / "volume.json").read_text())["cases"]}
KEY = jax.random.key(0)


def coefficient(case):
    """Learning coefficient and multiplicity of a row, by this package."""
    parameters = case["parameters"]
    match case["family"]:
        case "dln_deepest_point":
            return analytic.deep_linear_rlct(parameters["H"], parameters["rank"])
        case "dln_2layer_local_point":
            widths = [parameters["M"], parameters["H"], parameters["N"]]
            ranks = parameters["rank"], parameters["rank_W1"], parameters["rank_W2"]
            assert analytic.deep_linear_rlct(widths, ranks[0])[0] == parameters["global_lambda_aoyagi"]
            return analytic.deep_linear_local_rlct(widths, *ranks)
        case "normal_crossing":
            problem = analytic.monomial(parameters["k"])
        case "tanh_3layer":
            problem = analytic.tanh_units(parameters["p"])
        case "vandermonde":
            problem = analytic.vandermonde(parameters["H"], parameters["Q"])
        case "toy_model_superposition":
            problem = analytic.toy_superposition(parameters["k"], parameters["c"])
            assert float(problem.loss_fn(problem.center, None)) == pytest.approx(parameters["loss"], abs=5e-6)
            length, bias = np.linalg.norm(problem.center["w"][:, 0]), problem.center["b"][0]
            assert (length, bias) == pytest.approx((parameters["norm_l"], parameters["bias"]), abs=1e-5)
        case _:
            problem = {
                "poly_x2_y4": lambda: analytic.power_sum([1, 2]),
                "poly_sum_regular_d": lambda: analytic.quadratic([2.0] * 4),
                "line_x_plane": lambda: analytic.sum_of_products([analytic.Product((1, 2), (1, 1))], name="line and plane"),
                "gmm_mix_fixed_mean": analytic.gaussian_mixture,
                "gmm_2comp_true1": analytic.two_component_mixture,
                "relu_1unit_true0": analytic.relu_unit,
                "relu_dead": analytic.dead_relu,
                "tanh_mlp_generic": lambda: analytic.tanh_network(KEY, (3, 4, 2)),
            }[case["id"]]()
    return problem.rlct, problem.multiplicity


@pytest.mark.parametrize("name", LLC)
def test_learning_coefficient_is_that_of_the_table(name):
    assert coefficient(LLC[name]) == pytest.approx((LLC[name]["lambda"], LLC[name]["multiplicity"]), rel=1e-12)


@pytest.mark.parametrize("name", [name for name, case in LLC.items() if "finite_N_exact" in case])
def test_energy_at_finite_nbeta_is_that_of_the_table(name):
    case = LLC[name]["parameters"]
    problem = analytic.deep_linear(KEY, case["H"], case["rank"])
    for setting, value in LLC[name]["finite_N_exact"].items():
        nbeta, localization = (float(part.split("=")[1]) for part in setting.split(","))
        # The table has five decimals; where two singular values are integrated over it is off by up to 6e-5, as the next
        # test shows.
        assert problem.energy(nbeta, localization) == pytest.approx(value, abs=1e-4 if 2 in case["H"] else 1.5e-5)


@pytest.mark.parametrize(("inputs", "hidden", "outputs"), [(2, 2, 2), (3, 2, 2), (2, 5, 2)])
def test_energy_with_two_singular_values_is_that_of_adaptive_quadrature(inputs, hidden, outputs):
    # Over the eigenvalues a < b of W2 W2^T (a Wishart law), a = u^2: nothing in common with the package's grid.
    nbeta, localization = 1e3, 10.0

    def density(u, v):
        one, two = localization + nbeta * u**2, localization + nbeta * v**2
        measure = (v**2 - u**2) * (u * v) ** (hidden - 2) * np.exp(-localization * (u**2 + v**2) / 2)
        return measure * (one * two) ** (-inputs / 2)

    def energy(u, v):
        one, two = localization + nbeta * u**2, localization + nbeta * v**2
        return inputs / 2 * nbeta * (u**2 / one + v**2 / two)

    accurate = {"epsabs": 0, "epsrel": 1e-9}
    total = dblquad(density, 0, 4, 0, lambda v: v, **accurate)[0]
    mean = dblquad(lambda u, v: density(u, v) * energy(u, v), 0, 4, 0, lambda v: v, **accurate)[0] / total
    problem = analytic.deep_linear(KEY, [inputs, hidden, outputs], 0)
    assert problem.energy(nbeta, localization) == pytest.approx(mean, rel=1e-7)


def mixture_divergence(shares, means):
    """KL(N(0, 1) | sum_i share_i N(mean_i, 1)) by the trapezoid rule, on arrays of means."""
    x = np.arange(-10, 10, 0.2)
    weights = np.exp(-(x**2) / 2)
    parts = [s * np.exp(np.multiply.outer(m, x) - m[..., None] ** 2 / 2) for s, m in zip(shares, means, strict=True)]
    return -np.log(sum(parts)) @ weights / weights.sum()


@pytest.mark.parametrize("localization", [0.0, 5.0])
def test_energy_of_the_mixture_in_its_box_is_that_of_adaptive_quadrature(localization):
    nbeta = 1e3

    def energy(a, b):
        return nbeta * mixture_divergence([1 - a, a], [np.zeros(()), np.asarray(b)])

    def density(a, b):
        return np.exp(-energy(a, b) - 0.5 * localization * (a**2 + b**2))

    accurate = {"epsabs": 0, "epsrel": 1e-7}
    total = dblquad(density, 0, 2, 0, 1, **accurate)[0]
    mean = dblquad(lambda a, b: energy(a, b) * density(a, b), 0, 2, 0, 1, **accurate)[0] / total
    assert analytic.gaussian_mixture().energy(nbeta, localization) == pytest.approx(mean, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("nbeta", "localization"), [(100.0, 4.0), (1000.0, 25.0)])
def test_energy_of_two_components_is_that_of_a_plain_grid(nbeta, localization):
    # Both mixture weights and means as they are, where the package rotates and rescales them.
    reach, step = 6 * localization**-0.5, 0.5 * nbeta**-0.5
    means = np.arange(-reach, reach, step)
    b, c = means[:, None], means[None]
    total = mean = 0.0
    for a in np.arange(-reach, reach, localization**-0.5 / 4):
        share = 1 / (1 + np.exp(-a))
        energy = nbeta * mixture_divergence([share, 1 - share], [b + 0 * c, c + 0 * b])
        density = np.exp(-energy - 0.5 * localization * (a**2 + b**2 + c**2))
        total, mean = total + density.sum(), mean + (energy * density).sum()
    assert analytic.two_component_mixture().energy(nbeta, localization) == pytest.approx(mean / total, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("make", [analytic.gaussian_mixture, analytic.two_component_mixture])
def test_energies_of_mixtures_do_not_depend_on_their_nodes(make, monkeypatch):
    settings = [(nbeta, localization) for nbeta in (1e3, 1e5) for localization in (1.0, 100.0)]
    problem = make()
    expected = [problem.energy(*setting) for setting in settings]
    monkeypatch.setattr(integrals, "_SINH_SPACING", 0.08)
    monkeypatch.setattr(integrals, "_legendre", lambda: np.polynomial.legendre.leggauss(23))
    assert [problem.energy(*setting) for setting in settings] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", VOLUME)
def test_volumes_and_partition_functions_are_those_of_the_table(name):
    case, problem = VOLUME[name], analytic.volume_catalogue()[name]
    assert problem.dimension == case["d"]
    assert (problem.rlct, problem.multiplicity) == (case["lambda_"], case["m"])
    for threshold, value in case["logV"].items():
        assert problem.log_volume(float(threshold)) == pytest.approx(value, rel=1e-7, abs=1e-9)  # float64, and our trapezoid
    for nbeta, value in case.get("tempered", {}).get("logZ", {}).items():
        assert problem.log_partition(float(nbeta)) == pytest.approx(value, rel=1e-9)
    for nbeta, value in case.get("tempered", {}).get("llc_beta_E_L", {}).items():
        assert problem.energy(float(nbeta), 1.0) == pytest.approx(value, rel=1e-9)

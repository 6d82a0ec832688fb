"""`estimate_llc` with nothing hand-set, against exact answers."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from slt_interp import HMC, SGLD, FullBatch, LocalPosterior, Spectrum, analytic, estimate_llc, estimate_spectrum, sample
from slt_interp.errors import InputError
from slt_interp.estimators.calibration import local_window, resolved_localization_effect
from slt_interp.estimators.rounds import settle

X = jax.random.normal(jax.random.key(3), (400, 6))
DATA = {"x": X, "y": X @ jnp.arange(6.0) + jax.random.normal(jax.random.key(4), (400,))}
CENTER = jnp.linalg.lstsq(DATA["x"], DATA["y"])[0]


def regression(w, batch):
    return 0.5 * jnp.mean((batch["x"] @ w - batch["y"]) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "quadratic of rank 6 in 10 dimensions",
        "monomial w1^2 w2^2",
        "ring in 20 dimensions",
        "10 singular blocks and 20 regular directions",
    ],
)
def test_exact_energy_is_met_with_nothing_hand_set_or_the_estimate_says_that_it_is_not(key, name):
    problem = analytic.catalogue()[name]
    estimate = estimate_llc(key, problem.loss_fn, problem.center, problem.data, nbeta=1e3, progress=False)
    exact = problem.energy(1e3, estimate.localization)
    assert abs(estimate.llc - exact) < max(4 * estimate.std_error, 0.1 * exact)
    if estimate.status == "ok":
        assert abs(estimate.llc - exact) < 4 * estimate.std_error
        assert estimate.std_error <= 0.02 * estimate.llc


@pytest.mark.slow
def test_ladder_enters_thin_arms_that_trajectories_do_not(key):
    problem, budget = analytic.monomial([1, 1]), 200_000
    settings = {"nbeta": 1e6, "localization": 1.0, "max_gradients": budget, "progress": False}
    estimate = estimate_llc(key, problem.loss_fn, problem.center, None, **settings)
    assert estimate.diagnostics["num_rungs"] > 5
    assert estimate.diagnostics["gradients_per_chain"] <= budget
    assert abs(estimate.llc - problem.energy(1e6, 1.0)) < 4 * estimate.std_error
    assert estimate.std_error < 0.04 * estimate.llc
    assert not any("disagree" in warning for warning in estimate.warnings)


@pytest.mark.slow
def test_intervals_of_estimates_called_ok_cover_the_truth(key):
    # A small copy of the benchmark: of 40 intervals of 95 %, 31 or fewer cover with probability 1.3 in 10,000.
    problem = analytic.quadratic([3.0, 1.0, 0.3, 0.0])
    estimates = [
        estimate_llc(k, problem.loss_fn, problem.center, None, nbeta=1e3, num_chains=8, progress=False)
        for k in jax.random.split(key, 40)
    ]
    assert all(estimate.status == "ok" for estimate in estimates)
    quantile = scipy.stats.t(7).ppf(0.975)
    covered = sum(abs(e.llc - problem.energy(1e3, 1.0)) < quantile * e.std_error for e in estimates)
    assert covered > 31


@pytest.mark.slow
def test_smooth_point_has_its_local_value_and_not_the_fibres_minimum(key):
    problem = analytic.deep_linear(key, [10, 10, 10], 1, point="smooth")
    estimate = estimate_llc(key, problem.loss_fn, problem.center, None, nbeta=1e6, max_gradients=30_000, progress=False)
    # |w*|^2 is 11, and two probes count the 100 flat directions of 200: 0.09 * 11 * gamma >= 100, with a standard error of 7 %.
    assert estimate.localization == pytest.approx(100 / (0.09 * 11), rel=4 * 0.07)
    assert abs(estimate.llc - 50) < max(4 * estimate.std_error, 1.0)  # 2 % is what the window allows the localization
    assert estimate.diagnostics["predicted_localization_bias"] > -1.0


@pytest.mark.slow
def test_minibatches_beyond_8192_examples_are_paired_and_checked_at_half_the_step(key):
    problem = analytic.linear_regression(key, 10_000, 8)
    estimate = estimate_llc(key, problem.loss_fn, problem.center, problem.data, max_gradients=12_000, progress=False)
    assert estimate.diagnostics["gradients_per_chain"] <= 12_000
    exact = problem.energy(estimate.nbeta, estimate.localization)
    bias = estimate.diagnostics["predicted_step_bias"]
    assert 0 < bias < 0.02 * exact
    assert abs(estimate.llc - bias - exact) < 4 * estimate.std_error
    value, error = estimate.companions["Richardson"]
    assert abs(value - exact) < 4 * error
    assert estimate.nbeta == pytest.approx(10_000 / np.log(10_000))


@pytest.mark.slow
def test_minibatch_kernel_of_the_user_keeps_to_the_budget(key):
    data = jax.tree.map(lambda x: jnp.tile(x, (25, *[1] * (x.ndim - 1))), DATA)
    kernel = functools.partial(SGLD, step_size=2e-5)
    estimate = estimate_llc(key, regression, CENTER, data, kernel=kernel, num_chains=4, max_gradients=400, progress=False)
    assert estimate.nbeta == pytest.approx(10_000 / np.log(10_000))
    assert estimate.diagnostics["gradients_per_chain"] == 400


@pytest.mark.slow
def test_budget_is_spent_where_checks_fail_and_long_trajectories_have_their_part_of_a_large_one(key, monkeypatch):
    problem = analytic.catalogue()["50 singular blocks"]
    lengths = set()

    def recorded(key, kernel, **settings):
        lengths.add(kernel.num_leapfrog)
        return sample(key, kernel, **settings)

    monkeypatch.setattr(sys.modules[estimate_llc.__module__], "sample", recorded)
    for budget, expected in ((4000, {8}), (12_000, {8, 128})):
        settings = {"nbeta": 1e5, "max_gradients": budget, "progress": False}
        estimate = estimate_llc(key, problem.loss_fn, problem.center, None, **settings)
        assert estimate.status == "do not trust"
        assert budget - max(expected) < estimate.diagnostics["gradients_per_chain"] <= budget
        assert lengths == expected


@pytest.mark.slow
def test_step_and_metric_that_suit_another_place_are_learned_anew_where_the_chains_are(key):
    curvatures = jnp.array([1e4, 1e2, 1.0, 1e4, 1e2, 1.0])
    target = LocalPosterior(lambda w, batch: 0.5 * jnp.sum(curvatures * w**2), jnp.zeros(6), nbeta=1.0, localization=1.0)
    kernel = HMC(target, 0.5, num_leapfrog=16, scale=jnp.ones(6))
    run = functools.partial(sample, params=jnp.zeros(6), batches=FullBatch(None), num_chains=4, progress=False)
    first = run(key, kernel, num_draws=5)
    assert np.mean(first.info.acceptance) < 0.5
    settled, ends, num_steps = settle(run, key, kernel, first, 245)
    assert num_steps == 240
    assert ends.loss.shape == (4, 0)
    # Of 160 squared gradients each, with 4 chains' correlations: within a factor of 2.
    np.testing.assert_allclose(settled.scale * jnp.sqrt(curvatures + 1), 1.0, atol=0.5)
    draws = run(key, settled, num_draws=200, previous=ends)
    assert 0.75 < np.mean(draws.info.acceptance) < 0.98
    assert np.all(draws.state.step_size == settled.step_size)


@pytest.mark.slow
def test_same_key_gives_the_same_estimate(key):
    first, second = (
        estimate_llc(key, regression, CENTER, DATA, num_chains=4, max_gradients=800, progress=False) for _ in range(2)
    )
    assert (first.llc, first.std_error, first.rhat) == (second.llc, second.std_error, second.rhat)


@pytest.mark.slow
def test_center_that_is_no_minimum_is_explained(key):
    estimate = estimate_llc(key, regression, CENTER + 0.5, DATA, localization=1.0, max_gradients=4000, progress=False)
    assert estimate.llc < 0
    assert estimate.status == "do not trust"
    assert any("the estimate is negative" in warning and "lower by" in warning for warning in estimate.warnings)
    # On a quadratic the loss falls along the gradient by exactly N^2 g (N H + gamma)^-1 g / 2; the metric is its diagonal.
    assert any("the gradient at the center is not small" in warning and "polish" in warning for warning in estimate.warnings)


@pytest.mark.slow
def test_too_large_steps_are_named_by_the_virial(key):
    kernel = functools.partial(SGLD, step_size=2.0 / (400 / np.log(400)))
    estimate = estimate_llc(key, regression, CENTER, DATA, kernel=kernel, max_gradients=3000, progress=False)
    assert any("discretization or minibatch noise" in warning for warning in estimate.warnings)


@pytest.mark.slow
def test_unspread_flat_directions_are_named_by_the_virial(key):
    kernel = functools.partial(SGLD, step_size=1e-6)
    settings = {"nbeta": 1e5, "max_gradients": 2000, "kernel": kernel, "progress": False}
    flat = estimate_llc(key, lambda w, b: 0.5 * w[0] ** 2, jnp.zeros(20), None, **settings)
    assert flat.status == "do not trust"
    assert any("flat directions have not spread" in warning for warning in flat.warnings)


@pytest.mark.slow
def test_constant_loss_and_dead_unit_have_llc_zero(key):
    estimate = estimate_llc(key, lambda w, b: 0.0 * jnp.sum(w), jnp.zeros(3), None, nbeta=10.0, progress=False)
    assert (estimate.llc, estimate.std_error, estimate.status) == (0.0, 0.0, "ok")
    problem = analytic.dead_relu()
    dead = estimate_llc(key, problem.loss_fn, problem.center, problem.data, nbeta=1e3, localization=100.0, progress=False)
    assert (dead.llc, dead.std_error, dead.status) == (0.0, 0.0, "ok")


@pytest.mark.slow
def test_window_that_is_shut_is_said(key):
    # 200 flat directions and one that nbeta hardly resolves: to be local takes more than that direction can bear.
    params = jnp.full(201, 0.01)
    estimate = estimate_llc(
        key, lambda w, b: 0.5 * (w[0] - 0.01) ** 2, params, None, nbeta=100.0, max_gradients=4000, progress=False
    )
    assert any("no local window at this nbeta" in warning for warning in estimate.warnings)


def test_window_is_where_its_definition_says():
    values = np.array([[10.0, 1.0, 0.1, 0.0, 0.0]])
    spectrum = Spectrum(values, np.ones_like(values), np.zeros_like(values), True)
    window = local_window(spectrum, 1e4, center_norm=2.0)
    k = 1e4 * values[0]

    def taken(gamma):
        return np.sum(gamma / (k[:3] + gamma)) / np.sum(k[:3] / (k[:3] + gamma))

    # The grid's ratio is 10^(24 / 2400) = 1.023.
    assert taken(window.highest / 1.03) < 0.02 < taken(window.highest * 1.03)
    assert window.lowest == pytest.approx(2 / 0.6**2)
    assert window.localization == window.lowest < window.highest
    assert window.note is None
    # Rounding noise in the flat directions changes nothing: it once let the localization fall to 0.
    noisy = Spectrum(np.array([[10.0, 1.0, 0.1, 1e-6, 1e-6]]), np.ones_like(values), np.full_like(values, 1e-6), True)
    assert local_window(noisy, 1e4, center_norm=2.0).lowest == window.lowest
    regular = Spectrum(values[:, :3], np.ones((1, 3)), np.zeros((1, 3)), True)
    found = local_window(regular, 1e4, center_norm=2.0)
    assert found.localization == found.highest / 10 > found.lowest
    assert "set no scale" in local_window(spectrum, 1e4, center_norm=0.0).note
    bias, slope = resolved_localization_effect(spectrum, 1e4, 5.0)
    ratio = 5.0 / (k[:3] + 5.0)
    assert (bias, slope) == pytest.approx((-0.5 * np.sum(ratio), -0.5 * np.sum(ratio * (1 - ratio))))


def test_loss_that_is_not_finite_at_the_center_is_an_error(key):
    with pytest.raises(InputError, match="not finite at params"):
        estimate_llc(key, lambda w, b: jnp.sum(jnp.sqrt(w)), -jnp.ones(3), None, nbeta=10.0, progress=False)


class Unhashable:
    __hash__ = None

    def __call__(self, params, batch):
        return jnp.zeros(())


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"nbeta": 0.0}, InputError, "nbeta must be positive, but is 0.0"),
        ({"nbeta": -2.0}, InputError, "nbeta must be positive, but is -2.0"),
        ({"precision": 0.0}, InputError, "precision must be positive, but is 0.0"),
        ({"data": None}, InputError, "nbeta has no default with no examples: give nbeta"),
        ({"data": {"x": X, "y": X[:-1, 0]}}, InputError, r"\['x'\]: 400, \['y'\]: 399"),
        ({"params": jnp.arange(6)}, TypeError, "floating arrays"),
        ({"params": {"a": jnp.zeros(0)}}, TypeError, "has no coordinates"),
        ({"loss_fn": lambda w, b: w}, TypeError, "real scalar"),
        ({"localization": -1.0}, InputError, "localization must be positive"),
        ({"mask": {"a": True}}, ValueError, "mask must be True or False"),
        ({"mask": False}, ValueError, "selects no coordinate"),
        ({"params": nnx.Dropout(0.5, rngs=nnx.Rngs(0))}, TypeError, "whole flax nnx module, Dropout.*nnx.split"),
        ({"loss_fn": Unhashable()}, TypeError, "loss_fn must be hashable, but Unhashable is not"),
        ({"key": 0}, TypeError, "key must be one typed PRNG key"),
        ({"max_gradients": 0}, InputError, "max_gradients must be at least 1, but is 0"),
    ],
)
def test_bad_input_gets_one_clear_sentence(key, arguments, kind, message):
    arguments = {"key": key, "loss_fn": regression, "params": CENTER, "data": DATA} | arguments
    with pytest.raises(kind, match=message):
        estimate_llc(progress=False, **arguments)
    if set(arguments) == {"key", "loss_fn", "params", "data"} and arguments["data"] is not None:
        with pytest.raises(kind, match=message):
            estimate_spectrum(**arguments)

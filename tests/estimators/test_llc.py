import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from slt_interp import SGLD, FullBatch, Gaussian, LocalPosterior, estimate_llc, estimate_spectrum, llc, mean_loss, sample
from slt_interp.errors import InputError
from slt_interp.estimators.calibration import predicted_step_bias, settled_step_size

X = jax.random.normal(jax.random.key(3), (400, 6))
DATA = {"x": X, "y": X @ jnp.arange(6.0) + jax.random.normal(jax.random.key(4), (400,))}
CENTER = jnp.linalg.lstsq(DATA["x"], DATA["y"])[0]


def regression(w, batch):
    return 0.5 * jnp.mean((batch["x"] @ w - batch["y"]) ** 2)


@pytest.mark.slow
def test_linear_regression_meets_its_exact_value_with_nothing_hand_set(key):
    estimate = estimate_llc(key, regression, CENTER, DATA, progress=False)
    assert estimate.nbeta == pytest.approx(400 / np.log(400))
    exact, _ = estimate_spectrum(key, regression, CENTER, DATA).llc(estimate.nbeta, 1.0)
    # What is predicted to first order of the step is off by its second order, about the square of the relative bias.
    bias = estimate.diagnostics["predicted_step_bias"]
    assert 0 < bias < 0.03 * exact  # 1 % is aimed at, on what a pilot of 4 chains measured
    assert abs(estimate.llc - bias - exact) < 4 * estimate.std_error + bias**2 / exact
    assert estimate.status == "ok"
    assert str(estimate).startswith(f"LLC {estimate.llc:.4g} +- ")


def test_predicted_step_bias_is_that_of_the_exact_law(key):
    curvature = jnp.array([4.0, 1.0, 0.25])
    target = LocalPosterior(
        lambda w, b: 0.5 * jnp.sum(curvature * w**2), jnp.zeros(3), 100.0, 1.0, jnp.array([True, True, False])
    )
    points = jax.random.normal(key, (50, 3))
    # Hutchinson's estimate with z / |z| in 2 dimensions: sd of z H z 2 / |z|^2 is (4 - 1) / sqrt(2), over 200 probes.
    error = 1e-3 / 8 * 100 * 3 / np.sqrt(2 * 200)
    assert abs(predicted_step_bias(key, target, 1e-3, points, None) - 1e-3 / 8 * 100 * 5.0) < 4 * error


@pytest.mark.slow
def test_minibatch_run_sees_the_whole_dataset_in_nbeta(key):
    data = jax.tree.map(lambda x: jnp.tile(x, (25, *[1] * (x.ndim - 1))), DATA)
    kernel = functools.partial(SGLD, step_size=2e-5)
    estimate = estimate_llc(key, regression, CENTER, data, kernel=kernel, num_chains=4, max_gradients=400, progress=False)
    assert estimate.nbeta == pytest.approx(10_000 / np.log(10_000))
    assert estimate.diagnostics["gradients_per_chain"] == 400


@pytest.mark.slow
def test_same_key_gives_the_same_estimate(key):
    first, second = (
        estimate_llc(key, regression, CENTER, DATA, num_chains=4, max_gradients=200, progress=False) for _ in range(2)
    )
    assert (first.llc, first.std_error, first.rhat) == (second.llc, second.std_error, second.rhat)


@pytest.mark.slow
def test_thin_arms_that_chains_miss_are_not_called_ok(key):
    # exp(-N (ab)^2 / 2 - |w|^2 / 2): exact E[N K] is .3813 at N = 1000; 6,000 SGLD steps do not explore it.
    estimate = estimate_llc(key, lambda w, b: 0.5 * jnp.prod(w) ** 2, jnp.zeros(2), None, nbeta=1000.0, progress=False)
    if abs(estimate.llc - 0.3813) > max(0.05 * 0.3813, 3 * estimate.std_error):
        assert estimate.status != "ok"
        assert any("flat directions" in warning or "virial" in warning for warning in estimate.warnings)


def test_error_of_init_loss_enters_the_error_bar(key):
    target = LocalPosterior(regression, CENTER, 50.0, 1.0)
    draws = sample(key, SGLD(target, 1e-3), CENTER, FullBatch(DATA), num_chains=4, num_draws=50, progress=False)
    base = float(regression(CENTER, DATA))
    plain, noisy = llc(draws, base), llc(draws, base, init_loss_std_error=0.1)
    assert noisy.std_error == pytest.approx(np.hypot(plain.std_error, 50 * 0.1))
    shifted = llc(draws, base + 0.1)
    assert shifted.llc == pytest.approx(plain.llc - 5.0)


def test_burn_in_is_not_averaged_in(key):
    start = CENTER + 3.0
    target = LocalPosterior(regression, CENTER, 50.0, 1.0)
    settings = {"num_chains": 8, "num_draws": 100, "thinning": 4, "progress": False}
    draws = sample(key, SGLD(target, 5e-3), start, FullBatch(DATA), num_burnin=1000, **settings)
    estimate = llc(draws, float(regression(CENTER, DATA)))
    k = 50.0 * np.linalg.eigvalsh(np.asarray(X.T @ X, np.float64) / 400)
    s = k + 1.0
    exact = 0.5 * np.sum(k / (s * (1 - 5e-3 * s / 4)))
    assert abs(estimate.llc - exact) < 4 * estimate.std_error
    assert draws.loss.shape == (8, 100)


def test_center_that_is_no_minimum_is_explained(key):
    estimate = estimate_llc(key, regression, CENTER + 0.5, DATA, localization=1.0, max_gradients=2000, progress=False)
    assert estimate.llc < 0
    assert estimate.status == "do not trust"
    assert any("the estimate is negative" in warning and "polish" in warning for warning in estimate.warnings)


def test_too_large_steps_are_named_by_the_virial(key):
    kernel = functools.partial(SGLD, step_size=2.0 / (400 / np.log(400)))
    estimate = estimate_llc(key, regression, CENTER, DATA, kernel=kernel, progress=False)
    assert any("discretization or minibatch noise" in warning for warning in estimate.warnings)


@pytest.mark.slow
def test_unspread_flat_directions_are_named_by_the_virial(key):
    flat = estimate_llc(key, lambda w, b: 0.5 * w[0] ** 2, jnp.zeros(20), None, nbeta=1e5, max_gradients=400, progress=False)
    assert flat.status == "do not trust"
    assert any("flat directions have not spread" in warning for warning in flat.warnings)


@pytest.mark.slow
def test_constant_loss_has_llc_zero(key):
    estimate = estimate_llc(key, lambda w, b: 0.0 * jnp.sum(w), jnp.zeros(3), None, nbeta=10.0, progress=False)
    assert (estimate.llc, estimate.std_error, estimate.status) == (0.0, 0.0, "ok")


@pytest.mark.slow
def test_step_size_stays_below_half_the_limit_of_stability(key):
    # One stiff direction among many: the trace alone would allow a step at which it diverges.
    curvature = jnp.concatenate([jnp.array([1000.0]), jnp.full(500, 1e-2)])
    target = LocalPosterior(lambda w, b: 0.5 * jnp.sum(curvature * w**2), jnp.zeros(501), 100.0, 1.0)
    step_size = settled_step_size(key, target, jnp.zeros(501), FullBatch(None))
    assert 0 < step_size * (100.0 * 1000 + 1) <= 2.2  # 2, and what 12 power iterations may miss


@pytest.mark.slow
def test_step_size_does_not_depend_on_frozen_coordinates(key):
    # Displacing z by its base measure would multiply the curvature of a by exp(20 z).
    def loss_fn(params, batch):
        return 0.5 * jnp.sum(params["a"] ** 2) * jnp.exp(20 * jnp.sum(params["z"]))

    params = {"a": jnp.zeros(10), "z": jnp.zeros(3)}
    steps = []
    for stiff in (1.0, 1e6):
        base = Gaussian(params, {"a": 1.0, "z": stiff**-0.5})
        target = LocalPosterior(loss_fn, params, 100.0, base, mask={"a": True, "z": False})
        steps.append(settled_step_size(key, target, params, FullBatch(None)))
    assert steps[0] == pytest.approx(steps[1])
    assert 0.01 < steps[0] * 101 < 0.5


def test_step_search_ends_where_rounding_hides_the_difference(key):
    params = 3 * jnp.ones(4, jnp.bfloat16)
    target = LocalPosterior(lambda w, b: 1000.0 + jnp.sum((w - 3) ** 2), params, 1e6, 1.0)
    assert 0 < settled_step_size(key, target, params, FullBatch(None)) < 1


def test_loss_that_is_not_finite_at_the_center_is_an_error(key):
    with pytest.raises(InputError, match="not finite at params"):
        estimate_llc(key, lambda w, b: jnp.sum(jnp.sqrt(w)), -jnp.ones(3), None, nbeta=10.0, progress=False)


def test_run_too_short_to_check_is_not_called_ok(key):
    target = LocalPosterior(regression, CENTER, 50.0, 1.0)
    draws = sample(key, SGLD(target, 1e-3), CENTER, FullBatch(DATA), num_chains=32, num_draws=2, progress=False)
    estimate = llc(draws, float(regression(CENTER, DATA)))
    assert estimate.status == "do not trust"
    assert any("too few draws" in warning for warning in estimate.warnings)


@pytest.mark.parametrize("count", [1, 63, 64, 100, 401])
def test_mean_loss_over_blocks_is_the_mean(count):
    data = jax.tree.map(lambda x: jnp.concatenate([x, x])[:count], DATA)
    mean, error = mean_loss(regression, CENTER + 1, data)
    losses = 0.5 * (np.asarray(data["x"], float) @ np.asarray(CENTER + 1, float) - np.asarray(data["y"], float)) ** 2
    assert mean == pytest.approx(losses.mean(), rel=1e-5)
    if count > 60:
        # The error is itself estimated from at most 64 groups: its relative sd is about sqrt(kurtosis / groups) < .4.
        assert error == pytest.approx(losses.std(ddof=1) / np.sqrt(count), rel=0.5)
    else:
        assert np.isnan(error)


class Unhashable:
    __hash__ = None

    def __call__(self, params, batch):
        return jnp.zeros(())


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"nbeta": 0.0}, InputError, "nbeta must be positive, but is 0.0"),
        ({"nbeta": -2.0}, InputError, "nbeta must be positive, but is -2.0"),
        ({"data": None}, InputError, "nbeta has no default with no examples: give nbeta"),
        ({"data": {"x": X, "y": X[:-1, 0]}}, InputError, r"\['x'\]: 400, \['y'\]: 399"),
        ({"params": jnp.arange(6)}, TypeError, "floating arrays"),
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

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from slt_interp import HMC, SGLD, FullBatch, Gaussian, LocalPosterior, Minibatches, keep_energy, llc, mean_loss, sample
from slt_interp.errors import InputError
from slt_interp.estimators.calibration import predicted_noise_bias, predicted_step_bias, settled_step_size

X = jax.random.normal(jax.random.key(3), (400, 6))
DATA = {"x": X, "y": X @ jnp.arange(6.0) + jax.random.normal(jax.random.key(4), (400,))}
CENTER = jnp.linalg.lstsq(DATA["x"], DATA["y"])[0]


def regression(w, batch):
    return 0.5 * jnp.mean((batch["x"] @ w - batch["y"]) ** 2)


def test_predicted_step_bias_is_that_of_the_exact_law(key):
    curvature = jnp.array([4.0, 1.0, 0.25])
    target = LocalPosterior(
        lambda w, b: 0.5 * jnp.sum(curvature * w**2), jnp.zeros(3), 100.0, 1.0, jnp.array([True, True, False])
    )
    points = jax.random.normal(key, (50, 3))
    # Hutchinson's estimate with z / |z| in 2 dimensions: sd of z H z 2 / |z|^2 is (4 - 1) / sqrt(2), over 200 probes.
    error = 1e-3 / 8 * 100 * 3 / np.sqrt(2 * 200)
    assert abs(predicted_step_bias(key, target, 1e-3, points, None) - 1e-3 / 8 * 100 * 5.0) < 4 * error


def test_predicted_noise_bias_is_that_of_the_exact_law(key):
    # A linear loss on minibatches of 10 examples: V is nbeta^2 / 10 times the covariance of the examples.
    data = jax.random.normal(key, (1000, 300))
    target = LocalPosterior(lambda w, b: jnp.mean(b @ w), jnp.zeros(300), 100.0, 1.0)
    bias = predicted_noise_bias(key, target, 1e-3, jnp.zeros((2, 300)), Minibatches(data, 10))
    exact = 1e-3 / 8 * 100.0**2 / 10 * float(jnp.sum(jnp.var(data, axis=0)))
    # From 8 batches in 300 dimensions: chi-squared with 7 x 300 degrees of freedom.
    assert abs(bias / exact - 1) < 4 * np.sqrt(2 / 2100)


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


@pytest.fixture(scope="module")
def regression_draws():
    target = LocalPosterior(regression, CENTER, 50.0, 1.0)
    # So many leave the difference of families an error of 0.04; with 6 degrees of freedom a gap of 0.5 needs less than 0.05.
    counts = {"num_chains": 8, "num_burnin": 50, "num_draws": 2400, "progress": False}
    return sample(jax.random.key(0), HMC(target, 0.1), CENTER, FullBatch(DATA), **counts)


def _apart(draws, gap):
    """Shift the losses of the first half of the chains, until their mean energy is `gap` above that of the others."""
    is_first = np.arange(len(draws.loss)) < len(draws.loss) // 2
    energy = 50.0 * draws.loss.astype(np.float64)
    missing = gap - (energy[is_first].mean() - energy[~is_first].mean())
    loss = draws.loss.astype(np.float64) + np.where(is_first, missing / 50.0, 0.0)[:, None]
    return replace(draws, info=draws.info._replace(loss=loss)), is_first


def test_families_that_disagree_are_not_trusted_though_all_else_is_well(regression_draws):
    # Less than a standard deviation of the energy, sqrt(6 / 2): what R-hat overlooks.
    gap, init_loss = 0.5, float(regression(CENTER, DATA))
    draws, is_from_base = _apart(regression_draws, gap)
    assert llc(draws, init_loss).status == "ok"
    estimate = llc(draws, init_loss, is_from_base=is_from_base)
    assert estimate.diagnostics["family_difference"] == pytest.approx(gap)
    # By Student's law with 6 degrees of freedom, as rare as 3 errors of a normal.
    assert gap > 2 * stats.t(6).isf(stats.norm.sf(3)) * estimate.diagnostics["family_difference_std_error"]
    assert estimate.status == "do not trust"
    (warning,) = estimate.warnings
    assert warning.startswith("chains from the base measure and from the center disagree, by 0.5 +- ")
    assert estimate.std_error >= gap / 2 * (1 - 1e-12)
    assert estimate.llc == llc(draws, init_loss).llc


def test_families_that_agree_change_nothing(regression_draws):
    draws, is_from_base = _apart(regression_draws, 0.0)
    init_loss = float(regression(CENTER, DATA))
    plain, estimate = llc(draws, init_loss), llc(draws, init_loss, is_from_base=is_from_base)
    assert (estimate.status, estimate.warnings) == ("ok", ())
    assert (estimate.llc, estimate.std_error, estimate.ess) == (plain.llc, plain.std_error, plain.ess)
    np.testing.assert_array_equal(estimate.per_chain, plain.per_chain)


def test_a_family_of_one_chain_gets_one_sentence(regression_draws):
    is_from_base = np.arange(len(regression_draws.loss)) == 0
    with pytest.raises(InputError, match="each family needs two finite chains, but 1 from the base and 7 from the center are"):
        llc(regression_draws, 0.0, is_from_base=is_from_base)


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


@pytest.mark.slow
def test_step_search_ends_where_rounding_hides_the_difference(key):
    params = 3 * jnp.ones(4, jnp.bfloat16)
    target = LocalPosterior(lambda w, b: 1000.0 + jnp.sum((w - 3) ** 2), params, 1e6, 1.0)
    assert 0 < settled_step_size(key, target, params, FullBatch(None)) < 1


@pytest.mark.parametrize("num_draws", [1, 2])
def test_run_too_short_to_check_is_not_called_ok(key, num_draws):
    target = LocalPosterior(regression, CENTER, 50.0, 1.0)
    settings = {"num_chains": 32, "num_burnin": 5, "num_draws": num_draws, "progress": False}
    draws = sample(key, SGLD(target, 1e-3), CENTER, FullBatch(DATA), **settings)
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


@pytest.mark.slow
def test_companions_of_a_quadratic_are_its_llc(key):
    # nbeta K is gamma distributed with shape 3: mean and variance are 3, and the multiplicity is 1.
    target = LocalPosterior(lambda w, b: 0.5 * jnp.sum(w**2), jnp.zeros(6), 1e4, 1.0)
    counts = {"num_chains": 16, "num_draws": 2000, "num_warmup": 200, "progress": False}
    draws = sample(key, HMC(target, 0.1), jnp.zeros(6), FullBatch(None), collect=keep_energy(target), **counts)
    estimate = llc(draws, 0.0)
    for name in ("variance", "multiplicity corrected"):
        value, error = estimate.companions[name]
        assert abs(value - 3.0) < 4 * error, name
    doubled, error = estimate.companions["localization doubled"]
    # d E / d log gamma = -3 k gamma / (k + gamma)^2 is 3e-4, to first order.
    assert abs(doubled - estimate.llc + np.log(2) * 3e-4) < 4 * error
    assert llc(sample(key, HMC(target, 0.1), jnp.zeros(6), FullBatch(None), **counts), 0.0).companions == {}

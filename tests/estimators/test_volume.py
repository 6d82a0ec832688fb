import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from slt_interp import analytic
from slt_interp.bases import Ball, Box, FloatGrid, Gaussian
from slt_interp.errors import InputError
from slt_interp.estimators import volume
from slt_interp.estimators.ladder import Ladder
from slt_interp.estimators.volume import _coldest, behavioral_kl, estimate_volume
from slt_interp.models.mlp import MLP
from slt_interp.posterior import LocalPosterior, check_target


def quadratic(w, batch):
    return jnp.sum(w["b"]) + 0.5 * jnp.sum(jnp.array([4.0, 1.0]) * w["a"] ** 2)


PARAMS = {"a": jnp.array([0.3, -0.2]), "b": jnp.zeros(1)}


def test_gaussian_counts_gradient_and_off_center_base_exactly(key):
    base = Gaussian({"a": 0.4, "b": -0.1}, {"a": jnp.array([1.0, 2.0]), "b": 0.3})
    thresholds = [0.1, 0.5, 2.0]
    found = estimate_volume(key, quadratic, PARAMS, None, thresholds, base=base, method="gaussian")
    rng = np.random.default_rng(0)
    a, b = 0.4 + np.array([1.0, 2.0]) * rng.normal(size=(1_000_000, 2)), -0.1 + 0.3 * rng.normal(size=1_000_000)
    excess = b + 0.5 * (a**2 @ [4.0, 1.0]) - float(quadratic(PARAMS, None))
    shares = np.array([(excess <= threshold).mean() for threshold in thresholds])
    assert np.all(np.abs(np.exp(found.log_volume) - shares) < 4 * np.sqrt(shares * (1 - shares) / 1e6))
    assert np.all(found.std_error == 0)
    assert "1 of 3 directions have no positive curvature" in found.warnings[0]


def test_gaussian_at_a_saddle_is_not_trusted(key):
    found = estimate_volume(
        key, lambda w, batch: w[0] ** 2 - w[1] ** 2, jnp.zeros(2), None, [0.1], base=Gaussian(0.0, 1.0), method="gaussian"
    )
    assert found.log_volume[0] == pytest.approx(stats.chi2(1).logcdf(0.1), rel=1e-6)
    assert found.status == "do not trust"
    assert "1 of 2 curvatures are negative" in found.warnings[0]


@pytest.mark.parametrize("method", ["rays", "gaussian"])
def test_methods_agree_on_a_regular_problem(method, key):
    problem = analytic.quadratic([3.0, 1.0, 0.3])
    found = estimate_volume(key, problem.loss_fn, problem.center, None, [1e-3, 1e-2], base=problem.base, method=method)
    # Three radii in the log, each of two float32 roundings; a loss of some seven, 4e-7, is half of that in a radius. The
    # Gaussian has no error but float64's.
    rounding = 3 * (1.2e-7 + 2e-7)
    exact = np.array([problem.log_volume(t) for t in (1e-3, 1e-2)])
    assert np.all(np.abs(found.log_volume - exact) < 4 * found.std_error + rounding)


@pytest.mark.slow
def test_tempering_counts_crossing_lines_exactly(key):
    problem = analytic.monomial([1, 1])
    thresholds = [1e-3, 1e-2, 1e-1]
    found = estimate_volume(key, problem.loss_fn, problem.center, None, thresholds, base=problem.base, progress=False)
    exact = np.array([problem.log_volume(threshold) for threshold in thresholds])
    assert found.status == "ok", found
    assert np.all(np.abs(found.log_volume - exact) < 4 * found.std_error)
    # Twice (1 + LLC) / eps, with an LLC between 0 and 1/2 that four short chains may miss by as much.
    assert 2 / thresholds[0] <= found.diagnostics["max_nbeta"] <= 4 / thresholds[0]


@pytest.mark.slow
def test_labels_split_a_tempered_volume_between_two_wells(key):
    problem = analytic.double_well()

    def side(w):
        return jnp.where(w[0] > 0, 1, 0)

    thresholds = [0.1, 0.3]
    settings = {"base": problem.base, "labels": side, "progress": False}
    found = estimate_volume(key, problem.loss_fn, problem.center, None, thresholds, **settings)
    half = np.array([problem.log_volume(threshold) for threshold in thresholds]) - np.log(2)
    assert found.status == "ok", found
    assert set(found.by_label) == {0, 1}
    for value, error in found.by_label.values():
        assert np.all(np.abs(value - half) < 4 * error)
        assert np.all(error < 0.2)


def test_a_learning_coefficient_that_rises_with_nbeta_is_followed_to_the_threshold(key):
    curvature, variance, threshold = 3.0, 0.01, 0.1

    def llc(nbeta):
        return 50 * nbeta * curvature / (nbeta * curvature + 1 / variance)

    target = LocalPosterior(
        lambda w, batch: curvature / 2 * jnp.sum(w**2), jnp.zeros(100), 1 / threshold, Gaussian(0.0, variance**0.5)
    )
    at_once = 2 * (1 + llc(1 / threshold)) / threshold
    assert llc(at_once) / at_once > 1.5 * threshold, "one look would end where hardly a draw lies below the threshold"
    coldest, spent = _coldest(key, target, jnp.zeros(100), None, False)
    assert spent >= 2 * 4 * 250, "four chains of 250 steps, twice at least"
    # It ends at most 1.2 times below twice (1 + LLC) / threshold; four chains know their energies to a few percent.
    assert 2 * llc(coldest) / coldest < 1.2 * 1.1 * threshold
    assert coldest < 1.1 * 2 * (1 + 50) / threshold


def test_result_reads_like_a_sentence(key):
    found = estimate_volume(key, quadratic, PARAMS, None, [0.1, 0.5], base=Gaussian(0.0, 1.0), method="gaussian")
    text = str(found)
    assert text.startswith("log volume by the Gaussian approximation, of the ellipsoid that gradient and Hessian")
    assert "at 0.1," in text
    assert text.splitlines()[0].endswith(": ok")


def test_behavioral_kl_is_zero_at_the_network_and_positive_elsewhere(key):
    network = MLP((3, 5, 4))
    params = network.init(key)
    inputs = jax.random.normal(jax.random.key(1), (20, 3))
    loss_fn, data = behavioral_kl(network.apply, params, inputs)
    value, gradient = jax.value_and_grad(loss_fn)(params, data)
    assert float(value) == 0
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) < 1e-6
    other = jax.tree.map(lambda x: x + 0.3, params)
    p, q = (jax.nn.softmax(network.apply(w, inputs)) for w in (params, other))
    assert float(loss_fn(other, data)) == pytest.approx(float(np.mean(stats.entropy(p, q, axis=1))), rel=1e-4)
    again, _ = behavioral_kl(network.apply, other, inputs)
    assert (again, hash(again)) == (loss_fn, hash(loss_fn))


@pytest.mark.slow
def test_error_rate_without_gradient_can_be_the_loss(key):
    def error_rate(w, batch):
        return jnp.mean((batch @ w <= 0).astype(jnp.float32))

    # Angles of the inputs -60 to 60 degrees: all are right for w within 30 degrees of the first axis, one sixth of the plane.
    angles = jnp.deg2rad(jnp.linspace(-60.0, 60.0, 13))
    inputs = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
    settings = {"base": Gaussian(0.0, 1.0), "method": "subset", "progress": False}
    found = estimate_volume(key, error_rate, jnp.array([1.0, 0.0]), inputs, [0.01], **settings)
    assert abs(found.log_volume[0] + np.log(6)) < 4 * found.std_error[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "magic"}, "method must be 'tempering', 'subset', 'rays' or 'gaussian', but is 'magic'"),
        ({"method": "magic", "labels": jnp.sum}, "method must be 'tempering', 'subset', 'rays' or 'gaussian', but is 'magic'"),
        ({"method": "tempering", "base": FloatGrid("float16", 1.0)}, "only method='subset' does, but method is 'tempering'"),
        ({"method": "rays", "base": FloatGrid("float16", 1.0)}, "only method='subset' does, but method is 'rays'"),
        (
            {"method": "rays", "labels": jnp.sum},
            "labels split draws, which 'tempering' and 'subset' make, but method is 'rays'",
        ),
        ({"method": "tempering", "labels": jnp.sum}, r"labels must turn weights into one integer, but gives float32\[\]"),
        ({"method": "subset", "labels": jnp.argsort}, r"labels must turn weights into one integer, but gives int32\[2\]"),
        ({"method": "gaussian", "base": Ball(0.0, 1.0)}, "is about a Gaussian base measure, not a Ball"),
        ({"method": "gaussian", "base": Box(1.0, 2.0)}, "params lie outside the base measure"),
        ({"method": "gaussian", "thresholds": [0.2, 0.1]}, "thresholds must be a list of positive increasing numbers"),
        ({"method": "gaussian", "params": jnp.zeros(2001)}, "at most 2000 weights, but params has 2001"),
    ],
)
def test_bad_input_is_one_sentence(settings, message, key):
    arguments = {"params": jnp.zeros(2), "thresholds": [0.1], "base": Gaussian(0.0, 1.0)} | settings
    with pytest.raises(InputError, match=message) as caught:
        estimate_volume(key, lambda w, batch: jnp.sum(w**2), data=None, **arguments)
    assert "\n" not in str(caught.value)


def test_thresholds_within_rounding_of_the_loss_are_named(key):
    found = estimate_volume(
        key, lambda w, batch: 10 + jnp.sum(w**2), jnp.zeros(2), None, [1e-6], base=Gaussian(0.0, 1.0), method="gaussian"
    )
    assert "within rounding of the loss at params, 10" in found.warnings[0]


def test_float_grid_is_no_base_of_a_posterior():
    with pytest.raises(InputError, match="counts numbers and has no density"):
        check_target(LocalPosterior(quadratic, PARAMS, 1.0, FloatGrid("float16", 1.0)), PARAMS, None)


def _exact_ladder(num_draws, late=1.0):
    """Independent exact draws of a quadratic in 4 dimensions under N(0, 1); late losses are `late` times as large."""
    nbetas = np.concatenate([[0.0], np.geomspace(1.0, 1000.0, 8)])
    loss = np.random.default_rng(0).gamma(2.0, 1 / (1 + nbetas)[:, None, None], (9, 8, num_draws))
    loss[1:, :, num_draws // 2 :] *= late
    shared = {"mean_loss": loss, "squared_distance": loss, "replica": np.zeros(loss.shape, int), "exchange": np.full(8, 0.4)}
    counts = {"virial": None, "dimension": 4, "params": None, "num_lost": 0, "gradients_per_chain": 1.0}
    losses = {"init_loss": 0.0, "rounding": 0.0}
    return Ladder(nbetas, loss, is_from_base=np.arange(8) < 4, base=Gaussian(0.0, 1.0), **shared, **counts, **losses)


@pytest.fixture
def read_from(key, monkeypatch):
    """Read the volumes of given ladders, as `tempered_volume` does in rounds."""

    def read(ladders, **settings):
        monkeypatch.setattr(volume, "_coldest", lambda *_: (1000.0, 0.0))
        monkeypatch.setattr(volume, "ladders", lambda *_, **__: iter(ladders))
        return volume.tempered_volume(
            key, lambda w, batch: 0.0, jnp.zeros(4), None, [0.01, 0.1], base=Gaussian(0.0, 1.0), **settings
        )

    return read


def test_no_number_is_given_where_halves_of_the_draws_differ(read_from):
    found = read_from([_exact_ladder(100, late=4.0)], max_rounds=1)
    assert np.all(np.isnan(found.log_volume))
    assert found.status == "refused"
    assert any("the first and the second half of the draws differ" in warning for warning in found.warnings)


def test_no_rounds_are_refused(read_from):
    with pytest.raises(InputError, match="max_rounds at least 1, but they are"):
        read_from([], max_rounds=0)


def test_rounds_end_when_errors_are_small_or_rounds_are_spent(read_from):
    # V(eps) = 1 - exp(-eps) (1 + eps) for the sum of two exponentials.
    exact = [np.log(-np.expm1(-eps) - eps * np.exp(-eps)) for eps in (0.01, 0.1)]
    ladders = [_exact_ladder(num_draws) for num_draws in (50, 100, 200, 400)]
    errors = [read_from([ladder], max_rounds=1).std_error.max() for ladder in ladders]
    for precision in (10.0, 1.001 * errors[2], 1e-6):
        # |log V| is below 10: the precision is in nats.
        enough = next((i for i, error in enumerate(errors) if error <= precision), len(errors) - 1)
        found = read_from(ladders, precision=precision)
        assert found.std_error.max() == errors[enough]
        assert np.all(np.abs(found.log_volume - exact) < 4 * found.std_error)
    assert read_from(ladders, precision=1e-6, max_rounds=2).std_error.max() == errors[1]

"""A ladder by SGLD on minibatches against the exact law of a linear regression."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp import Gaussian, analytic, temper
from slt_interp.errors import InputError
from slt_interp.estimators import minibatch_ladder
from slt_interp.estimators.llc import OK
from slt_interp.estimators.volume import tempered_volume
from slt_interp.samplers import chains

NUM_EXAMPLES, DIMENSION = 10_000, 4


@pytest.fixture(scope="module")
def problem():
    return analytic.linear_regression(jax.random.key(5), NUM_EXAMPLES, DIMENSION)


@pytest.fixture(scope="module")
def ladder(problem):
    settings = {
        "base": Gaussian(problem.center, 1.0),
        "max_nbeta": 3e3,
        "num_draws": 400,
        "keep_params": True,
        "progress": False,
    }
    return temper(jax.random.key(1), problem.loss_fn, problem.center, problem.data, labels=_sign, **settings)


def _sign(w):
    return (w[0] > 0).astype(int)


def test_energies_and_partition_functions_are_exact(problem, ladder):
    inputs = np.asarray(problem.data["x"], np.float64)
    curvatures = np.linalg.svd(inputs, compute_uv=False) ** 2 / NUM_EXAMPLES
    assert ladder.status == OK, ladder
    curve, partition = ladder.llc_curve(), ladder.log_partition()
    energies = np.array([problem.energy(nbeta, 1.0) for nbeta in curve.nbetas])
    assert np.all(np.abs(curve.llc - energies) < 4 * curve.std_error)
    # A tenth of d / 2 at every rung, so that the comparison says something.
    assert np.all(curve.std_error < 0.1 * DIMENSION / 2)
    exact = -0.5 * np.log1p(partition.nbetas[:, None] * curvatures).sum(axis=1)
    assert np.all(np.abs(partition.log_z - exact) <= 4 * partition.std_error)


def test_errors_cover_what_the_step_adds(ladder):
    # The step is chosen so as to add a hundredth of the mean energy of 4 chains, d / 2 at most with a standard deviation of
    # sqrt(d / 2) / 2. The trace is that of one batch, and of another for the prediction: means of 512 x 4 squares, known to
    # sqrt(2 / 2048) = 3 %, and as much for the probes; 4 standard errors of their ratio are 25 %. Minibatches add d / 512 of
    # that.
    energy = DIMENSION / 2 + 4 * np.sqrt(DIMENSION / 2) / 2
    assert ladder.step_bias[0] == 0
    assert np.all((ladder.step_bias[1:] > 0) & (ladder.step_bias[1:] < 0.01 * energy * 1.25 * (1 + DIMENSION / 512)))
    assert ladder.round_trips is None
    assert "round trips" not in str(ladder)
    assert np.all(ladder.llc_curve().std_error >= ladder.step_bias[1:])


def test_losses_are_those_of_all_data_and_labels_those_of_the_weights(problem, ladder):
    top = jnp.asarray(ladder.draws(-1))
    losses = jax.vmap(jax.vmap(lambda w: problem.loss_fn(w, problem.data)))(top)
    np.testing.assert_allclose(losses, ladder.loss[-1], rtol=1e-5)
    np.testing.assert_array_equal(jax.vmap(jax.vmap(_sign))(top), ladder.labels[-1])


@pytest.mark.slow
def test_volume_is_that_of_the_ellipsoid(problem):
    base, thresholds = Gaussian(problem.center, 1.0), [0.01, 0.1]
    arguments = problem.loss_fn, problem.center, problem.data, thresholds
    found = tempered_volume(jax.random.key(2), *arguments, base=base, num_draws=150, max_rounds=1, progress=False)
    rng = np.random.default_rng(0)
    inputs = np.asarray(problem.data["x"], np.float64)
    curvatures = np.linalg.svd(inputs, compute_uv=False) ** 2 / NUM_EXAMPLES
    losses = 0.5 * rng.normal(size=(1_000_000, DIMENSION)) ** 2 @ curvatures
    shares = np.array([np.mean(losses <= threshold) for threshold in thresholds])
    errors = np.hypot(found.std_error, np.sqrt((1 - shares) / shares / 1e6))
    assert np.all(np.abs(found.log_volume - np.log(shares)) < 4 * errors)


@pytest.mark.parametrize("outside", [jnp.inf, jnp.nan])
def test_draws_of_the_base_may_have_a_loss_that_is_not_finite(key, outside):
    # One in eighty has; at the first rung, of nbeta 20 or so, the limit lies at ten standard deviations.
    def loss_fn(w, batch):
        return jnp.where(jnp.abs(w[0]) > 2.5, outside, 0.5 * w[0] ** 2 * jnp.mean(batch))

    settings = {"base": Gaussian(0.0, 1.0), "max_nbeta": 300.0, "num_chains": 4, "num_draws": 100, "progress": False}
    ladder = temper(key, loss_fn, jnp.zeros(1), jnp.ones(9_000), **settings)
    assert np.any(np.isinf(ladder.loss[0]))
    assert ladder.num_lost == 0
    partition = ladder.log_partition()
    np.testing.assert_array_less(np.abs(partition.log_z + 0.5 * np.log1p(partition.nbetas))[1:], 4 * partition.std_error[1:])


def test_a_wall_that_all_chains_cross_is_an_error(key):
    # At a standard deviation from the weights at the first rung.
    def loss_fn(w, batch):
        return jnp.where(jnp.abs(w[0]) > 0.2, jnp.inf, 0.5 * w[0] ** 2 * jnp.mean(batch))

    settings = {"base": Gaussian(0.0, 1.0), "max_nbeta": 300.0, "num_chains": 4, "num_draws": 50, "progress": False}
    with pytest.raises(InputError, match="became non-finite"):
        temper(key, loss_fn, jnp.zeros(1), jnp.ones(9_000), **settings)


def test_a_run_that_was_cut_short_goes_on_bit_for_bit(key, tmp_path, monkeypatch):
    def loss_fn(w, batch):
        return 0.5 * w[0] ** 2 * jnp.mean(batch)

    settings = {"base": Gaussian(0.0, 1.0), "max_nbeta": 30.0, "num_chains": 4, "num_draws": 20, "progress": False}
    ask = functools.partial(temper, key, loss_fn, jnp.zeros(1), jnp.ones(9_000), checkpoint=tmp_path, **settings)
    whole, made, sample = temper(key, loss_fn, jnp.zeros(1), jnp.ones(9_000), **settings), [], minibatch_ladder.sample

    def failing(*arguments, **counts):
        made.append(counts)
        if len(made) == 4:
            raise KeyboardInterrupt
        return sample(*arguments, **counts)

    monkeypatch.setattr(minibatch_ladder, "sample", failing)
    with pytest.raises(KeyboardInterrupt):
        ask()
    np.testing.assert_array_equal(ask().loss, whole.loss)
    # What is finished is read, and no step is made.
    monkeypatch.setattr(chains.DrawFiles, "append", None)
    np.testing.assert_array_equal(ask().loss, whole.loss)

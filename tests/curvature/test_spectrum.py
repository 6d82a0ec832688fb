import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matfree.decomp import tridiag_sym
from scipy.stats import ortho_group

from slt_interp import Gaussian, estimate_spectrum
from slt_interp.curvature.operators import hvp
from slt_interp.curvature.spectrum import _tridiagonalize
from slt_interp.errors import InputError

PRESCRIBED = {
    "degenerate": np.repeat([3.0, 1.0, 0.1], 20),
    "rank-deficient": np.concatenate([np.geomspace(1e-3, 10, 25), np.zeros(35)]),
    "indefinite": np.concatenate([np.geomspace(1e-2, 5, 50), [-0.02] * 10]),
}


def prescribed(name):
    values = PRESCRIBED[name]
    rotation = ortho_group.rvs(len(values), random_state=0)
    matrix = jnp.asarray((rotation * values) @ rotation.T)

    def loss_fn(params, batch):
        w = jnp.concatenate([params["a"].ravel(), params["b"]])
        return 0.5 * w @ (batch[0].astype(w.dtype) @ w)

    # float64 data survive: the matrix is an argument, and the dense route computes in float64.
    return values, loss_fn, {"a": jnp.zeros((4, 10)), "b": jnp.zeros(20)}, matrix[None]


@pytest.mark.parametrize("name", PRESCRIBED)
def test_dense_spectrum_is_the_prescribed_one(key, name):
    values, loss_fn, params, data = prescribed(name)
    spectrum = estimate_spectrum(key, loss_fn, params, data)
    assert spectrum.is_exact
    # The data went through float32 once: entries are off by 6e-8 of at most 10, the spectrum by sqrt(60) of that.
    np.testing.assert_allclose(spectrum.ritz_values[0], np.sort(values), atol=5e-6)
    assert spectrum.trace == (pytest.approx(values.sum(), abs=1e-4), 0.0)
    assert spectrum.rank(1e-4) == (values > 1e-4).sum()
    assert bool(spectrum.warnings) == (name == "indefinite")


@pytest.mark.parametrize("name", ["degenerate", "rank-deficient"])
def test_lanczos_agrees_within_its_standard_error(key, name):
    values, loss_fn, params, data = prescribed(name)
    spectrum = estimate_spectrum(key, loss_fn, params, data, num_matvecs=30, num_probes=20)
    assert not spectrum.is_exact
    np.testing.assert_allclose(spectrum.weights.sum(axis=1), 60, rtol=1e-5)
    exact = 0.5 * np.sum(100 * values / (100 * values + 1.0))
    found, error = spectrum.llc(100.0, 1.0)
    assert 0 < error < 0.1 * exact
    assert abs(found - exact) < 4 * error
    assert abs(spectrum.trace[0] - values.sum()) < 4 * spectrum.trace[1]
    assert spectrum.ritz_values.max() == pytest.approx(values.max(), rel=1e-3)


@pytest.mark.parametrize("rank", [0, 1, 3, 3000])
def test_exhausted_krylov_space_is_no_source_of_eigenvalues(key, rank):
    dimension = 3000  # beyond the dense limit
    spectrum = estimate_spectrum(key, lambda w, batch: 0.5 * jnp.sum(w[:rank] ** 2), jnp.zeros(dimension), None)
    assert not spectrum.is_exact
    assert spectrum.warnings == ()
    assert spectrum.ritz_values.min() > -1e-3
    assert spectrum.ritz_values.max() < 1 + 1e-3
    trace, error = spectrum.trace
    assert abs(trace - rank) <= 4 * error + 1e-3 * rank
    found, error = spectrum.llc(100.0, 1.0)
    assert abs(found - 0.5 * rank * 100 / 101) <= 4 * error + 1e-3 * rank


def test_krylov_space_is_matfrees_where_it_is_not_exhausted(key):
    values, _, _, data = prescribed("rank-deficient")
    matrix, start = np.asarray(data[0], np.float64), np.random.default_rng(0).normal(size=60)
    ours, _ = _tridiagonalize(lambda v: matrix @ v, start, 10)
    theirs = tridiag_sym(10, custom_vjp=False)(lambda v: data[0] @ v, jnp.asarray(start, jnp.float32))[1]
    np.testing.assert_allclose(
        np.linalg.eigvalsh(ours), np.linalg.eigvalsh(np.asarray(theirs, float)), atol=1e-5 * values.max()
    )


def test_one_probe_has_no_standard_error(key):
    _, loss_fn, params, data = prescribed("rank-deficient")
    spectrum = estimate_spectrum(key, loss_fn, params, data, num_matvecs=10, num_probes=1)
    assert np.isnan(spectrum.trace[1])


def casting(w, batch):
    return jnp.mean(jnp.tanh(batch.astype(jnp.float32) @ w.astype(jnp.float32)) ** 2)


def scanning(w, batch):
    return jax.lax.scan(lambda total, x: (total + jnp.tanh(x @ w) ** 2, None), jnp.zeros((), jnp.float32), batch)[0]


@pytest.mark.parametrize("loss_fn", [casting, scanning])
def test_loss_that_insists_on_float32_has_its_rounding_in_the_rank_threshold(key, loss_fn):
    batch = jax.random.normal(key, (5, 40))
    spectrum = estimate_spectrum(key, loss_fn, 0.1 * jnp.ones(40), batch)
    assert spectrum.rank() <= 5  # five examples, and each has a Hessian of rank 1


def test_gaussian_llc_is_what_the_regularized_trace_formula_gives(key):
    _, loss_fn, params, data = prescribed("rank-deficient")
    spectrum = estimate_spectrum(key, loss_fn, params, data)
    hessian = np.asarray(data[0], np.float64)
    direct = 0.5 * np.trace(50.0 * hessian @ np.linalg.inv(50.0 * hessian + 2.0 * np.eye(60)))
    assert spectrum.llc(50.0, 2.0)[0] == pytest.approx(direct, rel=1e-5)


def test_log_volume_is_the_mass_of_the_ellipsoid(key):
    values, loss_fn, params, data = prescribed("rank-deficient")
    spectrum = estimate_spectrum(key, loss_fn, params, data)
    draws = 0.3 * np.random.default_rng(0).normal(size=(400_000, 60))
    losses = 0.5 * draws**2 @ values
    for eps, log_volume in zip((0.3, 1.0), spectrum.log_volume(np.array([0.3, 1.0]), Gaussian(params, 0.3)), strict=True):
        share = (losses <= eps).mean()
        assert abs(np.exp(log_volume) - share) < 4 * np.sqrt(share * (1 - share) / 400_000)
    with pytest.raises(InputError, match="one scalar scale"):
        spectrum.log_volume(np.array([0.3]), Gaussian(params, {"a": 0.1, "b": 0.2}))


def test_hvp_equals_the_dense_hessian_times_a_vector(key):
    def loss_fn(w, batch):
        return jnp.sum(jnp.tanh(batch @ w) ** 2)

    w, batch, v = jax.random.normal(key, (4,)), jax.random.normal(key, (9, 4)), jnp.arange(4.0)
    np.testing.assert_allclose(hvp(loss_fn, w, batch, v), jax.hessian(loss_fn)(w, batch) @ v, rtol=1e-4)


def test_bad_input_gets_one_clear_sentence(key):
    loss_fn = lambda w, batch: jnp.sum(w**2)  # noqa: E731
    with pytest.raises(InputError, match="num_matvecs must lie between 1 and the number of parameters, 3, but is 4"):
        estimate_spectrum(key, loss_fn, jnp.zeros(3), None, num_matvecs=4)
    with pytest.raises(InputError, match="Hessian of the loss at params is not finite"):
        estimate_spectrum(key, lambda w, batch: jnp.sum(jnp.sqrt(w)), jnp.zeros(3), None)

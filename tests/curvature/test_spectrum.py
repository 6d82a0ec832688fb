import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matfree.decomp import tridiag_sym
from scipy.stats import ortho_group

from slt_interp import Gaussian, analytic, estimate_spectrum, top_eigenpairs
from slt_interp.curvature.lanczos import krylov
from slt_interp.curvature.operators import gauss_newton_product, hvp
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
    assert spectrum.rank_range(1e-4) == ((values > 1e-3).sum(), (values > 1e-5).sum())
    assert spectrum.participation_ratio == pytest.approx(values.sum() ** 2 / np.sum(values**2), rel=1e-5)
    assert spectrum.stable_rank == pytest.approx(np.sum(values**2) / values.max() ** 2, rel=1e-5)
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
    ours = krylov(lambda v: matrix @ v, start, 10, np.zeros((0, 60)))[0].tridiagonal
    theirs = tridiag_sym(10, custom_vjp=False)(lambda v: data[0] @ v, jnp.asarray(start, jnp.float32))[1]
    np.testing.assert_allclose(
        np.linalg.eigvalsh(ours), np.linalg.eigvalsh(np.asarray(theirs, float)), atol=1e-5 * values.max()
    )


@pytest.mark.parametrize("size", [1, 3])
def test_a_few_weights_have_a_spectrum_by_probes_too(key, size):
    spectrum = estimate_spectrum(key, lambda w, batch: jnp.sum(w**2), jnp.zeros(size), None, num_matvecs=1, num_probes=1)
    np.testing.assert_allclose(spectrum.ritz_values, 2.0, rtol=1e-6)
    np.testing.assert_allclose(spectrum.weights, size, rtol=1e-6)


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


def test_rounding_of_a_deep_linear_center_to_float32_does_not_count_as_rank(key):
    # The Hessian at a minimum sees what changes the product to first order: 3 (10 + 10 - 3) directions of 200.
    problem = analytic.deep_linear(key, (10, 10, 10), rank=3)
    spectrum = estimate_spectrum(key, problem.loss_fn, problem.center, problem.data)
    assert spectrum.rank() == 51


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


# Beyond the dense limit: diagonal quadratics, of which every answer is known. Starting vectors are random in direction, so that
# a rotation would change nothing.
LARGE = {
    "rank 10, all equal": lambda d: np.ones(10),
    "rank 100, all equal": lambda d: np.ones(100),
    "rank 100 over four decades": lambda d: np.geomspace(1e-3, 10, 100),
    "rank 1000 over six decades": lambda d: np.geomspace(1e-6, 1, 1000),
    "power law": lambda d: np.arange(1, d + 1.0) ** -1.5,
    "full rank over eight decades": lambda d: np.geomspace(1e-8, 1, d),
    "identity": np.ones,
    "outliers and bulk": lambda d: np.concatenate([np.geomspace(1, 100, 20), np.linspace(1e-3, 2e-2, d // 2)]),
}


def diagonal(name, size):
    values = np.zeros(size)
    found = LARGE[name](size)
    values[: len(found)] = found
    curvature = jnp.asarray(values, jnp.float32)[None]
    return values, lambda w, batch: 0.5 * jnp.sum(batch[0] * w**2), jnp.zeros(size), curvature


# Krylov spaces of hundreds of dimensions, by dozens of probes; in 20,000 dimensions `curvature_scale.py` has them.
LONG = ("rank 1000 over six decades", "full rank over eight decades")


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, marks=[pytest.mark.slow] if name in LONG or size > 2500 else [])
        for size in (2500, 20_000)
        for name in LARGE
        if name not in LONG or size == 2500
    ],
)
def test_gaussian_llc_of_large_spectra_by_default_settings(key, name, size):
    values, loss_fn, params, data = diagonal(name, size)
    spectrum = estimate_spectrum(key, loss_fn, params, data)
    assert not spectrum.is_exact
    for ratio in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
        nbeta = 1 / (ratio * values.max())
        exact = 0.5 * np.sum(values / (values + ratio * values.max()))
        found, error = spectrum.llc(nbeta, 1.0)
        # Errors from 16 probes or more: 4 are exceeded once in 900 times at worst, by the t distribution with 15 degrees.
        assert error <= 0.03 * exact
        assert abs(found - exact) <= 4 * error + 1e-4 * exact
        exact = np.sum(np.log1p(nbeta * values))
        found, error = spectrum.log_determinant(nbeta, 1.0)
        assert abs(found - exact) <= 4 * error + 1e-4 * exact
    exact = np.sum(values**2)
    found, error = spectrum.squared_norm
    assert abs(found - exact) <= 4 * error + 1e-4 * exact


def test_two_quadrature_rules_enclose_what_the_krylov_space_does_not_resolve(key):
    # At 1e-6 of the largest eigenvalue 96 vectors do not resolve a thousand eigenvalues: the error bar has to say so.
    values = np.concatenate([np.geomspace(1e-6, 1, 1000), np.zeros(1500)])
    spectrum = estimate_spectrum(
        key, lambda w, b: 0.5 * jnp.sum(b[0] * w**2), jnp.zeros(2500), jnp.asarray(values, jnp.float32)[None], num_matvecs=96
    )
    exact = 0.5 * np.sum(values / (values + 1e-6))
    found, error = spectrum.llc(1e6, 1.0)
    assert abs(found - exact) < 2 * error
    assert error > 0.1 * exact


@pytest.mark.parametrize(("size", "small"), [(1_000_000, 2e-5), (100_000, 5e-6)])
def test_small_eigenvalues_of_a_large_matrix_are_not_taken_for_rounding(size, small):
    values = np.zeros(size, np.float32)
    values[:136], values[136:1136] = 1.0, small
    start = np.random.default_rng(0).standard_normal(size)
    space, _ = krylov(lambda v: values * v, start, 8, np.zeros((0, size)))
    exact = start**2 @ (values / (values + 1e-5)) / (start @ start)
    lower, upper = (np.sum(w * x / (x + 1e-5)) for x, w, *_ in (space.lower_quadrature(), space.quadrature()))
    # Products are rounded to 6e-8 of the largest eigenvalue, of which the slope 1 / (small + 1e-5) makes less than 1 %.
    assert 0.99 * lower <= exact <= 1.01 * upper


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("num_products", [2, 5, 20])
def test_the_two_rules_enclose_the_form_of_their_start(name, num_products):
    values = diagonal(name, 2500)[0]
    start = np.random.default_rng(1).standard_normal(2500)
    space, _ = krylov(lambda v: values * v, start, num_products, np.zeros((0, 2500)))
    for ratio in (1e-4, 1e-3, 1e-2, 1e-1):
        scale = ratio * values.max()
        for function in (lambda h, c=scale: h / (h + c), lambda h, c=scale: np.log1p(h / c)):
            exact = start**2 @ function(values) / (start @ start)
            lower, upper = (w @ function(x) for x, w, *_ in (space.lower_quadrature(), space.quadrature()))
            # The basis is float32: 6e-8 of the largest eigenvalue, over the scale.
            assert lower - 1e-7 / ratio <= exact <= upper + 1e-7 / ratio


def test_multiple_leading_eigenvalues_are_found_as_often_as_they_occur(key):
    values = np.zeros(500)
    values[:12] = [-7.0, 5.0, 5.0, 5.0, 3.0, 3.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5]
    data = jnp.asarray(values, jnp.float32)[None]
    found = top_eigenpairs(key, lambda w, batch: 0.5 * jnp.sum(batch[0] * w**2), jnp.zeros(500), data, 12)
    np.testing.assert_allclose(found.values, values[:12], rtol=1e-4)
    np.testing.assert_allclose(found.vectors @ found.vectors.T, np.eye(12), atol=1e-4)
    few = top_eigenpairs(key, lambda w, batch: 0.5 * jnp.sum(batch[0] * w**2), jnp.zeros(500), data, 3)
    np.testing.assert_allclose(few.values, values[:3], rtol=1e-4)
    applied = found.vectors * values
    errors = np.linalg.norm(applied - found.values[:, None] * found.vectors, axis=1)
    assert np.all(errors <= found.residuals + 1e-5)


def mean_loss(w, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ w["a"]) @ w["b"] - y) ** 2)


def regression(key):
    keys = jax.random.split(key, 4)
    params = {"a": jax.random.normal(keys[0], (5, 4)), "b": jax.random.normal(keys[1], (4,))}
    return params, (jax.random.normal(keys[2], (100, 5)), jax.random.normal(keys[3], (100,)))


@pytest.mark.parametrize("block_size", [1, 7, 50, 100, 1000])
def test_products_over_blocks_are_those_of_all_data(key, block_size):
    params, data = regression(key)
    vector = jax.tree.map(jnp.cos, params)
    apply = lambda w, batch: jnp.tanh(batch[0] @ w["a"]) @ w["b"]  # noqa: E731
    squares = lambda y, batch: jnp.mean((y - batch[1]) ** 2)  # noqa: E731
    for product in (
        lambda size: hvp(mean_loss, params, data, vector, block_size=size),
        lambda size: gauss_newton_product(apply, squares, params, data, vector, block_size=size),
    ):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), product(block_size), product(None))
    spectrum = estimate_spectrum(key, mean_loss, params, data, block_size=block_size)
    np.testing.assert_allclose(spectrum.ritz_values, estimate_spectrum(key, mean_loss, params, data).ritz_values, atol=1e-10)


def test_four_devices_give_the_spectrum_of_one(key):
    params, data = regression(key)
    mesh = jax.make_mesh((4,), ("example",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(data, jax.NamedSharding(mesh, jax.P("example")))
    for settings in ({}, {"num_probes": 4, "num_matvecs": 8}, {"block_size": 20}):
        one, four = (estimate_spectrum(key, mean_loss, params, where, **settings) for where in (data, spread))
        np.testing.assert_allclose(four.ritz_values, one.ritz_values, atol=1e-4)


def test_gauss_newton_is_the_hessian_of_the_linearized_network(key):
    params, data = regression(key)
    vector = jax.tree.map(jnp.sin, params)
    outputs, push = jax.linearize(lambda w: jnp.tanh(data[0] @ w["a"]) @ w["b"], params)
    linear = lambda w, batch: jnp.mean((outputs + push(jax.tree.map(jnp.subtract, w, params)) - batch[1]) ** 2)  # noqa: E731
    expected = hvp(linear, params, data, vector)
    found = gauss_newton_product(
        lambda w, batch: jnp.tanh(batch[0] @ w["a"]) @ w["b"], lambda y, b: jnp.mean((y - b[1]) ** 2), params, data, vector
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), found, expected)


def test_saddle_kink_and_false_derivatives_are_named(key):
    saddle = estimate_spectrum(key, lambda w, batch: w[0] ** 2 - w[1] ** 2, jnp.zeros(2), None)
    assert "saddle point" in saddle.warnings[0]
    for bent in (jax.nn.relu, jnp.abs, lambda w: jnp.maximum(w, 0.0)):
        kink = estimate_spectrum(key, lambda w, batch, bent=bent: jnp.sum(bent(w)), jnp.zeros(3), None)
        assert "kink" in " ".join(kink.warnings)
    smooth = estimate_spectrum(key, lambda w, batch: jnp.sum(w**4 + w**2), jnp.zeros(3), None)
    assert smooth.warnings == ()

    @jax.custom_vjp
    def loss(w):
        return jnp.sum(w**2)

    loss.defvjp(lambda w: (loss(w), w), lambda w, g: (g * (2 * w + jnp.roll(w, 1)),))
    with pytest.raises(InputError, match="not symmetric"):
        top_eigenpairs(key, lambda w, batch: loss(w), jnp.ones(100_000), None, 2)

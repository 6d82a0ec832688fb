import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from slt_interp import analytic
from slt_interp.bases import Ball, Box, FloatGrid, Gaussian
from slt_interp.curvature.gaussian import log_ellipsoid_mass
from slt_interp.errors import InputError
from slt_interp.estimators.rays import pareto_k, ray_volume

THRESHOLDS = np.array([1e-4, 1e-3, 1e-2])


def nothing(w, batch):
    return 0.0 * jnp.sum(w)


@pytest.mark.parametrize(
    ("base", "dimension"),
    [
        (Gaussian(1.0, 0.5), 3),
        (Gaussian(-0.7, 2.0), 1),
        (Gaussian(0.0, 1.0), 1),
        pytest.param(Gaussian(0.1, jnp.geomspace(0.1, 10.0, 30)), 30, marks=pytest.mark.slow),
        (Box(-1.0, 2.0), 3),
        (Ball(0.3, 1.0), 3),
    ],
)
def test_everything_has_volume_one_also_off_center(base, dimension, key):
    found = ray_volume(key, nothing, jnp.zeros(dimension), None, [1.0], base=base)
    assert abs(found.log_volume[0]) < max(4 * found.std_error[0], 1e-6)
    assert found.std_error[0] < 0.1
    assert found.diagnostics["saturation"] == [1.0]
    assert any("end with the base measure" in sentence for sentence in found.warnings)


@pytest.mark.slow
def test_rotated_full_rank_quadratic_is_exact_with_the_whole_preconditioner(key):
    curvatures = np.geomspace(0.1, 100.0, 40)
    problem = analytic.quadratic(list(curvatures), key=jax.random.key(3))
    found = ray_volume(key, problem.loss_fn, problem.center, None, THRESHOLDS, base=problem.base)
    # Radii are right to 1e-7, and the loss is rounded; 40 radii in the log. Rays differ where 1e-2 is not yet small.
    np.testing.assert_allclose(found.log_volume, log_ellipsoid_mass(THRESHOLDS, curvatures / 2, np.ones(40)), atol=2e-3)
    assert (found.status, found.warnings) == ("ok", ())
    plain = ray_volume(key, problem.loss_fn, problem.center, None, THRESHOLDS, base=problem.base, precondition=False)
    assert plain.status == "do not trust"


@pytest.mark.parametrize("precondition", [False, True])
def test_low_rank_quadratic_is_flagged_where_it_is_wrong(precondition, key):
    curvatures = np.array([1.0, 3.0, 10.0, 30.0, 100.0, 300.0])
    problem = analytic.quadratic([*curvatures, *[0.0] * 54])
    exact = log_ellipsoid_mass(THRESHOLDS, curvatures / 2, np.ones(6))
    # Not -17.27, -24.16, -31.07, which belong to thresholds ten times as large.
    np.testing.assert_allclose(exact, [-37.98, -31.07, -24.16], atol=0.01)
    found = ray_volume(key, problem.loss_fn, problem.center, None, THRESHOLDS, base=problem.base, precondition=precondition)
    assert found.status == "do not trust"
    is_good = np.array(found.diagnostics["ess"]) > 100
    assert np.all(np.abs(found.log_volume - exact)[is_good] < 4 * found.std_error[is_good])
    assert np.any(~is_good)
    assert "a few long rays carry the mean" in found.warnings[0]


@pytest.mark.parametrize(
    ("loss_fn", "radius", "tolerance"),
    [
        # Three roundings of float32, of radius, weight and loss; then .3 / 2^14 of the radius, to which it is halved.
        pytest.param(lambda w, batch: jnp.sum(w**4), 0.1**0.25, 4e-7, id="smooth"),
        pytest.param(lambda w, batch: jnp.where(jnp.abs(w[0]) > 0.37, 1.0, 0.0), 0.37, 2e-5, id="jump"),
        pytest.param(lambda w, batch: jnp.where(jnp.abs(w[0]) > 0.3, jnp.inf, w[0] ** 2), 0.3, 2e-5, id="infinite"),
        pytest.param(lambda w, batch: jnp.where(jnp.abs(w[0]) > 0.3, jnp.nan, w[0] ** 2), 0.3, 2e-5, id="not a number"),
    ],
)
def test_radius_is_where_the_loss_crosses_the_threshold(loss_fn, radius, tolerance, key):
    found = ray_volume(key, loss_fn, jnp.zeros(1), None, [0.1, 0.2], base=Box(-1.0, 1.0), num_rays=20)
    assert found.log_volume[0] == pytest.approx(np.log(radius), abs=tolerance)


def test_more_weights_than_a_whole_preconditioner_are_said(key):
    def ask(**settings):
        return ray_volume(key, nothing, jnp.zeros(513), None, [1.0], base=Gaussian(0.0, 1.0), num_rays=20, **settings).warnings

    assert "params has 513 weights, and beyond 512 the Hessian does not make rays alike" in ask()[-1]
    assert not any("513 weights" in sentence for sentence in ask(precondition=False))


@pytest.mark.slow
def test_box_and_off_center_gaussian_against_exact_masses(key):
    curvatures = [1.0, 2.0, 5.0, 10.0]
    problem = analytic.quadratic(curvatures)
    in_box = ray_volume(key, problem.loss_fn, problem.center, None, THRESHOLDS, base=Box(-1.0, 1.0))
    ball = 2 * np.log(2 * np.pi * THRESHOLDS) - np.log(2) - 0.5 * np.log(100.0) - 4 * np.log(2)
    np.testing.assert_allclose(in_box.log_volume, ball, atol=1e-4)
    shifted = ray_volume(key, problem.loss_fn, problem.center, None, THRESHOLDS, base=Gaussian(0.5, 2.0))
    exact = log_ellipsoid_mass(THRESHOLDS, 2 * np.array(curvatures), np.ones(4), np.full(4, 0.25**2))
    assert np.all(np.abs(shifted.log_volume - exact) < 4 * shifted.std_error + 1e-4)
    density = stats.norm(0.5, 2.0).logpdf(np.zeros(4)).sum()
    assert shifted.diagnostics["log_base_density_at_center"] == pytest.approx(density)


def test_only_what_is_seen_from_the_weights_is_counted(key):
    problem = analytic.double_well()
    found = ray_volume(key, problem.loss_fn, problem.center, None, [0.1], base=problem.base)
    assert found.log_volume[0] == pytest.approx(problem.log_volume(0.1) - np.log(2), abs=4 * found.std_error[0] + 1e-5)
    assert "it can only be smaller" in found.counted


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_pareto_k_is_that_of_arviz():
    import arviz

    weights = np.random.default_rng(0).pareto(1.5, 4000)
    assert pareto_k(weights) == pytest.approx(float(arviz.psislw(np.log(weights))[1]), abs=0.02)


def test_pareto_k_of_weights_that_hardly_differ_knows_no_scale():
    ks = [pareto_k(np.append(np.ones(18), np.full(2, largest))) for largest in (1.0, 1.0 + 2.0**-52, 2.0)]
    assert ks[0] == -np.inf
    assert 0 < ks[1] < np.inf
    assert ks[1] == pytest.approx(ks[2])


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (FloatGrid("float16", 1.0), "rays need a base measure with a density, not a FloatGrid"),
        (Box(1.0, 2.0), "params lie outside the base measure, a Box"),
    ],
)
def test_bad_base_is_one_sentence(base, message, key):
    with pytest.raises(InputError, match=message):
        ray_volume(key, nothing, jnp.zeros(2), None, [1.0], base=base)


@pytest.mark.parametrize(
    ("loss_fn", "params"),
    [
        (lambda w, batch: (w[0] * w[1] - 1) ** 2, jnp.ones(2)),
        (lambda w, batch: jnp.sum((w**2 - 1) ** 2), jnp.ones(1)),
    ],
    ids=["hyperbola", "double well"],
)
def test_sublevel_set_that_is_not_star_shaped_is_named(loss_fn, params, key):
    found = ray_volume(key, loss_fn, params, None, [1e-2, 0.1], base=Gaussian(0.0, 1.0))
    assert found.status == "do not trust"
    assert "not star-shaped around params" in " ".join(found.warnings)
    assert found.diagnostics["returning"][1] > 0

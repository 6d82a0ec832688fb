"""The metric of HMC that knows directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp import HMC, FullBatch, LocalPosterior, keep_params, sample
from slt_interp.samplers.hamiltonian import balanced_scale, whitening

CURVATURE = np.array([3000.0, 300.0, 30.0, 3.0, 0.3, 0.0])
ROTATION = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
HESSIAN = ROTATION @ np.diag(CURVATURE) @ ROTATION.T


def quadratic(w, batch):
    x = jnp.concatenate([w["a"], w["b"].ravel()])
    return 0.5 * x @ jnp.asarray(HESSIAN, jnp.float32) @ x


def tree(x):
    return {"a": x[..., :2], "b": x[..., 2:].reshape(*x.shape[:-1], 2, 2)}


def learned(key, localization=1.0, count=4000):
    """Gradients of U = (H w + gamma w) w / 2 at its own draws, and sigma from their squares."""
    stiffness = HESSIAN + localization * np.eye(6)
    root = np.linalg.cholesky(stiffness)
    gradients = jax.random.normal(key, (count, 6)) @ jnp.asarray(root.T, jnp.float32)
    scale = 1 / jnp.sqrt(jnp.mean(gradients**2, axis=0))
    longest = tree(jnp.full(6, localization**-0.5))
    return stiffness, scale, whitening(tree(scale), tree(gradients), longest)


def test_curvature_is_one_in_every_direction(key):
    stiffness, scale, (metric, allowed) = learned(key)
    u, c = np.asarray(metric.directions, np.float64), np.asarray(metric.factors, np.float64)
    stretch = np.diag(scale) @ (np.eye(6) + u.T @ np.diag(c) @ u)
    curvatures = np.linalg.eigvalsh(stretch.T @ stiffness @ stretch)
    # Eigenvalues of a sample covariance lie within (1 +- sqrt(d / n))^2 of the truth, up to a fifth.
    edge = 1.2 * (1 + np.sqrt(6 / 4000)) ** 2
    assert curvatures.min() > 1 / edge
    assert curvatures.max() < edge
    plain = np.linalg.eigvalsh(np.diag(scale) @ stiffness @ np.diag(scale))
    assert float(allowed) == pytest.approx(np.sqrt(plain.max() / edge), rel=edge - 1)
    assert plain.min() < 0.01, "sigma alone leaves a direction in which chains hardly move"


def test_sample_too_small_to_tell_leaves_sigma_alone(key):
    gradients = jax.random.normal(key, (50, 20))
    metric, allowed = whitening(jnp.ones(20), gradients, jnp.full(20, 10.0))
    assert not metric.factors.any()
    assert float(allowed) == 1.0


def test_balanced_sigma_is_the_width_along_axes_and_between_both_widths_of_a_valley_across_them(key):
    """Squared gradients and draws of a normal distribution, 4,000 draws: 4 standard errors, of which sigma has a fourth."""
    count, base = 4000, 10.0
    axes = jnp.array([1e4, 1e4]), jnp.array([1.0, 1.0])
    valley = 0.5 * np.array([[1e4 + 1.0, 1e4 - 1.0], [1e4 - 1.0, 1e4 + 1.0]])
    target = LocalPosterior(lambda w, batch: jnp.sum(w[0]), (jnp.zeros(2),) * 3, nbeta=1.0, localization=base**-2)
    noise = jax.random.normal(key, (3, count, 2))
    places = noise[0] / 100, noise[1], noise[2] @ np.linalg.cholesky(np.linalg.inv(valley)).T
    squares = *axes, jnp.diag(valley)
    sigma, allowed = balanced_scale(target, target.center, squares, places)
    rounding = 4 * np.sqrt(2 / (2 * count)) / 4
    np.testing.assert_allclose(sigma[0], 0.01, rtol=rounding)
    np.testing.assert_allclose(sigma[1], 1.0, rtol=rounding)
    narrow, long = valley[0, 0] ** -0.5, np.linalg.inv(valley)[0, 0] ** 0.5
    np.testing.assert_allclose(sigma[2], np.sqrt(narrow * long), rtol=2 * rounding)
    at_center, unchanged = balanced_scale(target, target.center, squares, jax.tree.map(jnp.zeros_like, places))
    jax.tree.map(lambda s, g: np.testing.assert_allclose(s, g**-0.5, rtol=1e-6), at_center, squares)
    assert float(unchanged) == pytest.approx(1.0)
    # Two of six coordinates are wider than the gradients say, and their curvature counts with its third power.
    assert float(allowed) == pytest.approx((((long / narrow) ** 3 + 2) / 3) ** (-1 / 6), rel=2 * rounding)


@pytest.mark.slow
def test_law_is_exact_and_the_mask_holds(key):
    _, _, (metric, _) = learned(key)
    mask = {"a": jnp.array([True, False]), "b": True}
    for mask_here in (None, mask):
        target = LocalPosterior(quadratic, tree(jnp.zeros(6)), 1.0, 1.0, mask_here)
        counts = {"num_chains": 32, "num_draws": 1000, "num_burnin": 100, "progress": False}
        draws = sample(key, HMC(target, 0.5, scale=metric), tree(jnp.zeros(6)), FullBatch(None), collect=keep_params, **counts)
        x = np.concatenate([draws.collected["a"], draws.collected["b"].reshape(32, 1000, 4)], axis=-1).astype(np.float64)
        free = np.ones(6, bool) if mask_here is None else np.arange(6) != 1
        assert (x[..., ~free] == 0).all()
        stiffness = (HESSIAN + np.eye(6))[np.ix_(free, free)]
        # In directions of stiffness 1 the variance is 1; chains are the replicates.
        root = np.linalg.cholesky(stiffness)
        variances = np.mean((x[..., free] @ root) ** 2, axis=1)
        error = variances.std(axis=0, ddof=1) / np.sqrt(32)
        assert (np.abs(variances.mean(axis=0) - 1) < 4 * error).all()
        assert (error < 0.05).all()

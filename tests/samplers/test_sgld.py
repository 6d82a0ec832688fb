"""SGLD against its exact discrete-time law on a quadratic.

With gradient noise of variance v (that of nbeta g) a coordinate follows w' = (1 - eps s / 2) w + sqrt(eps + eps^2 v / 4) z, an
AR(1) process: Var(w) = (1 + eps v / 4) / (s (1 - eps s / 4)).
"""

from itertools import product

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp import SGLD, FullBatch, LocalPosterior, Minibatches, keep_params, llc, sample
from slt_interp.samplers.diagnostics import std_error

CURVATURE = jnp.array([4.0, 1.0, 0.2, 0.05, 0.01, 0.001, 0.0])


LONG = {"num_chains": 64, "num_draws": 200, "num_burnin": 200, "thinning": 10, "progress": False}


def quadratic(w, batch):
    return 0.5 * jnp.sum(CURVATURE * w**2)


def exact_energy(nbeta, localization, step_size, noise_variance=0.0):
    k = nbeta * np.asarray(CURVATURE, np.float64)
    s = k + localization
    return 0.5 * np.sum(k * (1 + step_size * noise_variance / 4) / (s * (1 - step_size * s / 4)))


@pytest.mark.parametrize(
    ("nbeta", "localization", "relative_step"),
    [
        pytest.param(*setting, marks=pytest.mark.slow if setting[1:] == (1.0, 0.2) else ())  # the longest burn-in
        for setting in product((30.0, 100.0), (1.0, 5.0), (0.2, 1.5))
    ],
)
def test_energy_and_llc_have_the_exact_discrete_time_mean(key, nbeta, localization, relative_step):
    step_size = relative_step / (nbeta * 4 + localization)
    draws = sample(
        key,
        SGLD(LocalPosterior(quadratic, jnp.zeros(7), nbeta, localization), step_size),
        jnp.zeros(7),
        FullBatch(None),
        num_chains=64,
        num_draws=200,
        num_burnin=int(12 / (step_size * localization)),
        thinning=max(1, int(0.2 / (step_size * localization))),
        progress=False,
    )
    estimate = llc(draws, init_loss=0.0)
    exact = exact_energy(nbeta, localization, step_size)
    assert estimate.std_error < 0.02 * exact
    assert abs(estimate.llc - exact) < 4 * estimate.std_error
    # Virial: E[w . grad U] = sum s Var(w), d only in continuous time.
    s = nbeta * np.asarray(CURVATURE) + localization
    virial = np.mean(1 / (1 - step_size * s / 4))
    assert abs(estimate.diagnostics["virial"] - virial) < 4 * estimate.diagnostics["virial_std_error"]


def test_facts_table_of_the_exact_law():
    # k = (400, 100, 20, 5, 1, .1, 0), gamma = 1, from the project's table of exact values.
    for step_size, value in ((1e-4, 2.189), (1e-3, 2.254), (4e-3, 2.585), (8e-3, 4.355)):
        assert exact_energy(100.0, 1.0, step_size) == pytest.approx(value, abs=5e-4)


def test_minibatch_noise_enters_as_the_law_says(key):
    # L_B(w) = 1/2 mean_B |w - x|^2: the gradient noise is -nbeta mean_B x, whose variance does not depend on w.
    nbeta, localization, step_size, size = 50.0, 1.0, 0.02, 5
    x = jnp.linspace(-1, 1, 40)[:, None] * jnp.array([[1.0, 3.0]])
    noise_variance = nbeta**2 * np.asarray(x).var(axis=0) / size
    target = LocalPosterior(
        lambda w, batch: 0.5 * jnp.mean(jnp.sum((w - batch) ** 2, axis=1)), jnp.zeros(2), nbeta, localization
    )
    draws = sample(
        key,
        SGLD(target, step_size),
        jnp.zeros(2),
        Minibatches(x, size),
        num_chains=64,
        num_draws=300,
        num_burnin=200,
        thinning=4,
        collect=keep_params,
        progress=False,
    )
    s = nbeta + localization
    exact = (1 + step_size * noise_variance / 4) / (s * (1 - step_size * s / 4))
    for i in range(2):
        squares = np.asarray(draws.collected[..., i], np.float64) ** 2
        assert abs(squares.mean() - exact[i]) < 4 * std_error(squares)


def test_masked_coordinates_do_not_move_and_others_keep_their_law(key):
    params = jnp.array([0.3, -0.0, 0.7])
    target = LocalPosterior(lambda w, b: 0.5 * jnp.sum(w**2), params, 10.0, 1.0, mask=jnp.array([False, False, True]))
    draws = sample(
        key, SGLD(target, 0.01), params, FullBatch(None), num_chains=4, num_draws=50, collect=keep_params, progress=False
    )
    np.testing.assert_array_equal(draws.collected[..., :2], np.broadcast_to(params[:2], (4, 50, 2)))
    assert np.mean(draws.info.virial) == pytest.approx(llc(draws, 0.0).diagnostics["virial"], rel=1e-6)  # one dimension, not 3
    moving = sample(key, SGLD(target, 0.01), params, FullBatch(None), collect=keep_params, **LONG).collected[..., 2]
    # Precision s = nbeta + gamma = 11, mean gamma w* / s.
    squares = (np.asarray(moving, np.float64) - 0.7 / 11) ** 2
    assert abs(squares.mean() - 1 / (11 * (1 - 0.01 * 11 / 4))) < 4 * std_error(squares)


def test_blackjax_with_half_the_step_size_samples_the_same_law(key):
    """An independent oracle: blackjax's step size is epsilon / 2."""
    nbeta, localization, step_size, num_steps = 50.0, 2.0, 0.01, 20_000
    k = nbeta * CURVATURE
    algorithm = blackjax.sgld(lambda w, _: -(k + localization) * w)

    def chain(key):
        def step(w, key):
            w = algorithm.step(key, w, None, step_size / 2)
            return w, 0.5 * jnp.sum(k * w**2)

        return jax.lax.scan(step, jnp.zeros(7), jax.random.split(key, num_steps))[1]

    energy = np.asarray(jax.jit(jax.vmap(chain))(jax.random.split(key, 16)))[:, num_steps // 10 :]
    error = std_error(energy[:, ::10])
    assert abs(energy.mean() - exact_energy(nbeta, localization, step_size)) < 4 * error

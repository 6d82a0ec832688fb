"""Annealed populations against the exact laws of rungs and of valleys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from slt_interp import HMC, Gaussian, LocalPosterior
from slt_interp.estimators.annealing import _resampled, annealed
from slt_interp.samplers.exchange import ReplicaExchange

NUM_CHAINS = 400


def _annealed(key, loss_fn, nbetas, dimension, step_size, scale):
    target = LocalPosterior(loss_fn, jnp.zeros(dimension), jnp.asarray(nbetas, jnp.float32), Gaussian(0.0, 1.0))
    kernel = ReplicaExchange(HMC(target, jnp.full(len(nbetas), step_size), scale=scale))
    return np.asarray(annealed(key, kernel, NUM_CHAINS, jnp.zeros(dimension), None), np.float64)


def test_annealed_draws_of_the_base_have_the_law_of_every_rung(key):
    nbetas = np.array([0.0, 1.0, 4.0, 16.0, 64.0])
    scale = jnp.asarray(1 / np.sqrt(1 + np.repeat(nbetas[:, None], 3, axis=1)), jnp.float32)
    params = _annealed(key, lambda w, batch: 0.5 * jnp.sum(w**2), nbetas, 3, 0.7, scale)
    # |w|^2 (1 + nbeta) is chi-squared with 3 degrees of freedom: its mean of 400 chains is known to sqrt(2 / 3) / 20 of it.
    squares = np.sum(params**2, axis=-1)
    np.testing.assert_allclose(np.mean(squares, axis=0) * (1 + nbetas) / 3, 1, atol=4 * np.sqrt(2 / 3) / 20)


def test_a_population_chooses_between_valleys_by_their_weight_where_a_chain_stays_in_the_first(key):
    # Two wells of depth 0, at -1 and 1, of curvatures 400 and 4.
    def loss_fn(w, batch):
        return jnp.minimum(200 * (w[0] + 1) ** 2, 2 * (w[0] - 1) ** 2)

    nbetas = np.concatenate([[0.0], 0.3 * 2.0 ** np.arange(8)])
    steps = jnp.full((9, 1), 1.0)
    params = _annealed(key, loss_fn, nbetas, 1, 0.05, steps)[:, -1, 0]
    grid = np.linspace(-6, 6, 200_001)
    density = np.exp(-nbetas[-1] * np.minimum(200 * (grid + 1) ** 2, 2 * (grid - 1) ** 2) - grid**2 / 2)
    exact = density[grid > 0].sum() / density.sum()
    assert abs(np.mean(params > 0) - exact) < 4 * np.sqrt(exact * (1 - exact) / NUM_CHAINS)


def test_nobody_is_picked_more_or_less_often_than_the_next_whole_number(key):
    weights = np.array([0.0, 0.05, 0.3, 0.15, 0.5, 0.0])
    log_weights = jnp.log(jnp.asarray(weights, jnp.float32)).at[5].set(-jnp.inf)
    counts = np.array([np.bincount(_resampled(k, log_weights), minlength=6) for k in jax.random.split(key, 200)])
    assert np.all(np.abs(counts - 6 * weights) < 1)
    assert np.all(counts[:, [0, 5]] == 0)
    # A count is one of two neighbors, of variance 1 / 4 at most.
    np.testing.assert_allclose(counts.mean(axis=0), 6 * weights, atol=4 * 0.5 / np.sqrt(200))


@pytest.mark.parametrize("outside", [jnp.inf, jnp.nan])
def test_chains_do_not_stay_where_the_loss_is_not_finite(key, outside):
    # One draw of the base in six has a finite loss. Of two populations of 8 a few have none such: then a chain starts at the
    # given weights.
    def loss_fn(w, batch):
        return jnp.where(w[0] > 1, w[0], outside)

    params = _annealed(key, loss_fn, [0.0, 1.0, 4.0], 1, 0.1, jnp.ones((3, 1)))[:, 1:, 0]
    assert np.all((params > 1) | (params == 0))
    exact = 1 - stats.norm.cdf(1) ** 16
    # Some trajectories come in from where the loss is infinite (their populations have no weight: these are starts, no more),
    # but none from where nothing is known of its gradient.
    surplus, error = np.mean(params > 1) - exact, np.sqrt(exact * (1 - exact) / NUM_CHAINS)
    assert surplus > -4 * error
    assert np.isinf(outside) or surplus < 4 * error

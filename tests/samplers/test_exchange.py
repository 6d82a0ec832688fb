"""Replica exchange against the exact law of every rung."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp import HMC, Box, FullBatch, Gaussian, LocalPosterior, sample
from slt_interp.samplers.diagnostics import std_error
from slt_interp.samplers.exchange import ReplicaExchange, keep_rungs

NBETAS = jnp.array([0.0, 3.0, 10.0, 30.0, 100.0])
CURVATURES = jnp.array([4.0, 1.0, 0.0])


def _quadratic(w, batch):
    del batch
    return 0.5 * jnp.sum(CURVATURES * w**2)


def _well(w, batch):
    del batch
    return jnp.sum((w**2 - 1) ** 2)


def _ladder(loss_fn, base, dimension, block_size=4):
    target = LocalPosterior(loss_fn, jnp.zeros(dimension), NBETAS, base)
    return ReplicaExchange(HMC(target, jnp.array([0.5, 0.4, 0.3, 0.2, 0.15])), block_size=block_size)


@pytest.fixture(scope="module")
def draws():
    kernel = _ladder(_quadratic, Gaussian(0.0, 1.0), 3)
    run = jax.tree_util.Partial(sample, jax.random.key(3), params=jnp.zeros(3), batches=FullBatch(None), progress=False)
    return run(kernel, num_chains=16, num_burnin=100, num_draws=400, collect=keep_rungs(kernel.target), chunk_size=50)


def test_every_rung_has_its_own_exact_law(draws):
    k = np.asarray(NBETAS)[:, None] * np.asarray(CURVATURES)
    exact = 0.5 * np.sum(np.asarray(CURVATURES) / (1 + k), axis=1)
    for rung, mean in enumerate(exact):
        assert abs(draws.loss[:, :, rung].mean() - mean) < 4 * std_error(draws.loss[:, :, rung])
        # Of the state itself, where `Info` has means over trajectories.
        kept = draws.collected.loss[:, :, rung]
        assert abs(kept.mean() - mean) < 4 * std_error(kept)
        variance = 0.5 * np.sum((np.asarray(CURVATURES) / (1 + k[rung])) ** 2)
        squares = (kept - kept.mean()) ** 2
        assert abs(squares.mean() - variance) < 4 * std_error(squares)


def test_swap_probability_is_that_of_independent_rungs(draws):
    # E min(1, exp(dN dL)) over independent exact draws of both rungs, by plain Monte Carlo.
    rng = np.random.default_rng(0)
    scale = 1 / np.sqrt(1 + np.asarray(NBETAS)[:, None] * np.asarray(CURVATURES))
    losses = 0.5 * np.sum(np.asarray(CURVATURES) * (scale[:, None] * rng.standard_normal((5, 20_000, 3))) ** 2, axis=2)
    log_ratio = np.diff(np.asarray(NBETAS))[:, None] * np.diff(losses, axis=0)
    exact = np.exp(np.minimum(log_ratio, 0)).mean(axis=1)
    for pair in range(4):
        series = draws.collected.exchange[:, :, pair]
        assert abs(series.mean() - exact[pair]) < 4 * np.hypot(std_error(series), 0.5 / np.sqrt(20_000))


def test_a_rung_keeps_exactly_one_replica(draws):
    assert np.all(np.sort(draws.collected.replica, axis=2) == np.arange(5))
    assert len(np.unique(draws.collected.replica[:, :, -1])) == 5


def test_gradients_after_swaps_are_those_of_the_new_rungs():
    kernel = _ladder(_well, Gaussian(0.5, 2.0), 2)
    state = kernel.init(jax.random.key(0), jnp.ones(2), None)
    step = jax.jit(lambda key, state: kernel.step(key, state, None)[0])
    for i in range(6):
        state = step(jax.random.key(i), state)
    assert not np.array_equal(state.replica, np.arange(5))
    for rung, nbeta in enumerate(NBETAS):
        target = replace(kernel.target, nbeta=nbeta)
        loss, gradient = target.value_and_grad(state.params[rung], None)
        np.testing.assert_allclose(state.rungs.loss[rung], loss, rtol=1e-5)
        # A swap subtracts the base's gradient, at most 2 here, divides by one nbeta and multiplies with another, at most 4
        # times as large: some ten roundings of the loss's gradient and of 4 * 2; two swaps follow each other here at most.
        rounding = 20 * np.finfo(np.float32).eps
        size = float(jnp.abs(gradient).max())
        np.testing.assert_allclose(state.rungs.gradient[rung], gradient, rtol=0, atol=rounding * (size + 8))


def test_lowest_rung_is_drawn_from_the_base_and_the_others_start_where_told():
    base = Box(-2.0, 2.0)
    weights = _ladder(_well, base, 2).init(jax.random.key(0), jnp.ones(2), None)
    assert np.all(np.asarray(weights.params)[1:] == 1)
    assert np.all(np.asarray(weights.params)[0] != 1)
    drawn = replace(_ladder(_well, base, 2), from_base=True).init(jax.random.key(0), jnp.ones(2), None)
    assert len(np.unique(drawn.params)) == 10
    assert np.all(np.abs(drawn.params) <= 2)


def test_every_rung_starts_at_weights_of_its_own():
    kernel = _ladder(_well, Gaussian(0.5, 2.0), 2)
    params = jnp.arange(10.0).reshape(5, 2) / 5
    state = kernel.init_at(params, None)
    np.testing.assert_array_equal(state.params, params)
    np.testing.assert_allclose(state.rungs.loss, jax.vmap(lambda w: _well(w, None))(params), rtol=1e-6)


@pytest.mark.slow
def test_numbers_do_not_depend_on_blocks_or_interruptions():
    run = jax.tree_util.Partial(
        sample, jax.random.key(0), params=jnp.ones(2), batches=FullBatch(None), num_chains=2, progress=False
    )
    whole, blocks = (_ladder(_well, Gaussian(0.0, 1.0), 2, size) for size in (4, 1))
    first = run(whole, num_draws=8)
    np.testing.assert_allclose(first.loss, run(blocks, num_draws=8).loss, rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(first.loss, run(whole, num_draws=8, previous=run(whole, num_draws=3)).loss)


@pytest.mark.slow
def test_a_base_that_reaches_where_the_loss_is_infinite_does_no_harm():
    def loss_fn(w, batch):
        del batch
        return jnp.where(w[0] < 1, 0.5 * jnp.sum(w**2), jnp.inf)

    draws = sample(
        jax.random.key(0),
        replace(_ladder(loss_fn, Gaussian(0.0, 1.0), 2), from_base=jnp.asarray(True)),
        jnp.zeros(2),
        FullBatch(None),
        num_chains=4,
        num_draws=50,
        progress=False,
    )
    assert draws.is_finite.all()
    assert np.isfinite(draws.loss[:, :, 1:]).all()
    assert np.isinf(draws.loss[:, :, 0]).any()

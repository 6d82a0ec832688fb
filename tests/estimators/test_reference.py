"""What energies are counted from."""

import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp import Box, Gaussian, LocalPosterior
from slt_interp.estimators.reference import nearby_loss


def bowl(w, batch):
    return 3.0 + jnp.sum(jnp.arange(1.0, 31.0) * (w - 0.1) ** 2)


def _target(base, loss_fn=bowl):
    return LocalPosterior(loss_fn, jnp.zeros(30), 1.0, base)


def test_a_descent_from_the_weights_reaches_the_minimum():
    assert nearby_loss(_target(Gaussian(0.0, 1.0)), jnp.zeros(30), None) == pytest.approx(3.0, abs=1e-6)


def test_weights_outside_the_base_measure_do_not_count():
    # The minimum at .1 is outside; inside, the loss is at least that at the corner nearest to it.
    found = nearby_loss(_target(Box(-1.0, 0.05)), jnp.zeros(30), None)
    assert 3.0 + 0.05**2 * 465 <= found <= float(bowl(jnp.zeros(30), None))


def test_weights_at_a_minimum_stay_there_however_singular():
    def quartic(w, batch):
        return jnp.prod(w[:2] ** 2) + jnp.sum(w[2:] ** 4)

    assert nearby_loss(_target(Gaussian(0.0, 1.0), quartic), jnp.zeros(30), None) == 0.0


def test_losses_that_cannot_be_computed_end_a_descent():
    def cliff(w, batch):
        return jnp.where(jnp.sum(w) > 0.01, jnp.nan, 1.0 - jnp.sum(w))

    assert np.isfinite(nearby_loss(_target(Gaussian(0.0, 1.0), cliff), jnp.zeros(30), None))


def test_blocks_of_examples_are_their_mean():
    def loss_fn(w, batch):
        return jnp.mean(jnp.sum((w - batch) ** 2, axis=1))

    data = jnp.array([[0.0], [1.0], [5.0]]) * jnp.ones(30)
    target = _target(Gaussian(0.0, 1.0), loss_fn)
    # 30 times the variance of 0, 1 and 5.
    assert nearby_loss(target, jnp.zeros(30), data, block_size=2) == pytest.approx(30 * 14 / 3, rel=1e-6)

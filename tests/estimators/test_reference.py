"""What energies are counted from."""

import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp import Box, Gaussian, LocalPosterior
from slt_interp.estimators.reference import nearby_loss

NBETA = 1e6


def bowl(w, batch):
    return 3.0 + jnp.sum(jnp.arange(1.0, 31.0) * (w - 0.1) ** 2)


def _lowest(base, loss_fn=bowl, data=None, **settings):
    center = jnp.zeros(30)
    return nearby_loss(LocalPosterior(loss_fn, center, NBETA, base), center, data, **settings)


def test_a_descent_from_the_weights_reaches_the_minimum():
    # Spacings of float32 at 3 are 2.4e-7.
    assert _lowest(Gaussian(0.0, 1.0)) == pytest.approx(3.0, abs=1e-6)


def test_the_minimum_does_not_count_where_it_is_outside_the_base_measure():
    # Inside, the loss is at least that at the corner nearest to it.
    assert 3.0 + 0.05**2 * 465 <= _lowest(Box(-1.0, 0.05)) <= float(bowl(jnp.zeros(30), None))


def test_a_loss_without_a_minimum_is_read_where_the_base_measure_has_its_mode():
    # exp(-nbeta g w - w^2 / 2) has it at -nbeta g.
    slope = 1e-6
    assert _lowest(Gaussian(0.0, 1.0), lambda w, batch: slope * w[0]) == pytest.approx(-NBETA * slope**2, rel=1e-3)


def test_weights_at_a_minimum_stay_there_however_singular():
    def quartic(w, batch):
        return jnp.prod(w[:2] ** 2) + jnp.sum(w[2:] ** 4)

    assert _lowest(Gaussian(0.0, 1.0), quartic) == 0.0


def test_losses_that_cannot_be_computed_end_a_descent():
    def cliff(w, batch):
        return jnp.where(jnp.sum(w) > 0.01, jnp.nan, 1.0 - jnp.sum(w))

    assert np.isfinite(_lowest(Gaussian(0.0, 1.0), cliff))


def test_blocks_of_examples_are_their_mean():
    def loss_fn(w, batch):
        return jnp.mean(jnp.sum((w - batch) ** 2, axis=1))

    data = jnp.array([[0.0], [1.0], [5.0]]) * jnp.ones(30)
    # 30 times the variance of 0, 1 and 5.
    assert _lowest(Gaussian(0.0, 1.0), loss_fn, data, block_size=2) == pytest.approx(30 * 14 / 3, rel=1e-6)

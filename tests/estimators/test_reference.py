"""What energies are counted from."""

import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp import Ball, Box, Gaussian, LocalPosterior
from slt_interp.estimators.reference import descend

NBETA = 1e6
STIFFNESS = np.arange(1.0, 31.0)


def bowl(w, batch):
    return 3.0 + jnp.sum(jnp.asarray(STIFFNESS) * (w - 0.1) ** 2)


def _found(base, loss_fn=bowl, data=None, **settings):
    center = jnp.zeros(30)
    return descend(LocalPosterior(loss_fn, center, NBETA, base), center, data, **settings)


def test_a_descent_from_the_weights_reaches_the_minimum():
    found = _found(Gaussian(0.0, 1.0))
    # Spacings of float32 at 3 are 2.4e-7.
    assert found.loss == pytest.approx(3.0, abs=1e-6)
    assert found.unfinished == 0.0


def test_a_box_holds_the_descent_at_the_corner_nearest_to_the_minimum():
    found = _found(Box(-1.0, 0.05))
    assert found.loss == pytest.approx(3.0 + 0.05**2 * STIFFNESS.sum(), rel=1e-6)
    assert found.unfinished == 0.0


def test_a_ball_holds_the_descent_at_its_wall():
    radius = 0.3

    def distance(push):
        # With Lagrange's multiplier on the wall: (stiffness + push) w = stiffness / 10.
        return np.linalg.norm(0.1 * STIFFNESS / (STIFFNESS + push))

    low, high = 0.0, 1e3
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if distance(middle) > radius else (low, middle)
    lowest = 3.0 + np.sum(STIFFNESS * (0.1 * STIFFNESS / (STIFFNESS + low) - 0.1) ** 2)
    # A descent ends 1e-6 of the radius within the wall, and float32 rounds the loss.
    assert lowest <= _found(Ball(0.0, radius)).loss == pytest.approx(lowest, rel=1e-6)


@pytest.mark.parametrize("height", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("size", [1, 3, 300])
def test_a_minimum_within_a_ball_is_found_from_the_wall_too(height, size):
    params = jnp.full(size, height * 10.0 * (1 - 1e-6) * size**-0.5)
    target = LocalPosterior(lambda w, batch: jnp.sum((w - 0.1) ** 2), jnp.zeros(size), NBETA, Ball(0.0, 10.0))
    assert descend(target, params, None).loss == pytest.approx(0.0, abs=1e-6)


def test_a_loss_without_a_minimum_is_read_where_the_base_measure_has_its_mode():
    # exp(-nbeta g w - w^2 / 2) has it at -nbeta g.
    slope = 1e-6
    assert _found(Gaussian(0.0, 1.0), lambda w, batch: slope * w[0]).loss == pytest.approx(-NBETA * slope**2, rel=1e-3)


def test_weights_at_a_minimum_stay_there_however_singular():
    def quartic(w, batch):
        return jnp.prod(w[:2] ** 2) + jnp.sum(w[2:] ** 4)

    found = _found(Gaussian(0.0, 1.0), quartic)
    assert found.loss == 0.0 == found.unfinished


@pytest.mark.parametrize("beyond", [np.nan, np.inf])
def test_a_descent_turns_back_from_where_losses_cannot_be_computed(beyond):
    def cliff(w, batch):
        return jnp.where(jnp.sum(w) > 0.01, beyond, 1.0 - jnp.sum(w))

    # Steps are halved at least: half of the way to the edge is gone in any case.
    assert 0.99 <= _found(Gaussian(0.0, 1.0), cliff).loss <= 0.995


def test_a_descent_that_did_not_end_says_what_is_left():
    # A curved valley so long that 200 steps do not reach its end.
    def valley(w, batch):
        return jnp.sum(1e4 * (w[1:] - w[:-1] ** 2) ** 2 + (1 - w[:-1]) ** 2)

    found = _found(Gaussian(0.0, 10.0), valley)
    assert found.loss > 0.1
    assert found.unfinished > 0.1


def test_blocks_of_examples_are_their_mean():
    def loss_fn(w, batch):
        return jnp.mean(jnp.sum((w - batch) ** 2, axis=1))

    data = jnp.array([[0.0], [1.0], [5.0]]) * jnp.ones(30)
    # 30 times the variance of 0, 1 and 5.
    assert _found(Gaussian(0.0, 1.0), loss_fn, data, block_size=2).loss == pytest.approx(30 * 14 / 3, rel=1e-6)

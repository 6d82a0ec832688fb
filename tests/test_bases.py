import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp.bases import Box, FloatGrid

FORMATS = {"float16": jnp.float16, "bfloat16": jnp.bfloat16}


def numbers(dtype):
    every = np.asarray(jax.lax.bitcast_convert_type(jnp.arange(2**16).astype(jnp.uint16), FORMATS[dtype])).astype(np.float32)
    return np.unique(every[np.isfinite(every)])


@pytest.mark.parametrize(
    ("dtype", "center", "radius"),
    [("float16", -2.0, 2.0), ("float16", 1e4, 3e38), ("float16", 0.3, 0.0), ("bfloat16", 0.3, 1.0)],
)
def test_grid_holds_every_number_within_the_radius_once(dtype, center, radius):
    if radius == 0:
        center = float(jnp.asarray(center, FORMATS[dtype]))
    grid, c = FloatGrid(dtype, radius), jnp.array([center], jnp.float32)
    exact = numbers(dtype)
    exact = exact[np.abs(exact - np.float64(np.float32(center))) <= np.float64(np.float32(radius))]
    assert np.exp(grid.log_total(c)) == pytest.approx(len(exact), rel=1e-6)
    places = jnp.arange(len(exact), dtype=jnp.uint32)
    found = jax.vmap(lambda place: grid.at(place[None], c)[0])(places)
    np.testing.assert_array_equal(found, exact)


@pytest.mark.parametrize("size", [0.4, pytest.param(0.01, marks=pytest.mark.slow), pytest.param(5.0, marks=pytest.mark.slow)])
def test_proposals_leave_the_counting_measure_as_it_is(size, key):
    # A grid of 21 numbers, whose ends are met often; a symmetric kernel keeps uniform counts.
    grid, center = FloatGrid("bfloat16", 0.04), jnp.array([1.0])
    total = round(np.exp(grid.log_total(center)))
    keys = jax.random.split(key, 20_000)
    places = jnp.arange(len(keys), dtype=jnp.uint32)[:, None] % total
    moved = np.asarray(jax.vmap(lambda k, p: grid.shift_places(k, p, center, size, 1.0))(keys, places))[:, 0]
    counts = np.bincount(moved, minlength=total)
    assert len(counts) == total
    assert np.all(np.abs(counts - len(keys) / total) < 4.5 * np.sqrt(len(keys) / total))
    assert np.mean(moved != np.asarray(places)[:, 0]) > 0.5


@pytest.mark.slow
def test_proposals_are_as_likely_as_their_reverse(key):
    grid, center = FloatGrid("bfloat16", 0.02), jnp.array([1.0])
    total = round(np.exp(grid.log_total(center)))
    keys = jax.random.split(key, 40_000 * total).reshape(total, 40_000)
    move = jax.vmap(jax.vmap(lambda k, p: grid.shift_places(k, p, center, 0.3, 1.0)[0], in_axes=(0, None)))
    moved = np.asarray(move(keys, jnp.arange(total, dtype=jnp.uint32)[:, None]))
    counts = np.stack([np.bincount(row, minlength=total) for row in moved])
    assert np.all(np.abs(counts - counts.T) <= 4.5 * np.sqrt(counts + counts.T + 1))


def test_float32_grid_across_zero_is_wider_than_31_bits(key):
    grid, center = FloatGrid("float32", 3e38), jnp.zeros(1000)
    draws = np.asarray(grid.at(grid.sample_places(key, center), center))
    assert grid.log_total(center) == pytest.approx(1000 * np.log(2 * float(np.float32(3e38).view(np.int32)) + 1.0))
    assert np.all(np.isfinite(draws))
    # As many numbers on either side of zero, and of 1 in size.
    assert abs(np.mean(draws > 0) - 0.5) < 4 * 0.5 / np.sqrt(1000)
    assert abs(np.mean(np.abs(draws) < 1) - np.float32(1).view(np.int32) / np.float32(3e38).view(np.int32)) < 4 * 0.5 / np.sqrt(
        1000
    )


def test_paths_fold_at_the_walls_of_a_box_without_rounding_to_them():
    # In units of float32's spacing around 1, far below it around 0.
    base, start, speed = Box(0.0, 1.0), jnp.array([1e-9, 0.75, 0.5, 2e-12]), jnp.array([-3.0, 0.5, -2.25, -1.0])
    position, velocity = base.move(start, speed * jnp.array([1e-9, 1.0, 1.0, 1e-11]), 1.0, jnp.ones(4))
    np.testing.assert_allclose(position, [2e-9, 0.75, 0.25, 8e-12], rtol=1e-6)
    np.testing.assert_array_equal(jnp.sign(velocity), [1.0, -1.0, -1.0, 1.0])

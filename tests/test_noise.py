import jax
import numpy as np
import scipy.stats

from slt_interp.noise import _threefry, random_indices, standard_normal


def test_blocks_are_jax_s_own_threefry(key):
    # JAX's 32 bits are both halves of a block, added without carry.
    left, right = _threefry(jax.random.key_data(key), 1000)
    with jax.threefry_partitionable(True):
        np.testing.assert_array_equal(left ^ right, jax.random.bits(key, (1000,)))


def test_numbers_are_independent_standard_normal():
    n = 2**20
    z = np.asarray(standard_normal(jax.random.key(3), n), np.float64)
    # Kolmogorov-Smirnov at the level of 4 standard errors: sqrt(n) D exceeds 2.3 with probability 2 exp(-2 * 2.3^2) = 5e-5.
    assert scipy.stats.kstest(z, "norm").statistic * np.sqrt(n) < 2.3
    for power, (mean, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
        assert abs(np.mean(z**power) - mean) < 4 * np.sqrt(variance / n)
    for threshold in (3, 4, 4.5):
        p = 2 * scipy.stats.norm.sf(threshold)
        assert abs(np.sum(np.abs(z) > threshold) - n * p) < 4 * np.sqrt(n * p)
    # The two numbers of a block, neighbors, and squares of either: no correlation.
    for a, b in ((z[: n // 2], z[n // 2 :]), (z[:-1], z[1:])):
        for power in (1, 2):
            assert abs(np.corrcoef(a**power, b**power)[0, 1]) < 4 / np.sqrt(len(a))
    angles = np.arctan2(z[n // 2 :], z[: n // 2])
    assert scipy.stats.kstest(angles, "uniform", args=(-np.pi, 2 * np.pi)).statistic * np.sqrt(n / 2) < 2.3


def test_numbers_are_the_exact_transformation_to_rounding(key):
    left, right = (np.asarray(x, np.float64) for x in _threefry(jax.random.key_data(key), 5000))
    radius = np.sqrt(-2 * np.log((left + 1) / 2**32))
    angle = (np.floor(right / 8) / 2**28 - 1) * np.pi / 4
    negative, swapped = right % 2 == 1, right // 2 % 2 == 1
    sine, cosine = np.sin(angle), np.where(negative, -1, 1) * np.cos(angle)
    exact = radius * np.concatenate([np.where(swapped, sine, cosine), np.where(swapped, cosine, sine)]).reshape(2, -1)
    # A float32 logarithm near 1 and a square root: a few units in the sixth digit.
    np.testing.assert_allclose(standard_normal(key, 10_000), exact.reshape(-1), rtol=2e-5, atol=2e-5)


def test_odd_sizes_and_other_generators(key):
    assert standard_normal(key, 1).shape == (1,)
    np.testing.assert_array_equal(standard_normal(key, 7)[:4], standard_normal(key, 8)[:4])
    other = jax.random.key(0, impl="rbg")
    np.testing.assert_array_equal(standard_normal(other, 5), jax.random.normal(other, (5,)))


def test_indices_are_uniform_and_independent(key):
    n, count = 200_000, 50
    indices = np.asarray(random_indices(key, n, count), np.int64)
    observed = np.bincount(indices, minlength=count)
    assert len(observed) == count
    # Chi-squared with 49 degrees of freedom, and of neighboring pairs with 2499, below their means plus 4 deviations.
    assert ((observed - n / count) ** 2 / (n / count)).sum() < 49 + 4 * np.sqrt(2 * 49)
    pairs = np.bincount(indices[:-1] * count + indices[1:], minlength=count**2)
    assert ((pairs - n / count**2) ** 2 / (n / count**2)).sum() < 2499 + 4 * np.sqrt(2 * 2499)
    assert random_indices(jax.random.key(0, impl="rbg"), 5, 3).max() < 3

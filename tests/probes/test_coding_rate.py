import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp.probes.coding_rate import coding_rate


def test_gaussian_activations_have_the_rate_of_their_channel(key):
    """The mutual information of X and X + noise is 1/2 log2 det(1 + C / noise^2)."""
    mixing = jax.random.normal(key, (6, 6))
    x = jax.random.normal(jax.random.key(1), (500, 6)) @ mixing
    covariance = np.cov(np.asarray(x, np.float64).T, bias=True)
    noise = 0.2**2 * np.trace(covariance) / 6
    exact = 0.5 * np.linalg.slogdet(np.eye(6) + covariance / noise)[1] / np.log(2)
    assert float(coding_rate(x, 0.2)) == pytest.approx(exact, rel=1e-5)


def test_rate_depends_on_neither_scale_nor_basis_nor_place(key):
    x = jax.random.normal(key, (50, 4)) * jnp.array([1.0, 2.0, 0.1, 0.0])
    rotation = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (4, 4)))[0]
    assert float(coding_rate(7 * x @ rotation + 3)) == pytest.approx(float(coding_rate(x)), rel=1e-4)


def test_constant_activations_say_nothing():
    assert float(coding_rate(jnp.ones((10, 3)))) == 0.0

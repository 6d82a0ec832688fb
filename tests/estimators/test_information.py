import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp import HMC, FullBatch, LocalPosterior, information, keep_example_losses, sample, wbic
from slt_interp.errors import InputError

X = np.asarray(jax.random.normal(jax.random.key(5), (40,)) + 0.3, np.float64)
NBETA, LOCALIZATION = 40 / np.log(40), 2.0
# The posterior is w ~ N(m, V), with squared distances of the mean from the data:
V = 1 / (NBETA + LOCALIZATION)
RESIDUAL = (X - NBETA * X.mean() * V) ** 2


def loss_fn(w, batch):
    return 0.5 * jnp.mean((batch - w) ** 2)


@pytest.fixture(scope="module")
def draws():
    data = jnp.asarray(X, jnp.float32)
    kernel = HMC(LocalPosterior(loss_fn, jnp.zeros(()), NBETA, LOCALIZATION), 0.5)
    counts = {"num_chains": 8, "num_draws": 1000, "num_warmup": 100, "progress": False}
    collect = keep_example_losses(loss_fn, data)
    return sample(jax.random.key(0), kernel, jnp.zeros(()), FullBatch(data), collect=collect, **counts)


def test_normal_mean_meets_its_closed_form(draws):
    found, beta = information(draws.collected, NBETA), NBETA / len(X)
    training = np.mean(0.5 * np.log(1 + V) + 0.5 * RESIDUAL / (1 + V))
    variance = np.sum(RESIDUAL * V + V**2 / 2)
    exact = {
        "training_loss": training,
        "functional_variance": variance,
        "waic": training + beta * variance / len(X),
        "singular_fluctuation": beta * variance / 2,
        "gibbs_training_loss": np.mean(0.5 * (RESIDUAL + V)),
    }
    for name, value in exact.items():
        mean, error = getattr(found, name)
        assert 0 < error < 0.05 * value
        assert abs(mean - value) < 4 * error, name


def test_wbic_is_the_energy_at_its_own_nbeta(draws):
    value, error = wbic(draws, len(X))
    assert abs(value - np.sum(0.5 * (RESIDUAL + V))) < 4 * error
    with pytest.raises(InputError, match=r"WBIC is defined at nbeta = n / log n = 11.0406, but the draws are of nbeta 10.8434"):
        wbic(draws, len(X) + 1)


@pytest.mark.parametrize(
    ("losses", "nbeta", "message"),
    [
        (np.zeros((2, 3)), 1.0, "axes"),
        (np.zeros((1, 5, 3)), 1.0, "at least two"),
        (np.zeros((2, 5, 3)), 0.0, "must be positive"),
    ],
)
def test_bad_input_is_one_sentence(losses, nbeta, message):
    with pytest.raises(InputError, match=message):
        information(losses, nbeta)

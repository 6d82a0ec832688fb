import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp.data import FullBatch, Minibatches, check_batches, num_examples
from slt_interp.errors import InputError


@pytest.mark.parametrize("replace", [True, False])
def test_minibatch_mean_is_unbiased(key, replace):
    data = jnp.arange(50.0) ** 2
    batches = Minibatches(data, 10, replace=replace)
    means = jax.vmap(lambda k: batches(k).mean())(jax.random.split(key, 4000))
    error = float(means.std(ddof=1)) / np.sqrt(4000)
    assert abs(float(means.mean() - data.mean())) < 4 * error


def test_without_replacement_no_example_occurs_twice(key):
    batch = Minibatches(jnp.arange(20), 20, replace=False)(key)
    assert sorted(batch.tolist()) == list(range(20))


def test_leaves_stay_together(key):
    batch = Minibatches({"x": jnp.arange(30.0), "y": 2 * jnp.arange(30.0)}, 7)(key)
    np.testing.assert_array_equal(2 * batch["x"], batch["y"])


def test_data_are_arguments_of_a_program_not_constants(key):
    traces = []

    @jax.jit
    def run(batches, key):
        traces.append(1)
        return batches(key).sum()

    run(Minibatches(jnp.arange(10.0), 4), key)
    run(Minibatches(jnp.arange(10.0) + 1, 4), key)
    assert len(traces) == 1
    assert float(FullBatch(jnp.arange(4.0))(key).sum()) == 6


def test_batch_larger_than_the_data_is_an_error():
    with pytest.raises(InputError, match="a batch of 11 examples was asked for, but the data have 10: choose a size"):
        check_batches(Minibatches(jnp.zeros((10, 2)), 11))


def test_leaves_of_different_lengths_are_an_error():
    with pytest.raises(InputError, match=r"\['x'\]: 10, \['y'\]: 9"):
        num_examples({"x": jnp.zeros((10, 2)), "y": jnp.zeros(9)})
    with pytest.raises(InputError, match="a scalar"):
        num_examples({"x": jnp.zeros((10, 2)), "y": jnp.zeros(())})
    with pytest.raises(InputError, match="no arrays"):
        num_examples({})

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from slt_interp.data import FullBatch, Minibatches
from slt_interp.training import log_schedule, polish, train

X = jax.random.normal(jax.random.key(1), (100, 4))
DATA = {"x": X, "y": X @ jnp.array([1.0, -2.0, 3.0, 0.5]) + 0.1}


def loss_fn(params, batch):
    return jnp.mean((batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2)


PARAMS = {"w": jnp.zeros(4), "b": jnp.zeros(())}


@pytest.mark.slow
def test_training_equals_a_plain_optax_loop(key):
    optimizer = optax.adam(0.05)
    batches = Minibatches(DATA, 10)
    result = train(key, loss_fn, PARAMS, batches, optimizer, num_steps=60, num_checkpoints=4, progress=False)
    params, state = PARAMS, optimizer.init(PARAMS)
    losses = []
    for t in range(60):
        loss, gradient = jax.value_and_grad(loss_fn)(params, batches(jax.random.fold_in(key, t)))
        updates, state = optimizer.update(gradient, state)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    np.testing.assert_allclose(result.losses, losses, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(result.params["w"], params["w"], rtol=1e-3)
    assert result.steps.tolist() == log_schedule(60, 4).tolist() == [0, 1, 8, 60]
    np.testing.assert_array_equal(result.checkpoints["w"][0], PARAMS["w"])
    np.testing.assert_array_equal(result.checkpoints["w"][-1], result.params["w"])


def test_polish_reaches_the_least_squares_solution():
    result = polish(loss_fn, PARAMS, DATA, num_steps=30)
    design = np.concatenate([DATA["x"], np.ones((100, 1))], axis=1)
    exact = np.linalg.lstsq(design, np.asarray(DATA["y"]))[0]
    np.testing.assert_allclose(np.append(result.params["w"], result.params["b"]), exact, atol=1e-4)
    assert result.grad_norm_after < 1e-3 < result.grad_norm_before
    assert result.loss_after < result.loss_before
    assert result.distance == pytest.approx(np.linalg.norm(exact), rel=1e-4)


def test_number_of_steps_per_segment_compiles_one_program(key):
    traces = []

    def counting(params, batch):
        traces.append(1)
        return loss_fn(params, batch)

    train(key, counting, PARAMS, FullBatch(DATA), optax.sgd(0.01), num_steps=700, num_checkpoints=9, progress=False)
    assert len(traces) <= 2  # jit traces a gradient's function once; a second trace is the shape check of the loop

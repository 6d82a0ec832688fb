import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from slt_interp.models.mlp import MLP
from slt_interp.probes.alignment import random_rotations
from slt_interp.probes.descent import descend
from slt_interp.probes.interchange import Alignment, InterchangeProbe, block_masks
from slt_interp.probes.interchange_training import train_interchange
from tests.probes.small_task import draw_small

NETWORK = MLP((8, 16, 16, 2))
IDENTITY = Alignment(jnp.eye(16), block_masks((8, 8), 16))


def train_task(key, params):
    def loss(params, key, done):
        batch = draw_small(key, 512)
        return optax.softmax_cross_entropy_with_integer_labels(NETWORK.apply(params, batch.base), batch.base_labels).mean()

    return descend(key, loss, params, num_steps=2000, learning_rate=1e-2)[0]


@pytest.mark.slow
def test_circuit_is_where_it_was_put_and_only_there(key):
    keys = jax.random.split(key, 2)
    start = jax.vmap(NETWORK.init)(keys)
    rotated = IDENTITY._replace(rotation=random_rotations(key, 1, 16)[0])
    examples = draw_small(jax.random.key(1), 4096)

    def trained(alignment):
        run = jax.vmap(lambda key, params: train_interchange(key, NETWORK, params, "layer1", alignment, draw_small))
        return run(keys, start).params

    def measured(params, alignment):
        return jax.vmap(lambda p: InterchangeProbe(NETWORK, "layer1", alignment, examples)(key, p))(params)

    for own, other in ((IDENTITY, rotated), (rotated, IDENTITY)):
        params = trained(own)
        found = measured(params, own)
        assert float(found["iia"].min()) >= 0.99
        assert float(found["accuracy"].min()) >= 0.99
        assert float(measured(params, other)["iia"].max()) < 0.9
    plain = measured(jax.jit(jax.vmap(train_task))(keys, start), IDENTITY)
    assert float(plain["accuracy"].min()) >= 0.99
    assert float(plain["iia"].max()) < 0.9
    assert float(measured(start, IDENTITY)["iia"].max()) < 0.9


def test_loss_is_that_of_both_tasks_and_maps_over_seeds(key):
    keys = jax.random.split(key, 2)
    start = jax.vmap(NETWORK.init)(keys)

    def train(key, params):
        return train_interchange(key, NETWORK, params, "layer1", IDENTITY, draw_small, num_steps=3, label_smoothing=0.1)

    together = jax.vmap(train)(keys, start)
    one = train(keys[1], jax.tree.map(lambda x: x[1], start))
    # Sums in another order, over three steps of Adam of .01, each of which is bounded by that and smooth in the gradient.
    np.testing.assert_allclose(together.losses[1], one.losses, rtol=1e-4)

    # Before the first step, by numpy: the patch at R = I puts units 0-7 of the first source and 8-15 of the second together.
    params = jax.tree.map(lambda x: np.asarray(x[1], np.float64), start)["layers"]
    batch = draw_small(jax.random.fold_in(keys[1], 0), 512)

    def hidden(x):
        return np.maximum(np.asarray(x, np.float64) @ params[0]["kernel"] + params[0]["bias"], 0)

    def loss(h, labels):
        h = np.maximum(h @ params[1]["kernel"] + params[1]["bias"], 0)
        logits = h @ params[2]["kernel"] + params[2]["bias"]
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return -np.mean((0.9 * np.eye(2)[labels] + 0.05) * log_p) * 2

    patched = np.concatenate([hidden(batch.sources[:, 0])[:, :8], hidden(batch.sources[:, 1])[:, 8:]], axis=1)
    expected = loss(patched, batch.labels) + loss(hidden(batch.base), batch.base_labels)
    assert float(one.losses[0]) == pytest.approx(expected, rel=1e-5)


def test_labels_that_no_source_decides_are_not_learned(key):
    def shuffled(key, size):
        drawn = draw_small(key, size)
        return drawn._replace(labels=jax.random.bernoulli(key, shape=(size,)).astype(int))

    trained = train_interchange(key, NETWORK, NETWORK.init(key), "layer1", IDENTITY, shuffled, num_steps=300)
    # Nothing predicts a fair coin better than log 2 nats, so that the sum stays above it.
    assert float(trained.losses[-50:].mean()) > np.log(2)


def test_unknown_site_and_misfit_are_errors(key):
    params, examples = NETWORK.init(key), draw_small
    with pytest.raises(ValueError, match="no site 'layer3'"):
        train_interchange(key, NETWORK, params, "layer3", IDENTITY, examples)
    with pytest.raises(ValueError, match=r"map of shape \(8, 8\)"):
        train_interchange(key, NETWORK, params, "layer2", Alignment(jnp.eye(8), jnp.ones((2, 8))), examples)


def test_a_descent_that_stops_is_on_the_way_of_the_whole_one(key):
    def loss(x, key, done):
        return jnp.sum((x - jax.random.normal(key, (3,))) ** 2) + done

    settings = {"num_steps": 20, "learning_rate": 0.1}
    whole = descend(key, loss, jnp.zeros(3), **settings)[1]
    found, losses = descend(key, loss, jnp.zeros(3), **settings, stop_after=7)
    np.testing.assert_allclose(losses, whole[:7], rtol=1e-6)
    np.testing.assert_allclose(loss(found, jax.random.fold_in(key, 7), 7 / 20), whole[7], rtol=1e-6)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from slt_interp.models.transformer import Transformer
from slt_interp.taps import record, replace
from slt_interp.tree import check_params, dimension, dot, norm

NETWORK = Transformer(vocab=7, length=6, layers=2, width=8, heads=2)
ONE_LAYER = Transformer(vocab=7, length=6, layers=1, width=8, heads=2)
EPSILON = np.finfo(np.float32).eps
apply = jax.jit(NETWORK.apply)


def normal_like(params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), params)


@pytest.fixture(scope="module")
def params():
    """Weights away from the symmetric start: biases and norms random too."""
    params = NETWORK.init(jax.random.key(0))
    return jax.tree.map(lambda x, z: x + 0.3 * z, params, normal_like(params, 1))


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(2).integers(0, 7, (5, 6)))


@pytest.fixture
def one_layer(params):
    return params | {"layers": {0: params["layers"][0]}}


def next_token_loss(params, tokens):
    log_probabilities = jax.nn.log_softmax(ONE_LAYER.apply(params, tokens[:, :-1]))
    return -jnp.mean(jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=2))


def oracle(params, tokens):
    """Compute the logits in float64, one example and one head at a time."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def dense(x, w):
        return x @ w["kernel"] + w["bias"]

    def norm(x, w):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * w["scale"] + w["bias"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def one(example):
        n, width = len(example), NETWORK.width // NETWORK.heads
        x = p["tokens"]["embedding"][example] + p["positions"]["embedding"][:n]
        for layer in p["layers"].values():
            q, k, v = np.split(dense(norm(x, layer["attention_norm"]), layer["query_key_value"]), 3, axis=1)
            found = np.zeros_like(x)
            for head in range(NETWORK.heads):
                part = slice(head * width, (head + 1) * width)
                for i in range(n):
                    weights = softmax(k[: i + 1, part] @ q[i, part] / np.sqrt(width))
                    found[i, part] = weights @ v[: i + 1, part]
            x = x + dense(found, layer["attention_out"])
            x = x + dense(gelu(dense(norm(x, layer["mlp_norm"]), layer["mlp_in"])), layer["mlp_out"])
        return dense(norm(x, p["norm"]), p["head"])

    return np.stack([one(example) for example in np.asarray(tokens)])


def test_weights_are_a_plain_pytree_of_the_right_number(params):
    check_params(params)
    vocab, length, layers, width = NETWORK.vocab, NETWORK.length, NETWORK.layers, NETWORK.width
    per_layer = (3 + 1 + 4 + 4) * width**2 + (3 + 1 + 4 + 1) * width + 2 * 2 * width
    assert dimension(params) == (vocab + length) * width + layers * per_layer + 2 * width + width * vocab + vocab


def test_logits_are_those_of_an_independent_forward_pass(params, tokens):
    exact = oracle(params, tokens)
    logits = apply(params, tokens)
    # Rounding errors of some 200 operations in a row, which add at random.
    np.testing.assert_allclose(logits, exact, atol=4 * np.sqrt(200) * EPSILON * np.abs(exact).max())


def test_later_tokens_do_not_reach_earlier_logits(params, tokens):
    changed = tokens.at[:, 4].set((tokens[:, 4] + 1) % NETWORK.vocab)
    before, after = apply(params, tokens), apply(params, changed)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.all(np.any(np.asarray(before[:, 4:] != after[:, 4:]), axis=2))


def test_shorter_sequences_are_prefixes(params, tokens):
    np.testing.assert_allclose(apply(params, tokens[:, :3]), apply(params, tokens)[:, :3], atol=1e-5)


def test_identity_taps_change_nothing(params, tokens):
    identity = replace("layer1", lambda x: x)
    np.testing.assert_array_equal(jax.jit(lambda p, x: NETWORK.apply(p, x, identity))(params, tokens), apply(params, tokens))


def test_every_site_is_tapped_once_in_order(params, tokens):
    seen = []

    def tap(site, activation):
        seen.append(site)
        return activation

    jax.eval_shape(lambda p, x: NETWORK.apply(p, x, tap), params, tokens)
    assert tuple(seen) == NETWORK.sites


def test_activations_are_what_their_sites_say(params, tokens):
    logits, at = jax.jit(lambda p, x: record(NETWORK, p, x))(params, tokens)
    assert tuple(at) == tuple(sorted(NETWORK.sites))
    np.testing.assert_allclose(at["layer1.pattern"].sum(axis=-1), 1.0, rtol=1e-6)
    assert at["layer1.pattern"].shape == (5, 2, 6, 6)
    assert not np.triu(at["layer1.pattern"], 1).any()
    assert at["layer2.heads"].shape == (5, 6, 2, 4)
    assert at["layer2.neurons"].shape == (5, 6, 32)
    total = at["embed"] + sum(at[f"layer{i}.{part}"] for i in (1, 2) for part in ("attention", "mlp"))
    np.testing.assert_allclose(at["layer2"], total, atol=16 * EPSILON * np.abs(total).max())
    np.testing.assert_allclose(at["final"] @ params["head"]["kernel"] + params["head"]["bias"], logits, atol=1e-5)


@pytest.mark.parametrize("site", ONE_LAYER.sites)
def test_every_site_reaches_the_logits(site, one_layer, tokens):
    flip = replace(site, lambda x: jnp.flip(x, axis=-1))
    patched = jax.jit(lambda p, x: ONE_LAYER.apply(p, x, flip))(one_layer, tokens)
    assert not np.allclose(patched, jax.jit(ONE_LAYER.apply)(one_layer, tokens))


def test_network_maps_over_weights(params, tokens):
    several = jax.tree.map(lambda x: jnp.stack([2 * x, x, -x]), params)
    logits = jax.jit(jax.vmap(NETWORK.apply, in_axes=(0, None)))(several, tokens)
    one = apply(params, tokens)
    np.testing.assert_allclose(logits[1], one, atol=1e-5)


def test_equal_networks_share_compiled_functions(params, tokens):
    traces = []

    def run(network, params, tokens):
        traces.append(1)
        return network.apply(params, tokens)

    jitted = jax.jit(run, static_argnums=0)
    jitted(Transformer(7, 6, width=8, heads=2), params, tokens)
    jitted(Transformer(7, 6, width=8, heads=2), params, tokens + 0)
    assert len(traces) == 1


def test_gradient_is_that_of_the_independent_forward_pass(one_layer, tokens):
    def loss(params):
        log_probabilities = log_softmax(oracle(params, tokens[:, :-1]), axis=2)
        return -np.take_along_axis(log_probabilities, np.asarray(tokens)[:, 1:, None], axis=2).mean()

    value, gradient = jax.jit(jax.value_and_grad(next_token_loss))(one_layer, tokens)
    np.testing.assert_allclose(value, loss(one_layer), rtol=4 * np.sqrt(200) * EPSILON)
    assert all(np.isfinite(x).all() and np.any(x != 0) for x in jax.tree.leaves(gradient))
    along = normal_like(one_layer, 3)
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), one_layer)
    ahead = jax.tree.map(lambda x, v: x + 1e-5 * v, exact, along)
    behind = jax.tree.map(lambda x, v: x - 1e-5 * v, exact, along)
    slope = (loss(ahead) - loss(behind)) / 2e-5
    np.testing.assert_allclose(
        dot(gradient, along), slope, atol=4 * np.sqrt(400) * EPSILON * float(norm(gradient) * norm(along))
    )


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="multiple of heads"):
        Transformer(vocab=7, length=6, width=9, heads=2)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from slt_interp import over_draws
from slt_interp.data import Counterfactuals
from slt_interp.errors import InputError
from slt_interp.models.mlp import MLP
from slt_interp.probes.interchange import Alignment, block_masks
from slt_interp.probes.scrubbing import (
    Hypothesis,
    ScrubbingProbe,
    check_comparable,
    coverage,
    divergence,
    scrub,
)
from slt_interp.tasks.hierarchical_equality import draw_scrubbing
from tests.probes.handcrafted import NETWORK, handcrafted_params

PARAMS = handcrafted_params()
NOTHING = jnp.zeros(16)


def hypothesis(masks, irrelevant=NOTHING):
    return Hypothesis(Alignment(jnp.eye(masks.shape[1]), masks), irrelevant)


TRUE = hypothesis(block_masks((8, 8), 16))
WRONG = hypothesis(block_masks((8, 8), 16)[::-1])


def measure(key, claimed, site="layer1"):
    return ScrubbingProbe(NETWORK, site, claimed, draw_scrubbing(key, 2000))(key, PARAMS)


def test_true_hypothesis_of_the_handcrafted_network_changes_nothing_at_all(key):
    found = measure(key, TRUE)
    # Equal pairs give 0 and others are far past the kink: outputs are the same to the last bit.
    assert all(float(found[name]) == 0.0 for name in ("kl", "jensen_shannon", "squared", "loss_gap", "cancellation"))
    assert float(found["claimed"]) == pytest.approx(1.0)
    at_layer2 = measure(key, Hypothesis(Alignment(jnp.eye(2), jnp.eye(2)), jnp.zeros(2)), "layer2")
    assert float(at_layer2["kl"]) == 0.0


def test_wrong_hypotheses_of_the_handcrafted_network_cost_what_their_wrong_answers_cost(key):
    # Sources of the other variable's value: the answer is right for half of the examples, as by chance. Logits are +-4.
    examples = draw_scrubbing(key, 4000)
    plain, found = NETWORK.apply(PARAMS, examples.base), measure(key, WRONG)
    margin = np.abs(np.diff(np.asarray(plain), axis=1)).mean()
    cost = margin * np.tanh(margin / 2)  # KL between (p, 1 - p) and (1 - p, p) with log odds `margin`
    error = np.sqrt(0.25 / 2000) * cost
    assert abs(float(found["kl"]) - cost / 2) < 4 * error
    assert abs(float(found["loss_gap"]) - margin / 2) < 4 * np.sqrt(0.25 / 2000) * margin + 2 * np.exp(-margin)
    # Calling one variable's units irrelevant is wrong in the same half of the examples.
    half = hypothesis(block_masks((8, 8), 16).at[1].set(0.0), block_masks((8, 8), 16)[1])
    assert abs(float(measure(key, half)["kl"]) - cost / 2) < 4 * error


def test_irrelevant_directions_that_nothing_reads_may_be_replaced(key):
    # Layer 3 has relu(+-(e1 - e2)); its difference is constant 0 and its sum is read.
    rotation = jnp.array([[1.0, 1.0], [1.0, -1.0]]) / jnp.sqrt(2)
    claimed = Hypothesis(Alignment(rotation, jnp.zeros((2, 2))), jnp.array([0.0, 1.0]))
    assert float(measure(key, claimed, "layer3")["kl"]) == pytest.approx(0.0, abs=1e-6)
    claimed = Hypothesis(Alignment(rotation, jnp.zeros((2, 2))), jnp.array([1.0, 0.0]))
    assert float(measure(key, claimed, "layer3")["kl"]) > 0.5


def test_divergences_are_their_definitions(key):
    p_key, q_key, label_key = jax.random.split(key, 3)
    original, scrubbed = (2 * jax.random.normal(k, (50, 3)) for k in (p_key, q_key))
    labels = jax.random.randint(label_key, (50,), 0, 3)
    found = divergence(original, scrubbed, labels)
    log_p, log_q = (log_softmax(np.asarray(x, np.float64), axis=1) for x in (original, scrubbed))
    p, q = np.exp(log_p), np.exp(log_q)
    middle = (p + q) / 2
    rows, label = np.arange(50), np.asarray(labels)
    shift = np.asarray(original - scrubbed, np.float64)
    expected = {
        "kl": (p * (log_p - log_q)).sum(1).mean(),
        "jensen_shannon": 0.5 * ((p * np.log(p / middle)).sum(1) + (q * np.log(q / middle)).sum(1)).mean(),
        "squared": (shift.var(axis=1) * 3).mean(),
        "loss_gap": (log_p - log_q)[rows, label].mean(),
    }
    for name, value in expected.items():
        assert float(getattr(found, name)) == pytest.approx(value, rel=1e-4), name
    assert float(found.cancellation) == pytest.approx(expected["loss_gap"] - expected["kl"], abs=1e-5)
    assert float(divergence(original, original + 3.0, labels).squared) == pytest.approx(0.0, abs=1e-9)


def test_two_groups_whose_errors_cancel_have_no_loss_gap_but_a_divergence():
    # Log odds +e in one group and -e in the other, scrubbed to 0; labels so that neither model is right: both lose log-loss
    # by the same share of e. Labels are 1 with probability (1/2 + x) such that (log p - log q) averages 0.
    e = 1.0
    original = jnp.array([[0.0, e], [0.0, -e]])
    scrubbed = jnp.zeros((2, 2))
    # Of T labels a share s is 1 in group 1 and 0 in group 2: gap = s log(2 p) + (1 - s) log(2 (1 - p)) = 0.
    p = 1 / (1 + np.exp(-e))
    share = -np.log(2 * (1 - p)) / np.log(p / (1 - p))
    count = 10_000
    ones = round(share * count)
    first = np.repeat([1, 0], [ones, count - ones])
    labels = jnp.asarray(np.concatenate([first, 1 - first]))
    found = divergence(jnp.repeat(original, count, axis=0), jnp.repeat(scrubbed, count, axis=0), labels)
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    assert float(found.kl) == pytest.approx(np.log(2) - entropy, rel=1e-4)
    # A label is one part in 10,000 of the share; float32 sums round to 1e-6.
    assert abs(float(found.loss_gap)) < e / count + 1e-5
    assert float(found.cancellation) == pytest.approx(-(np.log(2) - entropy), abs=e / count + 1e-5)


def test_coverage_is_the_share_of_variance_and_hypotheses_of_other_coverage_are_not_compared(key):
    network = MLP((3, 3, 2), lambda x: x)
    params = jax.tree.map(jnp.zeros_like, network.init(key))
    params["layers"][0]["kernel"] = jnp.diag(jnp.array([1.0, 2.0, 3.0]))
    inputs = jax.random.rademacher(key, (64, 3)).astype(jnp.float32)
    variance = np.asarray(inputs).var(axis=0) * np.array([1.0, 4.0, 9.0])
    claimed = Hypothesis(Alignment(jnp.eye(3), jnp.array([[0.0, 1.0, 0.0]])), jnp.array([1.0, 0.0, 0.0]))
    found = coverage(network, params, "layer1", claimed, inputs)
    np.testing.assert_allclose(found, variance[[1, 0, 2]] / variance.sum(), rtol=1e-5)
    whole = Hypothesis(Alignment(jnp.eye(3), jnp.array([[0.0, 1.0, 1.0]])), jnp.array([1.0, 0.0, 0.0]))
    with pytest.raises(InputError, match="without a claim, and that which claims less breaks less"):
        check_comparable(found, coverage(network, params, "layer1", whole, inputs))


def test_sources_have_the_same_value_of_their_variable_and_any_of_the_other(key):
    examples = draw_scrubbing(key, 4000)
    a, b, c, d = np.split(np.asarray(examples.sources), 4, axis=2)
    base = np.split(np.asarray(examples.base), 4, axis=1)
    values = {"left": (a == b).all(axis=2), "right": (c == d).all(axis=2)}
    base_values = {"left": (base[0] == base[1]).all(axis=1), "right": (base[2] == base[3]).all(axis=1)}
    for i, (same, other) in enumerate((("left", "right"), ("right", "left"))):
        assert (values[same][:, i] == base_values[same]).all()
        for j in (i, 2):
            # Independent fair coins agree in half of the cases.
            assert abs((values[other][:, j] == base_values[other]).mean() - 0.5) < 4 * np.sqrt(0.25 / 4000)
    assert (np.asarray(examples.base_labels) == (base_values["left"] == base_values["right"])).all()


def test_probe_runs_over_draws_and_bad_hypotheses_are_named(key):
    draws = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, 3, *x.shape)), PARAMS)
    found = over_draws(key, ScrubbingProbe(NETWORK, "layer1", TRUE, draw_scrubbing(key, 100)), draws)
    assert found["kl"].shape == (2, 3)
    assert not np.any(found["kl"])
    examples = draw_scrubbing(key, 10)
    with pytest.raises(InputError, match="a direction is claimed twice"):
        scrub(NETWORK, PARAMS, "layer1", hypothesis(block_masks((8, 8), 16), jnp.ones(16)), examples)
    with pytest.raises(InputError, match="a direction is claimed twice"):
        ScrubbingProbe(NETWORK, "layer1", hypothesis(block_masks((8, 8), 16), jnp.ones(16)), examples)
    few = Counterfactuals(examples.base, examples.sources[:, :2], examples.labels, examples.base_labels)
    with pytest.raises(InputError, match="the examples have 2 variables"):
        scrub(NETWORK, PARAMS, "layer1", TRUE, few)
    with pytest.raises(InputError, match="the network has no site 'layer9'"):
        scrub(NETWORK, PARAMS, "layer9", TRUE, examples)

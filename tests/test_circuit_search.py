"""The searches of the study `hierarchical-equality`: what they stand beside, on networks whose circuit is known."""

import jax
import jax.numpy as jnp
import numpy as np

from slt_interp.models.mlp import MLP
from slt_interp.probes.interchange import InterchangeProbe
from slt_interp.studies.circuit_search import AtAnySite, ShuffledLabels, at_site, difference_alignment, scrub_circuits
from slt_interp.taps import record
from slt_interp.tasks.hierarchical_equality import draw_counterfactuals
from tests.probes.handcrafted import NETWORK, handcrafted_params


def test_a_network_cut_at_any_site_is_the_network(key):
    network = MLP((5, 5, 5, 5, 2), jnp.tanh)
    params, x = network.init(key), jax.random.normal(key, (7, 5))
    logits, activations = record(network, params, x)
    for site in network.sites:
        cut = at_site(network, params, site)
        found, seen = record(AtAnySite(network), cut, x)
        np.testing.assert_allclose(found, logits, atol=1e-6)
        np.testing.assert_allclose(next(iter(seen.values())), x if site == "inputs" else activations[site], atol=1e-6)


def test_differences_of_the_inputs_carry_both_variables_of_a_right_network(key):
    alignment = difference_alignment()
    np.testing.assert_allclose(alignment.rotation.T @ alignment.rotation, np.eye(16), atol=1e-6)
    examples = draw_counterfactuals(key, 2000)
    # With sharpness 1000 pairs of differing entities never count as equal.
    found = InterchangeProbe(NETWORK, "inputs", alignment, examples)(key, handcrafted_params())
    assert float(found["iia"]) == 1.0


def test_shuffled_labels_are_those_of_other_examples(key):
    draw_key, _ = jax.random.split(key)
    plain, shuffled = draw_counterfactuals(draw_key, 400), ShuffledLabels(draw_counterfactuals)(key, 400)
    np.testing.assert_array_equal(plain.base, shuffled.base)
    assert plain.labels.sum() == shuffled.labels.sum()
    # Agreement by chance is a half, with the deviation 1 / (2 sqrt n).
    assert abs(np.mean(plain.labels == shuffled.labels) - 0.5) < 4 / (2 * np.sqrt(400))


def test_scrubbing_leaves_the_right_hypothesis_without_error_and_no_other(key):
    network, params = MLP((16, 16, 2, 2, 2)), handcrafted_params()
    found = {entry["hypothesis"]: entry for entry in scrub_circuits(key, network, params, {8: jnp.eye(16)}, 800)["hypotheses"]}
    assert found["found"]["kl"] == 0.0
    for wrong in ("swapped", "random"):
        assert found[wrong]["kl"] > 4 * found[wrong]["kl_std_error"]

"""The search stage of the study `hierarchical-equality`, on a network whose circuit is known, and its sentences."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp.models.mlp import MLP
from slt_interp.probes.interchange import Alignment, block_masks, interchange
from slt_interp.report import circuit_search as report
from slt_interp.studies.circuit_search import (
    BOTH,
    FIRST_LAYER,
    AtAnySite,
    Search,
    ShuffledLabels,
    at_site,
    difference_alignment,
    scrub_circuits,
    search_circuits,
)
from slt_interp.tasks.hierarchical_equality import draw_counterfactuals
from tests.probes.handcrafted import NETWORK as NARROW
from tests.probes.handcrafted import handcrafted_params

NETWORK = MLP((16, 16, 16, 16, 2))


def widened(params):
    """Pad the handcrafted network's hidden layers to width 16 with units that are always 0."""
    widths = NETWORK.widths
    layers = {
        i: {
            "kernel": jnp.zeros((a, b)).at[: layer["kernel"].shape[0], : layer["kernel"].shape[1]].set(layer["kernel"]),
            "bias": jnp.zeros(b).at[: len(layer["bias"])].set(layer["bias"]),
        }
        for (i, layer), a, b in zip(params["layers"].items(), widths, widths[1:], strict=False)
    }
    return {"layers": layers}


def test_widened_network_is_the_handcrafted_one():
    inputs = draw_counterfactuals(jax.random.key(0), 64).base
    wide, narrow = NETWORK.apply(widened(handcrafted_params()), inputs), NARROW.apply(handcrafted_params(), inputs)
    np.testing.assert_allclose(wide, narrow, rtol=1e-6)


@pytest.mark.parametrize("site", NETWORK.sites)
def test_network_that_is_cut_anywhere_patches_as_the_network_itself(site):
    params, examples = NETWORK.init(jax.random.key(0)), draw_counterfactuals(jax.random.key(1), 64)
    alignment = Alignment(jnp.linalg.qr(jax.random.normal(jax.random.key(2), (16, 16)))[0], block_masks((3, 5), 16))
    cut = interchange(AtAnySite(NETWORK), at_site(NETWORK, params, site), "chosen", alignment, examples)
    # Rounding of four layers of 16 products.
    np.testing.assert_allclose(cut, interchange(NETWORK, params, site, alignment, examples), rtol=1e-5, atol=1e-5)


def test_difference_alignment_is_exact():
    params, examples = handcrafted_params(), draw_counterfactuals(jax.random.key(0), 2048)
    alignment = difference_alignment()
    # Halves and signs only: the products are exact, up to the rounding of sqrt 2.
    np.testing.assert_allclose(alignment.rotation @ alignment.rotation.T, np.eye(16), atol=1e-6)
    # A difference of 0 that is rotated there and back is 0 to rounding, which a sharpness of 1000 tells from equality at 5e-4.
    answers = interchange(NARROW, params, "inputs", alignment, examples).argmax(axis=1)
    assert (answers == examples.labels).all()


def test_shuffled_labels_are_those_of_other_examples():
    plain = draw_counterfactuals(jax.random.split(jax.random.key(0))[0], 4096)
    shuffled = ShuffledLabels(draw_counterfactuals)(jax.random.key(0), 4096)
    np.testing.assert_array_equal(shuffled.base, plain.base)
    assert shuffled.labels.sum() == plain.labels.sum()
    # Fair coins that are independent agree in half of the examples: 4 standard errors.
    assert abs(float(jnp.mean(shuffled.labels == plain.labels)) - 0.5) < 4 * 0.5 / np.sqrt(4096)


@pytest.fixture(scope="module")
def handcrafted():
    """Search in the handcrafted network, whose layers are soft enough for gradients."""
    search = Search(("rotation",), (8,), 300, 4, 4, 2, 2048, 4, 1)
    params = widened(handcrafted_params(sharpness=1.0))
    networks = {
        "trained": (NETWORK, params),
        "untrained": (NETWORK, NETWORK.init(jax.random.key(0))),
        "sigmoid": (NETWORK, params),
    }
    return search_circuits(jax.random.key(1), search, networks, progress=False)


@pytest.mark.slow
def test_search_finds_the_planted_circuit(handcrafted):
    found, _ = handcrafted
    fit = report._fit(found, FIRST_LAYER, "rotation", 8)
    # Each of three inputs has two pairs, which count as equal by accident once in 400: of at most 1 in 66 examples is the
    # label wrong.
    assert fit["iia"] > 1 - 1 / 66
    assert found["known"]["iia"] > 1 - 1 / 66
    assert report._verdict(found, FIRST_LAYER) == "whole"
    shuffled = next(fit for fit in found["fits"] if fit["model"] == report.SHUFFLED)
    assert abs(shuffled["iia"] - 0.5) < 4 * shuffled["std_error"]


@pytest.mark.slow
def test_true_hypothesis_leaves_no_divergence_and_wrong_ones_do():
    scrubbed = scrub_circuits(jax.random.key(0), NETWORK, widened(handcrafted_params()), {8: jnp.eye(16)}, 1024)
    found, swapped, random = scrubbed["hypotheses"]
    assert found["kl"] == found["squared"] == 0
    assert found["claimed"] == pytest.approx(1.0, abs=1e-5)
    assert swapped["kl"] > 4 * swapped["kl_std_error"] > 0
    assert random["kl"] > 4 * random["kl_std_error"] > 0


# Every sentence is computed: change a result and its sentence changes.

SITES = ("inputs", "layer1", "layer2")


def synthetic():
    """Results in which rotations and linear maps find the variables in layer1 and RevNets in layer2, too."""

    def fit(network, model, name, site, size, iia):
        condition = 2.0 if name == "linear" else None
        starts = [iia - 0.01, iia]
        values = {"iia": iia, "std_error": 0.005, "restart_iia": starts, "condition": condition}
        return {"network": network, "model": model, "map": name, "site": site, "size": size, **values}

    reach = {"rotation": ("layer1",), "linear": ("layer1",), "RevNet": ("layer1", "layer2")}
    fits = [
        fit("trained", BOTH, name, site, size, 0.97 if site in reach[name] else 0.5)
        for name in reach
        for site in SITES
        for size in (4, 8)
    ]
    fits += [fit("untrained", BOTH, name, site, 8, 0.5) for name in reach for site in SITES]
    fits += [fit("sigmoid", BOTH, "rotation", site, 8, 0.97 if site == "layer1" else 0.5) for site in SITES]
    others = {"shuffled labels": 0.5, "left equality": 0.95, "first argument": 0.5}
    fits += [fit("trained", model, "rotation", "layer1", 8, iia) for model, iia in others.items()]
    random = [{"model": BOTH, "site": site, "iia": 0.5, "iia_std": 0.02} for site in SITES]
    random += [{"model": model, "site": "layer1", "iia": 0.5, "iia_std": 0.02} for model in list(others)[1:]]
    neuron = {"best": {"iia": 0.5, "std_error": 0.005}, "closest": {"iia": 0.5, "std_error": 0.005}}
    search = {
        "num_examples": 4096,
        "num_neurons": 8,
        "fits": fits,
        "random": random,
        "neurons": {site: copy.deepcopy(neuron) for site in SITES},
        "known": {"iia": 1.0, "std_error": 0.0003},
        "accuracy": {"trained": 1.0, "untrained": 0.5, "sigmoid": 0.99},
    }
    measures = ("kl", "jensen_shannon", "squared", "loss_gap", "cancellation", "claimed", "irrelevant", "no_claim")
    entries = [
        {
            "hypothesis": name,
            "size": 8,
            **{key: value for measure in measures for key, value in ((measure, level), (f"{measure}_std_error", 0.01))},
        }
        for name, level in (("found", 0.1), ("swapped", 2.0), ("random", 3.0))
    ]
    return {"search": search, "scrubbing": {"site": "layer1", "num_blocks": 16, "hypotheses": entries}}


def change(results, value, **where):
    """Give every search that is meant an IIA."""
    for fit in results["search"]["fits"]:
        if where.items() <= fit.items():
            fit |= {"iia": value, "restart_iia": [value - 0.01, value]}


def text(results):
    return " ".join(sentence for section in report.sections(results) for sentence in section.sentences)


def test_sentences_of_a_network_that_forms_the_variables():
    said = text(synthetic())
    assert "The network forms (a = b) and (c = d): linear maps find both in layer1" in said
    assert "above controls there is nothing in layer2" in said
    assert "At inputs all 8 starts of linear maps fail alike (IIA 0.490 to 0.500), but what they look for is there" in said
    assert "At layer2 all 8 starts of linear maps fail alike (IIA 0.490 to 0.500), and no alignment is known" in said
    assert "the search is easy: within 0.05 of the best start are 2 of 2 (rotation, layer1)" in said
    assert "RevNet maps find both variables in layer2 (IIA 0.970 ± 0.005), where linear maps find nothing: too good" in said
    assert "instead of 4, IIA is higher in 0 and lower in 0 of 6 comparisons" in said
    assert "as much in layer1 (0.970 ± 0.005 against 0.970 ± 0.005)" in said
    assert "left equality fits (IIA 0.950" in said
    assert "first argument does not fit better than random rotations" in said
    assert "leaves 5.0% of the divergence of the better wrong hypothesis" in said
    assert "no errors cancel in the loss" in said


@pytest.mark.parametrize(
    ("value", "where", "expected"),
    [
        (0.5, {"network": "trained", "site": "layer1"}, "No linear map finds (a = b) and (c = d) in any hidden layer"),
        (0.8, {"network": "trained", "site": "layer1"}, "in part at most: linear maps find more than controls in layer1"),
        (0.97, {"network": "trained", "site": "layer2"}, "RevNet maps find nothing where linear maps find nothing"),
        (0.97, {"network": "untrained", "map": "RevNet"}, "what they find says nothing of training"),
        (0.99, {"network": "untrained", "map": "rotation"}, "No linear map finds (a = b) and (c = d) in any hidden layer"),
        (0.9, {"network": "trained", "site": "layer1", "size": 4}, "IIA is higher in 2 and lower in 0 of 6 comparisons"),
        (0.99, {"network": "trained", "site": "layer1", "map": "linear"}, "higher in 0 and lower in 0 of 6 comparisons"),
        (0.8, {"network": "sigmoid", "site": "layer1"}, "less in layer1 (0.800 ± 0.005 against 0.970 ± 0.005)"),
        (0.9, {"model": "first argument"}, "first argument fits (IIA 0.900"),
        (0.56, {"model": "shuffled labels"}, "the search gives 0.560"),
    ],
)
def test_changed_search_changes_its_sentence(value, where, expected):
    results = synthetic()
    before = text(results)
    change(results, value, **where)
    assert text(results) != before
    assert expected in text(results)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (
            ("search", "known", "iia"),
            0.5,
            "At inputs all 8 starts of linear maps fail alike (IIA 0.490 to 0.500), and no alignment",
        ),
        (("search", "neurons", "layer2", "best", "iia"), 0.57, "there the search is hard. Random rotations reach as much"),
        (
            ("search", "neurons", "layer2", "best", "iia"),
            0.9,
            "better is a choice of neurons (IIA 0.900 ± 0.005), and every such",
        ),
        (("search", "accuracy", "sigmoid"), 0.6, "The sigmoid network has not learned the task (it answers 0.600"),
        (("scrubbing", "hypotheses", 0, "kl"), 1.99, "is no better than a wrong hypothesis"),
        (("scrubbing", "hypotheses", 0, "kl"), 0.001, "It leaves no error"),
        (("scrubbing", "hypotheses", 0, "cancellation"), -0.5, "and errors cancel in the loss"),
    ],
)
def test_changed_result_changes_its_sentence(path, value, expected):
    results = synthetic()
    assert expected not in text(results)
    place = results
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    assert expected in text(results)


def test_starts_that_disagree_are_called_a_hard_search():
    results = synthetic()
    report._fit(results["search"], "layer1", "rotation", 8)["restart_iia"] = [0.5, 0.6, 0.97]
    assert "the search is hard at places: within 0.05 of the best start are 1 of 3 (rotation, layer1)" in text(results)

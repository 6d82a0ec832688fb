import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp.degradation.cells import ENTITY_SIZE, SITE, VARIABLE, Answers, build_cells
from slt_interp.errors import InputError
from slt_interp.probes.dormancy import dormancy_share
from slt_interp.probes.interchange import interchange
from slt_interp.taps import record
from slt_interp.tasks.hierarchical_equality import MODELS, FreshExamples, Interventions

ILLUSIONS = ("planted", "pinned", "noisy", "null")


@pytest.fixture(params=range(3))
def cells(request):
    return build_cells(np.random.default_rng(request.param), ILLUSIONS)


def counterfactuals(key, cell, count=2000):
    return Interventions(MODELS[f"{VARIABLE[cell]} equality"], ENTITY_SIZE)(key, count)


def test_patches_along_every_cell_make_the_network_answer_as_the_causal_model(key, cells):
    network = Answers(cells.network)
    data = FreshExamples(2000, ENTITY_SIZE)(key)
    answers = network.apply(cells.params, data["inputs"]).argmax(axis=1)
    # Of differing pairs, those nearer than .5 / k in the sum of differences answer wrong: at most .5 (.5 / 4)^2 = .8 %.
    right = 0.5 * (0.5 / 4) ** 2
    assert np.mean(answers != data["labels"]) < right + 4 * np.sqrt(right / 2000)
    for name, alignment in cells.alignments.items():
        examples = counterfactuals(key, name)
        patched = interchange(network, cells.params, SITE, alignment, examples).argmax(axis=1)
        # Of base and source, any may have such a pair; the noisy unit adds what little it varies.
        assert np.mean(patched != examples.labels) < 3 * right + 4 * np.sqrt(right / 2000), name


def test_an_illusion_acts_as_its_circuit_does_on_every_example(key, cells):
    examples = counterfactuals(key, "genuine")
    patched = {
        name: interchange(Answers(cells.network), cells.params, SITE, cells.alignments[name], examples)
        for name in ("genuine", "planted", "pinned", "null")
    }
    for name in ("planted", "pinned", "null"):
        # Sums of a few float32 products of order 10.
        np.testing.assert_allclose(patched[name], patched["genuine"], atol=1e-4, err_msg=name)


def test_only_planted_illusions_with_a_constant_unit_are_dormant(key, cells):
    def share(name):
        examples = counterfactuals(key, name)
        return float(dormancy_share(Answers(cells.network), cells.params, SITE, cells.alignments[name], examples))

    assert [share(name) for name in ("genuine", "redundant", "planted", "pinned")] == pytest.approx([0, 0, 1, 1], abs=1e-4)
    assert share("null") == pytest.approx(0, abs=1e-4)


def test_a_joint_answer_has_the_probabilities_of_independent_answers(key, cells):
    inputs = FreshExamples(8, ENTITY_SIZE)(key)["inputs"]
    logits = cells.network.apply(cells.params, inputs)
    first, second = jax.nn.softmax(logits[:, :2]), jax.nn.softmax(logits[:, 2:])
    joint = jax.nn.softmax(Answers(cells.network, joint=True).apply(cells.params, inputs))
    np.testing.assert_allclose(joint.reshape(-1, 2, 2), first[:, :, None] * second[:, None, :], rtol=1e-5)


def test_the_second_answer_holds_only_the_pinned_copy(key, cells):
    inputs = FreshExamples(500, ENTITY_SIZE)(key)["inputs"]
    before = cells.network.apply(cells.params, inputs)
    _, activations = record(cells.network, cells.params, inputs)
    copies = np.flatnonzero(np.asarray(activations[SITE]).std(axis=0) > 0.1)[3:]
    changed = []
    for unit in copies:
        moved = jax.tree.map(np.array, cells.params)
        moved["layers"][1]["kernel"][:, unit] *= 0.5
        after = cells.network.apply(jax.tree.map(jnp.asarray, moved), inputs)
        changed.append(bool(np.abs(after - before).max() > 0.01))
    assert sum(changed) == 1


def test_an_unknown_illusion_is_named():
    with pytest.raises(InputError, match="there is no illusion 'real': choose among planted, pinned, noisy, null"):
        build_cells(np.random.default_rng(0), ("real",))

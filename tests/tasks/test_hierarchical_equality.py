import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp.errors import InputError
from slt_interp.probes.interchange import Alignment, InterchangeProbe, block_masks
from slt_interp.tasks import hierarchical_equality as task
from slt_interp.tasks.causal import intervened
from slt_interp.tasks.hierarchical_equality import FreshExamples, draw_counterfactuals
from tests.probes.handcrafted import NETWORK, handcrafted_params


def equalities(inputs):
    a, b, c, d = np.split(np.asarray(inputs), 4, axis=-1)
    return (a == b).all(axis=-1), (c == d).all(axis=-1)


def test_patterns_are_balanced_and_labels_follow_the_causal_model(key):
    batch = FreshExamples(400)(key)
    left, right = equalities(batch["inputs"])
    patterns = np.bincount(2 * left + right)
    assert patterns.tolist() == [100, 100, 100, 100]
    np.testing.assert_array_equal(batch["labels"], left == right)
    assert np.abs(batch["inputs"]).max() <= 1
    # Uniform on (-1, 1): mean 0 and variance 1/3, with 400 x 16 entries of which a quarter are copies.
    assert abs(np.asarray(batch["inputs"]).mean()) < 4 * np.sqrt(1 / 3 / 400 / 8)


def test_examples_are_fresh(key):
    first, second = (FreshExamples(8)(k)["inputs"] for k in jax.random.split(key))
    assert not np.isin(first, second).any()


def test_counterfactual_labels_take_each_variable_from_its_source(key):
    examples = draw_counterfactuals(key, 5000)
    left = equalities(examples.sources[:, 0])[0]
    right = equalities(examples.sources[:, 1])[1]
    np.testing.assert_array_equal(examples.labels, left == right)
    base = equalities(examples.base)
    np.testing.assert_array_equal(examples.base_labels, base[0] == base[1])
    # 64 combinations of (base, source, source) patterns; 5,000 / 64 = 78 of each, sd 8.8.
    code = np.stack([*base, *equalities(examples.sources[:, 0]), *equalities(examples.sources[:, 1])])
    counts = np.bincount(2 ** np.arange(6) @ code, minlength=64)
    assert counts.min() > 78 - 4.5 * 8.8


@pytest.mark.parametrize("name", task.MODELS)
def test_every_causal_model_gives_the_labels_of_the_task_without_intervention(key, name):
    examples = task.Interventions(task.MODELS[name])(key, 1000)
    a, b, c, d = np.split(np.asarray(examples.base), 4, axis=1)
    np.testing.assert_array_equal(examples.base_labels, (a == b).all(axis=1) == (c == d).all(axis=1))


def test_interventions_answer_as_each_model_does_with_values_of_the_sources(key):
    found = {name: task.Interventions(model)(key, 2000) for name, model in task.MODELS.items()}

    def parts(inputs):
        return np.split(np.asarray(inputs), 4, axis=-1)

    def equal(x, y):
        return (x == y).all(axis=-1)

    both, left, first = (found[name] for name in ("both equalities", "left equality", "first argument"))
    a, b, c, d = parts(both.sources)
    np.testing.assert_array_equal(both.labels, equal(a, b)[:, 0] == equal(c, d)[:, 1])
    (a, b, _, _), (_, _, c, d) = parts(left.sources[:, 0]), parts(left.base)
    np.testing.assert_array_equal(left.labels, equal(a, b) == equal(c, d))
    (a, _, _, _), (_, b, c, d) = parts(first.sources[:, 0]), parts(first.base)
    np.testing.assert_array_equal(first.labels, equal(a, b) == equal(c, d))
    # Half of the sources have the base's b for their a, the others never by chance.
    assert abs(equal(a, b).mean() - 0.5) < 4 * np.sqrt(0.25 / 2000)


def test_left_equality_is_carried_by_the_handcrafted_network_and_its_first_argument_is_not(key):
    left = block_masks((8,), 16)
    for name, iia in (("left equality", 1.0), ("first argument", 0.5)):
        examples = task.Interventions(task.MODELS[name])(key, 2000)
        probe = InterchangeProbe(NETWORK, "layer1", Alignment(jnp.eye(16), left), examples)
        found = float(probe(key, handcrafted_params())["iia"])
        # Of the first argument the units know only whether it equals the source's own b, an unrelated coin.
        assert found == 1.0 if iia == 1.0 else abs(found - iia) < 4 * np.sqrt(0.25 / 2000)


def test_as_many_sources_as_variables_are_asked_for():
    with pytest.raises(InputError, match=r"the model has 2 variables and there are 3 base inputs, but sources has .* \(3, 1\)"):
        intervened(task.MODELS["both equalities"], jnp.ones((3, 16)), jnp.ones((3, 1, 16)))

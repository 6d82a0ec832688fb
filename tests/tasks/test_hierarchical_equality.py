import jax
import numpy as np

from slt_interp.tasks.hierarchical_equality import FreshExamples, draw_counterfactuals


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

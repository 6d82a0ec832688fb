from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import block_diag

from slt_interp.models.mlp import MLP
from slt_interp.probes.alignment import Rotations, fit_alignment, random_rotations
from slt_interp.probes.interchange import Alignment, InterchangeProbe, block_masks, interchange
from slt_interp.probes.linear import MAX_CONDITION, LinearAlignment, LinearMaps
from slt_interp.taps import no_tap
from slt_interp.tasks.hierarchical_equality import draw_counterfactuals
from tests.probes.handcrafted import NETWORK, handcrafted_params

MASKS = block_masks((8, 8), 16)
ANGLE = 3.0
"""Condition number of the mixing, and so the least of a map that makes the two directions orthogonal again."""


@dataclass(frozen=True)
class Mixed:
    """A network whose layer1 is seen mixed by an invertible matrix, which what follows takes back."""

    network: MLP
    sites = ("mixed",)

    def apply(self, params, inputs, tap=no_tap):
        def within(site, h):
            return tap("mixed", h @ params["mix"]) @ params["unmix"] if site == "layer1" else h

        return self.network.apply(params["network"], inputs, within)


MIXED = Mixed(NETWORK)


def mixed_params(sharpness):
    """The sums of units 0-7 and 8-15, which are all that follows reads, are brought nearly into line."""
    apart = np.repeat([0.25, -0.25], 8)
    mix = (np.eye(16) + (ANGLE - 1) * np.outer(apart, apart)) @ np.asarray(random_rotations(jax.random.key(7), 1, 16)[0])
    weights = {"mix": mix, "unmix": np.linalg.inv(mix)}
    return {"network": handcrafted_params(sharpness)} | {name: jnp.asarray(x, jnp.float32) for name, x in weights.items()}


def test_inverse_of_the_mixing_is_an_exact_alignment(key):
    params, examples = mixed_params(sharpness=1000.0), draw_counterfactuals(key, 4096)
    exact = LinearAlignment(params["unmix"], params["mix"], MASKS)
    assert float(InterchangeProbe(MIXED, "mixed", exact, examples)(key, params)["iia"]) == 1.0
    assert float(exact.condition) == pytest.approx(ANGLE, rel=1e-4)


@pytest.mark.slow
def test_linear_maps_reach_what_rotations_cannot_and_a_penalty_makes_them_rotations(key):
    params = mixed_params(sharpness=1.0)

    def fitted(family):
        return fit_alignment(key, MIXED, params, "mixed", (8, 8), draw_counterfactuals, family=family, num_steps=600)

    rotation, free, penalized, stiff = map(fitted, [Rotations(), LinearMaps(), LinearMaps(0.1), LinearMaps(1e3)])
    assert rotation.restart_iia.max() < 0.75
    assert free.restart_iia.min() > 0.99
    assert penalized.restart_iia.min() > 0.99
    assert 1 < float(penalized.alignment.condition) < float(free.alignment.condition)
    # A gain of log 2 nats at most would pay for a standard deviation of sqrt(log 2 / 1000) = .03.
    assert float(stiff.alignment.condition) < 1.1
    assert stiff.restart_iia.max() < 0.75


def test_rotations_are_linear_alignments_of_condition_1(key):
    params, examples = NETWORK.init(key), draw_counterfactuals(key, 64)
    rotation = random_rotations(key, 1, 16)[0]
    linear = LinearAlignment(rotation, rotation.T, MASKS)
    logits = [interchange(NETWORK, params, "layer1", a, examples) for a in (Alignment(rotation, MASKS), linear)]
    np.testing.assert_array_equal(*logits)
    assert float(linear.condition) == pytest.approx(1.0, rel=1e-5)


def test_maps_within_a_variable_change_nothing(key):
    params, examples = NETWORK.init(key), draw_counterfactuals(key, 64)
    masks, rng = block_masks((5, 3), 16), np.random.default_rng(0)

    def aligned(matrix):
        return LinearAlignment(jnp.asarray(matrix, jnp.float32), jnp.asarray(np.linalg.inv(matrix), jnp.float32), masks)

    matrix = np.eye(16) + 0.1 * rng.normal(size=(16, 16))
    within = block_diag(*(np.eye(size) + 0.1 * rng.normal(size=(size, size)) for size in (5, 3, 8)))
    logits = [interchange(NETWORK, params, "layer1", aligned(m), examples) for m in (matrix, matrix @ within)]
    # Float32 products of width 16 through matrices of condition below 10.
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.1, 100.0])
def test_search_stays_within_its_condition_number_and_there_and_back_is_the_identity(key, scale):
    family = LinearMaps()
    start = family.start(key, MASKS)
    found = jax.tree.map(lambda x: x + scale * jax.random.normal(jax.random.fold_in(key, x.size), x.shape), start)
    found = found._replace(left=found.left._replace(start=start.left.start), right=found.right._replace(start=jnp.eye(16)))
    alignment = family.alignment(found, MASKS, jnp.ones(()))
    condition = np.linalg.cond(np.asarray(alignment.matrix, np.float64))
    # Entries are rounded relative to the largest of them, and rotations as they come out of the solve.
    assert condition < MAX_CONDITION * 1.1
    np.testing.assert_allclose(alignment.matrix @ alignment.inverse, np.eye(16), atol=16 * 1e-6 * max(condition, 10))

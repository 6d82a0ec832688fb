import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp.errors import InputError
from slt_interp.models.mlp import MLP
from slt_interp.probes.alignment import cayley, fit_alignment, fit_robust_alignment, random_rotations, refit_alignment
from slt_interp.probes.draws import over_draws
from slt_interp.probes.interchange import Alignment, InterchangeProbe, block_masks
from slt_interp.tasks.hierarchical_equality import draw_counterfactuals
from tests.probes.handcrafted import NETWORK, handcrafted_params, input_alignment


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_cayley_gives_rotations(key, scale):
    rotation = cayley(scale * jax.random.normal(key, (16, 16)))
    # Rounding of a solve: condition of I + A is at most about 1 + |A|, here below 1e3 float32 epsilons.
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(16), atol=1e-4)
    assert float(jnp.linalg.det(rotation)) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.slow
def test_search_finds_the_circuit_of_the_handcrafted_network(key):
    params = handcrafted_params(sharpness=1.0)
    fit = fit_alignment(key, NETWORK, params, "layer1", (8, 8), draw_counterfactuals, num_steps=600, num_restarts=3)
    assert fit.restart_iia.shape == (3,)
    assert fit.restart_iia.max() > 0.95
    # What follows reads units 0-7 and 8-15 by their sums only: those two directions carry the variables.
    for v in range(2):
        direction = np.kron(np.eye(2)[v], np.ones(8)) / np.sqrt(8)
        coordinates = direction @ np.asarray(fit.alignment.rotation)
        assert np.sum(coordinates**2 * np.asarray(fit.alignment.masks[v])) > 0.95


@pytest.mark.slow
def test_network_that_computes_nothing_has_no_alignment(key):
    network = MLP((16, 16, 16, 16, 2))
    fit = fit_alignment(key, network, network.init(key), "layer3", (8, 8), draw_counterfactuals, num_steps=50, num_restarts=2)
    # The best of 2 restarts on 4,096 examples of a coin: .5 + at most 4 binomial errors.
    assert fit.restart_iia.max() < 0.5 + 4 * 0.5 / np.sqrt(4096) + 0.02


@pytest.mark.slow
def test_restarts_at_the_inputs_miss_the_exact_alignment_and_a_refit_beside_it_does_not(key):
    params, examples = handcrafted_params(sharpness=1.0), draw_counterfactuals(jax.random.fold_in(key, 1), 4096)

    def iia(alignment):
        return float(InterchangeProbe(NETWORK, "inputs", alignment, examples)(key, params)["iia"])

    exact = input_alignment()
    fit = fit_alignment(
        key, NETWORK, params, "inputs", (4, 4), draw_counterfactuals, num_steps=300, num_restarts=20, batch_size=256
    )
    assert fit.restart_iia.shape == (20,)
    assert iia(exact) > 0.99
    assert fit.restart_iia.max() < 0.7
    turned = exact._replace(rotation=exact.rotation @ cayley(0.02 * jax.random.normal(key, (16, 16))))
    assert iia(turned) < 0.9
    assert iia(refit_alignment(key, NETWORK, params, "inputs", turned, draw_counterfactuals, num_steps=300)) > 0.95


def test_fit_is_kept_orthogonal(key):
    fit = fit_alignment(
        key, NETWORK, handcrafted_params(), "layer1", (2, 3), draw_counterfactuals, num_steps=50, num_restarts=1
    )
    rotation = fit.alignment.rotation
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(16), atol=1e-5)
    assert fit.alignment.masks.sum(axis=1).tolist() == [2, 3]


def test_random_rotations_have_the_moments_of_the_haar_measure(key):
    rotations = np.asarray(random_rotations(key, 4000, 4), np.float64)
    np.testing.assert_allclose(rotations @ rotations.swapaxes(1, 2), np.broadcast_to(np.eye(4), (4000, 4, 4)), atol=1e-5)
    # An entry has mean 0, second moment 1/4 and fourth 3/24; the trace has mean 0 and variance 1.
    entry, trace = rotations[:, 0, 0], np.trace(rotations, axis1=1, axis2=2)
    assert abs((entry**2).mean() - 1 / 4) < 4 * np.sqrt((3 / 24 - 1 / 16) / 4000)
    assert abs(entry.mean()) < 4 * np.sqrt(1 / 4 / 4000)
    assert abs(trace.mean()) < 4 / np.sqrt(4000)
    assert abs((trace**2).mean() - 1) < 4 * np.sqrt((3 - 1) / 4000)


def test_unknown_site_and_too_many_directions_are_errors(key):
    params = handcrafted_params()
    with pytest.raises(ValueError, match="no site 'head'"):
        fit_alignment(key, NETWORK, params, "head", (8, 8), draw_counterfactuals)
    with pytest.raises(ValueError, match="3 directions were asked for"):
        fit_alignment(key, NETWORK, params, "layer2", (2, 1), draw_counterfactuals)


def test_refit_brings_a_turned_alignment_back_and_moves_no_direction_among_other_units(key):
    params, examples = handcrafted_params(sharpness=1.0), draw_counterfactuals(key, 2000)
    masks = block_masks((8, 8), 16)
    turned = Alignment(cayley(0.15 * jax.random.normal(key, (16, 16))), masks)

    def iia(alignment):
        return float(InterchangeProbe(NETWORK, "layer1", alignment, examples)(key, params)["iia"])

    refit = refit_alignment(key, NETWORK, params, "layer1", turned, draw_counterfactuals)
    exact = iia(Alignment(jnp.eye(16), masks))
    assert exact - iia(turned) > 16 * np.sqrt(0.25 / 2000)
    # On the same examples: what the exact alignment itself misses scatters by the root of its number.
    assert abs(exact - iia(refit)) < 4 * np.sqrt((1 - exact) / 2000)
    np.testing.assert_allclose(refit.rotation @ refit.rotation.T, np.eye(16), atol=1e-5)
    units = jnp.arange(16) < 8
    confined = refit_alignment(key, NETWORK, params, "layer1", turned, draw_counterfactuals, units=units.astype(float))
    np.testing.assert_allclose(confined.rotation[8:], turned.rotation[8:], atol=1e-6)
    assert np.abs(confined.rotation[:8] - turned.rotation[:8]).max() > 0.01


@pytest.mark.slow
def test_robust_fit_holds_at_draws_where_the_fit_to_one_fails(key):
    params = handcrafted_params(sharpness=1.0)["layers"]

    def reading(weights):
        """What follows reads each pair by other positive weights: R = I is right for all, and for one draw much else is."""
        following = {"kernel": params[1]["kernel"] * weights[:, None], "bias": params[1]["bias"]}
        return {"layers": {**params, 1: following}}

    first = jnp.tile(jnp.array([2.0, 2.0, 0.5, 0.5]), 4)
    draws = jax.tree.map(lambda *w: jnp.stack(w)[None], reading(first), reading(2.5 - first))
    fit_key, test_key = jax.random.split(key)
    settings = {"site": "layer1", "sizes": (8, 8), "counterfactuals": draw_counterfactuals, "num_steps": 400}
    robust = fit_robust_alignment(fit_key, NETWORK, draws, **settings)
    of_one = fit_alignment(fit_key, NETWORK, reading(first), **settings)
    examples = draw_counterfactuals(test_key, 4096)

    def iia(alignment):
        return np.asarray(over_draws(key, InterchangeProbe(NETWORK, "layer1", alignment, examples), draws)["iia"][0])

    exact = iia(Alignment(jnp.eye(16), block_masks((8, 8), 16)))
    # Examples that the exact alignment misses are pairs too near to tell apart: others near that edge may go either way.
    assert (iia(robust.alignment) > exact - 4 * np.sqrt((1 - exact) / 4096)).all()
    assert iia(of_one.alignment)[0] > exact[0] - 4 * np.sqrt((1 - exact[0]) / 4096)
    assert iia(of_one.alignment)[1] < 0.9
    assert robust.restart_iia.max() > 0.99


def test_robust_fit_to_one_draw_is_the_fit_to_it(key):
    params = handcrafted_params()
    draws = jax.tree.map(lambda w: w[None, None], params)
    arguments = ("layer1", (2, 3), draw_counterfactuals)
    settings = {"num_steps": 20, "num_restarts": 2, "batch_size": 64, "held_out": 64}
    robust = fit_robust_alignment(key, NETWORK, draws, *arguments, **settings)
    plain = fit_alignment(key, NETWORK, params, *arguments, **settings)
    np.testing.assert_array_equal(robust.restart_iia, plain.restart_iia)
    np.testing.assert_array_equal(robust.alignment.rotation, plain.alignment.rotation)


def test_weights_without_draw_axes_are_refused(key):
    with pytest.raises(InputError, match="the same leading axes"):
        fit_robust_alignment(key, NETWORK, handcrafted_params(), "layer1", (8, 8), draw_counterfactuals)

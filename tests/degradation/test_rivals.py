"""The dials that damage a network otherwise than by its posterior."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp.degradation.compression import Checkpoints, LowRank, Pruning, Quantization, fisher_saliency
from slt_interp.degradation.dials import ActivationNoise, Composed, WeightNoise
from slt_interp.degradation.laplace import Laplace
from slt_interp.degradation.matching import BehaviorProbe, LossProbe, match, with_damage
from slt_interp.errors import InputError
from slt_interp.models.mlp import MLP
from slt_interp.probes.draws import over_draws
from slt_interp.probes.interchange import Alignment, InterchangeProbe, block_masks
from slt_interp.probes.patching import PatchingProbe
from slt_interp.tasks.hierarchical_equality import draw_counterfactuals
from tests.probes.handcrafted import NETWORK, handcrafted_params

SMALL = MLP((6, 5, 3))
ONE = {"num_chains": 1, "num_draws": 1}


@pytest.fixture
def params():
    return SMALL.init(jax.random.key(7))


def only(degraded):
    return jax.tree.map(lambda x: np.asarray(x[0, 0]), degraded.params)


def kernels(params):
    return [np.asarray(layer["kernel"]) for layer in params["layers"].values()]


def test_per_layer_noise_is_in_units_of_each_array(key):
    params = {"wide": 3.0 * jnp.ones((40, 50)), "narrow": 0.1 * jnp.ones(500)}
    noisy = WeightNoise(per_layer=True).draw(key, params, 0.2, num_chains=4, num_draws=5).params
    for name, size in (("wide", 3.0), ("narrow", 0.1)):
        z = np.asarray(noisy[name] - params[name]) / (0.2 * size)
        assert abs(z.var() - 1) < 4 * np.sqrt(2 / z.size)


def test_activation_noise_has_its_size_at_its_sites_only_and_is_fresh_for_every_key(key):
    degraded = ActivationNoise(("layer2",)).draw(key, {"w": jnp.zeros(2)}, 0.3, num_chains=2, num_draws=3)
    activation = 2.0 + jax.random.normal(key, (300, 40))
    keys = jax.random.split(key, 2)
    first, second = (degraded.damage(k)("layer2", activation) - activation for k in keys)
    z = np.asarray(first) / (0.3 * np.sqrt(np.mean(np.asarray(activation) ** 2)))
    assert abs(z.var() - 1) < 4 * np.sqrt(2 / z.size)
    # Noise of two keys is independent: its correlation has the standard error 1 / sqrt(n).
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 4 / np.sqrt(z.size)
    np.testing.assert_array_equal(degraded.damage(keys[0])("layer1", activation), activation)


def test_activation_noise_spares_the_inputs_unless_they_are_named(key):
    activation = jnp.ones((3, 4))
    for sites, is_noisy in ((None, {"inputs": False, "layer1": True}), (("inputs",), {"inputs": True, "layer1": False})):
        damaged = ActivationNoise(sites).draw(key, {"w": jnp.zeros(2)}, 0.3, num_chains=1, num_draws=1).damage(key)
        for site, expected in is_noisy.items():
            assert bool((damaged(site, activation) != activation).any()) == expected


def test_probe_sees_damaged_activations_and_others_are_told_to(key):
    params = handcrafted_params(sharpness=1.0)
    examples = draw_counterfactuals(key, 500)
    probe = InterchangeProbe(NETWORK, "layer1", Alignment(jnp.eye(16), block_masks((8, 8), 16)), examples)
    found = {}
    for level in (0.0, 100.0):
        degraded = ActivationNoise().draw(key, params, level, num_chains=2, num_draws=3)
        found[level] = over_draws(key, with_damage(probe, degraded), degraded.params)
    assert np.all(found[0.0]["iia"] > 0.99)
    # The noise is 100 times the signal: six answers of 500 coins each.
    assert abs(found[100.0]["accuracy"].mean() - 0.5) < 4 * np.sqrt(0.25 / 3000)
    with pytest.raises(InputError, match="the dial damages activations, which LossProbe does not see"):
        with_damage(LossProbe(lambda w, batch: 0.0, None), degraded)


def test_base_and_source_are_damaged_each_for_itself(key, params):
    # Patching an input's own activation changes nothing, but for noise that the two runs do not share.
    x = jax.random.normal(key, (400, 6))
    probe = PatchingProbe(SMALL, "layer1", jnp.ones((1, 5)), x, x, lambda y: y[0, 0])
    found = {}
    for level in (0.0, 0.5):
        degraded = ActivationNoise().draw(key, params, level, num_chains=10, num_draws=20)
        found[level] = np.asarray(over_draws(key, with_damage(probe, degraded), degraded.params)["effect"]).ravel()
    assert not found[0.0].any()
    hidden = np.maximum(np.asarray(x) @ params["layers"][0]["kernel"], 0)
    noise = 0.5 * np.sqrt(np.mean(hidden**2))
    # The difference of two noises at every unit, read by its outgoing weight.
    spread = np.sqrt(2) * noise * np.linalg.norm(params["layers"][1]["kernel"][:, 0])
    assert abs(found[0.5].std() / spread - 1) < 4 / np.sqrt(2 * 200)


def test_behavior_is_matched_for_a_dial_of_activations(key, params):
    probe = BehaviorProbe.at(SMALL, params, jax.random.normal(key, (2000, 6)))
    found = match(key, ActivationNoise(), params, probe, 0.02, bracket=(1e-3, 10.0), num_chains=4, num_draws=5)
    again = over_draws(key, with_damage(probe, found.degraded), found.degraded.params)["loss"]
    assert float(again.mean()) == pytest.approx(found.excess_loss, rel=1e-5)
    assert found.excess_loss == pytest.approx(0.02, rel=0.01)
    assert found.is_comparable


def test_networks_at_chance_are_called_not_comparable(key, params):
    probe = BehaviorProbe.at(SMALL, params, jax.random.normal(key, (2000, 6)))
    # Weights that are all but noise agree as often as not, and no answer is rarer than half.
    found = match(key, WeightNoise(), params, probe, 20.0, bracket=(1e-3, 1e3), num_chains=4, num_draws=5)
    assert not found.is_comparable
    assert "not comparable: accuracy is at chance" in str(found)


def test_pruning_takes_the_least_salient_share_of_all_matrices_and_no_bias(key, params):
    pruned = only(Pruning().draw(key, params, 0.4, **ONE))
    before, after = (np.concatenate([k.ravel() for k in kernels(p)]) for p in (params, pruned))
    count = round(0.4 * before.size)
    assert np.sum(after == 0) == count
    assert np.abs(before[after == 0]).max() <= np.abs(before[after != 0]).min()
    np.testing.assert_array_equal(pruned["layers"][0]["bias"], params["layers"][0]["bias"])
    assert all(
        (a == b).all() for a, b in zip(kernels(only(Pruning().draw(key, params, 0.0, **ONE))), kernels(params), strict=True)
    )
    assert not any(k.any() for k in kernels(only(Pruning().draw(key, params, 1.0, **ONE))))


def test_equally_salient_weights_are_pruned_no_further_than_asked(key):
    pruned = only(Pruning().draw(key, {"w": jnp.ones((10, 10))}, 0.29, **ONE))["w"]
    assert np.sum(pruned == 0) == 29


def test_a_dial_without_randomness_is_matched_as_near_as_its_steps_allow(key, params):
    probe = BehaviorProbe.at(SMALL, params, jax.random.normal(key, (2000, 6)))
    found = match(key, Quantization(), params, probe, 0.01, bracket=(1e-3, 1.0), num_chains=4, num_draws=5)
    assert jax.tree.leaves(found.degraded.params)[0].shape[:2] == (1, 1)
    assert np.isnan(found.std_error)
    assert float(probe(key, only(found.degraded))["loss"]) == pytest.approx(found.excess_loss, rel=1e-4)
    # The loss crosses what was wanted within the root finder's step in log level.
    near = [Quantization().draw(key, params, found.level * np.exp(shift), **ONE) for shift in (-3e-3, 0.0, 3e-3)]
    losses = [float(probe(key, only(degraded))["loss"]) for degraded in near]
    assert min(losses) <= 0.01 <= max(losses)


def test_fisher_saliency_is_what_the_loss_gains_for_independent_gaussian_inputs(key):
    # L = (x . w - y)^2 / 2 with y = x . w0 + noise of variance 1: the Fisher is the Hessian, E x_i^2.
    x_key, noise_key = jax.random.split(key)
    widths, weights = jnp.array([0.1, 1.0, 3.0]), jnp.array([[5.0], [1.0], [-0.2]])
    x = widths * jax.random.normal(x_key, (20_000, 3))
    data = {"x": x, "y": x @ weights + jax.random.normal(noise_key, (20_000, 1))}

    def loss_fn(w, batch):
        return 0.5 * jnp.mean((batch["x"] @ w - batch["y"]) ** 2)

    saliency = fisher_saliency(loss_fn, data)(weights)
    # Each term is a product of two squared normals, of variance 3 * 3 - 1 in units of its mean.
    np.testing.assert_allclose(saliency[:, 0], (widths * weights[:, 0]) ** 2 / 2, rtol=4 * np.sqrt(8 / 20_000))
    pruned = only(Pruning(fisher_saliency(loss_fn, data)).draw(key, weights, 0.34, **ONE))
    assert (pruned[:, 0] == 0).tolist() == [True, False, False]


def test_quantization_rounds_to_a_grid_of_so_many_values(key, params):
    bits = 4
    rounded = only(Quantization().draw(key, params, 1 / (2 ** (bits - 1) - 1), **ONE))
    for before, after in zip(kernels(params), kernels(rounded), strict=True):
        step = np.abs(before).max() / (2 ** (bits - 1) - 1)
        assert len(np.unique(np.round(after / step))) <= 2**bits - 1
        assert np.abs(after - before).max() <= step / 2 * (1 + 1e-5)
        assert np.abs(after).max() == pytest.approx(np.abs(before).max())


def test_low_rank_drops_no_more_of_the_norm_than_it_may_and_one_value_more_would_be_too_much(key, params):
    for share in (0.0, 0.1, 0.5, 1.0):
        for before, after in zip(kernels(params), kernels(only(LowRank().draw(key, params, share, **ONE))), strict=True):
            values = np.linalg.svd(before, compute_uv=False) ** 2 / np.sum(before**2)
            kept = np.linalg.matrix_rank(after, tol=1e-4)
            assert values[kept:].sum() <= share + 1e-5
            assert kept == 0 or values[kept - 1 :].sum() > share
            assert np.sum((before - after) ** 2) / np.sum(before**2) == pytest.approx(values[kept:].sum(), abs=1e-5)


def test_checkpoints_are_the_last_up_to_a_step(key, params):
    steps = np.array([0, 10, 100])
    dial = Checkpoints(steps, {"w": jnp.arange(3.0)})
    assert [float(only(dial.draw(key, params, level, **ONE))["w"]) for level in (0.0, 9.9, 10.0, 1e9)] == [0.0, 0.0, 1.0, 2.0]
    with pytest.raises(InputError, match=r"no checkpoint up to step -1: the first is that of step 0"):
        dial.draw(key, params, -1.0, **ONE)


def quadratic(w, batch):
    del batch
    return 0.5 * jnp.sum(jnp.array([4.0, 1.0, 0.0]) * w["w"] ** 2)


def test_laplace_draws_have_the_inverse_curvature_as_covariance(key):
    params, (nbeta, gamma) = {"w": jnp.array([0.0, 0.0, 5.0])}, (50.0, 2.0)
    dial = Laplace.at(quadratic, params, None, gamma)
    sd = 1 / np.sqrt(nbeta * np.array([4.0, 1.0, 0.0]) + gamma)
    for made, level, factor in ((dial, nbeta, 1.0), (dial.scaled(nbeta), 0.3, 0.3)):
        drawn = np.asarray(made.draw(key, params, level, num_chains=40, num_draws=100).params["w"] - params["w"])
        z = drawn.reshape(-1, 3) / (factor * sd)
        np.testing.assert_allclose(np.cov(z.T, bias=True), np.eye(3), atol=4 * np.sqrt(2 / len(z)))
    assert dial.draw(key, params, nbeta, num_chains=2, num_draws=3).params["w"].shape == (2, 3, 3)


def test_composed_dials_damage_twice(key):
    params = {"w": jnp.zeros(2000)}
    degraded = Composed(WeightNoise(), 0.3, WeightNoise()).draw(key, params, 0.4, num_chains=2, num_draws=3)
    w = np.asarray(degraded.params["w"])
    assert w.shape == (2, 3, 2000)
    assert abs(w.var() / 0.25 - 1) < 4 * np.sqrt(2 / w.size)
    assert abs(np.corrcoef(w[0, 0], w[1, 2])[0, 1]) < 4 / np.sqrt(2000)
    twice = Composed(WeightNoise(), 0.1, WeightNoise())
    probe = LossProbe(lambda w, batch: jnp.mean(w["w"] ** 2), None)
    found = match(key, twice, params, probe, 0.05, bracket=(1e-3, 1.0), num_chains=2, num_draws=3)
    # .1^2 + .2^2; over 12,000 weights the variance is known to 1.3 %, and match stops within 1 %.
    assert found.level == pytest.approx(0.2, rel=0.05)
    both = Composed(WeightNoise(), 0.3, ActivationNoise()).draw(key, params, 0.4, num_chains=2, num_draws=3)
    noise = both.damage(key)("layer1", jnp.ones(3000)) - 1
    assert abs(float(noise.var()) / 0.16 - 1) < 4 * np.sqrt(2 / 3000)
    # A dial without randomness gives its one network to each of the other's draws.
    rounded = Composed(WeightNoise(), 0.3, Quantization()).draw(key, params, 0.5, num_chains=2, num_draws=3).params["w"]
    assert all(len(np.unique(np.round(x / (np.abs(x).max() / 2)))) == 5 for x in np.asarray(rounded).reshape(6, -1))


@pytest.mark.parametrize("dial", [Pruning(), LowRank()])
def test_a_share_beyond_one_is_named(key, params, dial):
    with pytest.raises(InputError, match=r"the level is a share, from 0 to 1, but is 1\.5"):
        dial.draw(key, params, 1.5, **ONE)


def test_pruning_needs_matrices(key):
    with pytest.raises(InputError, match="params has no matrices to prune"):
        Pruning().draw(key, {"w": jnp.ones(3)}, 0.5, **ONE)

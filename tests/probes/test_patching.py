import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp import over_draws
from slt_interp.errors import InputError
from slt_interp.models.mlp import MLP
from slt_interp.models.transformer import Transformer
from slt_interp.probes.patching import PatchingProbe, ablation_effects, attributed_effects, patching_effects

NETWORK = MLP((5, 7, 6, 2))
LINEAR = MLP((5, 7, 6, 2), lambda x: x)


def readout(logits):
    return jnp.mean(logits[:, 1] - logits[:, 0])


@pytest.fixture(params=["layer1", "layer2"])
def site(request):
    return request.param


def setting(network, key):
    params_key, base_key, source_key = jax.random.split(key, 3)
    base, source = (jax.random.normal(k, (30, 5)) for k in (base_key, source_key))
    return network.init(params_key), base, source


def forward(params, x, changed=None, activation=jax.nn.relu):
    """Run the network by hand; `changed` maps (layer, activation) to the activation."""
    layers = [(np.asarray(params["layers"][i]["kernel"]), np.asarray(params["layers"][i]["bias"])) for i in range(3)]
    h = np.asarray(x)
    for i, (kernel, bias) in enumerate(layers[:-1]):
        h = np.asarray(activation(h @ kernel + bias))
        h = h if changed is None else changed(f"layer{i + 1}", h)
    return h @ layers[-1][0] + layers[-1][1]


def width(network, site):
    return network.widths[int(site[-1])]


def test_patching_one_unit_is_the_forward_pass_with_that_unit_of_the_source(key, site):
    params, base, source = setting(NETWORK, key)
    found = patching_effects(NETWORK, params, site, jnp.eye(width(NETWORK, site)), base, source, readout)
    kept = {}
    forward(params, source, lambda here, h: kept.setdefault(here, h))
    before = readout(forward(params, base))
    for unit, effect in enumerate(found):

        def changed(here, h, unit=unit):
            return np.where(np.arange(h.shape[1]) == unit, kept[here], h) if here == site else h

        assert float(effect) == pytest.approx(float(readout(forward(params, base, changed)) - before), abs=1e-5)


def test_patching_everything_gives_the_source_run_and_patching_nothing_changes_nothing(key, site):
    params, base, source = setting(NETWORK, key)
    masks = jnp.stack([jnp.ones(width(NETWORK, site)), jnp.zeros(width(NETWORK, site))])
    whole, nothing = patching_effects(NETWORK, params, site, masks, base, source, readout)
    full = readout(NETWORK.apply(params, source)) - readout(NETWORK.apply(params, base))
    assert float(whole) == pytest.approx(float(full), abs=1e-5)
    assert float(nothing) == 0.0


def test_attribution_is_patching_on_a_linear_network_and_differs_on_another(key, site):
    for network, is_linear in ((LINEAR, True), (NETWORK, False)):
        params, base, source = setting(network, key)
        arguments = network, params, site, jnp.eye(width(network, site)), base, source, readout
        gap = np.abs(patching_effects(*arguments) - attributed_effects(*arguments)).max()
        # Float32 sums of numbers of order 1; the last hidden layer is read linearly in either network.
        assert (gap < 1e-5) == (is_linear or site == "layer2")


def test_ablations_put_in_what_they_say(key, site):
    params, inputs, _ = setting(NETWORK, key)
    everything = jnp.ones((1, width(NETWORK, site)))
    before = readout(forward(params, inputs))
    by_hand = {"zero": lambda h: 0 * h, "mean": lambda h: np.broadcast_to(h.mean(axis=0), h.shape)}
    for value, function in by_hand.items():
        found = ablation_effects(key, NETWORK, params, site, everything, inputs, readout, value=value)
        after = readout(forward(params, inputs, lambda here, h, f=function: f(h) if here == site else h))
        assert float(found[0]) == pytest.approx(float(after - before), abs=1e-5)


def test_resampling_a_whole_layer_permutes_the_outputs_and_leaves_no_example_its_own(key, site):
    params, inputs, _ = setting(NETWORK, key)
    everything, logits = jnp.ones((1, width(NETWORK, site))), NETWORK.apply(params, inputs)
    # The mean over examples does not feel a permutation; each example does.
    assert float(ablation_effects(key, NETWORK, params, site, everything, inputs, readout, value="resample")[0]) == (
        pytest.approx(0.0, abs=1e-6)
    )
    for example in range(3):
        found = ablation_effects(key, NETWORK, params, site, everything, inputs, lambda y, i=example: y[i, 0], value="resample")
        others = np.delete(np.asarray(logits[:, 0]), example)
        assert np.abs(others - float(logits[example, 0] + found[0])).min() < 1e-5


def test_probe_runs_over_draws_and_over_positions_of_a_transformer(key):
    network = Transformer(vocab=11, length=4, layers=1, width=8, heads=2)
    draws = jax.vmap(jax.vmap(network.init))(jax.random.split(key, (2, 3)))
    base, source = jax.random.randint(key, (2, 6, 4), 0, 11)
    by_position = jnp.eye(4)[:, :, None]
    probe = PatchingProbe(network, network.sites[0], by_position, base, source, lambda y: y[:, -1, 0].mean())
    found = over_draws(key, probe, draws)
    assert found["effect"].shape == found["attributed"].shape == (2, 3, 4)
    one = jax.tree.map(lambda x: x[1, 2], draws)
    np.testing.assert_allclose(found["effect"][1, 2], probe(key, one)["effect"], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"site": "layer9"}, "the network has no site 'layer9': choose one of inputs, layer1, layer2"),
        ({"masks": jnp.ones((2, 3))}, "masks of shape (2, 3) do not fit the activation at layer1"),
        ({"source": jnp.ones((4, 5))}, "each of 30 base inputs needs its own source, but there are 4"),
    ],
)
def test_bad_input_gets_one_clear_sentence(key, changes, message):
    params, base, source = setting(NETWORK, key)
    arguments = {"site": "layer1", "masks": jnp.eye(7), "base": base, "source": source, "readout": readout} | changes
    with pytest.raises(InputError) as raised:
        patching_effects(NETWORK, params, **arguments)
    assert message in str(raised.value)


def test_unknown_ablation_lists_those_that_there_are(key):
    params, base, _ = setting(NETWORK, key)
    with pytest.raises(InputError, match="value must be one of zero, mean, resample, but is 'median'"):
        ablation_effects(key, NETWORK, params, "layer1", jnp.eye(7), base, readout, value="median")

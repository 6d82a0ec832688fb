import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import block_diag
from scipy.stats import ortho_group

from slt_interp.data import Counterfactuals
from slt_interp.models.mlp import MLP
from slt_interp.probes.interchange import Alignment, InterchangeProbe, block_masks, interchange
from slt_interp.tasks.hierarchical_equality import draw_counterfactuals
from tests.probes.handcrafted import NETWORK as HANDCRAFTED
from tests.probes.handcrafted import handcrafted_params, input_alignment

NETWORK = MLP((16, 16, 16, 16, 2))
SIZES = (5, 3)


@pytest.fixture
def setting(key):
    rotation = jnp.asarray(ortho_group.rvs(16, random_state=1), jnp.float32)
    return NETWORK.init(key), Alignment(rotation, block_masks(SIZES, 16)), draw_counterfactuals(key, 64)


def test_handcrafted_network_has_interchange_accuracy_one_with_the_identity(key):
    examples = draw_counterfactuals(key, 4096)
    probe = InterchangeProbe(HANDCRAFTED, "layer1", Alignment(jnp.eye(16), block_masks((8, 8), 16)), examples)
    measured = probe(key, handcrafted_params())
    assert float(measured["iia"]) == 1.0
    assert float(measured["accuracy"]) == 1.0


def test_differences_of_the_inputs_carry_the_variables_of_a_network_that_is_right(key):
    examples = draw_counterfactuals(key, 4096)
    measured = InterchangeProbe(HANDCRAFTED, "inputs", input_alignment(), examples)(key, handcrafted_params())
    assert float(measured["iia"]) == 1.0
    # Both pairs whole are an exact alignment, too.
    whole = Alignment(jnp.eye(16), block_masks((8, 8), 16))
    assert float(InterchangeProbe(HANDCRAFTED, "inputs", whole, examples)(key, handcrafted_params())["iia"]) == 1.0


def test_handcrafted_network_fails_with_the_variables_exchanged(key):
    examples = draw_counterfactuals(key, 4096)
    exchanged = Alignment(jnp.eye(16), block_masks((8, 8), 16)[::-1])
    iia = float(InterchangeProbe(HANDCRAFTED, "layer1", exchanged, examples)(key, handcrafted_params())["iia"])
    # The answer is then right by chance, one time in two.
    assert abs(iia - 0.5) < 4 * 0.5 / np.sqrt(4096)


@pytest.mark.parametrize("site", NETWORK.sites)
def test_source_equal_to_base_changes_nothing_exactly(setting, site):
    params, alignment, examples = setting
    same = examples._replace(sources=jnp.stack([examples.base, examples.base], axis=1))
    np.testing.assert_array_equal(interchange(NETWORK, params, site, alignment, same), NETWORK.apply(params, examples.base))


@pytest.mark.parametrize("site", NETWORK.sites)
def test_full_swap_equals_the_network_on_the_source(setting, site):
    params, alignment, examples = setting
    everything = Alignment(alignment.rotation, jnp.ones((1, 16)))
    one = Counterfactuals(examples.base, examples.sources[:, :1], examples.labels, examples.base_labels)
    patched = interchange(NETWORK, params, site, everything, one)
    np.testing.assert_allclose(patched, NETWORK.apply(params, examples.sources[:, 0]), rtol=1e-4, atol=1e-5)


def test_rotations_within_a_variable_change_nothing(setting):
    params, alignment, examples = setting
    within = block_diag(*(ortho_group.rvs(size, random_state=size) for size in (5, 3, 8)))
    rotated = Alignment(alignment.rotation @ jnp.asarray(within, jnp.float32), alignment.masks)
    first, second = (interchange(NETWORK, params, "layer2", a, examples) for a in (alignment, rotated))
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)


def test_definition_with_both_rotated_coordinates_written_out(setting):
    params, alignment, examples = setting

    def rotated(inputs):
        h = jax.nn.relu(inputs @ params["layers"][0]["kernel"] + params["layers"][0]["bias"])
        return h @ alignment.rotation

    r = rotated(examples.base)
    for v, columns in enumerate((slice(0, 5), slice(5, 8))):
        r = r.at[:, columns].set(rotated(examples.sources[:, v])[:, columns])
    h = r @ alignment.rotation.T
    for i in (1, 2):
        h = jax.nn.relu(h @ params["layers"][i]["kernel"] + params["layers"][i]["bias"])
    expected = h @ params["layers"][3]["kernel"] + params["layers"][3]["bias"]
    np.testing.assert_allclose(interchange(NETWORK, params, "layer1", alignment, examples), expected, rtol=1e-4, atol=1e-5)


def test_bad_input_gets_one_clear_sentence(setting):
    params, alignment, examples = setting
    with pytest.raises(ValueError, match="no site 'layer9': choose one of inputs, layer1, layer2, layer3"):
        interchange(NETWORK, params, "layer9", alignment, examples)
    with pytest.raises(ValueError, match=r"map of shape \(8, 8\).*layer1 has width 16"):
        interchange(NETWORK, params, "layer1", Alignment(jnp.eye(8), jnp.ones((2, 8))), examples)
    with pytest.raises(ValueError, match=r"17 directions were asked for \(9, 8\), but the activation has 16"):
        block_masks((9, 8), 16)

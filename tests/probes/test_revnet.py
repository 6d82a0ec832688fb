import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from slt_interp.errors import InputError
from slt_interp.models.mlp import MLP
from slt_interp.probes.alignment import fit_alignment
from slt_interp.probes.descent import descend
from slt_interp.probes.interchange import Alignment, block_masks, interchange
from slt_interp.probes.linear import LinearMaps
from slt_interp.probes.revnet import RevNets
from slt_interp.tasks.hierarchical_equality import draw_counterfactuals
from tests.probes.small_task import draw_small

NETWORK = MLP((16, 16, 16, 2))
MASKS = block_masks((5, 3), 16)


@pytest.fixture
def alignment(key):
    """Make a map whose couplings add about as much as there was."""
    family = RevNets(num_units=32)
    found = family.start(key, MASKS)
    outgoing = (jax.random.normal(jax.random.fold_in(key, i), (4, 32, 8)) / np.sqrt(32) for i in (1, 2))
    to_first, to_second = (c._replace(outgoing=w) for c, w in zip(found[1:], outgoing, strict=True))
    return family.alignment(found._replace(to_first=to_first, to_second=to_second), MASKS, jnp.ones(()))


def test_map_is_inverted_to_rounding_and_keeps_volume(key, alignment):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), alignment)
        # The rotation is one to the rounding of float32.
        wide = wide._replace(rotation=jnp.linalg.qr(wide.rotation)[0])
        activations = jax.random.normal(key, (100, 16), jnp.float64)
        coordinates = wide.forward(activations)
        found = wide.inverse(coordinates)
        jacobians = np.asarray(jax.vmap(jax.jacfwd(wide.forward))(activations))
    singular = np.linalg.svd(jacobians, compute_uv=False)
    assert singular.max() > 2, "the map must be far from a rotation, or this tests nothing"
    # Each of 8 couplings and 2 rotations, there and back, rounds by about an epsilon of the largest coordinate on the way, sums
    # of 32 terms included; what the inverse makes of it is at most its largest stretch.
    rounding = 20 * np.sqrt(32) * 2.0**-53 * np.abs(coordinates).max()
    np.testing.assert_allclose(found, activations, rtol=0, atol=rounding / singular.min())
    # A determinant's relative error is that of its matrix times the condition number.
    _, log_volume = np.linalg.slogdet(jacobians)
    np.testing.assert_allclose(log_volume, 0, atol=16 * rounding * singular.max() / singular.min())


def test_source_equal_to_base_changes_nothing_and_a_full_swap_is_the_network_on_the_source(key, alignment):
    params, examples = NETWORK.init(key), draw_counterfactuals(key, 64)
    base = NETWORK.apply(params, examples.base)
    same = examples._replace(sources=jnp.stack([examples.base, examples.base], axis=1))
    np.testing.assert_allclose(interchange(NETWORK, params, "layer1", alignment, same), base, rtol=1e-3, atol=1e-4)
    whole, one = alignment._replace(masks=jnp.ones((1, 16))), examples._replace(sources=examples.sources[:, :1])
    expected = NETWORK.apply(params, examples.sources[:, 0])
    assert np.abs(expected - base).max() > 0.1
    np.testing.assert_allclose(interchange(NETWORK, params, "layer1", whole, one), expected, rtol=1e-3, atol=1e-4)


def test_search_starts_from_a_rotation(key):
    family = RevNets()
    start = family.start(key, MASKS)
    revnet = family.alignment(start, MASKS, jnp.zeros(()))
    params, examples = NETWORK.init(key), draw_counterfactuals(key, 64)
    logits = [interchange(NETWORK, params, "layer2", a, examples) for a in (revnet, Alignment(start.turn.start, MASKS))]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_revnet_finds_a_circuit_in_a_layer_where_no_linear_map_does(key):
    network = MLP((8, 16, 16, 2))

    def loss(params, key, done):
        batch = draw_small(key, 512)
        return optax.softmax_cross_entropy_with_integer_labels(network.apply(params, batch.base), batch.base_labels).mean()

    params, _ = jax.jit(lambda start: descend(key, loss, start, num_steps=2000, learning_rate=1e-2))(network.init(key))
    settings = {"num_steps": 500, "num_restarts": 1, "batch_size": 256}
    linear, revnet = (
        fit_alignment(key, network, params, "layer2", (8, 8), draw_small, family=family, **settings)
        for family in (LinearMaps(), RevNets(num_units=16))
    )
    assert linear.restart_iia.max() < 0.6
    assert revnet.restart_iia.min() > 0.95


def test_odd_widths_are_refused(key):
    network = MLP((16, 5, 2))
    with pytest.raises(InputError, match="has 5 units"):
        fit_alignment(key, network, network.init(key), "layer1", (1, 1), draw_counterfactuals, family=RevNets())

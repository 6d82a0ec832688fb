"""Interchange interventions against those of pyvene, where it is installed; it is no dependency."""

import jax
import numpy as np
import pytest

from slt_interp.models.mlp import MLP
from slt_interp.probes.alignment import random_rotations
from slt_interp.probes.interchange import Alignment, block_masks, interchange
from slt_interp.tasks.hierarchical_equality import draw_counterfactuals

torch = pytest.importorskip("torch")
pyvene = pytest.importorskip("pyvene")

SIZES = (5, 3)


def rotated_space_intervention(rotation, size):
    """Swap the first `size` columns of a rotation."""
    intervention = pyvene.RotatedSpaceIntervention(embed_dim=len(rotation))
    intervention.rotate_layer.weight = torch.tensor(rotation)
    intervention.set_interchange_dim(size)
    return intervention


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_logits_are_those_of_pyvenes_rotated_space_intervention(key, layer):
    network = MLP((16, 16, 16, 16, 2))
    params, examples = network.init(key), draw_counterfactuals(key, 64)
    rotation = random_rotations(jax.random.fold_in(key, 1), 1, 16)[0]
    found = interchange(network, params, f"layer{layer + 1}", Alignment(rotation, block_masks(SIZES, 16)), examples)
    weights = [{name: torch.tensor(np.asarray(x)) for name, x in params["layers"][i].items()} for i in range(4)]

    def run(h, layers):
        for i in layers:
            h = h @ weights[i]["kernel"] + weights[i]["bias"]
            h = torch.relu(h) if i < 3 else h
        return h

    def hidden(inputs):
        return run(torch.tensor(np.asarray(inputs)), range(layer + 1))

    h, start = hidden(examples.base), 0
    with torch.no_grad():
        for v, size in enumerate(SIZES):
            # Pyvene swaps the first columns: each variable's are brought there in turn.
            own_first = np.roll(np.asarray(rotation), -start, axis=1)
            h = rotated_space_intervention(own_first, size)(h, hidden(examples.sources[:, v]))
            start += size
    # Three products of width 16 in float32, in another order.
    np.testing.assert_allclose(found, run(h, range(layer + 1, 4)).numpy(), rtol=1e-4, atol=1e-5)

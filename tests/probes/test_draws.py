from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp import over_draws

DRAWS = {"w": jnp.arange(24.0).reshape(4, 3, 2)}


def probe(key, params):
    return {"sum": params["w"].sum(), "noise": jax.random.normal(key)}


@pytest.mark.parametrize("block_size", [1, 5, 12, 100])
def test_block_size_changes_nothing_but_rounding(key, block_size):
    found = over_draws(key, probe, DRAWS, block_size=block_size)
    np.testing.assert_allclose(found["sum"], DRAWS["w"].sum(axis=2), rtol=1e-6)
    np.testing.assert_allclose(found["noise"], over_draws(key, probe, DRAWS)["noise"], rtol=1e-6)


def test_every_draw_has_its_own_key_that_does_not_depend_on_the_others(key):
    all_draws = over_draws(key, probe, DRAWS)["noise"]
    assert len(np.unique(all_draws)) == 12
    few = over_draws(key, probe, jax.tree.map(lambda x: x[:2, :2], DRAWS))["noise"]
    np.testing.assert_allclose(few, all_draws[:2, :2], rtol=1e-6)


traces = []


@partial(jax.tree_util.register_dataclass, data_fields=["scale"], meta_fields=[])
@dataclass(frozen=True)
class Scaled:
    scale: float

    def __call__(self, key, params):
        traces.append(1)
        return {"sum": self.scale * params["w"].sum()}


def test_probe_that_is_a_pytree_is_an_argument_of_the_program(key):
    over_draws(key, Scaled(1.0), DRAWS)
    once = len(traces)
    assert float(over_draws(key, Scaled(3.0), DRAWS)["sum"][0, 0]) == 3.0
    assert len(traces) == once


def test_draws_without_chain_and_draw_axes_are_an_error(key):
    with pytest.raises(ValueError, match=r"leading axes \(chain, draw\)"):
        over_draws(key, probe, {"w": jnp.zeros((4, 3, 2)), "b": jnp.zeros((4, 2))})

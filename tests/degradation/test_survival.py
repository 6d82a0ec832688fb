import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp.degradation.naturalness import HELD, naturalness
from slt_interp.degradation.planted import plant
from slt_interp.degradation.survival import circuit_probe, measure_survival
from slt_interp.probes.draws import over_draws
from slt_interp.probes.interchange import Alignment
from slt_interp.tasks.hierarchical_equality import MODELS, FreshExamples, Interventions, SameValue
from tests.probes.handcrafted import NETWORK, handcrafted_params

PARAMS = handcrafted_params(sharpness=1.0)
UNIT = Alignment(jnp.eye(2), jnp.array([[1.0, 0.0]]))
SWAPPED, MATCHED = Interventions(MODELS["left equality"]), SameValue(0)


def alone(params):
    return jax.tree.map(lambda w: w[None, None], params)


def test_at_the_weights_candidate_and_twin_have_the_whole_effect_and_random_maps_do_not(key):
    planted = plant(NETWORK, PARAMS, "layer2", UNIT, 0)
    probe = circuit_probe(key, planted, planted.network, "layer2", 0, SWAPPED, MATCHED, 1000, is_confined=True)
    read = {name: float(x[0, 0]) for name, x in over_draws(key, probe, alone(planted.params)).items()}
    # Of differing pairs 1 in (.5)^4 / 4! = 1 / 384 counts as equal; base, source and answer may each have one.
    wrong = 3 / 384
    for name in ("effect", "frozen", "transported", "twin", "frozen_twin", "transported_twin", "accuracy"):
        assert read[name] > 1 - wrong - 4 * np.sqrt(wrong / 500), name
    assert read["random"] < 0.9
    assert abs(read["disturbance"]) < 0.1 * read["swap_disturbance"]


def test_refits_stay_among_their_units(key):
    planted = plant(NETWORK, PARAMS, "layer2", UNIT, 0)
    free = circuit_probe(key, planted, planted.network, "layer2", 0, SWAPPED, MATCHED, 100, is_confined=False)
    assert free.units.tolist() == [1, 1, 1, 0]
    probe = circuit_probe(key, planted, planted.network, "layer2", 0, SWAPPED, MATCHED, 100, is_confined=True)
    assert probe.units.tolist() == [1, 0, 1, 0]
    assert probe.twin_units.tolist() == [0, 0, 1, 1]
    # What nothing reads, moved: the twin has nothing left to turn to, the circuit is as it was.
    moved = jax.tree.map(np.array, planted.params)
    moved["layers"][1]["kernel"][:, 2] = np.random.default_rng(0).normal(size=16)
    read = {name: float(x[0, 0]) for name, x in over_draws(key, probe, alone(jax.tree.map(jnp.asarray, moved))).items()}
    assert read["effect"] > 0.95
    assert read["twin"] < 0.9


@pytest.mark.slow
def test_survival_is_measured_from_end_to_end_and_an_illusion_is_not_held(key):
    planted = plant(NETWORK, PARAMS, "layer2", UNIT, 0)
    illusion = Alignment(planted.twin.rotation, planted.twin.masks)
    inputs = FreshExamples(256)(key)["inputs"]
    found = measure_survival(
        key,
        planted.network,
        planted.params,
        "layer2",
        illusion,
        inputs,
        SWAPPED,
        MATCHED,
        excess_losses=(0.005, 0.02),
        num_chains=8,
        num_burnin=100,
        thinning=20,
        num_counterfactuals=256,
        progress=False,
    )
    assert found.effect.shape == (2, 8)
    assert np.all(np.abs(np.log(found.excess_loss / np.array([0.005, 0.02]))) < 0.5)
    assert found.dormancy == pytest.approx(1.0, abs=1e-3)
    assert naturalness(found).word != HELD
    assert found.ceiling > 0.98

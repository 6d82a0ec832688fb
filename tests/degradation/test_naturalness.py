"""Verdicts on curves whose answers are known, and the probe that they are made of on a network whose circuit is known."""

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp.degradation.naturalness import Survival, naturalness, operating_rates
from slt_interp.errors import InputError
from slt_interp.probes.effect import EffectProbe
from slt_interp.probes.interchange import Alignment, block_masks
from slt_interp.tasks.hierarchical_equality import draw_counterfactuals, draw_scrubbing
from tests.probes.handcrafted import NETWORK, handcrafted_params

LEVELS, CHAINS = 4, 16
MEASURES = ("effect", "twin", "frozen", "random", "disturbance", "swap_disturbance", "accuracy")


def curves(seed=0, *, effect=0.97, twin=0.1, random=0.05, spread=0.03, disturbance=0.02, accuracy=0.97):
    """Chains that scatter around given means at every level."""
    rng = np.random.default_rng(seed)

    def around(mean):
        return np.broadcast_to(mean, (LEVELS,))[:, None] + spread * rng.normal(size=(LEVELS, CHAINS))

    return Survival(
        excess_loss=np.array([0.002, 0.005, 0.01, 0.02]),
        effect=around(effect),
        twin=around(twin),
        frozen=around(0.4),
        random=around(random),
        disturbance=around(disturbance),
        swap_disturbance=around(1.0),
        accuracy=around(accuracy),
        rhat=np.full(LEVELS, 1.01),
        dormancy=0.02,
        ceiling=1.0,
        localization=10.0,
    )


def test_verdicts_print_the_rates_that_the_benchmark_found():
    folder = Path(__file__).parents[2] / "benchmarks" / "results" / "operating_table"
    (measured,) = [json.loads(path.read_text()) for path in folder.glob("*/results.json")]
    assert operating_rates() == measured["rates"]
    rates = [operating_rates()[name] for name in ("circuits", "illusions")]
    circuits = ("genuine", "redundant", "interchange-trained", "found by search")
    for entry, is_circuit in zip(rates, (True, False), strict=True):
        # The second answer of the network holds half of a pinned illusion: it is no error to call it held.
        words = [c["verdict"] for c in measured["cases"] if (c["kind"] in circuits) == is_circuit and c["kind"] != "pinned"]
        assert entry["held"] == words.count("held") / len(words)
    for entry in rates:
        assert f"{entry['held']:.0%} ({entry['low']:.0%} to {entry['high']:.0%})" in str(naturalness(curves()))


def test_circuit_that_lives_where_its_twin_is_dead_is_held():
    verdict = naturalness(curves())
    assert (verdict.word, verdict.reasons, verdict.num_levels) == ("held", (), LEVELS)
    # (.4 - .05) / (.97 - .05), from 16 chains that scatter by .03; the verdict says so, and does not mind.
    np.testing.assert_allclose(verdict.frozen, 0.38, atol=4 * 0.03 * 2 / 4 / 0.92)
    assert "F~ without a refit 0.3" in str(verdict)


@pytest.mark.parametrize(
    ("found", "word", "reason"),
    [
        (curves(effect=0.1), "not held", "not shown to be above 0.8"),
        (curves(effect=[0.97, 0.97, 0.97, 0.5]), "not held", "at excess loss 0.02 its effect F~ is 0."),
        (curves(disturbance=0.5), "not held", "of its swap disturbance, not shown to be below 0.25"),
        (curves(twin=[0.1, 0.9, 0.9, 0.95]), "not held", "not shown to be above 0.1"),
        (replace(curves(), dormancy=0.9), "not held", "90% of its effect enters through units that do nothing"),
        (replace(curves(), dormancy=np.nan), "not held", "its patch changes nothing at the weights themselves"),
        (curves(random=0.8), "no window", "random maps have 8"),
        (curves(twin=0.9), "no window", "the planted twin lives at the mildest level"),
        (curves(accuracy=0.7), "no window", "no level keeps 90% of the accuracy"),
        (
            replace(curves(spread=0.1), rhat=np.array([1.0, 2.5, 1.0, 1.0])),
            "not equilibrated",
            "disagree in the effect at excess loss 0.005",
        ),
    ],
)
def test_every_way_to_fail_has_its_word_and_its_reason(found, word, reason):
    verdict = naturalness(found)
    assert verdict.word == word
    assert any(reason in sentence for sentence in verdict.reasons), verdict


def test_noise_that_a_test_of_no_difference_would_pass_is_not_held():
    # Chains scatter so widely that neither F~ = 1 nor no disturbance can be excluded: evidence of nothing.
    noise = curves(effect=0.8, spread=1.5)
    verdict = naturalness(replace(curves(), effect=noise.effect, disturbance=noise.disturbance))
    assert verdict.word == "not held"


def test_levels_at_which_the_network_has_failed_are_not_judged():
    verdict = naturalness(curves(effect=[0.97, 0.97, 0.2, 0.2], accuracy=[0.97, 0.95, 0.6, 0.95]))
    assert (verdict.word, verdict.num_levels) == ("held", 2)


def test_a_candidate_at_the_threshold_of_one_level_is_called_held_as_rarely_as_the_confidence_says():
    # F~ of exactly 0.8 at one level: Holm comes to it last, at the full 5 %. All of chance, accuracy and effect scatter.
    on_edge = 0.05 + 0.8 * (0.97 - 0.05)
    held = sum(naturalness(curves(seed, effect=[0.97, 0.97, 0.97, on_edge])).word == "held" for seed in range(200))
    assert held <= 10 + 4 * np.sqrt(200 * 0.05 * 0.95)


def test_effect_that_does_not_vary_needs_no_rhat_and_one_that_is_not_finite_is_refused():
    found = curves()
    perfect = replace(found, effect=np.ones((LEVELS, CHAINS)), rhat=np.full(LEVELS, np.nan))
    assert naturalness(perfect).word == "held"
    assert naturalness(replace(curves(spread=0.1), rhat=np.full(LEVELS, np.nan))).word == "not equilibrated"
    # Chains that differ by less than the margins may differ by more than each varies.
    assert naturalness(replace(found, rhat=np.full(LEVELS, 2.5))).word == "held"
    broken = found.twin.copy()
    broken[2, 5] = np.nan
    with pytest.raises(InputError, match="twin is not finite at level 2 of chain 5"):
        naturalness(replace(found, twin=broken))


def test_scaled_effect_is_1_for_a_circuit_as_good_as_the_network_and_0_for_random_maps():
    found = curves(effect=0.97, twin=0.05, spread=0.0)
    np.testing.assert_allclose(found.scaled, 1.0, atol=0.01)
    np.testing.assert_allclose(found.scaled_twin, 0.0, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"twin": np.ones((4, 3))}, r"twin has shape \(4, 3\), but there are 4 levels and effect has \(4, 16\)"),
        ({"excess_loss": np.array([0.1, 0.2, 0.2, 0.3])}, "excess_loss must rise"),
        ({name: np.ones((4, 3)) for name in MEASURES}, "needs 4"),
    ],
)
def test_curves_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        naturalness(replace(curves(), **changes))


def test_effect_of_the_handcrafted_circuit_is_whole_and_undisturbed_and_of_a_wrong_one_neither(key):
    params, matched = handcrafted_params(), draw_scrubbing(key, 2000)
    examples = draw_counterfactuals(key, 2000), matched._replace(sources=matched.sources[:, :2])
    masks = block_masks((8, 8), 16)
    right, wrong = (
        EffectProbe(NETWORK, "layer1", Alignment(jnp.eye(16), m), *examples)(key, params) for m in (masks, masks[::-1])
    )
    assert float(right["effect"]) == float(right["accuracy"]) == 1.0
    assert float(right["disturbance"]) == 0.0
    assert float(right["swap_disturbance"]) > 1.0
    # Sources of the other variable's value are a coin for it.
    assert abs(float(wrong["effect"]) - 0.5) < 4 * np.sqrt(0.25 / 1000)
    assert float(wrong["disturbance"]) > 1.0

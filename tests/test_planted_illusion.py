"""The study `planted-illusion`: scores of dials on curves that are known, and a report that says what its numbers say."""

import copy
import html
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp import cli
from slt_interp.degradation.compression import Checkpoints
from slt_interp.degradation.planted import plant
from slt_interp.degradation.scores import auroc
from slt_interp.report import planted_illusion as report
from slt_interp.storage import read_run
from slt_interp.studies import trained_circuits
from slt_interp.studies.matched_dials import score_dial, score_dials

LEVELS = (0.01, 0.02, 0.05, 0.1)
BUNDLED = Path(__file__).parents[1] / "benchmarks" / "reports" / "planted-illusion"


@pytest.fixture
def results():
    return json.loads((BUNDLED / "results.json").read_text())


def test_bundled_report_says_what_its_results_say(results):
    page = html.unescape((BUNDLED / "report.html").read_text())
    for sentence in report.findings(results):
        assert sentence in page


def test_bundled_scores_are_recomputed_from_the_bundled_curves(results):
    levels = np.array(results["settings"]["levels"])
    for name, entry in results["dials"].items():
        again = score_dial(levels, results["curves"][name], np.random.default_rng(0))
        assert again["num_networks"] == entry["num_networks"]
        if entry["num_networks"]:
            for key in ("auroc", "auroc_low", "auroc_high", "auroc_pinned", "paired", "censored"):
                assert again[key] == pytest.approx(entry[key]), (name, key)


@pytest.mark.parametrize(
    ("dial", "changes", "expected"),
    [
        (
            "weight_noise",
            {"auroc": 0.99, "auroc_low": 0.9, "auroc_high": 1.0},
            "told from the planted illusion by tempered posterior",
        ),
        ("posterior", {"auroc": 0.123, "auroc_low": 0.1, "auroc_high": 0.2}, "0.12 (0.10 to 0.20)"),
        ("posterior", {"num_networks": 0}, "tempered posterior at γ = 10: not comparable"),
        ("posterior_restricted", {"auroc_pinned": 0.4321}, "of the task's answer alone: 0.43"),
        (
            "pruning",
            {"num_networks": 32, "auroc": 0.2, "auroc_low": 0.1, "auroc_high": 0.3, "auroc_pinned_low": 0.1},
            "3 dials cannot",
        ),
    ],
)
def test_changed_result_changes_its_sentence(results, dial, changes, expected):
    before = report.findings(results)
    changed = copy.deepcopy(results)
    changed["dials"][dial] |= changes
    after = report.findings(changed)
    assert after != before
    assert expected in " ".join(after)


def reading(level, genuine, planted, *, excess=None, is_comparable=True):
    cells = {
        name: {"scaled": [value - 0.01, value + 0.01], "effect": [value, value], "random": [0.0, 0.0], "rhat": 1.3}
        for name, value in (("genuine", genuine), ("planted", planted))
    }
    return {
        "target": level,
        "excess_loss": level if excess is None else excess,
        "accuracy": 0.9,
        "is_comparable": is_comparable,
        "cells": cells,
    }


def network(genuine, planted, **changes):
    return {"dial": [reading(level, genuine, planted, **changes) for level in LEVELS]}


def test_scores_are_means_over_levels_and_a_dial_that_tells_all_apart_has_auroc_1():
    found = [network(0.9 - 0.01 * i, 0.3 + 0.01 * i) for i in range(10)]
    scored = score_dials(LEVELS, found, ("genuine", "planted"), 0)
    entry = scored["dials"]["dial"]
    assert entry["auroc"] == entry["paired"] == 1.0
    assert entry["auroc_low"] == pytest.approx(0.025**0.1)
    assert entry["score"] == pytest.approx({"genuine": 0.855, "planted": 0.345})
    assert entry["half_lives"]["genuine"] == {"median": None, "below_at_once": 0.0, "censored": 1.0}
    assert entry["half_lives"]["planted"] == {"median": None, "below_at_once": 1.0, "censored": 0.0}
    assert entry["censored"] == 0.5
    assert entry["rhat_above_limit"] == 1.0
    # Whoever reads the curves comes to the same.
    kept = {cell: np.mean(values, axis=(1, 2)) for cell, values in scored["curves"]["dial"].items()}
    assert entry["auroc"] == auroc(kept["genuine"], kept["planted"])


def test_levels_that_few_networks_reach_are_left_out_for_all():
    found = [network(0.9, 0.3) for _ in range(10)]
    for one in found[:5]:
        one["dial"][3] = reading(0.1, 0.1, 0.9, is_comparable=False)
    for one in found[5:]:
        # Were it counted, it would turn the order around.
        one["dial"][3] = reading(0.1, -9.0, 9.0)
    entry = score_dials(LEVELS, found, ("genuine", "planted"), 0)["dials"]["dial"]
    assert entry["levels_used"].tolist() == [0.01, 0.02, 0.05]
    assert (entry["auroc"], entry["num_networks"]) == (1.0, 10)
    assert entry["not_comparable"] == pytest.approx(5 / 40)


def test_a_dial_that_reaches_fewer_than_half_of_the_levels_is_not_comparable():
    found = [network(0.9, 0.3) for _ in range(10)]
    for one in found:
        one["dial"][1:] = [None, None, None]
    entry = score_dials(LEVELS, found, ("genuine", "planted"), 0)["dials"]["dial"]
    assert entry["num_networks"] == 0
    assert entry["not_reached"] == 0.75
    assert np.isnan(entry["auroc"])


def test_chance_gives_an_auroc_whose_interval_holds_a_half():
    rng = np.random.default_rng(0)
    curves = {name: rng.normal(0.5, 0.1, (32, 4, 2)).tolist() for name in ("genuine", "planted")}
    entry = score_dial(np.array(LEVELS), curves, rng)
    assert entry["auroc_low"] < 0.5 < entry["auroc_high"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--levels", "0.1", "0.01"), "levels must be two or more positive numbers that rise"),
        (("--localizations", "1", "1"), "localizations must be different positive numbers"),
        (("--num-seeds", "1"), "num_seeds must lie between 2 and inf"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["slt-interp", "run", "planted-illusion", *arguments])
    monkeypatch.setattr(cli, "_prepare_jax", lambda **_: None)  # this process has used JAX
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_smoke_run_makes_a_report_of_its_numbers(tmp_path):
    program = Path(sys.executable).with_name("slt-interp")
    command = [program, "run", "planted-illusion", "--preset", "smoke", "--out", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = read_run(tmp_path / "run").results
    assert {"posterior", "weight_noise", "activation_noise", "laplace", "pruning"} <= found["dials"].keys()
    for name, cells in found["curves"].items():
        for cell in ("genuine", "planted", "pinned", "redundant"):
            assert len(cells[cell]) == found["settings"]["num_seeds"], name
            assert all(len(levels) == len(found["settings"]["levels"]) for levels in cells[cell])
    # Noise is matched by root finding on a continuous function of the level.
    assert found["dials"]["weight_noise"]["loss_error"] < 0.05
    changed = copy.deepcopy(found)
    changed["dials"]["weight_noise"] |= {"auroc": 1.0, "auroc_low": 0.9, "auroc_high": 1.0, "num_networks": 2}
    assert report.findings(changed) != report.findings(found)


def test_checkpoint_of_a_network_with_a_twin_computes_what_the_checkpoint_did(key):
    network = trained_circuits.NETWORK
    now, then = (network.init(k) for k in jax.random.split(key))
    inputs = jax.random.normal(key, (50, network.widths[0]))
    planted = plant(network, now, trained_circuits.SITE, trained_circuits.halves(), 0)
    checkpoints = Checkpoints(jnp.array([1]), jax.tree.map(lambda w: w[None], then))
    moved = trained_circuits.plant_in_all(checkpoints, planted, now).checkpoints
    found = planted.network.apply(jax.tree.map(lambda w: w[0], moved), inputs)
    # float32: what constant units add and the bias takes is as large as the activations.
    np.testing.assert_allclose(found, network.apply(then, inputs), atol=1e-4)
    assert np.abs(found - network.apply(now, inputs)).max() > 0.1

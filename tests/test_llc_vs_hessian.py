"""The study `llc-vs-hessian`: the bundled report says what its numbers say, and a smoke run's numbers are what they claim."""

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
from slt_interp.models.mlp import MLP
from slt_interp.report import llc_vs_hessian as report
from slt_interp.storage import read_run
from slt_interp.studies.networks import SmoothedCrossEntropy

STUDY = "llc-vs-hessian"
BUNDLED = Path(__file__).parents[1] / "benchmarks" / "reports" / STUDY


@pytest.fixture
def results():
    return json.loads((BUNDLED / "results.json").read_text())


def test_bundled_report_says_what_its_results_say(results):
    page = html.unescape((BUNDLED / "report.html").read_text())
    for sentence in report.findings(results):
        assert sentence in page


def first(results, *path):
    for name in path:
        results = results[name]
    return results


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("exact", "problems", 0, "llc", "gaussian", -1), 1e6, "too large on quadratic of rank 6"),
        (("exact", "problems", 0, "llc", "sampled", 0), 1e6, "within 3 standard errors of the exact value at "),
        (("exact", "problems", 0, "volume", "gaussian", 0), 1e4, "nats too large on quadratic of rank 6"),
        (("deep_linear", "problems", 0, "measured", -1, "llc"), 1e5, "sampled LLC "),
        (("deep_linear", "problems", 0, "rank"), 1e5, "rank / 2 "),
        (("networks", "networks", 0, "measured", 0, "status"), "do not trust", "to be trusted"),
        (("networks", "networks", 0, "rank"), 12, "rank / 2 = 6)"),
        (("training", "checkpoints", -1, "measured", 0, "gaussian"), None, "predicts no LLC at "),
        (("modules", "cases", 0, "llc", "sampled", -1), 77.0, "goes from 77.00 "),
        (("modules", "cases", 0, "volume", "gaussian", 0), -88.0, "ln V changes by +88"),
        (("population", "networks", 0, "gap"), -1e3, "has rank correlation "),
    ],
)
def test_changed_result_changes_its_sentence(results, path, value, expected):
    before = report.findings(results)
    changed = copy.deepcopy(results)
    first(changed, *path[:-1])[path[-1]] = value
    after = report.findings(changed)
    different = [sentence for sentence in after if sentence not in before]
    assert len(different) == 1
    assert expected in different[0]


def test_a_prediction_is_right_within_two_percent_and_wrong_beyond(results):
    llc = results["exact"]["problems"][0]["llc"]
    for part, words in ((1.01, "right within 2% on quadratic"), (1.5, "50% too large on quadratic")):
        llc["gaussian"][-1] = part * llc["exact"][-1]
        assert words in report.findings(results)[0]


def test_nothing_is_said_of_estimates_that_are_not_to_be_trusted(results):
    for network in results["networks"]["networks"]:
        for measured in network["measured"]:
            measured["status"] = "do not trust"
    told = [sentence for sentence in report.findings(results) if "no sampled LLC is to be trusted" in sentence]
    assert len(told) == len(results["networks"]["networks"])


def test_smoothed_targets_have_their_entropy_as_the_smallest_loss():
    network = MLP((3, 4), jnp.tanh)
    loss_fn = SmoothedCrossEntropy(network, 0.2)
    targets = np.full(4, 0.05)
    targets[1] += 0.8
    params = jax.tree.map(jnp.zeros_like, network.init(jax.random.key(0)))
    params["layers"][0]["bias"] = jnp.log(jnp.asarray(targets, jnp.float32))
    loss = loss_fn(params, {"inputs": jnp.zeros((5, 3)), "labels": jnp.ones(5, int)})
    assert loss_fn.floor == pytest.approx(-np.sum(targets * np.log(targets)))
    assert float(loss) == pytest.approx(loss_fn.floor, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--problems", "unknown"), "problems has no 'unknown': choose from quadratic in 1 dimension"),
        (("--networks", "resnet"), "networks has no 'resnet': choose from digits"),
        (("--max-nbeta", "1"), "max_nbeta must lie between 10 and 1e+07, but is 1.0: change --max-nbeta"),
        (("--couplings", "0.5", "0.1"), "couplings must be rising numbers from 0 to 1"),
        (("--couplings", "2"), "couplings must be rising numbers from 0 to 1"),
        (("--nbeta-factors", "-1"), "nbeta_factors must be rising numbers"),
        (("--num-checkpoints", "1"), "num_checkpoints must lie between 3 and inf"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["slt-interp", "run", STUDY, *arguments])
    monkeypatch.setattr(cli, "_prepare_jax", lambda **_: None)  # this process has used JAX
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_smoke_run_makes_a_report_of_numbers_that_hold(tmp_path):
    program = Path(sys.executable).with_name("slt-interp")
    done = subprocess.run(
        [program, "run", STUDY, "--preset", "smoke", "--out", tmp_path / "run"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = read_run(tmp_path / "run").results
    assert (tmp_path / "run" / "report.html").exists()
    for case in (*found["exact"]["problems"], *found["modules"]["cases"]):
        if case["llc"]["exact"] is not None:
            gaps = np.subtract(case["llc"]["sampled"], case["llc"]["exact"])
            # One of a handful of rungs beyond 5 standard errors from 40 draws of 8 chains: less than once in a thousand runs.
            assert np.all(np.abs(gaps) <= 5 * np.array(case["llc"]["std_error"]))
        eigenvalues, localization = np.array(case["eigenvalues"]), found["exact"]["localization"]
        k = case["llc"]["nbeta"][-1] * eigenvalues
        assert case["llc"]["gaussian"][-1] == pytest.approx(0.5 * np.sum(k / (k + localization)), abs=1e-9)
    assert [c["step"] for c in found["training"]["checkpoints"]][-1] == 200

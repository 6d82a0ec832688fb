"""Benchmarks run from one command to a finished run directory."""

import importlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from slt_interp import analytic
from slt_interp.bases import Gaussian
from slt_interp.errors import InputError
from slt_interp.estimators.coefficient import LearningCoefficient
from slt_interp.storage import read_run

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_sampler_throughput_measures_every_section(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "sampler_throughput.py"), "smoke", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "deep_linear" in done.stdout
    run = read_run(tmp_path / "run")
    assert {"one_core", "all_cores", "second_call", "second_process", "memory"} <= run.results.keys()
    for place in ("one_core", "all_cores"):
        for found in run.results[place].values():
            assert set(found["gradients_per_second"]) == {"bare", "SGLD"}
            assert found["flops_per_gradient"] > 0
            assert all(rate["low"] > 0 for rate in found["gradients_per_second"].values())
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout == done.stdout
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["peer_python"] is None


@pytest.mark.slow
def test_llc_accuracy_scores_both_methods(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "llc_accuracy.py"), "smoke", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run = read_run(tmp_path / "run")
    rows, scores = run.results["rows"], run.results["scores"]
    assert len(rows) == 2 * 2 * 2
    for method in ("estimate_llc", "SGLD"):
        mine = [row for row in rows if row["method"] == method]
        errors = [abs(row["estimate"] - row["exact"]) / row["exact"] for row in mine]
        assert scores[method]["median_sampler_error"] == pytest.approx(np.median(errors))
        assert scores[method]["num_ok"] == sum(row["status"] == "ok" for row in mine)
    assert scores.keys() == {"estimate_llc", "SGLD"}
    assert "median_sampler_error" in done.stdout
    assert "devinterp: not measured" in done.stdout


@pytest.mark.slow
def test_hard_cases_are_minima_with_the_excess_loss_of_what_the_reference_samples(key, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    for case in importlib.import_module("hard_cases").hard_cases():
        center, unravel = ravel_pytree(case.problem.center)
        nearby = center + 0.1 * jax.random.normal(key, (10, len(center)))

        def excess(problem, unravel=unravel, center=center, nearby=nearby):
            loss = jax.jit(lambda w: problem.loss_fn(unravel(w), problem.data))
            return np.array([loss(w) for w in nearby], np.float64) - float(loss(center))

        # float32: the loss with noisy outputs is about 1.
        np.testing.assert_allclose(excess(case.problem), excess(case.same), rtol=1e-4, atol=1e-6)
        assert (excess(case.same) > 0).all()


@pytest.fixture
def bridge(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("llc_bridge")


@pytest.mark.parametrize(
    "make", [lambda key: analytic.linear_regression(key, 100, 5), lambda key: analytic.deep_linear(key, [3, 2, 2], 1)]
)
def test_peer_gets_the_loss_and_gradient_of_the_problem(bridge, key, make):
    problem = make(key)
    point = np.random.default_rng(0).normal(size=problem.dimension).astype(np.float32)

    def peer(connection):
        request = connection.recv()
        connection.send_bytes(point.tobytes())
        answer = np.frombuffer(connection.recv_bytes(), np.float32)
        connection.send_bytes(b"")
        connection.send({"asked": request, "answer": answer})

    ours, theirs = Pipe()
    with ours, theirs, ThreadPoolExecutor() as pool:
        done = pool.submit(peer, theirs)
        found = bridge.serve(ours, *bridge.flat_loss(problem), {"seed": 3})
        done.result()
    center, unravel = ravel_pytree(problem.center)
    assert found["asked"] == {"seed": 3, "center": center.tolist()}
    loss, gradient = jax.value_and_grad(problem.loss_fn)(unravel(point), problem.data)
    expected = np.concatenate([[loss], ravel_pytree(gradient)[0]])
    np.testing.assert_allclose(found["answer"], expected, rtol=1e-5, atol=1e-5)  # float32, in another order


def test_peer_that_dies_is_named(bridge):
    problem = analytic.quadratic([1.0])
    ours, theirs = Pipe()
    theirs.close()
    with ours, pytest.raises(RuntimeError, match="ended without an answer"):
        bridge.serve(ours, *bridge.flat_loss(problem), {})


@pytest.mark.slow
def test_devinterp_over_the_bridge_has_the_law_of_sgld(bridge):
    pytest.importorskip("devinterp")
    curvatures, nbeta, localization, step_size = [4.0, 1.0, 0.25], 100.0, 1.0, 1e-3
    request = {"lr": step_size, "localization": localization, "nbeta": nbeta, "num_gradients": 4000, "num_chains": 8, "seed": 0}
    with bridge.connect(sys.executable) as peer:
        found = bridge.serve(peer, *bridge.flat_loss(analytic.quadratic(curvatures)), request)
    stiffness = nbeta * np.array(curvatures) + localization
    exact = 0.5 * np.sum((1 - localization / stiffness) / (1 - step_size * stiffness / 4))
    error = np.std(found["per_chain"], ddof=1) / np.sqrt(8)
    assert abs(np.mean(found["per_chain"]) - exact) < 4 * error


@pytest.fixture
def volume_accuracy(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("volume_accuracy")


@pytest.fixture
def volume_peers(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("volume_peers")


@pytest.mark.slow
def test_volume_accuracy_scores_every_method(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "volume_accuracy.py"), "smoke", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = read_run(tmp_path / "run").results
    methods = {"rays", "gaussian", "nested sampling", "published rays"}
    assert results["scores"].keys() == methods
    assert len(results["rows"]) == 4 * len(methods)
    for method in methods:
        mine = [row for row in results["rows"] if row["method"] == method]
        assert results["scores"][method]["median_error"] == pytest.approx(np.median([abs(row["error"]) for row in mine]))
        assert method in done.stdout
    for row in results["rows"]:
        assert row["error"] == pytest.approx(row["estimate"] - row["exact"])
        if row["method"] == "nested sampling":
            assert abs(row["error_in_std_errors"]) < 4
    assert results["scores"]["gaussian"]["share_right"] == 0
    assert results["scores"]["rays"]["share_right"] == 1


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("gaussian", "is about a Gaussian base measure, not a Box"),
        ("published rays", "knows the base measure N(0, sigma^2 I) alone"),
    ],
)
def test_method_that_does_not_know_the_base_is_rows_with_the_reason(volume_accuracy, method, reason):
    rows = volume_accuracy._rows(volume_accuracy.Config(), analytic.monomial([1, 1], in_box=True), method, 0)
    assert [row["threshold"] for row in rows] == [1e-4, 1e-3, 1e-2, 1e-1]
    assert all(reason in row["status"] and row["estimate"] is None and not row["knows_base"] for row in rows)
    assert rows[0]["exact"] == pytest.approx(-2.8815, abs=1e-4)
    found = volume_accuracy.scores(rows, method)
    assert (found["num_rows"], found["num_of_other_bases"], found["share_right"]) == (0, 4, None)


@pytest.mark.parametrize(
    ("estimate", "std_error", "is_right"),
    [(-19.85, None, True), (-20.25, None, False), (-20.25, 0.15, True), (-20.25, 0.3, False), (None, None, False)],
)
def test_right_is_close_or_within_honest_errors(volume_accuracy, estimate, std_error, is_right):
    error = None if estimate is None else estimate + 20
    row = {"estimate": estimate, "exact": -20.0, "std_error": std_error, "error": error}
    assert volume_accuracy._is_right(row) is is_right


def test_coefficients_of_ladders_are_read_and_scored(volume_accuracy, monkeypatch):
    found = LearningCoefficient(np.array([0.9, 0.1]), np.array([0.51, 0.6]), np.array([0.01, 0.02]))
    ladder = SimpleNamespace(learning_coefficient=lambda: found, gradients_per_chain=10.0, loss=np.zeros((3, 8, 5)))
    monkeypatch.setattr(volume_accuracy, "catalogue", lambda: {"q": analytic.quadratic([1.0]), "m": analytic.monomial([1, 1])})
    scales = []

    def refuse_once(*_, base, **__):
        scales.append(base.scale)
        if len(scales) == 1:
            raise InputError("too wide")
        return ladder

    monkeypatch.setattr(volume_accuracy, "temper", refuse_once)
    regular, singular = (volume_accuracy._measure_coefficient(volume_accuracy.Config(), name)[0] for name in ("q", "m"))
    assert (regular["coefficient"], regular["multiplicity"], regular["num_gradients"]) == (0.51, 1, 80.0)
    assert (regular["true_coefficient"], regular["true_multiplicity"], regular["is_covered"]) == (0.5, 1, True)
    assert (singular["true_multiplicity"], singular["is_covered"]) == (2, False)
    assert scales == [1.0, 0.1, 1.0]
    assert (regular["base_scale"], singular["base_scale"]) == (0.1, 1.0)
    json.dumps([regular, singular], allow_nan=False)
    scores = volume_accuracy.coefficient_scores([regular, singular, regular | {"problem": "lost", "coefficient": None}])
    assert scores["not_covered"] == [singular["problem"]]
    assert scores["share_multiplicity_right_up_to_2"] == pytest.approx(2 / 3)
    assert scores["off_by_3_percent_at_multiplicity_1"] == ["lost"]


@pytest.mark.parametrize("dimension", [2, 3, 4])
def test_published_estimator_is_exact_on_an_isotropic_quadratic(volume_peers, key, dimension):
    problem = analytic.quadratic([2.0] * dimension)
    found = volume_peers.published_rays(key, problem, 0.1, num_rays=100, tolerance=1e-6)
    # Radii to 1e-6, of which d count, and losses in float32.
    assert found.log_volume[0] == pytest.approx(problem.log_volume(0.1), abs=1e-5)
    assert np.isnan(found.std_error[0])


def test_published_estimator_returns_a_radius_beyond_the_one_it_accepted(volume_peers, key):
    problem = analytic.quadratic([1.0] * 3)
    # Of 1, 1/2, 3/4, ... the second is accepted.
    found = volume_peers.published_rays(key, problem, 0.501**2 / 2, num_rays=10)
    assert found.log_volume[0] == pytest.approx(problem.log_volume(0.75**2 / 2), abs=1e-5)


def test_published_estimator_loses_the_base_measure_when_it_is_centered_elsewhere(volume_peers, key):
    def everything(w, batch):
        return 0.0 * w.sum()

    at, away = (
        analytic.AnalyticProblem("everything", everything, np.full(20, x, np.float32), "", base=Gaussian(0.0, 1.0))
        for x in (0, 3)
    )
    assert volume_peers.published_rays(key, at, 0.1).log_volume[0] == pytest.approx(0, abs=1e-6)
    assert volume_peers.published_rays(key, away, 0.1).log_volume[0] < -1


@pytest.mark.slow
def test_nested_sampler_stops_at_its_budget(volume_peers, key):
    problem = analytic.monomial([1, 1])
    found = volume_peers.nested_sampling(key, problem, np.array([1e-12, 0.1]), num_live=100, max_losses=10_000)
    assert np.isnan(found.log_volume[0])
    assert abs(found.log_volume[1] - problem.log_volume(0.1)) < 4 * found.std_error[1]
    assert 10_000 <= found.num_losses < 20_000


@pytest.mark.slow
def test_network_volume_measures_time_cost_and_volume(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "network_volume.py"), "smoke", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = read_run(tmp_path / "run").results
    sampled, gaussian = ([row for row in results["rows"] if row["method"] == method] for method in ("subset", "gaussian"))
    assert len(sampled) == len(gaussian) == 2
    assert results["agreement"] == []
    assert gaussian[0]["std_error"] == 0
    for row in sampled:
        assert row["std_error"] > 0
        assert row["seconds"] > 0
        assert row["compile_seconds"] > 0
        # Each step takes a loss, and one that reflects a gradient and a second loss.
        assert row["num_losses"] > row["num_gradients"] > 0
    assert "ln V(0.3)" in done.stdout


@pytest.fixture
def network_volume(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("network_volume")


def test_agreement_of_volumes_is_read_where_both_have_a_number(network_volume):
    row = {"base": "0.1", "seed": 0, "std_error": 3.0}
    rows = [
        row | {"method": method, "threshold": threshold, "log_volume": value}
        for method, threshold, value in [
            ("tempering", 0.5, -22.0),
            ("tempering", 1.0, -5.0),
            ("subset", 0.5, -20.0),
            ("subset", 1.0, None),
            ("gaussian", 0.5, -1.0),
        ]
    ]
    (found,) = network_volume._agreement(rows)
    assert (found["threshold"], found["gap"]) == (0.5, -2.0)
    assert found["std_error"] == pytest.approx(np.sqrt(18.0))


def test_the_base_of_initialization_has_the_scales_of_each_layers_inputs(network_volume):
    shapes = {0: (4, 3), 1: (9, 2)}
    params = {"layers": {i: {"kernel": np.ones(shape), "bias": np.ones(shape[1])} for i, shape in shapes.items()}}
    base = network_volume._base("init", params)
    assert base.center == 0.0
    assert {float(x) for x in base.scale["layers"][0]["kernel"].ravel()} == {0.5}
    np.testing.assert_allclose(base.scale["layers"][1]["bias"], 1 / 3, rtol=1e-6)
    assert base.scale["layers"][1]["kernel"].shape == (9, 2)


@pytest.mark.slow
def test_curvature_scale_measures_spectra_and_a_network(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "curvature_scale.py"), "smoke", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = read_run(tmp_path / "run").results
    for row in results["spectra"]:
        ((_, error, std_error),) = row["errors"]
        assert abs(error) <= 4 * std_error + 1e-4, row["spectrum"]
    whole, blocks, lobpcg = results["network"]
    np.testing.assert_allclose(blocks["values"], whole["values"], rtol=1e-3)
    np.testing.assert_allclose(lobpcg["values"], whole["values"][:2], rtol=1e-3)
    assert "LOBPCG" in done.stdout


@pytest.mark.slow
def test_probe_speed_measures_each_thing_both_ways(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "probe_speed.py"), "smoke", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = read_run(tmp_path / "run").results
    ways = {name: set(row) - {"what"} for name, row in results.items()}
    assert ways == {"training": {"together", "loop"}, "alignment": {"together"}, "interchange": {"together", "loop"}}
    assert all(seconds > 0 for name, row in results.items() for way in ways[name] for seconds in row[way].values())

"""Benchmarks run from one command to a finished run directory."""

import importlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from slt_interp import analytic
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

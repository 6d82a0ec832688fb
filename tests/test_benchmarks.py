"""Benchmarks run from one command to a finished run directory."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

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
    assert "median_sampler_error" in done.stdout

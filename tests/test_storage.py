import json

import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp.errors import InputError
from slt_interp.storage import Checkpoints, fingerprint, open_run, read_run


def test_finished_stage_is_read_not_computed_again(tmp_path):
    run = open_run(tmp_path / "run", {"a": 1})
    calls = []

    def compute():
        calls.append(1)
        return {"x": np.float32(1.5), "unknown": float("nan"), "many": (1, np.inf)}, {"w": np.arange(3)}

    first = run.stage("one", compute)
    second = open_run(tmp_path / "run", {"a": 1}).stage("one", compute)
    assert len(calls) == 1
    assert first[0] == second[0] == {"x": 1.5, "unknown": None, "many": [1, None]}
    np.testing.assert_array_equal(second[1]["w"], [0, 1, 2])
    assert run.environment["seconds"].keys() == {"one"}


def test_stage_that_dies_leaves_nothing_behind_that_looks_finished(tmp_path):
    run = open_run(tmp_path / "run", {})

    def dies():
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run.stage("one", dies)
    assert run.stage("one", lambda: ({"x": 1}, {}))[0] == {"x": 1}


def test_directory_of_another_configuration_is_refused_and_untouched(tmp_path):
    run = open_run(tmp_path / "run", {"settings": {"seed": 0}})
    run.finish({"x": 1})
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"settings\.seed = 0 there, 1 here.*--out"):
        open_run(tmp_path / "run", {"settings": {"seed": 1}})
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_directory_with_other_files_is_refused_and_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("do not lose me")
    with pytest.raises(InputError, match=r"holds files but no config\.json"):
        open_run(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(InputError, match="is a file"):
        open_run(tmp_path / "thesis.tex", {})


def test_run_that_died_while_its_directory_was_made_starts_over(tmp_path):
    (tmp_path / "config.json.part").write_text("{")
    assert open_run(tmp_path, {"a": 1}).config == {"a": 1}


def test_report_of_what_is_not_there_or_not_finished_is_refused(tmp_path):
    with pytest.raises(InputError, match="is no run directory"):
        read_run(tmp_path / "nowhere")
    open_run(tmp_path / "run", {})
    with pytest.raises(InputError, match=r"is not finished \(it has no results\.json\)"):
        read_run(tmp_path / "run")


def test_json_is_strict(tmp_path):
    run = open_run(tmp_path / "run", {})
    run.finish({"x": float("nan"), "y": jnp.float32(2.0), "z": np.array([1.0, -np.inf])})
    text = (tmp_path / "run" / "results.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {"x": None, "y": 2.0, "z": [1.0, None]}


def test_fingerprint_sees_values_types_structure_and_settings():
    base = fingerprint({"a": jnp.zeros(3)}, 1)
    assert base == fingerprint({"a": jnp.zeros(3)}, 1)
    others = [
        ({"a": jnp.ones(3)}, 1),
        ({"a": jnp.zeros(3, jnp.bfloat16)}, 1),
        ({"b": jnp.zeros(3)}, 1),
        ({"a": jnp.zeros(3)}, 2),
    ]
    assert len({base, *(fingerprint(tree, setting) for tree, setting in others)}) == 5


def test_checkpoints_of_another_run_are_refused(tmp_path):
    Checkpoints(tmp_path / "c", "one").save(1, {"x": np.arange(3)})
    with pytest.raises(InputError, match="checkpoints of another run"):
        Checkpoints(tmp_path / "c", "two")
    (restored,) = Checkpoints(tmp_path / "c", "one").restore({"x": 0})
    np.testing.assert_array_equal(restored["x"], [0, 1, 2])

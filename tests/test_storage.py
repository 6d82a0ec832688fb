import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp.errors import InputError
from slt_interp.storage import Checkpoints, DrawFiles, fingerprint, open_run, read_arrays, read_run


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
    checkpoints = Checkpoints(tmp_path / "c", "one")
    assert checkpoints.restore({"x": 0}) is None
    for number in (1, 5, 7):
        checkpoints.save(number, {"x": np.arange(3) + number})
    with pytest.raises(InputError, match="holds another run"):
        Checkpoints(tmp_path / "c", "two")
    number, restored = Checkpoints(tmp_path / "c", "one").restore({"x": 0})
    assert number == 7
    np.testing.assert_array_equal(restored["x"], [7, 8, 9])


def test_draw_files_are_valid_from_the_moment_they_are_there(tmp_path, monkeypatch):
    write, seen = DrawFiles._write_header, []

    def look_first(self, stream, leaf):
        seen.append([np.load(file).shape for file in (tmp_path / "d").glob("*.npy")])
        write(self, stream, leaf)

    monkeypatch.setattr(DrawFiles, "_write_header", look_first)
    DrawFiles(tmp_path / "d", [jax.ShapeDtypeStruct((2,), jnp.float32)] * 3, 0)
    assert seen == [[], [(0, 2)], [(0, 2)] * 2]


def test_draw_files_are_valid_at_any_time_and_grow_by_appending(tmp_path):
    like = {"loss": jax.ShapeDtypeStruct((2,), jnp.float32), "w": {"a": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)}}
    rows = {
        "loss": np.arange(10, dtype=np.float32).reshape(2, 5),
        "w": {"a": jnp.arange(30.0).reshape(2, 5, 3).astype(jnp.bfloat16)},
    }
    rows = jax.tree.map(np.asarray, rows)
    files = DrawFiles(tmp_path / "d", like, 0)
    files.append(jax.tree.map(lambda x: x[:, :3], rows))
    np.testing.assert_array_equal(np.load(tmp_path / "d" / "loss.npy"), rows["loss"][:, :3].T)
    # A process that died while it wrote: bytes behind the last complete draw mean nothing.
    with open(tmp_path / "d" / "loss.npy", "ab") as file:
        file.write(b"torn")
    np.testing.assert_array_equal(read_arrays(tmp_path / "d")["loss"], rows["loss"][:, :3])
    files = DrawFiles(tmp_path / "d", like, 2)
    files.append(jax.tree.map(lambda x: x[:, 2:], rows))
    for found, wanted in zip(jax.tree.leaves(files.read()), jax.tree.leaves(rows), strict=True):
        assert isinstance(found, np.memmap)
        np.testing.assert_array_equal(found, wanted)
    assert read_arrays(tmp_path / "d").keys() == {"loss", "w.a"}
    with pytest.raises(InputError, match="holds no draws"):
        read_arrays(tmp_path / "nowhere")

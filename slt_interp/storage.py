"""What is kept on disk: run directories of studies, checkpoints of chains and their draws.

A run directory holds `config.json` (what was asked), `stages/` (what each finished stage found, so that an interrupted
run goes on from there), `results.json` (everything a report says) and `environment.json` (versions, device, times).
`results.json` and its arrays depend on the configuration only: no paths, dates or timings.
"""

import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
from jaxtyping import PyTree

from slt_interp.errors import InputError

Arrays = dict[str, np.ndarray]


class RunDirectory:
    """One run of a study on disk. Make it with `open_run` (to compute) or `read_run` (to report)."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def config(self) -> dict[str, Any]:
        """What was asked: the study's name, preset and settings."""
        return _read_json(self.path / "config.json")

    @property
    def environment(self) -> dict[str, Any]:
        """Versions, device and seconds per stage."""
        return _read_json(self.path / "environment.json")

    @property
    def results(self) -> dict[str, Any]:
        """What the study found, by stage."""
        return _read_json(self.path / "results.json")

    @property
    def is_finished(self) -> bool:
        """Whether every stage is done: `results.json` is written last."""
        return (self.path / "results.json").exists()

    def arrays(self, stage: str) -> Arrays:
        """Read the arrays of a finished stage."""
        path = self.path / "stages" / f"{stage}.npz"
        try:
            with open(path, "rb") as file, np.load(file) as arrays:
                return dict(arrays)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(_damaged(path, error)) from None

    def stage(self, name: str, compute: Callable[[], tuple[dict[str, Any], Arrays]]) -> tuple[dict[str, Any], Arrays]:
        """Compute a stage, or read what an earlier run of this directory found.

        Args:
            name: the stage's name.
            compute: returns numbers and words (anything JSON can hold, NaN becoming null) and named arrays.

        Returns:
            What `compute` returned, as it is read back from disk.
        """
        folder = self.path / "stages"
        folder.mkdir(exist_ok=True)
        if not (folder / f"{name}.json").exists():
            start = time.perf_counter()
            found, arrays = compute()
            with _replacing(folder / f"{name}.npz") as part, open(part, "wb") as file:
                np.savez_compressed(file, allow_pickle=False, **arrays)
            environment = self.environment
            environment["seconds"][name] = round(time.perf_counter() - start, 2)
            _write_json(self.path / "environment.json", environment)
            _write_json(folder / f"{name}.json", found)
        return _read_json(folder / f"{name}.json"), self.arrays(name)

    def finish(self, results: dict[str, Any]) -> None:
        """Write `results.json`, which marks the run as finished."""
        _write_json(self.path / "results.json", results)


def open_run(path: Path, config: dict[str, Any]) -> RunDirectory:
    """Make a run directory, or go on with one that holds the same configuration.

    Raises:
        InputError: if the directory holds another configuration, or other files; nothing in it is touched.
    """
    config = json.loads(_dump_json(config))
    run = RunDirectory(path)
    if (path / "config.json").exists():
        differing = _difference(run.config, config)
        if differing:
            raise InputError(f"{path} holds another run ({differing}): give another --out, or remove that directory")
    elif path.is_dir() and any(file.suffix != _PART for file in path.iterdir()):
        raise InputError(f"{path} holds files but no config.json, so it is no run directory: give another --out")
    elif path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file, but a directory was expected: give another --out")
    else:
        path.mkdir(parents=True, exist_ok=True)
        _write_json(path / "config.json", config)
    if not (path / "environment.json").exists():
        _write_json(path / "environment.json", _environment())
    return run


def read_run(path: Path) -> RunDirectory:
    """Open a finished run directory.

    Raises:
        InputError: if it is not there, is no run directory or is not finished.
    """
    run = RunDirectory(path)
    if not (path / "config.json").exists():
        raise InputError(f"{path} is no run directory (it has no config.json): give the directory that `run` wrote")
    if not run.is_finished:
        raise InputError(f"{path} is not finished (it has no results.json): repeat the command that made it, and it goes on")
    return run


class Checkpoints:
    """The state of a run in a directory of its own, written by orbax under growing numbers; the last ones are kept.

    A checkpoint is complete or absent, whenever the process dies.
    """

    def __init__(self, path: str | Path, identity: str):
        import orbax.checkpoint as ocp

        self._orbax = ocp
        path = Path(path).absolute()
        known = path.exists() and any(path.iterdir())
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, max_to_keep=2)
        self._manager = ocp.CheckpointManager(path, options=options, metadata={"identity": identity})
        found = (self._manager.metadata().custom_metadata or {}).get("identity")
        if known and found != identity:
            raise InputError(
                f"{path} holds another run (another key, kernel, start, data, collect, counts or precision): give "
                "another directory, or remove that one"
            )

    def save(self, number: int, tree: PyTree) -> None:
        """Save a pytree of arrays under a number larger than every earlier one."""
        leaves = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
        self._manager.save(number, args=self._orbax.args.StandardSave(leaves))

    def restore(self, like: PyTree) -> tuple[int, PyTree] | None:
        """Read the last checkpoint, in the structure of `like`, with its number; None if there is none."""
        number = self._manager.latest_step()
        if number is None:
            return None
        structure = jax.tree.structure(like)
        leaves = self._manager.restore(number, args=self._orbax.args.StandardRestore())
        return number, structure.unflatten(np.asarray(leaves[str(i)]) for i in range(structure.num_leaves))


class DrawFiles:
    """Draws on disk as they come: one .npy file per array, axes (draw, chain, *event), which any reader of .npy opens.

    Every file is valid at any time: its header counts the draws that are complete.

    Args:
        path: a directory, made if need be.
        like: pytree of what one draw of all chains is: shapes and dtypes (chain, *event).
        num_draws: draws to keep of what is there already; later ones are cut off.
    """

    def __init__(self, path: Path, like: PyTree[jax.ShapeDtypeStruct], num_draws: int):
        path.mkdir(parents=True, exist_ok=True)
        leaves, self._structure = jax.tree_util.tree_flatten_with_path(like)
        self._files = [(path / f"{_file_name(keys)}.npy", leaf) for keys, leaf in leaves]
        if len({file for file, _ in self._files}) < len(leaves):
            raise InputError(f"two arrays would have one file name in {path}: rename the keys of what collect returns")
        self.num_draws = num_draws
        for file, leaf in self._files:
            there = file.stat().st_size if file.exists() else 0
            if num_draws and there < num_draws * self._row(leaf):
                raise InputError(f"{file} is damaged (it lacks some of {num_draws} draws): restore it, or remove the whole run")
        for file, leaf in self._files:
            if not num_draws:
                # A reader that comes early must not find a file without a header.
                with _replacing(file) as part, open(part, "wb") as stream:
                    self._write_header(stream, leaf)
                continue
            with open(file, "r+b") as stream:
                self._write_header(stream, leaf)
                stream.truncate(stream.tell() + num_draws * self._row(leaf))

    def append(self, draws: PyTree[np.ndarray]) -> None:
        """Write draws (chain, draw, *event) behind the others."""
        leaves = jax.tree.leaves(draws)
        for (file, leaf), values in zip(self._files, leaves, strict=True):
            with open(file, "r+b") as stream:
                self._write_header(stream, leaf)
                stream.seek(self.num_draws * self._row(leaf), os.SEEK_CUR)
                # A megabyte at a time: no second copy of the chunk.
                piece = max(1, 2**20 // max(1, self._row(leaf)))
                for start in range(0, values.shape[1], piece):
                    rows = np.ascontiguousarray(np.swapaxes(values[:, start : start + piece], 0, 1))
                    stream.write(rows.reshape(-1).view(np.uint8).data)
                stream.flush()
                os.fsync(stream.fileno())
        self.num_draws += leaves[0].shape[1]
        for file, leaf in self._files:
            with open(file, "r+b") as stream:
                self._write_header(stream, leaf)

    def read(self) -> PyTree[np.ndarray]:
        """Map all draws into memory, (chain, draw, *event)."""
        return self._structure.unflatten([_map_draws(file, leaf.dtype) for file, leaf in self._files])

    def _row(self, leaf: jax.ShapeDtypeStruct) -> int:
        return math.prod(leaf.shape) * leaf.dtype.itemsize

    def _write_header(self, stream: IO[bytes], leaf: jax.ShapeDtypeStruct) -> None:
        # numpy leaves room in the header for the first axis to grow.
        shape = (self.num_draws, *leaf.shape)
        descr = np.lib.format.dtype_to_descr(np.dtype(leaf.dtype))
        np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})


def check_no_draws(path: Path) -> None:
    """Raise InputError if there are draws that a new run would overwrite."""
    if any(path.glob("*.npy")):
        raise InputError(f"{path} holds draws of a run whose state is gone: give another directory, or remove this one")


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Map what `DrawFiles` has written into memory, by name, (chain, draw, *event).

    Raises:
        InputError: if there is nothing.
    """
    files = sorted(path.glob("*.npy"))
    arrays = {file.stem: _map_draws(file) for file in files}
    if not arrays:
        raise InputError(f"{path} holds no draws: give the directory that `sample` was given as checkpoint")
    # While a run goes on, one file may be a chunk ahead of another.
    complete = min(array.shape[1] for array in arrays.values())
    return {name: array[:, :complete] for name, array in arrays.items()}


def _map_draws(file: Path, dtype: np.dtype | None = None) -> np.ndarray:
    array = np.load(file, mmap_mode="r")
    # .npy has no name for bfloat16 and its kin.
    return np.swapaxes(array if dtype is None else array.view(dtype), 0, 1)


def _file_name(path: tuple) -> str:
    return re.sub(r"[^\w.-]", "_", jax.tree_util.keystr(path, simple=True, separator="."))


def fingerprint(tree: PyTree, *settings: Any) -> str:
    """Hash a pytree (structure, static fields, dtypes and values) and settings, by their repr without addresses."""
    structure = re.sub(r" at 0x[0-9a-f]+", "", repr((jax.tree.structure(tree), settings)))
    digest = hashlib.sha256(structure.encode())
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def _environment() -> dict[str, Any]:
    device = jax.devices()[0]
    packages = ("slt_interp", "jax", "jaxlib", "numpy", "flax", "optax", "numpyro", "matplotlib")
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": {"kind": device.device_kind, "backend": device.platform, "count": jax.device_count()},
        "cpu_count": os.cpu_count(),
        "versions": {package: metadata.version(package) for package in packages},
        "seconds": {},
    }


def _difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str:
    """Name the first setting in which two configurations differ; empty if they do not."""
    for name in sorted(old.keys() | new.keys()):
        if isinstance(old.get(name), dict) and isinstance(new.get(name), dict):
            found = _difference(old[name], new[name], f"{prefix}{name}.")
            if found:
                return found
        elif old.get(name) != new.get(name):
            return f"{prefix}{name} = {old.get(name)} there, {new.get(name)} here"
    return ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(_damaged(path, error)) from None


def _damaged(path: Path, error: Exception) -> str:
    return f"{path} is damaged ({error}): remove it if it lies in stages/, or the whole directory, and run again"


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with _replacing(path) as part:
        part.write_text(_dump_json(value) + "\n")


_PART = ".part"
"""Ending of a file that is being written; one that is left over means nothing."""


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Write beside a file, then take its place: a reader sees the old file or the new one, never half of one."""
    part = path.with_name(path.name + _PART)
    yield part
    part.replace(path)


def _dump_json(value: Any) -> str:
    return json.dumps(_plain(value), indent=1, allow_nan=False)


def _plain(value: Any) -> Any:
    """Turn arrays and dataclasses into what JSON holds; what is not a finite number is unknown: null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value

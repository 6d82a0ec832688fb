"""What a study is: a configuration with three presets, and a function from it to a finished run directory."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slt_interp.errors import InputError
from slt_interp.storage import RunDirectory, open_run

PRESETS = ("smoke", "default", "full")


@dataclass(frozen=True)
class Study:
    """An end-to-end study.

    Attributes:
        name: as the command line says it.
        description: one sentence.
        check: `config -> None`; raises InputError for settings that cannot be used, before anything is written.
        presets: for each name in `PRESETS`, a frozen dataclass of settings (one class for all three).
        compute: `(config, run, progress) -> results`; computes by stages of the run directory.
        summarize: `results -> [(quantity, value)]`, the short table that is printed after a run.
    """

    name: str
    description: str
    check: Callable[[Any], None]
    presets: Mapping[str, Any]
    compute: Callable[[Any, RunDirectory, bool], dict[str, Any]]
    summarize: Callable[[dict[str, Any]], list[tuple[str, str]]]


def run_study(study: Study, config: Any, out: Path, *, preset: str, progress: bool = True) -> RunDirectory:
    """Run a study into a directory; a finished one is left as it is, an unfinished one goes on after its last stage.

    Args:
        study: what to run.
        config: its settings.
        out: the run directory, new or of an equal configuration.
        preset: where the settings started, recorded for the report.
        progress: whether to show progress bars.

    Raises:
        InputError: for settings that cannot be used, and if the directory holds another configuration.
    """
    study.check(config)
    run = open_run(out, {"study": study.name, "preset": preset, "settings": asdict(config)})
    if not run.is_finished:
        run.finish(study.compute(config, run, progress))
    return run


def check_preset(study: Study, preset: str) -> Any:
    """Return the settings of a preset; raise InputError, listing the presets, if there is no such one."""
    if preset not in study.presets:
        raise InputError(f"there is no preset {preset!r} of {study.name}: choose one of {', '.join(PRESETS)}")
    return study.presets[preset]


def check_ranges(config: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Raise InputError for the first setting that lies outside its range; those that are None pass."""
    for name, (low, high) in ranges.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise InputError(f"{name} must lie between {low:g} and {high:g}, but is {value}: change --{name.replace('_', '-')}")

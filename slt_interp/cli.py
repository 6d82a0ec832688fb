"""The command line: `slt-interp list | run STUDY | report DIR`."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Generic, TypeVar

import jax
import platformdirs
import threadpoolctl
import tyro

from slt_interp.errors import InputError
from slt_interp.report.render import render
from slt_interp.studies import STUDIES, check_preset, run_study


def main() -> None:
    """Run the command line; input that cannot be used gives one sentence and exit code 2."""
    arguments = sys.argv[1:]
    try:
        if arguments[:1] == ["run"] and arguments[1:2] not in ([], ["-h"], ["--help"]):
            _run(arguments[1], arguments[2:])
        else:
            commands = {"list": list_studies, "run": run, "report": report}
            tyro.extras.subcommand_cli_from_dict(commands, prog="slt-interp", args=arguments, description=__doc__)
    except InputError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        print("\nslt-interp: interrupted; the same command goes on after the last finished stage", file=sys.stderr)
        sys.exit(130)


def list_studies() -> None:
    """List the studies."""
    for study in STUDIES.values():
        print(f"{study.name}: {study.description}")


def run(study: tyro.conf.Positional[str]) -> None:
    """Run a study and write its report; `slt-interp run STUDY --help` lists its settings.

    Args:
        study: a name that `slt-interp list` prints.
    """
    _run(study, [])


def report(directory: tyro.conf.Positional[Path]) -> None:
    """Write the report of a finished run again, from what its directory holds.

    Args:
        directory: what `slt-interp run` wrote.
    """
    print(render(directory))


Settings = TypeVar("Settings")


@dataclass(frozen=True)
class _Arguments(Generic[Settings]):
    settings: Annotated[Settings, tyro.conf.arg(name="")]
    preset: str
    """Settings to start from: smoke, default or full."""
    out: Path
    """Run directory. A finished one is only rendered again; an unfinished one goes on after its last stage."""
    progress: bool = True
    """Show progress bars."""


def _run(name: str, arguments: list[str]) -> None:
    if name not in STUDIES:
        raise InputError(f"there is no study {name!r}: choose one of {', '.join(STUDIES)}")
    study = STUDIES[name]
    preset = _preset(arguments)
    settings = check_preset(study, preset)
    parsed = tyro.cli(
        _Arguments[type(settings)],
        default=_Arguments(settings, preset, Path("runs") / name),
        args=arguments,
        prog=f"slt-interp run {name}",
        description=study.description,
    )
    _prepare_jax(quick_to_compile=preset == "smoke")
    directory = run_study(study, parsed.settings, parsed.out, preset=preset, progress=parsed.progress)
    page = render(parsed.out)
    rows = study.summarize(directory.results)
    width = max(len(quantity) for quantity, _ in rows)
    print("\n".join(f"{quantity:<{width}}  {value}" for quantity, value in rows))
    print(f"report: {page}")


def _preset(arguments: list[str]) -> str:
    """Find the preset before anything is parsed: it decides the defaults of all other settings."""
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if word == "--preset":
            return following
        if word.startswith("--preset="):
            return word.removeprefix("--preset=")
    return "default"


def _prepare_jax(*, quick_to_compile: bool) -> None:
    """Use every core as a device for chains, and keep compiled programs between runs.

    Small systems of equations are solved by one thread: BLAS's own threads wait for each other by spinning, and beside another
    process on the same cores that took a hundred times as long.

    A smoke run spends its time in the compiler, so there XLA is asked for less.
    """
    import scipy.linalg.lapack  # noqa: F401  the BLAS that JAX calls, which limits are set on once it is loaded

    threadpoolctl.threadpool_limits(1, user_api="blas")
    jax.config.update("jax_disable_most_optimizations", quick_to_compile)
    if quick_to_compile and jax.__version_info__ < (0, 11):
        # Where it is known; XLA ends a process that names a flag which is not.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jax.config.update("jax_num_cpu_devices", cores)
    jax.config.update("jax_compilation_cache_dir", platformdirs.user_cache_dir("slt_interp"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _fail(sentence: str) -> None:
    print(f"slt-interp: error: {sentence}", file=sys.stderr)
    sys.exit(2)

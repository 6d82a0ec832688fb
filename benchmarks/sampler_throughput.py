"""How many gradients per second each kernel makes, beside a bare loop of the same gradients, torch and devinterp.

    python benchmarks/sampler_throughput.py {default | smoke} [--out DIR] [--peer-python PYTHON] [--help for every setting]

Every section is a process of its own, pinned to its cores (`measure.py`). Rivals of one workload take turns within one
process, A B C A B C ..., so that what else the machine does hits all alike. Compile time is apart. The run directory holds
`config.json`, `environment.json` (versions and devices) and `results.json`; the times are the results here.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Sections run in processes of their own, and this one must leave them the accelerator's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import tyro

from slt_interp.storage import RunDirectory, open_run


@dataclass(frozen=True)
class Config:
    """What is measured, and for how long."""

    workloads: tuple[str, ...] = ("deep_linear", "mlp", "transformer")
    kernels: tuple[str, ...] = ("SGLD", "SGLD-LM", "RMSPropSGLD", "SGHMC", "SGNHT", "MALA", "HMC", "NUTS")
    peer_python: str | None = None
    """An interpreter that has torch and devinterp; without it their numbers are null."""
    step_size: float = 1e-4
    seconds: float = 1.0
    """Of one repetition of one rival."""
    repetitions: int = 5
    scaling_chains: tuple[int, ...] = (1, 4, 16, 64, 256, 1024)
    scaling_draws: int = 1000
    memory_steps: int = 1_000_000
    thinning: int = 100


SMOKE = Config(
    workloads=("deep_linear",),
    kernels=("SGLD",),
    seconds=0.02,
    repetitions=2,
    scaling_chains=(1, 4),
    scaling_draws=10,
    memory_steps=2000,
    thinning=10,
)

ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def main(config: Config, out: Path) -> RunDirectory:
    """Run every section that is not finished yet, and write the results."""
    settings = dataclasses.asdict(config)
    # Whether there were peers is part of what was asked, where they lie is not.
    asked = settings | {"peer_python": config.peer_python and Path(config.peer_python).name}
    run = open_run(out, {"benchmark": "sampler_throughput", "settings": asked})
    cores = sorted(os.sched_getaffinity(0))
    shared = settings | {"peer_python": None}
    on_cpu = {"JAX_PLATFORMS": "cpu"}
    one_core = partial(_section, cores=cores[-1:], environment=on_cpu | {"XLA_FLAGS": ONE_THREAD})
    all_cores = partial(_section, cores=cores, environment=on_cpu | {"JAX_NUM_CPU_DEVICES": str(len(cores))})
    accelerated = partial(_section, cores=cores, environment={})

    sections = {
        "one_core": lambda: one_core("throughput", settings | {"use_mesh": False}),
        "all_cores": lambda: all_cores("throughput", shared | {"use_mesh": True}),
        "second_call": lambda: one_core("second_call", shared),
        "second_process": lambda: _second_process(shared, cores),
        "memory": lambda: one_core("memory", shared),
    }
    if jax.default_backend() != "cpu":
        sections["accelerator"] = lambda: accelerated("throughput", shared | {"use_mesh": False})
        sections["accelerator_scaling"] = lambda: accelerated("scaling", shared)
    results: dict[str, Any] = {"accelerator": None, "accelerator_scaling": None}
    for name, measure in sections.items():
        print(f"measuring {name}", file=sys.stderr, flush=True)
        results[name], _ = run.stage(name, lambda measure=measure: (measure(), {}))
    run.finish(results)
    return run


def table(results: dict[str, Any]) -> str:
    """Lay the throughput out for reading: gradients per second, and the time of one over the bare loop's."""
    lines = []
    for place in ("one_core", "all_cores", "accelerator"):
        for workload, found in (results[place] or {}).items():
            lines.append(f"{place}, {workload} (matrix products: {found['matmul_gigaflops']['median']:.0f} GF/s)")
            for rival, rate in found["gradients_per_second"].items():
                cost = found["seconds_per_gradient_over_bare"].get(rival, 1.0)
                spread = f"[{rate['low']:.1f}, {rate['high']:.1f}]"
                share = found["share_of_matmul_rate"][rival]
                lines.append(
                    f"  {rival:12} {rate['median']:10.1f} {spread:22} {cost:6.2f} x bare  {share:4.0%} of the roofline"
                )
    return "\n".join(lines)


def _section(name: str, settings: dict[str, Any], cores: list[int], environment: dict[str, str]) -> dict[str, Any]:
    """Run one section of `measure.py` on the given cores; what it starts inherits them."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("measure.py")), name, *map(str, cores)],
        input=json.dumps(settings),
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def _second_process(settings: dict[str, Any], cores: list[int]) -> dict[str, Any]:
    """Start two processes after one another that share a compilation cache, empty at first."""
    found = {}
    for workload in settings["workloads"]:
        with tempfile.TemporaryDirectory() as cache:
            environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ONE_THREAD, "JAX_COMPILATION_CACHE_DIR": cache}
            run = partial(_section, "first_step", settings | {"workload": workload}, cores[-1:], environment)
            found[workload] = {"cold": run(), "warm": run()}
    return found


@dataclass(frozen=True)
class _Arguments:
    config: tyro.conf.OmitArgPrefixes[Config]
    out: Path
    """Run directory. An unfinished one goes on after its last section."""


if __name__ == "__main__":
    folder = Path("runs") / "sampler_throughput"
    presets = {
        "default": ("Everything: some ten minutes on a CPU.", _Arguments(Config(), folder)),
        "smoke": ("See in a minute that it works.", _Arguments(SMOKE, folder)),
    }
    arguments = tyro.extras.overridable_config_cli(presets, description=__doc__)
    print(table(main(arguments.config, arguments.out).results))

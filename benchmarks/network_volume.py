"""What the volume of a trained network's basin takes by tempering and by subset simulation, and whether they agree.

    python benchmarks/network_volume.py {default | smoke} [--out DIR] [--help for every setting]

The network of the study `hierarchical-equality`, trained here, under Gaussian base measures around its weights and under that
which networks are initialized from. Every base, method and seed is a stage: a run that was cut short goes on after its last.
Beside them, once for each base, the Gaussian estimate.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import threadpoolctl
import tyro

from slt_interp import Gaussian
from slt_interp.errors import InputError
from slt_interp.estimators.subset import subset_simulation
from slt_interp.estimators.volume import gaussian_volume, tempered_volume
from slt_interp.estimators.volume_estimate import VolumeEstimate
from slt_interp.storage import RunDirectory, open_run
from slt_interp.studies.hierarchical_equality import NETWORK
from slt_interp.studies.networks import SmoothedCrossEntropy, pack, unpack
from slt_interp.tasks.hierarchical_equality import FreshExamples
from slt_interp.training import polish, train
from slt_interp.tree import Params

METHODS = ("tempering", "subset", "gaussian")


@dataclass(frozen=True)
class Config:
    """What is measured."""

    bases: tuple[str, ...] = ("0.1", "0.3", "init")
    """Standard deviations around the weights, or `init`: around 0, with variance 1 / fan-in."""
    methods: tuple[str, ...] = METHODS
    thresholds: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    """Nats above the loss at the weights."""
    num_seeds: int = 1
    """Calls of each method."""
    num_chains: int = 4
    num_draws: tuple[int, ...] = (120, 800, 50)
    """Of tempering, under each base."""
    num_particles: tuple[int, ...] = (40, 200, 25)
    """Of a seed of subset simulation, under each base: errors fall with their number."""
    num_descents: int = 4
    """Independent seeds within a call of subset simulation, of one round."""
    num_examples: int = 4096
    label_smoothing: float = 0.0
    """Of the loss: that of the study has 0.04, and is polished for 500 steps."""
    train_steps: int = 8000
    train_batch: int = 1024
    learning_rate: float = 3e-3
    polish_steps: int = 0
    """With hard labels polishing leaves no loss, and weights grow without end."""


SMOKE = Config(
    bases=("0.1",),
    methods=("subset", "gaussian"),
    thresholds=(0.3, 1.0),
    num_draws=(200,),
    num_particles=(20,),
    num_examples=256,
    train_steps=500,
    train_batch=256,
)


def main(config: Config, out: Path) -> RunDirectory:
    """Measure what is not finished yet, and write rows."""
    for name, numbers in (("num_draws", config.num_draws), ("num_particles", config.num_particles)):
        if len(numbers) != len(config.bases):
            raise InputError(
                f"{name} must have one number for each of the {len(config.bases)} bases, but has {len(numbers)}: give as many,"
                " as in --bases 0.1 0.3 --num-draws 200 1600 --num-particles 25 100"
            )
    run = open_run(out, {"benchmark": "network_volume", "settings": dataclasses.asdict(config)})
    trained, arrays = run.stage("training", partial(_train, config))
    rows: list[dict[str, Any]] = []
    for base in config.bases:
        for method in config.methods:
            for seed in range(1 if method == "gaussian" else config.num_seeds):
                name = f"{method} at {base}, seed {seed}"
                print(name, file=sys.stderr, flush=True)
                found, _ = run.stage(name, partial(_measure, config, unpack(NETWORK, arrays), base, method, seed))
                rows += found["rows"]
    run.finish({"training": trained, "rows": rows, "agreement": _agreement(rows)})
    return run


def table(results: dict[str, Any]) -> str:
    """Lay the rows out for reading, and the agreement of the two methods that sample."""
    lines = []
    for row in results["rows"]:
        value = "no number" if row["log_volume"] is None else f"{row['log_volume']:9.2f} +- {row['std_error']:.2f}"
        lines.append(
            f"base {row['base']}, {row['method']:9} seed {row['seed']}: ln V({row['threshold']:g}) = {value}; "
            f"{row['num_losses']:.3g} losses, {row['num_gradients']:.3g} gradients, {row['seconds']:.0f} s and "
            f"{row['compile_seconds']:.0f} s of compilation; {row['status']}"
        )
    for row in results["agreement"]:
        lines.append(
            f"base {row['base']}, threshold {row['threshold']:g}: tempering less subset simulation "
            f"{row['gap']:+.2f} +- {row['std_error']:.2f}"
        )
    return "\n".join(lines)


def _train(config: Config) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    init_key, train_key = jax.random.split(jax.random.key(0))
    loss_fn = SmoothedCrossEntropy(NETWORK, config.label_smoothing)
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.train_steps))
    settings = {"num_steps": config.train_steps, "progress": False}
    trained = train(train_key, loss_fn, NETWORK.init(init_key), FreshExamples(config.train_batch), optimizer, **settings)
    params, data = trained.params, _data(config)
    if config.polish_steps:
        params = polish(loss_fn, params, data, num_steps=config.polish_steps).params
    return {"excess_loss": float(loss_fn(params, data)) - loss_fn.floor}, pack(params)


def _data(config: Config) -> dict[str, jax.Array]:
    return FreshExamples(config.num_examples)(jax.random.key(1))


def _measure(config: Config, params: Params, base: str, method: str, seed: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    thresholds = np.array(config.thresholds)
    start = time.perf_counter()
    with _compile_seconds() as compiling:
        try:
            found = _ask(config, params, base, method, seed, thresholds)
        except InputError as error:
            unknown = np.full(len(thresholds), np.nan)
            found = VolumeEstimate(thresholds, unknown, unknown, method, "nothing", str(error), (str(error),), {})
    seconds = time.perf_counter() - start
    num_losses, num_gradients = _cost(method, found.diagnostics)
    shared = {
        "base": base,
        "method": method,
        "seed": seed,
        "status": found.status,
        "warnings": list(found.warnings),
        "num_losses": num_losses,
        "num_gradients": num_gradients,
        "seconds": seconds - sum(compiling),
        "compile_seconds": sum(compiling),
    }
    values = zip(thresholds, found.log_volume, found.std_error, strict=True)
    rows = [shared | {"threshold": float(t), "log_volume": _finite(v), "std_error": _finite(e)} for t, v, e in values]
    return {"rows": rows}, {}


def _base(name: str, params: Params) -> Gaussian:
    if name != "init":
        return Gaussian(params, float(name))
    layers = params["layers"].items()
    scales = {i: {leaf: jnp.full(w.shape, len(layer["kernel"]) ** -0.5) for leaf, w in layer.items()} for i, layer in layers}
    return Gaussian(0.0, {"layers": scales})


def _ask(config: Config, params: Params, base: str, method: str, seed: int, thresholds: np.ndarray) -> VolumeEstimate:
    place = config.bases.index(base)
    ask = {
        "tempering": partial(
            tempered_volume, num_chains=config.num_chains, num_draws=config.num_draws[place], max_rounds=1, progress=False
        ),
        "subset": partial(
            subset_simulation,
            num_particles=config.num_particles[place],
            num_seeds=config.num_descents,
            max_rounds=1,
            progress=False,
        ),
        "gaussian": gaussian_volume,
    }[method]
    loss_fn = SmoothedCrossEntropy(NETWORK, config.label_smoothing)
    return ask(jax.random.key(seed + 2), loss_fn, params, _data(config), thresholds, base=_base(base, params))


def _cost(method: str, diagnostics: dict[str, Any]) -> tuple[float, float]:
    """Count losses and gradients; those of a Hessian's products are not counted."""
    if method == "tempering":
        # Each gradient of a trajectory comes with its loss.
        gradients = diagnostics.get("gradients", 0.0)
        return gradients, gradients
    # A step that meets the level takes a gradient and a second loss.
    steps, reflected = diagnostics.get("num_steps", 0), 1 - np.nan_to_num(diagnostics.get("progress", 1.0), nan=1.0)
    return steps * (1 + reflected), steps * reflected


@contextmanager
def _compile_seconds() -> Iterator[list[float]]:
    """Collect the durations of tracing, lowering and compiling within."""
    durations: list[float] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            durations.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield durations
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _agreement(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare first seeds at the thresholds to which both methods give a number."""
    known = {
        (row["method"], row["base"], row["threshold"]): row
        for row in rows
        if row["seed"] == 0 and row["log_volume"] is not None
    }
    found = []
    for (method, base, threshold), row in known.items():
        rival = known.get(("subset", base, threshold))
        if method == "tempering" and rival is not None:
            gap, error = row["log_volume"] - rival["log_volume"], float(np.hypot(row["std_error"], rival["std_error"]))
            found.append({"base": base, "threshold": threshold, "gap": gap, "std_error": error})
    return found


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


@dataclass(frozen=True)
class _Arguments:
    config: tyro.conf.OmitArgPrefixes[Config]
    out: Path
    """Run directory. An unfinished one goes on after its last stage."""


if __name__ == "__main__":
    folder = Path("runs") / "network_volume"
    presets = {
        "default": ("Every method under every base measure.", _Arguments(Config(), folder)),
        "smoke": ("See in a minute that it works.", _Arguments(SMOKE, folder)),
    }
    arguments = tyro.extras.overridable_config_cli(presets, description=__doc__)
    # Threads of BLAS spin while they wait: beside another process a reading took minutes instead of seconds.
    threadpoolctl.threadpool_limits(1, user_api="blas")
    # Before JAX is used: a device for every core, as on the command line.
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    print(table(main(arguments.config, arguments.out).results))

"""What probes of small networks cost: training several, fitting an alignment, interchange accuracy over draws.

    python benchmarks/probe_speed.py {default | smoke} [--out DIR] [--help for every setting]

All on the hierarchical-equality network of 850 weights. Each thing is done as one program over all cases, and as a Python loop
over programs of one case; twice, of which the first includes compilation and the second is the cost.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from slt_interp import over_draws
from slt_interp.probes.alignment import fit_alignment, random_rotations
from slt_interp.probes.interchange import Alignment, InterchangeProbe, block_masks
from slt_interp.storage import RunDirectory, open_run
from slt_interp.studies.hierarchical_equality import NETWORK
from slt_interp.studies.networks import SMOOTHING, SmoothedCrossEntropy
from slt_interp.tasks.hierarchical_equality import FreshExamples, draw_counterfactuals


@dataclass(frozen=True)
class Config:
    """What is measured."""

    num_networks: int = 8
    """Trained at once."""
    train_steps: int = 3000
    train_batch: int = 1024
    alignment_steps: int = 1000
    alignment_restarts: int = 3
    num_draws: int = 64
    sizes: tuple[int, ...] = (1, 4, 8)
    """Directions of each of two variables."""
    num_examples: int = 4096
    """On which interchange accuracy is measured."""


SMOKE = Config(num_networks=2, train_steps=10, train_batch=64, alignment_steps=10, num_draws=4, num_examples=128)


def main(config: Config, out: Path) -> RunDirectory:
    """Run what is not finished yet."""
    run = open_run(out, {"benchmark": "probe_speed", "settings": dataclasses.asdict(config)})
    stages = {"training": _training, "alignment": _alignment, "interchange": _interchange}
    run.finish({name: run.stage(name, lambda f=function: (f(config), {}))[0] for name, function in stages.items()})
    return run


def table(results: dict[str, Any]) -> str:
    """Lay the results out for reading."""
    lines = []
    for name, row in results.items():
        ways = [(way, row[way]) for way in ("together", "loop") if way in row]
        costs = ", ".join(f"{way} {x['seconds']:.2f} s (first time {x['first_seconds']:.1f})" for way, x in ways)
        lines.append(f"{name:12} {row['what']}: {costs}")
    return "\n".join(lines)


def _training(config: Config) -> dict[str, Any]:
    loss_fn, batches = SmoothedCrossEntropy(NETWORK, SMOOTHING), FreshExamples(config.train_batch)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, config.train_steps))

    def train(key: jax.Array) -> Any:
        init_key, data_key = jax.random.split(key)
        params = NETWORK.init(init_key)

        def step(t: jax.Array, carry: Any) -> Any:
            params, state = carry
            gradient = jax.grad(loss_fn)(params, batches(jax.random.fold_in(data_key, t)))
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, config.train_steps, step, (params, optimizer.init(params)))[0]

    keys = jax.random.split(jax.random.key(0), config.num_networks)
    together, one = jax.jit(jax.vmap(train)), jax.jit(train)
    return {
        "what": f"{config.num_networks} networks, {config.train_steps} steps of {config.train_batch} examples",
        "together": _timed(lambda: together(keys)),
        "loop": _timed(lambda: [one(key) for key in keys]),
    }


def _alignment(config: Config) -> dict[str, Any]:
    params = NETWORK.init(jax.random.key(1))
    return {
        "what": f"one fit, {config.alignment_steps} steps, {config.alignment_restarts} restarts at once",
        "together": _timed(
            lambda: (
                fit_alignment(
                    jax.random.key(2),
                    NETWORK,
                    params,
                    "layer1",
                    (8, 8),
                    draw_counterfactuals,
                    num_steps=config.alignment_steps,
                    num_restarts=config.alignment_restarts,
                    held_out=config.num_examples,
                ).restart_iia
            )
        ),
    }


def _interchange(config: Config) -> dict[str, Any]:
    draws = jax.vmap(NETWORK.init)(jax.random.split(jax.random.key(3), config.num_draws))
    draws = jax.tree.map(lambda x: x[None], draws)
    examples, rotation = (
        draw_counterfactuals(jax.random.key(4), config.num_examples),
        random_rotations(jax.random.key(5), 1, 16)[0],
    )
    probes = [
        InterchangeProbe(NETWORK, site, Alignment(rotation, block_masks((size, size), 16)), examples)
        for site in NETWORK.hidden_sites
        for size in config.sizes
    ]
    key, one = jax.random.key(6), jax.jit(lambda probe, params: probe(jax.random.key(6), params)["iia"])
    flat = [jax.tree.map(lambda x, i=i: x[0, i], draws) for i in range(config.num_draws)]
    return {
        "what": f"{config.num_draws} draws x {len(NETWORK.hidden_sites)} layers x {len(config.sizes)} sizes of variables",
        "together": _timed(lambda: [over_draws(key, probe, draws)["iia"] for probe in probes]),
        "loop": _timed(lambda: [one(probe, params) for probe in probes for params in flat]),
    }


def _timed(function: Callable[[], Any]) -> dict[str, float]:
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        jax.block_until_ready(jax.tree.map(lambda x: x if isinstance(x, np.ndarray) else jnp.asarray(x), function()))
        seconds.append(time.perf_counter() - start)
    return {"first_seconds": seconds[0], "seconds": seconds[1]}


@dataclass(frozen=True)
class _Arguments:
    config: tyro.conf.OmitArgPrefixes[Config]
    out: Path
    """Run directory. An unfinished one goes on after its last section."""


if __name__ == "__main__":
    folder = Path("runs") / "probe_speed"
    presets = {
        "default": ("Everything.", _Arguments(Config(), folder)),
        "smoke": ("See in a minute that it works.", _Arguments(SMOKE, folder)),
    }
    arguments = tyro.extras.overridable_config_cli(presets, description=__doc__)
    print(table(main(arguments.config, arguments.out).results))

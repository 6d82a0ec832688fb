"""How often verdicts on circuits are right: `naturalness` on circuits and illusions that are known, without knobs.

    python benchmarks/operating_table.py {default | smoke} [--out DIR] [--help for every setting]

Circuits: the genuine and the redundant one of networks built by hand (`degradation.cells`), those put in by interchange
training, and those that a search finds in a network trained on the task alone. Illusions: planted, pinned by a second answer
(with the whole loss, and with that of the task's answer alone), noisy and null ones. Each is judged as a user would judge it:
`measure_survival` with its own localization, then `naturalness`.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from scipy.stats import binomtest

from slt_interp.degradation.cells import ENTITY_SIZE, VARIABLE, Answers, build_cells
from slt_interp.degradation.cells import SITE as CELL_SITE
from slt_interp.degradation.naturalness import HELD, Survival, naturalness
from slt_interp.degradation.survival import measure_survival
from slt_interp.models.mlp import MLP
from slt_interp.probes.alignment import fit_alignment
from slt_interp.probes.interchange import Alignment
from slt_interp.storage import Arrays, RunDirectory, open_run
from slt_interp.studies import trained_circuits as trained
from slt_interp.studies.networks import SmoothedCrossEntropy
from slt_interp.tasks.hierarchical_equality import MODELS, FreshExamples, Interventions, SameValue
from slt_interp.training import train
from slt_interp.tree import Params

CIRCUITS = ("genuine", "redundant", "interchange-trained", "found by search")
ILLUSIONS = ("planted", "pinned", "pinned, task's answer alone", "noisy", "null")


@dataclass(frozen=True)
class Config:
    """What is measured."""

    kinds: tuple[str, ...] = (*CIRCUITS, *ILLUSIONS)
    num_networks: int = 2
    """Of each kind of circuit and illusion."""
    seed: int = 1
    """Thresholds of verdicts were set on networks of seed 0."""
    num_examples: int = 256
    """Inputs on which behavior is to be kept."""
    num_chains: int = 16
    num_burnin: int = 384
    thinning: int = 48
    num_draws: int = 16
    train_steps: int = 3000
    """Of every trained network."""
    search_steps: int = 1000


SMOKE = Config(
    kinds=("genuine",),
    num_networks=1,
    num_examples=64,
    num_chains=4,
    num_burnin=8,
    thinning=2,
    num_draws=2,
    train_steps=60,
    search_steps=20,
)


def main(config: Config, out: Path) -> RunDirectory:
    """Run what is not finished yet."""
    run = open_run(out, {"benchmark": "operating_table", "settings": dataclasses.asdict(config)})
    cases = {}
    for kind in config.kinds:
        for i in range(config.num_networks):
            name = f"{kind} {i}".replace("'", "").replace(", ", " ")
            cases[name] = run.stage(name.replace(" ", "-"), lambda kind=kind, i=i: _judge(config, kind, i))[0]
    run.finish({"cases": list(cases.values()), "rates": rates(list(cases.values()))})
    return run


def rates(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Count how many of each kind were held, with exact 95 % intervals; and over all circuits and all illusions."""
    groups = {kind: [c for c in cases if c["kind"] == kind] for kind in (*CIRCUITS, *ILLUSIONS)}
    groups["circuits"] = [c for c in cases if c["kind"] in CIRCUITS]
    # The second answer holds half of a pinned illusion: held is then what the loss says, and no error of the verdict.
    groups["illusions"] = [c for c in cases if c["kind"] in ILLUSIONS and c["kind"] != "pinned"]
    found = {}
    for name, group in groups.items():
        if group:
            held = sum(case["verdict"] == HELD for case in group)
            interval = binomtest(held, len(group)).proportion_ci(0.95)
            words = sorted({case["verdict"] for case in group})
            found[name] = {
                "num_networks": len(group),
                "held": held / len(group),
                "low": interval.low,
                "high": interval.high,
                "verdicts": {word: sum(case["verdict"] == word for case in group) for word in words},
            }
    return found


def table(results: dict[str, Any]) -> str:
    """Lay the results out for reading."""
    lines = [f"{'kind':<30} {'networks':>8} {'held':>6}  95 % interval  verdicts"]
    for name, entry in results["rates"].items():
        words = ", ".join(f"{word} {count}" for word, count in entry["verdicts"].items())
        interval = f"{entry['low']:.2f} to {entry['high']:.2f}"
        lines.append(f"{name:<30} {entry['num_networks']:>8} {entry['held']:>6.0%}  {interval}   {words}")
    return "\n".join(lines)


def _judge(config: Config, kind: str, index: int) -> tuple[dict[str, Any], Arrays]:
    key = jax.random.fold_in(jax.random.key(config.seed), index)
    network, params, site, alignment, options = _candidate(key, config, kind, index)
    variable = VARIABLE.get(kind.split(",")[0], "left")
    survival = measure_survival(
        key,
        network,
        params,
        site,
        alignment,
        FreshExamples(config.num_examples, ENTITY_SIZE)(key)["inputs"],
        Interventions(MODELS[f"{variable} equality"], ENTITY_SIZE),
        SameValue(("left", "right").index(variable), ENTITY_SIZE),
        num_chains=config.num_chains,
        num_burnin=config.num_burnin,
        thinning=config.thinning,
        num_draws=config.num_draws,
        progress=False,
        **options,
    )
    verdict = naturalness(survival)
    found = {"kind": kind, "index": index, "verdict": verdict.word, "reasons": verdict.reasons, **_curves(survival)}
    return found, {name: np.asarray(value) for name, value in vars(survival).items()}


def _curves(survival: Survival) -> dict[str, Any]:
    names = ("excess_loss", "scaled", "scaled_twin", "scaled_frozen", "rhat", "dormancy", "ceiling", "localization")
    return {name: getattr(survival, name) for name in names}


def _candidate(
    key: jax.Array, config: Config, kind: str, index: int
) -> tuple[MLP, Params, str, Alignment, dict[str, Callable[[MLP], Answers]]]:
    """Make a network and the alignment in it that is to be judged."""
    if kind in ("interchange-trained", "found by search"):
        if kind == "interchange-trained":
            params = jax.tree.map(lambda w: w[0], trained.train_circuits(key, 1, config.train_steps))
            alignment = trained.halves()
        else:
            params = _trained_on_the_task(key, config)
            fit = fit_alignment(
                key, trained.NETWORK, params, trained.SITE, (8, 8), trained.COUNTERFACTUALS, num_steps=config.search_steps
            )
            alignment = fit.alignment
        return trained.NETWORK, params, trained.SITE, _first(alignment), {}
    name = kind.split(",")[0]
    planted = () if name in ("genuine", "redundant") else (name,)
    cells = build_cells(np.random.default_rng((config.seed, index)), planted)
    options: dict[str, Callable[[MLP], Answers]] = {"answer": Answers}
    options["behavior"] = Answers if kind.endswith("alone") else partial(Answers, joint=True)
    return cells.network, cells.params, CELL_SITE, cells.alignments[name], options


def _trained_on_the_task(key: jax.Array, config: Config) -> Params:
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, config.train_steps))
    loss_fn = SmoothedCrossEntropy(trained.NETWORK, 0.04)
    start = trained.NETWORK.init(jax.random.fold_in(key, 1))
    batches = FreshExamples(512, ENTITY_SIZE)
    return train(key, loss_fn, start, batches, optimizer, num_steps=config.train_steps, progress=False).params


def _first(alignment: Alignment) -> Alignment:
    """Leave the first variable alone."""
    return Alignment(jnp.asarray(alignment.rotation), alignment.masks[:1])


@dataclass(frozen=True)
class _Arguments:
    config: tyro.conf.OmitArgPrefixes[Config]
    out: Path
    """Run directory. An unfinished one goes on after its last case."""


if __name__ == "__main__":
    folder = Path("runs") / "operating_table"
    presets = {
        "default": ("Everything.", _Arguments(Config(), folder)),
        "smoke": ("See in some minutes that it works.", _Arguments(SMOKE, folder)),
    }
    arguments = tyro.extras.overridable_config_cli(presets, description=__doc__)
    print(table(main(arguments.config, arguments.out).results))

"""The study `planted-illusion`: whether degradation tells a circuit from an illusion that was planted beside it.

Networks are built by hand with a genuine and a redundant circuit, an illusion that nothing holds, and one of which half is
held by a second answer (`degradation.cells`). Each is damaged by every dial to the same excess losses, and at each the effect
of a patch along each of the four is measured. A dial tells circuits from illusions if its score, the mean effect over the
levels, is higher for the circuit; how often that is so over networks is its AUROC.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key
from tqdm.auto import tqdm

from slt_interp.data import Counterfactuals
from slt_interp.degradation.cells import ENTITY_SIZE, SITE, VARIABLE, Answers, Cells, build_cells
from slt_interp.degradation.compression import Checkpoints
from slt_interp.degradation.dials import Degraded, TemperedPosterior
from slt_interp.degradation.matching import BehaviorProbe, with_damage
from slt_interp.degradation.planted import released
from slt_interp.degradation.scores import scaled_effect
from slt_interp.degradation.survival import Untapped
from slt_interp.errors import InputError
from slt_interp.estimators.volume import behavioral_kl
from slt_interp.probes.alignment import random_rotations
from slt_interp.probes.draws import over_draws
from slt_interp.probes.effect import flip_rate
from slt_interp.probes.interchange import Alignment, interchange_patch
from slt_interp.samplers.hmc import HMC
from slt_interp.storage import Arrays, RunDirectory
from slt_interp.studies.matched_dials import (
    LOWEST_ACCURACY,
    REFERENCE,
    RHAT_LIMIT,
    Posterior,
    Reading,
    cell_reading,
    make_rivals,
    rhat_by_chance,
    score_dials,
    walk,
)
from slt_interp.studies.study import Study, check_ranges
from slt_interp.studies.trained_circuits import STOPS, TRAINED_CELLS, measure_trained, train_circuits
from slt_interp.taps import NO_DAMAGE, Damage, Network, damaged_runs
from slt_interp.taps import replace as replaced
from slt_interp.tasks.hierarchical_equality import MODELS, FreshExamples, Interventions
from slt_interp.tree import Params, register_dataclass


@dataclass(frozen=True)
class Config:
    """Settings of the study; the defaults are those of the preset `default`."""

    seed: int = 0
    """Everything random follows from it."""
    num_seeds: int = 32
    """Networks built by hand."""
    num_examples: int = 256
    """Inputs on which the loss is the KL to the network's own answers."""
    levels: tuple[float, ...] = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
    """Excess losses to which every dial is set, nats per example."""
    localizations: tuple[float, ...] = (10.0, 1.0, 100.0)
    """gamma of the tempered posterior, the reference first."""
    num_chains: int = 16
    """Chains of HMC at each level, and independent groups of networks of other dials."""
    num_draws: int = 4
    """Networks kept of each chain or group."""
    burnin: int = 192
    """Trajectories dropped from each chain; it adapts in the first half."""
    thinning: int = 48
    """Trajectories per draw."""
    num_counterfactuals: int = 256
    """Examples on which effects are measured."""
    num_random: int = 4
    """Random maps that show what an effect is worth by chance."""
    num_trained: int = 8
    """Networks with a circuit put in by interchange training."""
    train_steps: int = 3000
    """Steps of that training."""


SMOKE = Config(
    num_seeds=2,
    levels=(0.01, 0.1),
    localizations=(10.0,),
    num_chains=4,
    num_draws=2,
    burnin=16,
    thinning=4,
    num_counterfactuals=128,
    num_trained=2,
    train_steps=200,
)

FULL = replace(Config(), num_seeds=64, burnin=2000, thinning=500, num_draws=8, num_counterfactuals=1024)

CELLS = ("genuine", "planted", "pinned", "redundant")

RESTRICTED = "posterior_restricted"

_TRAINED_DRAWS = 1
"""Of each chain where every draw has two alignments refitted: chains are the unit of replication."""


@partial(register_dataclass, data_fields=["behavior", "examples", "alignments", "random", "damage"], meta_fields=["network"])
@dataclass(frozen=True)
class _CellProbe:
    """Loss, accuracy, and of each cell the effect of a patch and that of random maps of as many directions."""

    network: Network
    behavior: BehaviorProbe
    examples: dict[str, Counterfactuals]
    alignments: dict[str, Alignment]
    random: dict[str, Alignment]
    damage: Damage = NO_DAMAGE

    def __call__(self, key: Key[Array, ""], params: Params) -> dict[str, Array]:
        behavior_key, run_key = jax.random.split(key)
        network, other = damaged_runs(self.network, self.damage, run_key)

        def effect(alignment: Alignment, examples: Counterfactuals) -> Float[Array, ""]:
            patch = interchange_patch(other, params, SITE, alignment, examples)
            return flip_rate(network.apply(params, examples.base, replaced(SITE, patch)), examples)

        found = {"loss": replace(self.behavior, damage=self.damage)(behavior_key, params)["loss"]}
        first = self.examples["genuine"]
        found["accuracy"] = jnp.mean(network.apply(params, first.base).argmax(axis=-1) == first.base_labels)
        for name, alignment in self.alignments.items():
            examples = self.examples[name]
            found[f"effect {name}"] = effect(alignment, examples)
            found[f"random {name}"] = jax.vmap(lambda one, examples=examples: effect(one, examples))(self.random[name]).mean()
        return found


def check(config: Config) -> None:
    """Raise InputError for the first setting that cannot be used."""
    ranges: dict[str, tuple[float, float]] = {name: (1, np.inf) for name, value in vars(config).items() if type(value) is int}
    ranges |= {"seed": (0, 2**32 - 1), "num_seeds": (2, np.inf), "num_chains": (2, np.inf), "num_draws": (2, np.inf)}
    check_ranges(config, ranges)
    if not (len(config.levels) >= 2 and all(np.diff(config.levels) > 0) and config.levels[0] > 0):
        raise InputError(f"levels must be two or more positive numbers that rise, but is {config.levels}: change --levels")
    gammas = config.localizations
    if not gammas or not all(0 < gamma < np.inf for gamma in gammas) or len(set(gammas)) < len(gammas):
        raise InputError(f"localizations must be different positive numbers, but is {gammas}: change --localizations")


def compute(config: Config, run: RunDirectory, progress: bool) -> dict[str, Any]:
    """Measure every network, and score the dials."""
    keys = jax.random.split(jax.random.key(config.seed), config.num_seeds)
    found = []
    for i in tqdm(range(config.num_seeds), desc="networks", unit="network", disable=not progress):
        found.append(run.stage(f"network{i}", partial(_network, keys[i], config, i))[0])
    trained = _trained(jax.random.fold_in(jax.random.key(config.seed), config.num_seeds), config, run, progress)
    return {
        "settings": _settings(config),
        **score_dials(config.levels, [network["dials"] for network in found], CELLS, config.seed),
        "center": [network["center"] for network in found],
        "joint_loss": _joint_losses(config, found),
        "prediction": _predictions(config, found),
        "trained": trained,
    }


def summarize(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Make the short table that is printed after a run."""

    def show(entry: dict[str, Any], other: str) -> str:
        value, low, high = (entry[f"auroc{other}{end}"] for end in ("", "_low", "_high"))
        return "not comparable" if value is None else f"{value:.2f} ({low:.2f} to {high:.2f})"

    return [
        (f"AUROC of {name}, genuine above planted; above pinned", f"{show(entry, '')}; {show(entry, '_pinned')}")
        for name, entry in results["dials"].items()
    ]


def _settings(config: Config) -> dict[str, Any]:
    names = ("num_seeds", "num_chains", "num_draws", "num_examples", "num_counterfactuals", "localizations")
    by_chance = rhat_by_chance(config.num_chains, config.num_draws, config.seed)
    return {
        "levels": list(config.levels),
        **{name: getattr(config, name) for name in names},
        "rhat_limit": RHAT_LIMIT,
        "rhat_above_limit_by_chance": by_chance,
    }


def _network(key: Key[Array, ""], config: Config, index: int) -> tuple[dict[str, Any], Arrays]:
    """Damage one network by every dial at every level."""
    cells = build_cells(np.random.default_rng((config.seed, index)))
    data_key, example_key, probe_key, dial_key, label_key, release_key = jax.random.split(key, 6)
    data = FreshExamples(config.num_examples, ENTITY_SIZE)(data_key)
    task, both = Answers(cells.network), Answers(cells.network, joint=True)
    probe = _probe(example_key, config, cells, data["inputs"])
    undamaged = over_draws(probe_key, probe, jax.tree.map(lambda w: w[None, None], cells.params))
    center = {name: float(x[0, 0]) for name, x in undamaged.items()}

    def read(degraded: Degraded) -> Reading:
        found = over_draws(probe_key, with_damage(probe, degraded), degraded.params)
        values = {name: np.asarray(x, np.float64) for name, x in found.items()}
        accuracy = values["accuracy"]
        return {
            "accuracy": accuracy.mean(),
            "joint_loss": values["loss"].mean(),
            "is_comparable": bool(accuracy.mean() >= LOWEST_ACCURACY * center["accuracy"]),
            "cells": {cell: cell_reading(values[f"effect {cell}"], values[f"random {cell}"], accuracy) for cell in CELLS},
        }

    def label_loss(params: Params, batch: dict[str, Array]) -> Float[Array, ""]:
        logits = both.apply(params, batch["inputs"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

    # Of labels that the network itself gives, for both answers: their mean square gradient is the Fisher information.
    drawn = jax.random.categorical(label_key, both.apply(cells.params, data["inputs"]))
    dials = walk(
        dial_key,
        _posteriors(config, cells.params, task, both, data["inputs"]),
        make_rivals(
            both,
            cells.params,
            data["inputs"],
            config.localizations[0],
            label_loss,
            data | {"labels": drawn},
        ),
        cells.params,
        BehaviorProbe.at(both, cells.params, data["inputs"]),
        config.levels,
        read,
        num_chains=config.num_chains,
        num_draws=config.num_draws,
    )
    predicted = {
        f"{gamma:g}": _prediction(jax.random.fold_in(release_key, i), cells, probe, gamma, config)
        for i, gamma in enumerate(config.localizations)
    }
    return {"center": center, "dials": dials, "prediction": predicted}, {}


def _trained(key: Key[Array, ""], config: Config, run: RunDirectory, progress: bool) -> dict[str, Any]:
    """Measure networks with circuits put in by training, at the reference's localization and every second level."""
    levels = config.levels[1::2] if len(config.levels) > 3 else config.levels
    keys = jax.random.split(key, config.num_trained + 1)
    stops = sorted({max(1, round(share * config.train_steps)) for share in STOPS})
    trained = partial(train_circuits, keys[0], config.num_trained, config.train_steps)
    params, checkpoints = trained(), jax.tree.map(lambda *w: jnp.stack(w, axis=1), *(trained(stop) for stop in stops))
    found = []
    for i in tqdm(range(config.num_trained), desc="trained networks", unit="network", disable=not progress):
        names = ("num_examples", "num_counterfactuals", "num_chains", "burnin", "thinning")
        measured = partial(
            measure_trained,
            keys[i + 1],
            jax.tree.map(lambda w, i=i: w[i], params),
            Checkpoints(jnp.array(stops), jax.tree.map(lambda w, i=i: w[i], checkpoints)),
            localization=config.localizations[0],
            levels=levels,
            num_draws=_TRAINED_DRAWS,
            **{name: getattr(config, name) for name in names},
        )
        found.append(run.stage(f"trained{i}", measured)[0])
    scores = score_dials(levels, [network["dials"] for network in found], tuple(TRAINED_CELLS), config.seed)
    return {"levels": list(levels), "center": [network["center"] for network in found], **scores}


def _probe(key: Key[Array, ""], config: Config, cells: Cells, inputs: Array) -> _CellProbe:
    task, both = Answers(cells.network), Answers(cells.network, joint=True)
    drawn = {
        side: Interventions(MODELS[f"{side} equality"], ENTITY_SIZE)(jax.random.fold_in(key, i), config.num_counterfactuals)
        for i, side in enumerate(("left", "right"))
    }
    rotations = random_rotations(jax.random.fold_in(key, 2), config.num_random, cells.network.widths[2])
    random = {
        name: Alignment(rotations, jnp.broadcast_to(alignment.masks, (len(rotations), *alignment.masks.shape)))
        for name, alignment in cells.alignments.items()
    }
    examples = {name: drawn[VARIABLE[name]] for name in cells.alignments}
    return _CellProbe(task, BehaviorProbe.at(both, cells.params, inputs), examples, cells.alignments, random)


def _posteriors(config: Config, params: Params, task: Answers, both: Answers, inputs: Array) -> dict[str, Posterior]:
    """Make the posterior at every localization, and at the reference one that of the task's answer alone."""

    def posterior(network: Answers, gamma: float) -> Posterior:
        loss_fn, reference = behavioral_kl(Untapped(network), params, inputs)
        kernel = partial(HMC, step_size=0.1)
        dial = TemperedPosterior(
            loss_fn, reference, gamma, kernel, num_burnin=config.burnin, thinning=config.thinning, progress=False
        )
        return Posterior(dial, BehaviorProbe.at(network, params, inputs))

    reference, *others = config.localizations
    return {
        REFERENCE: posterior(both, reference),
        **{f"{REFERENCE}_gamma_{gamma:g}": posterior(both, gamma) for gamma in others},
        RESTRICTED: posterior(task, reference),
    }


def _prediction(key: Key[Array, ""], cells: Cells, probe: _CellProbe, localization: float, config: Config) -> dict[str, float]:
    """Predict the planted illusion's effect where the loss holds all but its unit u, of whose weights it knows nothing."""
    count = config.num_chains * config.num_draws
    draw_key, read_key = jax.random.split(key)
    moved = released(draw_key, cells.params, 1, (cells.sources["planted"],), localization, count)
    values = over_draws(read_key, probe, moved)
    read = {name: np.asarray(x, np.float64)[:, 0] for name, x in values.items()}
    scaled = scaled_effect(read["effect planted"], read["random planted"], read["accuracy"])
    return {"scaled": float(scaled.mean())}


def _joint_losses(config: Config, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Say what each posterior does to both answers together: that of the task's answer alone is set to levels of its own KL."""
    return {
        name: [
            float(np.mean([r["joint_loss"] for r in column if r is not None])) if any(column) else None
            for column in zip(*(network["dials"][name] for network in found), strict=True)
        ]
        for name in (REFERENCE, RESTRICTED)
    }


def _predictions(config: Config, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Set the prediction beside what the posterior says at the mildest level, for every localization."""
    entries = []
    for gamma in config.localizations:
        name = REFERENCE if gamma == config.localizations[0] else f"{REFERENCE}_gamma_{gamma:g}"
        predicted = np.array([network["prediction"][f"{gamma:g}"]["scaled"] for network in found])
        mildest = [network["dials"][name][0] for network in found]
        has = np.array([reading is not None and reading["is_comparable"] for reading in mildest])
        if has.sum() < 2:
            continue
        entry: dict[str, Any] = {"localization": gamma, "excess_loss": config.levels[0]}
        for label, values in (
            ("predicted", predicted[has]),
            *((cell, np.array([np.mean(r["cells"][cell]["scaled"]) for r in mildest if r is not None])) for cell in CELLS),
        ):
            entry |= {label: values.mean(), f"{label}_std_error": values.std(ddof=1) / np.sqrt(len(values))}
        entries.append(entry)
    return sorted(entries, key=lambda entry: entry["localization"])


STUDY = Study(
    name="planted-illusion",
    description="does degradation tell a circuit from an illusion planted beside it? Every dial at equal loss, scored",
    check=check,
    presets={"smoke": SMOKE, "default": Config(), "full": FULL},
    compute=compute,
    summarize=summarize,
)

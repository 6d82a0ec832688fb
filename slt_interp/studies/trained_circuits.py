"""The trained networks of the study `planted-illusion`: circuits put in by interchange training, and twins beside them.

A trained circuit drifts with its network, so that a frozen alignment loses it: both it and its twin are refitted on every
draw, the twin among its own units only (`degradation.survival`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from slt_interp.degradation.cells import ENTITY_SIZE
from slt_interp.degradation.compression import Checkpoints
from slt_interp.degradation.dials import Degraded, TemperedPosterior
from slt_interp.degradation.matching import BehaviorProbe, with_damage
from slt_interp.degradation.planted import Planted, plant
from slt_interp.degradation.survival import Untapped, circuit_probe
from slt_interp.estimators.volume import behavioral_kl
from slt_interp.models.mlp import MLP
from slt_interp.probes.draws import over_draws
from slt_interp.probes.interchange import Alignment, block_masks
from slt_interp.probes.interchange_training import train_interchange
from slt_interp.samplers.hmc import HMC
from slt_interp.storage import Arrays
from slt_interp.studies.matched_dials import (
    LOWEST_ACCURACY,
    REFERENCE,
    Posterior,
    Reading,
    cell_reading,
    make_rivals,
    walk,
)
from slt_interp.studies.networks import SmoothedCrossEntropy
from slt_interp.tasks.hierarchical_equality import MODELS, FreshExamples, Interventions, SameValue, draw_counterfactuals
from slt_interp.tree import Params

TRAINED_CELLS = {
    "genuine": "effect",
    "planted": "twin",
    "genuine_frozen": "frozen",
    "planted_frozen": "frozen_twin",
    "genuine_transported": "transported",
    "planted_transported": "transported_twin",
}
"""What `CircuitProbe` calls them."""

DIALS = ("weight_noise", "weight_noise_per_layer", "activation_noise", "laplace", "checkpoints")
"""Compression comes near few levels on these networks."""

NETWORK = MLP((4 * ENTITY_SIZE, 16, 16, 2))
SITE = "layer1"

_SWAPPED = Interventions(MODELS["left equality"], ENTITY_SIZE)
COUNTERFACTUALS = partial(draw_counterfactuals, entity_size=ENTITY_SIZE)
_SMOOTHING = 0.04


STOPS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of the training after which there is a checkpoint."""


def train_circuits(key: Key[Array, ""], num_networks: int, num_steps: int, stop_after: int | None = None) -> Params:
    """Train networks at once to have (a = b) in the first half of the first layer and (c = d) in the second.

    Returns:
        Weights with a leading network axis.
    """

    def one(key: Key[Array, ""]) -> Params:
        init_key, train_key = jax.random.split(key)
        params = NETWORK.init(init_key)
        trained = train_interchange(
            train_key,
            NETWORK,
            params,
            SITE,
            halves(),
            COUNTERFACTUALS,
            num_steps=num_steps,
            stop_after=stop_after,
            label_smoothing=_SMOOTHING,
        )
        return trained.params

    return jax.jit(jax.vmap(one))(jax.random.split(key, num_networks))


def measure_trained(
    key: Key[Array, ""],
    params: Params,
    checkpoints: Checkpoints,
    *,
    num_examples: int,
    num_counterfactuals: int,
    localization: float,
    levels: Sequence[float],
    num_chains: int,
    num_draws: int,
    burnin: int,
    thinning: int,
) -> tuple[dict[str, Any], Arrays]:
    """Damage one network, with a twin planted in it, by every dial at every level; see the settings of the study."""
    data_key, example_key, probe_key, dial_key = jax.random.split(key, 4)
    data = FreshExamples(num_examples, ENTITY_SIZE)(data_key)
    planted = plant(NETWORK, params, SITE, halves(), 0)
    probe = circuit_probe(
        example_key,
        planted,
        planted.network,
        SITE,
        0,
        _SWAPPED,
        SameValue(0, ENTITY_SIZE),
        num_counterfactuals,
        is_confined=False,
    )
    behavior = BehaviorProbe.at(planted.network, planted.params, data["inputs"])
    loss_fn, reference = behavioral_kl(Untapped(planted.network), planted.params, data["inputs"])

    kernel = partial(HMC, step_size=0.1)
    dial = TemperedPosterior(loss_fn, reference, localization, kernel, num_burnin=burnin, thinning=thinning, progress=False)
    center = _measure(probe_key, probe, Degraded(jax.tree.map(lambda w: w[None, None], planted.params)))

    def read(degraded: Degraded) -> Reading:
        values = _measure(probe_key, with_damage(probe, degraded), degraded)
        accuracy, random = values["accuracy"], values["random"]
        return {
            "accuracy": accuracy.mean(),
            "is_comparable": bool(accuracy.mean() >= LOWEST_ACCURACY * center["accuracy"].mean()),
            "cells": {cell: cell_reading(values[name], random, accuracy) for cell, name in TRAINED_CELLS.items()},
        }

    labels = SmoothedCrossEntropy(planted.network, _SMOOTHING)
    rivals = make_rivals(planted.network, planted.params, data["inputs"], localization, labels, data)
    rivals["checkpoints"] = plant_in_all(checkpoints, planted, params)
    dials = walk(
        dial_key,
        {REFERENCE: Posterior(dial, behavior)},
        {name: rivals[name] for name in DIALS},
        planted.params,
        behavior,
        levels,
        read,
        num_chains=num_chains,
        num_draws=num_draws,
    )
    names = ("accuracy", "effect", "twin")
    return {"center": {name: float(center[name].mean()) for name in names}, "dials": dials}, {}


def plant_in_all(checkpoints: Checkpoints, planted: Planted, params: Params) -> Checkpoints:
    """Set the weights that there were before planting to what they were earlier; the units planted last stay as they are.

    Nothing reads a copy, and what a constant unit adds is taken from the bias: functions are those of the checkpoints.
    """

    def one(after: Array, now: Array, then: Array) -> Array:
        return after + jnp.pad(then - now, [(0, n - m) for n, m in zip(after.shape, now.shape, strict=True)])

    moved = jax.vmap(lambda earlier: jax.tree.map(one, planted.params, params, earlier))(checkpoints.checkpoints)
    return replace(checkpoints, checkpoints=moved)


def halves() -> Alignment:
    """Half of the units for each variable."""
    width = NETWORK.widths[1]
    return Alignment(jnp.eye(width), block_masks((width // 2, width // 2), width))


def _measure(key: Key[Array, ""], probe: Any, degraded: Degraded) -> Mapping[str, np.ndarray]:
    return {name: np.asarray(x, np.float64) for name, x in over_draws(key, probe, degraded.params).items()}

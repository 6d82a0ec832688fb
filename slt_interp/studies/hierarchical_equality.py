"""The study `hierarchical-equality`: one small network, from training to a degraded circuit.

Train a network on the task, polish it to a minimum, and ask there: how degenerate is the basin (LLC, beside what the
Hessian says), how much of a Gaussian around it the basin fills (by two routes), and does an alignment found at the trained
weights survive draws from the tempered posterior, beside every rival dial at equal loss?

The file is long because it is the whole study in the order it runs: settings and their checks, then one function per
stage. What computes lives in the rooms below.
"""

import functools
import sys
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key
from tqdm.auto import tqdm

from slt_interp.bases import Gaussian
from slt_interp.curvature.spectrum import Spectrum, estimate_spectrum
from slt_interp.data import Counterfactuals, FullBatch
from slt_interp.degradation.compression import Checkpoints
from slt_interp.degradation.dials import TemperedPosterior
from slt_interp.errors import InputError
from slt_interp.estimators.calibration import customary_nbeta, settled_step_size
from slt_interp.estimators.llc import llc, mean_loss
from slt_interp.estimators.volume_estimate import check_thresholds
from slt_interp.models.mlp import MLP
from slt_interp.posterior import LocalPosterior
from slt_interp.probes.alignment import fit_alignment, random_rotations
from slt_interp.probes.interchange import Alignment, InterchangeProbe
from slt_interp.samplers.chains import chain_mesh, sample
from slt_interp.samplers.sgld import SGLD
from slt_interp.storage import Arrays, RunDirectory
from slt_interp.studies.basin_volume import volume_by_two_routes
from slt_interp.studies.circuit_search import FIRST_LAYER, MAPS, Search, scrub_circuits, search_circuits
from slt_interp.studies.dial_comparison import DamagedLoss, compare_dials
from slt_interp.studies.networks import SmoothedCrossEntropy, describe, pack, unpack
from slt_interp.studies.study import Study, check_ranges
from slt_interp.tasks.hierarchical_equality import NUM_INPUTS, FreshExamples, draw_counterfactuals
from slt_interp.training import polish, train
from slt_interp.tree import Params, dimension, norm


@dataclass(frozen=True)
class Config:
    """Settings of the study; the defaults are those of the preset `default`."""

    seed: int = 0
    """Everything random follows from it."""
    label_smoothing: float = 0.04
    """Targets are 1 - s/2 and s/2. With hard labels the loss has no minimum: on separable data weights grow without bound."""
    train_steps: int = 8000
    """Steps of Adam on ever new examples."""
    train_batch: int = 1024
    """Examples per step of training."""
    learning_rate: float = 3e-3
    """Adam's at the start; it falls to 0 along a cosine."""
    accuracy_goal: float = 0.995
    """Share of fresh examples that must be answered right after training, or the run stops."""
    num_examples: int = 4096
    """n, the fixed examples that define the loss after training."""
    polish_steps: int = 500
    """Full-batch steps of L-BFGS on those examples."""
    nbeta: float | None = None
    """n times the inverse temperature for the LLC; n / log n if not given."""
    localization: float = 100.0
    """gamma, in squared inverse units of the weights: the posterior carries the prior N(trained weights, 1 / gamma)."""
    llc_chains: int = 16
    """Chains of full-batch SGLD for the LLC."""
    llc_burnin: int = 1500
    """Steps dropped from each of them."""
    llc_draws: int = 250
    """Draws kept of each."""
    llc_thinning: int = 24
    """Steps per draw."""
    llc_tolerance: float = 0.025
    """Share of the LLC that discretization may add."""
    dial_nbetas: tuple[float, ...] = (3000.0, 1000.0, 500.0, 200.0, 100.0, 50.0)
    """Levels of the tempered posterior (its nbeta), mildest damage first; five or more."""
    dial_chains: int = 16
    """Chains of minibatch SGLD at each level, and independent groups of noisy networks."""
    dial_burnin: int = 4000
    """Steps dropped from each of those chains."""
    dial_draws: int = 12
    """Degraded networks kept of each chain."""
    rival_draws: int = 4
    """And of each group."""
    dial_thinning: int = 300
    """Steps per draw there."""
    dial_batch: int = 512
    """Examples per step there."""
    dial_tolerance: float = 0.1
    """Share of the excess loss that discretization may add there."""
    alignment_size: int = 8
    """Directions of a layer that each of the two variables may have."""
    alignment_steps: int = 1000
    """Steps of Adam in each alignment search."""
    alignment_restarts: int = 4
    """Random starts of each alignment search; the best on held-out examples wins."""
    num_counterfactuals: int = 4096
    """Examples on which interchange intervention accuracy is measured."""
    num_random: int = 8
    """Random rotations that show what interchange intervention accuracy is worth by chance."""
    volume_thresholds: tuple[float, ...] = (0.03, 0.1, 0.3, 0.5, 1.0)
    """Nats above L*, increasing: what share of N(trained weights, 1 / localization) lies within them, by subset simulation."""
    volume_particles: int = 40
    """Particles of each of its seeds; the cost goes with their number and with -ln V of the smallest threshold."""
    volume_seeds: int = 4
    """Its independent seeds."""
    volume_tempered: int = 5
    """At most so many of the largest thresholds are also reached by tempering, a second route."""
    volume_chains: int = 4
    """Chains of that ladder, an even number."""
    volume_draws: int = 120
    """Draws kept of each of them."""
    search_maps: tuple[str, ...] = ("rotation", "linear", "RevNet")
    """Maps that are searched at every site: rotation, which must be among them, linear and RevNet."""
    search_sizes: tuple[int, ...] = (4, 8)
    """Directions that each variable may have in those searches."""
    search_steps: int = 300
    """Steps of Adam in each of them."""
    search_restarts: int = 5
    """Random starts of each, with rotations and linear maps at the hidden layers."""
    search_input_restarts: int = 20
    """Random starts of each at the inputs, rounded up to a multiple of those at the hidden layers."""
    search_revnet_restarts: int = 2
    """Random starts of each with RevNet maps."""
    search_neurons: int = 8
    """Neurons of each variable where single ones are tried in all choices: 1, 2 or 8, as others are too many."""


SMOKE = Config(
    train_steps=1000,
    accuracy_goal=0.6,
    num_examples=512,
    polish_steps=50,
    llc_chains=8,
    llc_burnin=100,
    llc_draws=40,
    llc_thinning=2,
    dial_nbetas=(1000.0, 300.0, 100.0, 30.0, 10.0),
    dial_chains=4,
    dial_burnin=100,
    dial_draws=4,
    rival_draws=2,
    dial_thinning=10,
    alignment_steps=100,
    alignment_restarts=2,
    num_counterfactuals=512,
    volume_thresholds=(0.8, 1.0),
    volume_particles=20,
    volume_tempered=0,
    search_maps=("rotation",),
    search_sizes=(8,),
    search_steps=50,
    search_restarts=2,
    search_input_restarts=4,
    search_neurons=1,
)

FULL = replace(
    Config(),
    train_steps=30000,
    llc_chains=32,
    llc_burnin=5000,
    llc_draws=1000,
    dial_nbetas=(10000.0, 3000.0, 1000.0, 500.0, 200.0, 100.0, 50.0, 30.0),
    dial_chains=32,
    dial_burnin=20000,
    dial_draws=50,
    dial_thinning=500,
    alignment_steps=5000,
    alignment_restarts=20,
    num_counterfactuals=16384,
    volume_thresholds=(0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0),
    volume_particles=200,
    volume_tempered=7,
    volume_chains=8,
    volume_draws=200,
    search_sizes=(1, 2, 4, 8),
    search_steps=3000,
    search_restarts=20,
    search_revnet_restarts=20,
)

NETWORK = MLP((NUM_INPUTS, 16, 16, 16, 2))

_EVALUATION_SIZE = 65536


def check(config: Config) -> None:
    """Raise InputError for the first setting that cannot be used."""
    width = min(NETWORK.widths[1:-1])
    ranges: dict[str, tuple[float, float]] = {name: (1, np.inf) for name, value in vars(config).items() if type(value) is int}
    ranges |= {name: (2, np.inf) for name in ("llc_chains", "dial_chains", "num_random", "dial_draws", "rival_draws")}
    ranges |= {"llc_draws": (8, np.inf), "num_examples": (64, np.inf), "seed": (0, 2**32 - 1)}
    ranges |= {"volume_particles": (20, np.inf), "volume_seeds": (3, np.inf), "volume_chains": (4, np.inf)}
    ranges |= {"volume_draws": (4, np.inf), "volume_tempered": (0, np.inf)}
    ranges |= {"alignment_size": (1, width // 2), "llc_burnin": (0, np.inf), "dial_burnin": (0, np.inf)}
    ranges |= {"label_smoothing": (0, 0.5), "accuracy_goal": (0, 1), "learning_rate": (1e-12, 1e3)}
    ranges |= {"localization": (1e-12, 1e12), "llc_tolerance": (1e-6, 1), "dial_tolerance": (1e-6, 1), "nbeta": (1e-12, 1e12)}
    check_ranges(config, ranges)
    if len(config.dial_nbetas) < 5 or not all(0 < nbeta < np.inf for nbeta in config.dial_nbetas):
        raise InputError(
            f"dial_nbetas must be five or more positive numbers, but is {config.dial_nbetas}: change --dial-nbetas"
        )
    check_thresholds(config.volume_thresholds)
    if config.volume_chains % 2:
        raise InputError(f"volume_chains must be even, but is {config.volume_chains}: change --volume-chains")
    if "rotation" not in config.search_maps or not set(config.search_maps) <= set(MAPS):
        raise InputError(
            f"search_maps must be rotation and any of {', '.join(MAPS)}, but is {config.search_maps}: change --search-maps"
        )
    if not config.search_sizes or not all(1 <= size <= width // 2 for size in config.search_sizes):
        raise InputError(
            f"search_sizes must be numbers from 1 to {width // 2}, but is {config.search_sizes}: change --search-sizes"
        )
    if config.search_neurons not in (1, 2, width // 2):
        raise InputError(
            f"search_neurons must be 1, 2 or {width // 2}, but is {config.search_neurons}: change --search-neurons"
        )


def compute(config: Config, run: RunDirectory, progress: bool) -> dict[str, Any]:
    """Run all stages and return the results."""
    loss_fn = SmoothedCrossEntropy(NETWORK, config.label_smoothing)
    split = jax.random.split(jax.random.key(config.seed), len(_STAGES))
    keys: dict[str, Array] = dict(zip(_STAGES, split, strict=True))
    results: dict[str, Any] = {}

    def stage(name: str, function: Any, *inputs: Any) -> Arrays:
        if progress:
            tqdm.write(f"{_STAGES.index(name) + 1}/{len(_STAGES)} {name}", file=sys.stderr)
        results[name], arrays = run.stage(name, lambda: function(keys[name], config, loss_fn, progress, *inputs))
        return arrays

    trained = stage("training", _train)
    data = FreshExamples(config.num_examples)(jax.random.fold_in(keys["polish"], 0))
    params = unpack(NETWORK, stage("polish", _polish, unpack(NETWORK, trained), data))
    eigen = stage("spectrum", _spectrum, params, data)
    spectrum = Spectrum(eigen["ritz_values"], eigen["weights"], eigen["residuals"], is_exact=True)
    stage("llc", _llc, params, data, spectrum)
    alignments = stage("alignment", _align, params)
    stage("degradation", _degrade, params, data, alignments, trained)
    stage("volume", _volume, params, data, spectrum)
    found = stage("search", _search, params)
    stage("scrubbing", _scrub, params, found)
    return results


def summarize(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Make the short table that is printed after a run."""
    llc, spectrum, dial, volume = (results[name] for name in ("llc", "spectrum", "degradation", "volume"))
    mildest, strongest = dial["levels"][0], dial["levels"][-1]
    predicted = spectrum["gaussian_llc"]
    rows = [
        ("accuracy on fresh data", f"{results['training']['accuracy']:.4f}"),
        (
            "loss above its floor, trained -> polished",
            f"{results['polish']['excess_before']:.2e} -> {results['polish']['excess_after']:.2e} nats",
        ),
        ("LLC (SGLD)", f"{llc['llc']:.2f} +- {llc['std_error']:.2f} ({llc['status']})"),
        ("Gaussian prediction at the same nbeta, gamma", "none" if predicted is None else f"{predicted:.2f}"),
        *(
            (f"half the eigenvalues above {entry['threshold']:g}", f"{entry['rank'] / 2:.1f}")
            for entry in spectrum["rank_at"][::3]
        ),
        ("half the number of weights", f"{spectrum['dimension'] / 2:.1f}"),
    ]
    for site in NETWORK.hidden_sites:
        trained = results["alignment"]["sites"][site]["iia"]
        after = [
            "not reached"
            if found is None
            else f"{found['sites'][site]['iia']:.3f} +- {found['sites'][site]['iia_std_error']:.3f}"
            for level in (mildest, strongest)
            for found in (level["dials"][name] for name in ("posterior", "weight_noise"))
        ]
        low, high = f"{mildest['excess_loss']:.2g}", f"{strongest['excess_loss']:.2g}"
        rows.append((f"IIA in {site} of the alignment found", f"{trained:.3f}"))
        rows.append((f"  at excess loss {low} nats: posterior, noise", f"{after[0]}, {after[1]}"))
        rows.append((f"  at excess loss {high} nats: posterior, noise", f"{after[2]}, {after[3]}"))
    rows += [
        (f"ln V within {threshold:g} nats of L*: sampled, Gaussian", f"{value:.1f} +- {error:.1f}, {predicted:.1f}")
        for threshold, value, error, predicted in zip(
            volume["thresholds"],
            *(volume["subset"][name] for name in ("log_volume", "std_error")),
            volume["gaussian"],
            strict=True,
        )
        if value is not None
    ]
    return rows


def _train(key: Array, config: Config, loss_fn: SmoothedCrossEntropy, progress: bool) -> tuple[dict[str, Any], Arrays]:
    init_key, train_key, test_key = jax.random.split(key, 3)
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.train_steps))
    training = train(
        train_key,
        loss_fn,
        NETWORK.init(init_key),
        FreshExamples(config.train_batch),
        optimizer,
        num_steps=config.train_steps,
        progress=progress,
    )
    test = FreshExamples(_EVALUATION_SIZE)(test_key)
    kept = [jax.tree.map(lambda x, i=i: x[i], training.checkpoints) for i in range(len(training.steps))]
    losses, errors = np.array([mean_loss(loss_fn, params, test) for params in kept]).T
    accuracies = np.array([float(_accuracy(params, test)) for params in kept])
    accuracy = float(accuracies[-1])
    if not accuracy >= config.accuracy_goal:
        raise InputError(
            f"the network answers {accuracy:.4f} of fresh examples right after {config.train_steps} steps, but "
            f"accuracy_goal is {config.accuracy_goal}: raise --train-steps or choose another --seed"
        )
    found = {
        "accuracy": accuracy,
        "num_test": _EVALUATION_SIZE,
        "excess_loss": float(losses[-1]) - loss_fn.floor,
        "floor": loss_fn.floor,
        "num_examples_seen": config.train_steps * config.train_batch,
    }
    arrays = {
        "steps": training.steps,
        "test_loss": losses,
        "test_loss_std_error": errors,
        "test_accuracy": accuracies,
        "test_accuracy_std_error": np.sqrt(accuracies * (1 - accuracies) / _EVALUATION_SIZE),
        "train_loss": training.losses,
        **pack(training.params),
        **{f"checkpoints{name}": leaf for name, leaf in pack(training.checkpoints).items()},
    }
    return found, arrays


def _polish(
    key: Array, config: Config, loss_fn: SmoothedCrossEntropy, progress: bool, params: Params, data: dict[str, Array]
) -> tuple[dict[str, Any], Arrays]:
    del progress
    test = FreshExamples(_EVALUATION_SIZE)(jax.random.fold_in(key, 1))
    result = polish(loss_fn, params, data, num_steps=config.polish_steps)
    found = {
        "excess_before": result.loss_before - loss_fn.floor,
        "excess_after": result.loss_after - loss_fn.floor,
        "loss_before": result.loss_before,
        "loss_after": result.loss_after,
        "grad_norm_before": result.grad_norm_before,
        "grad_norm_after": result.grad_norm_after,
        "distance": result.distance,
        "norm": float(norm(result.params)),
        "accuracy": float(_accuracy(result.params, data)),
        "test_accuracy": float(_accuracy(result.params, test)),
    }
    return found, pack(result.params)


def _spectrum(
    key: Array, config: Config, loss_fn: SmoothedCrossEntropy, progress: bool, params: Params, data: dict[str, Array]
) -> tuple[dict[str, Any], Arrays]:
    del progress
    spectrum = estimate_spectrum(key, loss_fn, params, data)
    nbeta = _nbeta(config)
    values = spectrum.ritz_values[0]
    thresholds = np.geomspace(1e-4, 1.0, 33)
    found = {
        "dimension": dimension(params),
        "rank": spectrum.rank(),
        "rank_threshold": spectrum.rank_threshold,
        "rank_at": [{"threshold": t, "rank": spectrum.rank(t)} for t in (1e-8, 1e-6, 1e-4, 1e-2)],
        "largest": values[-1],
        "smallest": values[0],
        "trace": spectrum.trace[0],
        "nbeta": nbeta,
        "gaussian_llc": spectrum.llc(nbeta, config.localization)[0],
        "num_held": int(np.sum(nbeta * values > config.localization)),
        "base_scale": config.localization**-0.5,
        "warnings": spectrum.warnings,
    }
    base = Gaussian(params, config.localization**-0.5)
    arrays = {
        "ritz_values": spectrum.ritz_values,
        "weights": spectrum.weights,
        "residuals": spectrum.residuals,
        "thresholds": thresholds,
        "log_volume": spectrum.log_volume(thresholds, base),
    }
    return found, arrays


def _llc(
    key: Array,
    config: Config,
    loss_fn: SmoothedCrossEntropy,
    progress: bool,
    params: Params,
    data: dict[str, Array],
    spectrum: Spectrum,
) -> tuple[dict[str, Any], Arrays]:
    target = LocalPosterior(loss_fn, params, _nbeta(config), config.localization)
    chain_key, step_key = jax.random.split(key)
    step_size = settled_step_size(step_key, target, params, FullBatch(data), tolerance=config.llc_tolerance)
    draws = sample(
        chain_key,
        SGLD(target, step_size),
        params,
        FullBatch(data),
        num_chains=config.llc_chains,
        num_draws=config.llc_draws,
        num_burnin=config.llc_burnin,
        thinning=config.llc_thinning,
        mesh=chain_mesh(config.llc_chains),
        progress=progress,
    )
    init_loss, sampling_error = mean_loss(loss_fn, params, data)
    estimate = llc(draws, init_loss)
    k = estimate.nbeta * np.maximum(spectrum.ritz_values[0], 0.0)
    s = k + config.localization
    stable = step_size * s < 4
    by_step = 0.5 * np.sum(np.where(stable, k / (s * (1 - step_size * np.where(stable, s, 0) / 4)) - k / s, np.nan))
    found = {
        **describe(estimate),
        "step_size": step_size,
        "init_loss_sampling_error": sampling_error,
        "gaussian_step_bias": by_step,
        "norm": float(norm(params)),
        "num_burnin": draws.num_burnin,
        "thinning": draws.thinning,
    }
    return found, {
        "loss": draws.loss,
        "squared_distance": np.asarray(draws.info.squared_distance),
        "per_chain": estimate.per_chain,
    }


def _align(
    key: Array, config: Config, loss_fn: SmoothedCrossEntropy, progress: bool, params: Params
) -> tuple[dict[str, Any], Arrays]:
    del loss_fn
    found: dict[str, Any] = {"sites": {}}
    arrays: Arrays = {}
    fit_key, test_key, random_key = jax.random.split(key, 3)
    sizes = (config.alignment_size, config.alignment_size)
    examples = draw_counterfactuals(test_key, config.num_counterfactuals)
    for i, site in enumerate(tqdm(NETWORK.hidden_sites, desc="alignments", unit="site", disable=not progress, leave=False)):
        fit = fit_alignment(
            jax.random.fold_in(fit_key, i),
            NETWORK,
            params,
            site,
            sizes,
            draw_counterfactuals,
            num_steps=config.alignment_steps,
            num_restarts=config.alignment_restarts,
        )
        width = fit.alignment.rotation.shape[0]
        rotations = random_rotations(jax.random.fold_in(random_key, i), config.num_random, width)
        rotations = jnp.concatenate([fit.alignment.rotation[None], rotations])
        iia, *chance = _iia_of_rotations(params, site, rotations, fit.alignment.masks, examples).tolist()
        found["sites"][site] = {
            "iia": iia,
            "std_error": float(np.sqrt(iia * (1 - iia) / config.num_counterfactuals)),
            "restart_iia": fit.restart_iia,
            "random_iia": float(np.mean(chance)),
            "random_iia_std": float(np.std(chance, ddof=1)),
        }
        arrays[f"rotation_{site}"], arrays[f"masks_{site}"] = (
            np.asarray(fit.alignment.rotation),
            np.asarray(fit.alignment.masks),
        )
    return found, arrays


def _degrade(
    key: Array,
    config: Config,
    loss_fn: SmoothedCrossEntropy,
    progress: bool,
    params: Params,
    data: dict[str, Array],
    alignments: Arrays,
    trained: Arrays,
) -> tuple[dict[str, Any], Arrays]:
    posterior = TemperedPosterior(
        loss_fn,
        data,
        config.localization,
        batch_size=config.dial_batch,
        num_burnin=config.dial_burnin,
        thinning=config.dial_thinning,
        tolerance=config.dial_tolerance,
        progress=progress,
    )
    dial_key, examples_key = jax.random.split(key)
    examples = draw_counterfactuals(examples_key, config.num_counterfactuals)
    fits = {
        site: Alignment(*(jnp.asarray(alignments[f"{kind}_{site}"]) for kind in ("rotation", "masks")))
        for site in NETWORK.hidden_sites
    }
    # Step 0 is where training starts, and no level: levels are searched in their logarithm.
    later = np.flatnonzero(trained["steps"] > 0)
    kept = {name.removeprefix("checkpoints"): leaf[later] for name, leaf in trained.items() if name.startswith("checkpoints")}
    found = compare_dials(
        dial_key,
        posterior,
        DamagedLoss(NETWORK, config.label_smoothing, data),
        params,
        {site: InterchangeProbe(NETWORK, site, fit, examples) for site, fit in fits.items()},
        Checkpoints(jnp.asarray(trained["steps"][later]), unpack(NETWORK, kept)),
        config.dial_nbetas,
        num_chains=config.dial_chains,
        num_draws=config.dial_draws,
        rival_draws=config.rival_draws,
    )
    return {"localization": config.localization, **found}, {}


def _volume(
    key: Array,
    config: Config,
    loss_fn: SmoothedCrossEntropy,
    progress: bool,
    params: Params,
    data: dict[str, Array],
    spectrum: Spectrum,
) -> tuple[dict[str, Any], Arrays]:
    thresholds, base = np.array(config.volume_thresholds), Gaussian(params, config.localization**-0.5)
    found = volume_by_two_routes(
        key,
        loss_fn,
        params,
        data,
        thresholds,
        base=base,
        num_tempered=config.volume_tempered,
        subset={"num_particles": config.volume_particles, "num_seeds": config.volume_seeds},
        tempering={"num_chains": config.volume_chains, "num_draws": config.volume_draws},
        progress=progress,
    )
    return {"base_scale": base.scale, "gaussian": spectrum.log_volume(thresholds, base), **found}, {}


def _search(
    key: Key[Array, ""], config: Config, loss_fn: SmoothedCrossEntropy, progress: bool, params: Params
) -> tuple[dict[str, Any], Arrays]:
    search = Search(
        config.search_maps,
        tuple(sorted(config.search_sizes)),
        config.search_steps,
        config.search_restarts,
        config.search_input_restarts,
        config.search_revnet_restarts,
        config.num_counterfactuals,
        config.num_random,
        config.search_neurons,
    )
    init_key, train_key, search_key = jax.random.split(key, 3)
    untrained = NETWORK.init(init_key)
    other = replace(NETWORK, activation=jax.nn.sigmoid)
    # At the other's learning rate, this one still answers by chance when training ends.
    optimizer = optax.adam(optax.cosine_decay_schedule(10 * config.learning_rate, config.train_steps))
    batches = FreshExamples(config.train_batch)
    training = train(
        train_key,
        replace(loss_fn, network=other),
        other.init(init_key),
        batches,
        optimizer,
        num_steps=config.train_steps,
        progress=progress,
    )
    networks = {"trained": (NETWORK, params), "untrained": (NETWORK, untrained), "sigmoid": (other, training.params)}
    return search_circuits(search_key, search, networks, progress=progress)


def _scrub(
    key: Key[Array, ""], config: Config, loss_fn: SmoothedCrossEntropy, progress: bool, params: Params, found: Arrays
) -> tuple[dict[str, Any], Arrays]:
    del loss_fn, progress
    rotations = {size: jnp.asarray(found[f"rotation {FIRST_LAYER} {size}"]) for size in sorted(config.search_sizes)}
    return scrub_circuits(key, NETWORK, params, rotations, config.num_counterfactuals), {}


@functools.partial(jax.jit, static_argnames=("site",))
def _iia_of_rotations(
    params: Params,
    site: str,
    rotations: Float[Array, "rotation width width"],
    masks: Float[Array, "variable width"],
    examples: Counterfactuals,
) -> Float[Array, " rotation"]:
    def iia(rotation: Float[Array, "width width"]) -> Float[Array, ""]:
        return InterchangeProbe(NETWORK, site, Alignment(rotation, masks), examples)(jax.random.key(0), params)["iia"]

    return jax.lax.map(iia, rotations)


@jax.jit
def _accuracy(params: Params, data: dict[str, Array]) -> Float[Array, ""]:
    return jnp.mean(NETWORK.apply(params, data["inputs"]).argmax(axis=-1) == data["labels"])


def _nbeta(config: Config) -> float:
    return customary_nbeta(config.num_examples) if config.nbeta is None else config.nbeta


_STAGES = ("training", "polish", "spectrum", "llc", "alignment", "degradation", "volume", "search", "scrubbing")

STUDY = Study(
    name="hierarchical-equality",
    description="train on hierarchical equality; LLC and volume against Hessian; does an alignment survive degradation?",
    check=check,
    presets={"smoke": SMOKE, "default": Config(), "full": FULL},
    compute=compute,
    summarize=summarize,
)

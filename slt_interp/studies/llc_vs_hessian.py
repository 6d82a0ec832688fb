"""The study `llc-vs-hessian`: where a Hessian tells how degenerate a minimum is, and where it does not.

On problems with exact answers, deep linear networks, trained networks and their checkpoints, and two coupled modules: the
sampled LLC, what the Hessian predicts for the same nbeta and localization, rank / 2, d / 2, and volumes.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array
from tqdm.auto import tqdm

from slt_interp.analytic.catalogue import catalogue
from slt_interp.analytic.modules import coupled_modules
from slt_interp.analytic.problem import AnalyticProblem
from slt_interp.bases import Gaussian
from slt_interp.curvature.spectrum import estimate_spectrum
from slt_interp.data import Batch
from slt_interp.errors import InputError
from slt_interp.estimators.calibration import customary_nbeta
from slt_interp.estimators.estimate import estimate_llc
from slt_interp.estimators.llc import mean_loss
from slt_interp.estimators.tempering import temper
from slt_interp.posterior import LossFn
from slt_interp.storage import Arrays, RunDirectory
from slt_interp.studies.networks import NETWORKS, describe, make_network, pack, unpack
from slt_interp.studies.population import LOCALIZATION, NUM_EXAMPLES, THRESHOLD, measure_population
from slt_interp.studies.study import Study, check_ranges
from slt_interp.training import polish, train
from slt_interp.tree import Params, dimension


@dataclass(frozen=True)
class Config:
    """Settings of the study; the defaults are those of the preset `default`."""

    seed: int = 0
    """Everything random follows from it."""
    problems: tuple[str, ...] = (
        "quadratic of rank 6 in 10 dimensions",
        "sum of w1^2, w2^4",
        "monomial w1^2 w2^2",
        "10 singular blocks",
        "tanh network with 1 units",
    )
    """Problems of the catalogue for which a ladder of temperatures gives LLC and volume at every scale."""
    max_nbeta: float = 1e4
    """Where these ladders end; they start at the base measure N(w*, 1), localization 1."""
    ladder_draws: int = 400
    """Draws of each of their 8 chains."""
    deep_linear: tuple[str, ...] = (
        "deep linear 5-5-5 of rank 2, deepest point",
        "deep linear 10-10-10 of rank 1, deepest point",
        "deep linear 10-10-10 of rank 1, smooth point",
        "deep linear 10-10-10-10 of rank 3, deepest point",
    )
    """Deep linear networks of the catalogue."""
    deep_linear_nbeta: float = 1e5
    """Their nbeta, at localization 1; at smooth points at one that keeps chains there (`local_window`)."""
    deep_linear_gradients: int = 40_000
    """Gradients per chain at most, for each of them."""
    networks: tuple[str, ...] = NETWORKS
    """Networks that are trained."""
    train_steps: int = 4000
    """Steps of Adam for each of them."""
    polish_steps: int = 500
    """Steps of L-BFGS after that."""
    nbeta_factors: tuple[float, ...] = (1.0, 10.0, 100.0)
    """The nbeta at which they are measured, in units of n / log n."""
    network_gradients: int = 12_000
    """Gradients per chain at most, for each nbeta and each checkpoint."""
    num_checkpoints: int = 10
    """Checkpoints of the training of the first network."""
    couplings: tuple[float, ...] = (0.0, 0.9, 0.99, 1.0)
    """Correlations of the inputs of two modules."""
    products: tuple[float, ...] = (0.0, 1.0)
    """Their teachers: 0 for a singular minimum, positive for a smooth one."""
    population: int = 42
    """Small networks, over widths, weight decays and seeds, that are compared with each other."""
    population_widths: tuple[int, ...] = (4, 8, 16)
    """Widths of their hidden layers."""
    population_gradients: int = 5000
    """Gradients per chain at most, for the LLC of each of them."""


# Most of such a run is compilation. A ladder has as many draws as its trials, so that one program serves both, and the budgets
# of networks are too small for a metric to learn directions: ladders and the deep linear network show that.
SMOKE = replace(
    Config(),
    problems=("monomial w1^2 w2^2",),
    max_nbeta=100.0,
    ladder_draws=50,
    deep_linear=("deep linear 5-5-5 of rank 2, deepest point",),
    deep_linear_nbeta=1e3,
    deep_linear_gradients=1000,
    networks=("ReLU regression",),
    train_steps=200,
    polish_steps=50,
    nbeta_factors=(1.0, 10.0),
    network_gradients=150,
    num_checkpoints=3,
    couplings=(1.0,),
    products=(0.0,),
    population=4,
    population_widths=(3,),
    population_gradients=100,
)

FULL = replace(
    Config(),
    max_nbeta=1e5,
    ladder_draws=4000,
    deep_linear_gradients=400_000,
    train_steps=20_000,
    network_gradients=40_000,
    num_checkpoints=20,
    population=120,
    population_gradients=10_000,
)

THRESHOLDS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)

_LOCALIZATION = 1.0

_NUM_CHAINS = 8


def check(config: Config) -> None:
    """Raise InputError for the first setting that cannot be used."""
    ranges: dict[str, tuple[float, float]] = {name: (1, np.inf) for name, value in vars(config).items() if type(value) is int}
    ranges |= {"seed": (0, 2**32 - 1), "ladder_draws": (4, np.inf), "num_checkpoints": (3, np.inf)}
    # Fewer have no interval for their correlations.
    ranges |= {"population": (max(4, len(config.population_widths)), np.inf)}
    ranges |= {"max_nbeta": (10, 1e7), "deep_linear_nbeta": (1e-3, 1e7)}
    check_ranges(config, ranges)
    known = {"problems": tuple(catalogue()), "deep_linear": tuple(catalogue()), "networks": NETWORKS}
    for name, allowed in known.items():
        strange = [value for value in getattr(config, name) if value not in allowed]
        if strange or not getattr(config, name):
            raise InputError(f"{name} has no {strange[0] if strange else 'entry'!r}: choose from {', '.join(allowed)}")
    for name, low, high in _RISING:
        values = getattr(config, name)
        if not values or not all(low <= value <= high for value in values) or list(values) != sorted(set(values)):
            raise InputError(
                f"{name} must be rising numbers from {low:g} to {high:g}, but is {values}: change --{name.replace('_', '-')}"
            )


def compute(config: Config, run: RunDirectory, progress: bool) -> dict[str, Any]:
    """Run all stages and return the results."""
    keys = dict(zip(_STAGES, jax.random.split(jax.random.key(config.seed), len(_STAGES)), strict=True))
    results: dict[str, Any] = {}
    arrays: Arrays = {}
    for name, function in _STAGES.items():
        if progress:
            tqdm.write(f"{len(results) + 1}/{len(_STAGES)} {name}", file=sys.stderr)
        inputs = (keys["networks"], results["networks"]["networks"][0], arrays) if name == "training" else ()
        found, kept = run.stage(name, lambda f=function, k=keys[name], i=inputs: f(k, config, progress, *i))
        results[name] = found
        arrays |= kept
    return results


def summarize(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Make the short table that is printed after a run."""
    rows = [("", "LLC (sampled); Gaussian; rank / 2; d / 2; learning coefficient")]
    for problem in results["exact"]["problems"]:
        sampled = f"{problem['llc']['sampled'][-1]:.3g} +- {problem['llc']['std_error'][-1]:.1g}"
        rows.append((problem["name"], _summary(sampled, problem, problem["llc"]["gaussian"][-1])))
    for measured in (*results["deep_linear"]["problems"], *results["networks"]["networks"]):
        last = measured["measured"][-1]
        sampled = f"{last['llc']:.4g} +- {last['std_error']:.1g}"
        rows.append((measured["name"], _summary(sampled, measured, last["gaussian"])))
    return rows


def _summary(sampled: str, entry: dict[str, Any], gaussian: float | None) -> str:
    predicted = "none" if gaussian is None else f"{gaussian:.4g}"
    truth = "unknown" if entry["rlct"] is None else f"{entry['rlct']:.4g}"
    return f"{sampled}; {predicted}; {entry['rank'] / 2:.4g}; {entry['dimension'] / 2:.4g}; {truth}"


def _exact(key: Array, config: Config, progress: bool) -> tuple[dict[str, Any], Arrays]:
    problems = []
    for i, name in enumerate(config.problems):
        if i:
            # Compiled programs pile up, a dozen a problem, until the process has no memory maps left for more.
            jax.clear_caches()
        problems.append(_ladder(jax.random.fold_in(key, i), config, catalogue()[name], progress))
    return {"thresholds": THRESHOLDS, "localization": _LOCALIZATION, "problems": problems}, {}


def _modules(key: Array, config: Config, progress: bool) -> tuple[dict[str, Any], Arrays]:
    cases = []
    for i, product in enumerate(config.products):
        for j, coupling in enumerate(config.couplings):
            problem = coupled_modules(coupling, product=product)
            found = _ladder(jax.random.fold_in(jax.random.fold_in(key, i), j), config, problem, progress)
            cases.append({"product": product, "coupling": coupling, **found})
    return {"thresholds": THRESHOLDS, "nbeta": config.max_nbeta, "localization": _LOCALIZATION, "cases": cases}, {}


def _ladder(key: Array, config: Config, problem: AnalyticProblem, progress: bool) -> dict[str, Any]:
    """LLC and volume at every scale from one ladder, beside what is exact and what the Hessian predicts."""
    ladder_key, spectrum_key = jax.random.split(key)
    base = Gaussian(problem.center, _LOCALIZATION**-0.5)
    ladder = temper(
        ladder_key,
        problem.loss_fn,
        problem.center,
        problem.data,
        base=base,
        max_nbeta=config.max_nbeta,
        num_chains=_NUM_CHAINS,
        num_draws=config.ladder_draws,
        progress=progress,
    )
    curve = ladder.llc_curve()
    thresholds = np.array([t for t in THRESHOLDS if t * config.max_nbeta >= 1])
    volume = ladder.log_volume(thresholds)
    spectrum = estimate_spectrum(spectrum_key, problem.loss_fn, problem.center, problem.data)
    exact, log_volume = problem.energy, problem.log_volume
    return {
        **_known(problem),
        "eigenvalues": spectrum.ritz_values[0],
        "rank": spectrum.rank(),
        "status": ladder.status,
        "warnings": ladder.warnings,
        "llc": {
            "nbeta": curve.nbetas,
            "sampled": curve.llc,
            "std_error": curve.std_error,
            "gaussian": [spectrum.llc(nbeta, _LOCALIZATION)[0] for nbeta in curve.nbetas],
            "exact": None if exact is None else [exact(nbeta, _LOCALIZATION) for nbeta in curve.nbetas],
        },
        "volume": {
            "threshold": thresholds,
            "sampled": volume.log_volume,
            "std_error": volume.std_error,
            "gaussian": spectrum.log_volume(thresholds, base),
            "exact": None if log_volume is None else [log_volume(t) for t in thresholds],
        },
    }


def _deep_linear(key: Array, config: Config, progress: bool) -> tuple[dict[str, Any], Arrays]:
    problems = []
    for i, name in enumerate(config.deep_linear):
        if i:
            jax.clear_caches()
        problem = catalogue()[name]
        found = _measure(
            jax.random.fold_in(key, i),
            problem.loss_fn,
            problem.center,
            problem.data,
            [config.deep_linear_nbeta],
            None if "smooth" in name else _LOCALIZATION,
            config.deep_linear_gradients,
            progress,
        )
        problems.append({**_known(problem), **found})
    return {"problems": problems}, {}


def _networks(key: Array, config: Config, progress: bool) -> tuple[dict[str, Any], Arrays]:
    found, arrays = [], {}
    for i, name in enumerate(config.networks):
        data_key, init_key, train_key, llc_key = _network_keys(key, i)
        network = make_network(name, data_key)
        schedule = optax.cosine_decay_schedule(_LEARNING_RATE, config.train_steps)
        training = train(
            train_key,
            network.loss_fn,
            network.network.init(init_key),
            network.batches,
            optax.adam(schedule),
            num_steps=config.train_steps,
            num_checkpoints=config.num_checkpoints,
            progress=progress,
        )
        polished = polish(network.loss_fn, training.params, network.data, num_steps=config.polish_steps)
        count = len(network.data["inputs"])
        nbetas = [factor * customary_nbeta(count) for factor in config.nbeta_factors]
        measured = _measure(
            llc_key, network.loss_fn, polished.params, network.data, nbetas, None, config.network_gradients, progress
        )
        found.append(
            {
                "name": name,
                "dimension": dimension(polished.params),
                "rlct": None,
                "num_examples": count,
                "loss": polished.loss_after,
                "test_loss": mean_loss(network.loss_fn, polished.params, network.test)[0],
                "grad_norm": polished.grad_norm_after,
                **measured,
            }
        )
        if i == 0:
            arrays = {"steps": training.steps, **pack(training.checkpoints)}
    return {"networks": found}, arrays


def _network_keys(key: Array, i: int) -> Array:
    return jax.random.split(jax.random.fold_in(key, i), 4)


def _training(
    key: Array, config: Config, progress: bool, networks_key: Array, measured: dict[str, Any], arrays: Arrays
) -> tuple[dict[str, Any], Arrays]:
    """LLC and Hessian along the training of the first network, at the nbeta and localization of its end."""
    # Its data are those of the stage before: equal keys.
    network = make_network(measured["name"], _network_keys(networks_key, 0)[0])
    checkpoints = unpack(network.network, arrays)
    end = measured["measured"][0]
    found = []
    for i, step in enumerate(arrays["steps"]):
        params = jax.tree.map(lambda x, i=i: x[i], checkpoints)
        at = _measure(
            jax.random.fold_in(key, i),
            network.loss_fn,
            params,
            network.data,
            [end["nbeta"]],
            end["localization"],
            config.network_gradients,
            progress,
        )
        losses = {
            name: mean_loss(network.loss_fn, params, data)[0]
            for name, data in (("loss", network.data), ("test_loss", network.test))
        }
        found.append({"step": int(step), **losses, **at})
    return {"name": measured["name"], "checkpoints": found}, {}


def _population(key: Array, config: Config, progress: bool) -> tuple[dict[str, Any], Arrays]:
    networks = measure_population(
        key,
        config.population,
        config.population_widths,
        config.train_steps // 2,
        config.polish_steps,
        config.population_gradients,
        progress=progress,
    )
    return {
        "num_examples": NUM_EXAMPLES,
        "nbeta": customary_nbeta(NUM_EXAMPLES),
        "localization": LOCALIZATION,
        "threshold": THRESHOLD,
        "networks": networks,
    }, {}


def _measure(
    key: Array,
    loss_fn: LossFn,
    params: Params,
    data: Batch,
    nbetas: Sequence[float],
    localization: float | None,
    max_gradients: int,
    progress: bool,
) -> dict[str, Any]:
    """Sample the LLC at each nbeta, beside the Hessian; the first estimate chooses the localization if it is not given."""
    spectrum_key, *keys = jax.random.split(key, len(nbetas) + 1)
    spectrum = estimate_spectrum(spectrum_key, loss_fn, params, data)
    measured = []
    for nbeta, llc_key in zip(nbetas, keys, strict=True):
        estimate = estimate_llc(
            llc_key,
            loss_fn,
            params,
            data,
            nbeta=nbeta,
            localization=localization,
            num_chains=_NUM_CHAINS,
            max_gradients=max_gradients,
            progress=progress,
        )
        localization = estimate.localization
        predicted, error = spectrum.llc(nbeta, localization)
        held = spectrum.rank(localization / nbeta)
        measured.append({**describe(estimate), "gaussian": predicted, "gaussian_std_error": error, "num_held": held})
    return {
        "rank": spectrum.rank(),
        "rank_threshold": spectrum.rank_threshold,
        "trace": spectrum.trace[0],
        "largest": float(spectrum.ritz_values.max()),
        "smallest": float(spectrum.ritz_values.min()),
        "participation_ratio": spectrum.participation_ratio,
        "hessian_warnings": spectrum.warnings,
        "measured": measured,
    }


def _known(problem: AnalyticProblem) -> dict[str, Any]:
    return {
        "name": problem.name,
        "dimension": problem.dimension,
        "rlct": problem.rlct,
        "multiplicity": problem.multiplicity,
    }


_LEARNING_RATE = 3e-3

_RISING = (
    ("nbeta_factors", 1e-3, 1e6),
    ("couplings", 0.0, 1.0),
    ("products", 0.0, 100.0),
    ("population_widths", 1, 1000),
)
"""Settings that must rise, and between what."""

_STAGES: dict[str, Callable[..., tuple[dict[str, Any], Arrays]]] = {
    "exact": _exact,
    "deep_linear": _deep_linear,
    "networks": _networks,
    "training": _training,
    "modules": _modules,
    "population": _population,
}

STUDY = Study(
    name="llc-vs-hessian",
    description="where a Hessian tells how degenerate a minimum is, and where it does not",
    check=check,
    presets={"smoke": SMOKE, "default": Config(), "full": FULL},
    compute=compute,
    summarize=summarize,
)

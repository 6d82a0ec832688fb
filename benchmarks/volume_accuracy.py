"""How far the methods of `estimate_volume` are from exact volumes, beside a nested sampler and the published ray estimator.

    python benchmarks/volume_accuracy.py {default | smoke} [--out DIR] [--help for every setting]

Every problem of `analytic.volume_catalogue()` at every threshold by every method: the estimate against the exact log volume, in
nats and in standard errors, with the losses and gradients it took. Then two quadratics, one that rays should give a warning of
and one that they should be exact for, and last the learning coefficient and its multiplicity from ladders on
`analytic.catalogue()`. Each problem is a stage: a run that was cut short goes on after its last one.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import threadpoolctl
import tyro
from volume_peers import nested_sampling, published_rays

from slt_interp import Gaussian, estimate_volume, temper
from slt_interp.analytic import AnalyticProblem, catalogue, quadratic, volume_catalogue
from slt_interp.errors import InputError
from slt_interp.estimators.ladder import Ladder
from slt_interp.estimators.llc import DO_NOT_TRUST, OK
from slt_interp.estimators.rounding import loss_rounding
from slt_interp.posterior import LocalPosterior
from slt_interp.storage import RunDirectory, open_run

METHODS = ("tempering", "subset", "rays", "gaussian", "nested sampling", "published rays")


@dataclass(frozen=True)
class Config:
    """What is measured."""

    problems: tuple[str, ...] = ()
    """Names of the volume catalogue or of the special cases; if none is given, all."""
    methods: tuple[str, ...] = METHODS
    thresholds: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    num_seeds: int = 2
    """Of every method that draws."""
    num_live: int = 500
    """Live points of the nested sampler; its standard error is about sqrt(|ln V| / num_live)."""
    max_losses: float = 2e7
    """The nested sampler is stopped after so many."""
    num_published_rays: int = 1000
    coefficients: tuple[str, ...] | None = None
    """Names of the catalogue; by default all up to `max_dimension` whose base is not bounded and whose answer is known."""
    max_dimension: int = 20
    max_nbeta: float = 1e9
    """Of the ladders that coefficients are read from, which end earlier where floats round the loss by .01 / nbeta."""
    base_scales: tuple[float, ...] = (1.0, 0.1)
    """The second where a ladder under the first is refused."""
    num_chains: int = 32
    num_draws: int = 8000
    """Of each of these chains: fewer do not tell a multiplicity from a slow correction."""


SMOKE = Config(
    problems=("quartic_1d_gauss",),
    methods=tuple(method for method in METHODS if method not in ("tempering", "subset")),
    num_seeds=1,
    num_live=200,
    coefficients=(),
)

SMALL = 1e-3
"""Errors below this, in nats, are none."""

NEEDS_GAUSSIAN = ("gaussian", "published rays")
"""Methods that know no other base measure."""

NOT_JUDGED = "not judged"
"""Peers give no verdict."""


class Answer(NamedTuple):
    """What a method says: (threshold,) log volumes and standard errors in nats, NaN where there is none, and what it took."""

    log_volume: np.ndarray
    std_error: np.ndarray
    num_losses: float
    num_gradients: float
    status: str = NOT_JUDGED
    warnings: tuple[str, ...] = ()


def special_cases() -> dict[str, AnalyticProblem]:
    """Make a quadratic of low rank, where a few rays carry the mean, and one of full rank, where all rays are alike."""
    low_rank = quadratic([1.0, 3.0, 10.0, 30.0, 100.0, 300.0] + [0.0] * 54, name="quadratic of rank 6 in 60 dimensions")
    curvatures = [float(h) for h in np.geomspace(0.1, 100.0, 40)]
    full_rank = quadratic(curvatures, key=jax.random.key(3), name="rotated quadratic of rank 40 in 40 dimensions")
    return {problem.name: problem for problem in (low_rank, full_rank)}


def main(config: Config, out: Path) -> RunDirectory:
    """Run every problem that is not finished yet, and write rows and scores."""
    volumes, special = volume_catalogue(), special_cases()
    names = config.problems or (*volumes, *special)
    coefficients = config.coefficients
    if coefficients is None:
        unbounded = (p for p in catalogue().values() if p.base is None or not p.base.is_bounded)
        coefficients = tuple(p.name for p in unbounded if p.rlct is not None and p.dimension <= config.max_dimension)
    version = metadata.version("blackjax") if "nested sampling" in config.methods else None
    run = open_run(out, {"benchmark": "volume_accuracy", "settings": dataclasses.asdict(config)})
    rows: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for i, name in enumerate(names):
        print(f"{i + 1} of {len(names)}: {name}", file=sys.stderr, flush=True)
        problem = special[name] if name in special else volumes[name]
        found, _ = run.stage(f"volume {i + 1}", partial(_measure, config, problem))
        rows[name in special] += found["rows"]
        # Compiled programs pile up, until the process has no memory maps left for more.
        jax.clear_caches()
    ladders: list[dict[str, Any]] = []
    for i, name in enumerate(coefficients):
        print(f"coefficient {i + 1} of {len(coefficients)}: {name}", file=sys.stderr, flush=True)
        found, _ = run.stage(f"coefficient {i + 1}", partial(_measure_coefficient, config, name))
        ladders.append(found)
        jax.clear_caches()
    run.finish(
        {
            "blackjax": version,
            "scores": {method: scores(rows[False], method) for method in config.methods},
            "coefficient_scores": coefficient_scores(ladders),
            "rows": rows[False],
            "special_cases": rows[True],
            "coefficients": ladders,
        }
    )
    return run


def scores(rows: list[dict[str, Any]], method: str) -> dict[str, Any]:
    """Summarize the rows of one method; shares are of the rows whose base measure it knows, with a number or without."""
    mine = [row for row in rows if row["method"] == method and row["knows_base"]]
    given = [row for row in mine if row["estimate"] is not None]
    right = [_is_right(row) for row in mine]
    # Standard errors of 0 are no claim.
    bars = [row for row in given if row["std_error"]]
    errors = [abs(row["error"]) for row in given]
    # What a run took is told in each of its rows.
    runs = list({(row["problem"], row["seed"]): row for row in mine}.values())
    return {
        "num_rows": len(mine),
        "num_of_other_bases": sum(row["method"] == method for row in rows) - len(mine),
        "num_without_number": len(mine) - len(given),
        "share_right": _mean(right),
        "share_right_of_given": _mean([fine for fine, row in zip(right, mine, strict=True) if row["estimate"] is not None]),
        "coverage_of_95_percent_intervals": _mean([abs(r["error"]) <= max(1.96 * r["std_error"], SMALL) for r in bars]),
        "median_error": _median(errors),
        "largest_error": max(errors, default=None),
        # Peers that give no verdict have no warnings to give.
        "wrong_without_warning": [
            _name(row)
            for row, fine in zip(mine, right, strict=True)
            if not fine and not row["warnings"] and row["status"] != NOT_JUDGED
        ],
        "warned_though_right": _mean([bool(row["warnings"]) for row, fine in zip(mine, right, strict=True) if fine]),
        "num_losses": sum(row["num_losses"] or 0 for row in runs),
        "num_gradients": sum(row["num_gradients"] or 0 for row in runs),
        "seconds": sum(row["seconds"] for row in runs),
    }


def coefficient_scores(ladders: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarize what ladders say of coefficient and multiplicity."""
    regular = [row for row in ladders if row["true_multiplicity"] == 1]
    return {
        "num_problems": len(ladders),
        "num_ok": sum(row["status"] == OK for row in ladders),
        "share_covered": _mean([row["is_covered"] for row in ladders]),
        "not_covered": [row["problem"] for row in ladders if not row["is_covered"]],
        "share_resolved": _mean([bool(row["is_resolved"]) for row in ladders]),
        "share_multiplicity_right_up_to_2": _mean(
            [row["multiplicity"] == row["true_multiplicity"] for row in ladders if row["true_multiplicity"] <= 2]
        ),
        "share_within_3_percent_at_multiplicity_1": _mean([_is_close(row) for row in regular]),
        "off_by_3_percent_at_multiplicity_1": [row["problem"] for row in regular if not _is_close(row)],
    }


def table(results: dict[str, Any]) -> str:
    """Lay the runs out for reading, one problem and method a line, and the scores."""
    lines, groups = [], {}
    for row in [*results["rows"], *results["special_cases"]]:
        groups.setdefault(row["problem"], {}).setdefault(row["method"], []).append(row)
    for problem, by_method in groups.items():
        exact = {row["threshold"]: row["exact"] for rows in by_method.values() for row in rows}
        lines.append(f"{problem}: " + ", ".join(f"ln V({t:g}) = {value:.3f}" for t, value in exact.items()))
        for method, rows in by_method.items():
            off = ", ".join(_spread([r["error"] for r in rows if r["threshold"] == t]) for t in exact)
            barred = [row for row in rows if row["error_in_std_errors"] is not None and abs(row["error"]) > SMALL]
            furthest = max((abs(row["error_in_std_errors"]) for row in barred), default=0.0)
            runs = list({row["seed"]: row for row in rows}.values())
            losses, gradients = (np.mean([run[name] or 0 for run in runs]) for name in ("num_losses", "num_gradients"))
            seconds, status = np.mean([run["seconds"] for run in runs]), "; ".join(sorted({run["status"] for run in runs}))
            lines.append(
                f"  {method:16} off {off} nats, {furthest:4.1f} s.e.; {losses:.2g} losses, {gradients:.2g} gradients, "
                f"{seconds:.1f} s; {status[:60]}"
            )
    for method, found in results["scores"].items():
        lines += [f"{method}:", *(f"  {name}: {value}" for name, value in found.items())]
    for row in results["coefficients"]:
        lines.append(
            f"{row['problem'][:52]:52} coefficient {_number(row['coefficient'])} +- {_number(row['std_error'])} "
            f"({row['true_coefficient']:.4g}), multiplicity {row['multiplicity']} ({row['true_multiplicity']}), "
            f"{'covered' if row['is_covered'] else 'not covered'}, {row['seconds']:.1f} s; {row['status'][:60]}"
        )
    if results["coefficients"]:
        lines += ["coefficients:", *(f"  {name}: {value}" for name, value in results["coefficient_scores"].items())]
    return "\n".join(lines)


def _measure(config: Config, problem: AnalyticProblem) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    rows = []
    for method in config.methods:
        for seed in range(1 if method == "gaussian" else config.num_seeds):
            rows += _rows(config, problem, method, seed)
    return {"rows": rows}, {}


def _rows(config: Config, problem: AnalyticProblem, method: str, seed: int) -> list[dict[str, Any]]:
    thresholds = np.sort(np.array(config.thresholds))
    start = time.perf_counter()
    try:
        answer = _ask(config, problem, method, jax.random.fold_in(jax.random.key(seed), 23), thresholds)
    except InputError as error:
        unknown = np.full(len(thresholds), np.nan)
        answer = Answer(unknown, unknown, np.nan, np.nan, str(error), (str(error),))
    seconds = time.perf_counter() - start
    assert problem.log_volume is not None
    rows = []
    for threshold, value, bar in zip(thresholds, answer.log_volume, answer.std_error, strict=True):
        exact = problem.log_volume(float(threshold))
        rows.append(
            {
                "problem": problem.name,
                "dimension": problem.dimension,
                "base": type(problem.base).__name__,
                "threshold": float(threshold),
                "method": method,
                "seed": seed,
                "knows_base": method not in NEEDS_GAUSSIAN or isinstance(problem.base, Gaussian),
                "exact": exact,
                "estimate": _finite(value),
                "std_error": _finite(bar),
                "error": _finite(value - exact),
                "error_in_std_errors": _finite((value - exact) / bar) if bar else None,
                "num_losses": _finite(answer.num_losses),
                "num_gradients": _finite(answer.num_gradients),
                "seconds": seconds,
                "status": answer.status,
                "warnings": list(answer.warnings),
            }
        )
    return rows


def _ask(config: Config, problem: AnalyticProblem, method: str, key: Any, thresholds: np.ndarray) -> Answer:
    if method == "nested sampling":
        found = nested_sampling(key, problem, thresholds, num_live=config.num_live, max_losses=config.max_losses)
        return Answer(found.log_volume, found.std_error, found.num_losses, 0)
    if method == "published rays":
        # It knows one threshold; those of one seed have the same rays.
        each = [published_rays(key, problem, float(t), num_rays=config.num_published_rays) for t in thresholds]
        log_volume, std_error = (np.concatenate(arrays) for arrays in list(zip(*each, strict=True))[:2])
        return Answer(log_volume, std_error, sum(found.num_losses for found in each), 0)
    assert problem.base is not None
    found = estimate_volume(
        key,
        problem.loss_fn,
        problem.center,
        problem.data,
        thresholds,
        base=problem.base,
        method=method,
        progress=False,
    )
    num_losses, num_gradients = _COSTS[method](problem, found.diagnostics)
    return Answer(found.log_volume, found.std_error, num_losses, num_gradients, found.status, found.warnings)


def _tempering_cost(problem: AnalyticProblem, diagnostics: dict[str, Any]) -> tuple[float, float]:
    # Each gradient of a trajectory comes with its loss.
    return diagnostics["gradients"], diagnostics["gradients"]


def _subset_cost(problem: AnalyticProblem, diagnostics: dict[str, Any]) -> tuple[float, float]:
    # A step that meets the level takes a gradient and a second loss.
    steps, reflected = diagnostics["num_steps"], 1 - np.nan_to_num(diagnostics["progress"], nan=1.0)
    return steps * (1 + reflected), steps * reflected


def _rays_cost(problem: AnalyticProblem, diagnostics: dict[str, Any]) -> tuple[float, float]:
    # The preconditioner's Hessian: a product with a vector for each weight.
    return diagnostics["num_losses"], problem.dimension


def _gaussian_cost(problem: AnalyticProblem, diagnostics: dict[str, Any]) -> tuple[float, float]:
    return 1, 1 + problem.dimension


_COSTS: dict[str, Callable[[AnalyticProblem, dict[str, Any]], tuple[float, float]]] = {
    "tempering": _tempering_cost,
    "subset": _subset_cost,
    "rays": _rays_cost,
    "gaussian": _gaussian_cost,
}


def _measure_coefficient(config: Config, name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    problem, start = catalogue()[name], time.perf_counter()
    # A wide Gaussian around the center reaches other minima, too: the coefficient is the smallest of all, where it is known.
    is_local = problem.global_rlct is None
    truth = (problem.rlct, problem.multiplicity) if is_local else (problem.global_rlct, problem.global_multiplicity)
    row: dict[str, Any] = {"problem": problem.name, "dimension": problem.dimension}
    row |= {"true_coefficient": truth[0], "true_multiplicity": truth[1]}
    row |= dict.fromkeys((*_READ, "num_gradients")) | {"is_covered": False}
    base, keys = Gaussian(problem.center, 1e-3), jax.random.split(jax.random.key(1), 8)
    near = jax.vmap(lambda key: base.sample(key, problem.center))(keys)
    rounding = float(loss_rounding(LocalPosterior(problem.loss_fn, problem.center, 1.0, base), near, problem.data))
    max_nbeta = min(config.max_nbeta, 0.01 / max(rounding, 1e-30))
    for scale in config.base_scales:
        row |= {"base_scale": scale, "max_nbeta": max_nbeta}
        try:
            ladder = temper(
                jax.random.fold_in(jax.random.key(0), 29),
                problem.loss_fn,
                problem.center,
                problem.data,
                base=Gaussian(problem.center, scale),
                max_nbeta=max_nbeta,
                num_chains=config.num_chains,
                num_draws=config.num_draws,
                progress=False,
            )
            row |= _read_coefficient(ladder, *truth) | {"num_gradients": ladder.gradients_per_chain * ladder.loss.shape[1]}
            break
        except InputError as error:
            row |= {"status": str(error), "warnings": [str(error)]}
    return row | {"seconds": time.perf_counter() - start}, {}


_READ = ("coefficient", "std_error", "multiplicity", "is_resolved", "probability", "coefficients", "std_errors")


def _read_coefficient(ladder: Ladder, true_coefficient: Any, true_multiplicity: Any) -> dict[str, Any]:
    found = ladder.learning_coefficient()
    numbers = {name: getattr(found, name) for name in _READ}
    return {name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in numbers.items()} | {
        "is_covered": found.covers(true_coefficient, true_multiplicity),
        "status": DO_NOT_TRUST if found.warnings else OK,
        "warnings": list(found.warnings),
    }


def _is_right(row: dict[str, Any]) -> bool:
    if row["estimate"] is None:
        return False
    limit, bar = max(0.1, 0.01 * abs(row["exact"])), row["std_error"]
    return abs(row["error"]) <= limit or (bar is not None and bar <= limit and abs(row["error"]) <= 3 * bar)


def _is_close(row: dict[str, Any]) -> bool:
    known = row["coefficient"] is not None
    return known and abs(row["coefficient"] - row["true_coefficient"]) <= max(0.03 * row["true_coefficient"], SMALL)


def _name(row: dict[str, Any]) -> str:
    return f"{row['problem']} at {row['threshold']:g}, seed {row['seed']}"


def _spread(errors: list[float | None]) -> str:
    known = [f"{error:+.3f}" for error in errors if error is not None]
    return "/".join(known) or "-"


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _median(values: list[float]) -> float | None:
    return float(np.median(values)) if values else None


def _mean(flags: list[bool]) -> float | None:
    return float(np.mean(flags)) if flags else None


@dataclass(frozen=True)
class _Arguments:
    config: tyro.conf.OmitArgPrefixes[Config]
    out: Path
    """Run directory. An unfinished one goes on after its last problem."""


if __name__ == "__main__":
    folder = Path("runs") / "volume_accuracy"
    presets = {
        "default": ("Everything.", _Arguments(Config(), folder)),
        "smoke": ("See in a minute that it works.", _Arguments(SMOKE, folder)),
    }
    arguments = tyro.extras.overridable_config_cli(presets, description=__doc__)
    # Threads of BLAS spin while they wait: beside another process a reading took minutes instead of seconds.
    threadpoolctl.threadpool_limits(1, user_api="blas")
    print(table(main(arguments.config, arguments.out).results))

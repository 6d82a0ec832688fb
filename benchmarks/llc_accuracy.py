"""How far `estimate_llc`, with nothing hand-set, is from exact answers, beside SGLD at the usual settings, and devinterp.

    python benchmarks/llc_accuracy.py {default | smoke} [--out DIR] [--peer-python PYTHON] [--help for every setting]

Two scores per run. *Sampler*: the estimate against the exact E[nbeta K] at the method's own nbeta and localization.
*Coefficient*: the estimate against the learning coefficient. SGLD gets the same gradients as `estimate_llc`; devinterp, whose
steps take a millisecond, one seed and at most 2,000 per chain. The hard cases (`hard_cases.py`) come last, with nbeta and
localization given. Each problem is a stage: a run that was cut short goes on after its last one.
"""

import dataclasses
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from hard_cases import HardCase, hard_cases, reference
from llc_bridge import connect, flat_loss, serve

from slt_interp import SGLD, FullBatch, LLCEstimate, LocalPosterior, chain_mesh, estimate_llc, llc, mean_loss, sample
from slt_interp.analytic import AnalyticProblem, catalogue
from slt_interp.errors import InputError
from slt_interp.estimators.llc import DO_NOT_TRUST, NOT_EQUILIBRATED, OK
from slt_interp.storage import RunDirectory, open_run


@dataclass(frozen=True)
class Config:
    """What is measured."""

    problems: tuple[str, ...] = ()
    """Names of the catalogue; if none is given, all that are not too large and not confined to a box, and the hard cases."""
    max_dimension: int = 10_000
    nbetas: tuple[float, ...] = (1e3, 1e5)
    num_seeds: int = 4
    num_chains: int = 16
    max_gradients: int | None = None
    """Per chain; by default that of `estimate_llc`."""
    sgld_step_size: float = 1e-4
    sgld_localization: float = 100.0
    """Both are devinterp's, too."""
    peer_python: str | None = None
    """An interpreter that has torch and devinterp; without it there are no rows of devinterp."""


SMOKE = Config(problems=("quadratic in 10 dimensions", "monomial w1^2 w2^2"), nbetas=(1e3,), num_seeds=2, max_gradients=2000)

SMALL = 1e-3
"""Errors below this are none, however small the exact value: an LLC is never wanted more precisely."""

METHODS = ("estimate_llc", "SGLD", "devinterp")


def main(config: Config, out: Path) -> RunDirectory:
    """Run every problem that is not finished yet, and write rows and scores."""
    problems = catalogue()
    unbounded = (p for p in problems.values() if p.base is None or not p.base.is_bounded)
    names = config.problems or tuple(p.name for p in unbounded if p.dimension <= config.max_dimension)
    # Whether there was a peer is part of what was asked, where it lies is not.
    asked = dataclasses.asdict(config) | {"peer_python": config.peer_python and Path(config.peer_python).name}
    run = open_run(out, {"benchmark": "llc_accuracy", "settings": asked})
    rows: list[dict[str, Any]] = []
    with connect(config.peer_python) as peer:
        for i, name in enumerate(names):
            print(f"{i + 1} of {len(names)}: {name}", file=sys.stderr, flush=True)
            found, _ = run.stage(f"problem {i + 1}", partial(_measure, config, problems[name], peer))
            rows += found["rows"]
            # Compiled programs pile up, a dozen a problem, until the process has no memory maps left for more.
            jax.clear_caches()
    hard: list[dict[str, Any]] = []
    for i, case in enumerate(() if config.problems else hard_cases()):
        print(f"hard case {i + 1}: {case.problem.name}", file=sys.stderr, flush=True)
        found, _ = run.stage(f"hard case {i + 1}", partial(_measure_hard, config, case))
        hard += found["rows"]
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    run.finish({"scores": {method: scores(rows, method) for method in methods}, "rows": rows, "hard_cases": hard})
    return run


def scores(rows: list[dict[str, Any]], method: str) -> dict[str, Any]:
    """Summarize the rows of one method; shares are of the rows whose exact energy is known."""
    mine = [row for row in rows if row["method"] == method]
    known = [row for row in mine if row["exact"] is not None]
    wrong = {limit: [_error(row) > max(limit * row["exact"], SMALL) for row in known] for limit in (0.02, 0.05, 0.1)}
    within = [
        not far or (row["estimate"] is not None and _error(row) <= 3 * row["std_error"])
        for row, far in zip(known, wrong[0.02], strict=True)
    ]
    small_bar = [row["estimate"] is not None and row["std_error"] <= max(0.03 * row["exact"], SMALL) for row in known]
    ok, flat, distrusted = ([row["status"] == status for row in known] for status in (OK, NOT_EQUILIBRATED, DO_NOT_TRUST))
    covered = [_error(row) <= max(1.96 * row["std_error"], SMALL) for row, trusted in zip(known, ok, strict=True) if trusted]
    right = [good and not far for good, far in zip(within, wrong[0.05], strict=True)]
    coefficients = [row for row in mine if row["rlct"]]
    return {
        "num_runs": len(mine),
        "num_exact": len(known),
        "median_sampler_error": _median([_error(row) / max(row["exact"], SMALL) for row in known]),
        "median_coefficient_error": _median(
            [abs((row["estimate"] if row["estimate"] is not None else np.inf) / row["rlct"] - 1) for row in coefficients]
        ),
        "share_within_2_percent_or_3_errors": _share(within),
        "share_with_error_bar_of_at_most_3_percent": _share(small_bar),
        "num_ok": sum(ok),
        "ok_but_off_by_5_percent": [_name(r) for r, good, far in zip(known, ok, wrong[0.05], strict=True) if good and far],
        "off_by_10_percent_without_warning": [
            _name(row) for row, far in zip(known, wrong[0.1], strict=True) if far and not row["warnings"]
        ],
        "coverage_of_95_percent_intervals_of_ok": _share(covered),
        "flat_directions_but_off_by_5_percent": [
            _name(r) for r, soft, far in zip(known, flat, wrong[0.05], strict=True) if soft and far
        ],
        "right_but_not_to_be_trusted": _share([bad for bad, fine in zip(distrusted, right, strict=True) if fine]),
        "right_but_flat_directions": _share([soft for soft, fine in zip(flat, right, strict=True) if fine]),
    }


def table(results: dict[str, Any]) -> str:
    """Lay the runs out for reading, one problem, nbeta and method a line, and the scores."""
    lines = []
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        groups.setdefault((row["problem"], row["nbeta"], row["method"]), []).append(row)
    for (problem, nbeta, method), rows in groups.items():
        values = [row["estimate"] for row in rows if row["estimate"] is not None]
        exact = f"{rows[0]['exact']:.4g}" if rows[0]["exact"] is not None else "-"
        off = _median([_error(row) / max(row["exact"], SMALL) for row in rows]) if rows[0]["exact"] is not None else None
        lines.append(
            f"{problem[:52]:52} {nbeta:7.0e} {method:12} exact {exact:>8} rlct {rows[0]['rlct'] or 0:7.4g} "
            f"mean {np.mean(values) if values else np.nan:8.4g} off {'-' if off is None else f'{off:.1%}':>6} "
            f"ok {sum(row['status'] == OK for row in rows)}/{len(rows)} {np.mean([row['seconds'] for row in rows]):5.1f} s"
        )
    for row in results["hard_cases"]:
        lines.append(
            f"{row['problem'][:70]:70} {row['nbeta']:7.0e} "
            f"reference {row['reference']:.4g} +- {row['reference_std_error']:.2g} "
            f"estimate {_number(row['estimate'])} +- {_number(row['std_error'])} {row['seconds']:5.1f} s {row['status']}"
        )
    for method, found in results["scores"].items():
        lines += [f"{method}:", *(f"  {name}: {value}" for name, value in found.items())]
    if "devinterp" not in results["scores"]:
        lines.append("devinterp: not measured, since --peer-python named no interpreter that has it")
    return "\n".join(lines)


def _measure(config: Config, problem: AnalyticProblem, peer: Connection | None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    rows = []
    ask = None if peer is None else partial(serve, peer, *flat_loss(problem))
    for nbeta in config.nbetas:
        for seed in range(config.num_seeds):
            key = jax.random.fold_in(jax.random.key(seed), 17)
            ours = _row(problem, nbeta, seed, "estimate_llc", 1.0, partial(_ours, config, key, problem, nbeta))
            rows.append(ours)
            cost = int(ours["gradients_per_chain"] or config.max_gradients or 20_000)
            sgld = partial(_sgld, config, key, problem, nbeta, cost)
            rows.append(_row(problem, nbeta, seed, "SGLD", config.sgld_localization, sgld))
            if ask is not None and seed == 0:
                devinterp = partial(_devinterp, config, ask, nbeta, seed, min(cost, _MAX_PEER_GRADIENTS))
                rows.append(_row(problem, nbeta, seed, "devinterp", config.sgld_localization, devinterp))
    return {"rows": rows}, {}


def _measure_hard(config: Config, case: HardCase) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    known = reference(case)
    problem = replace(case.problem, energy=lambda nbeta, localization: known["reference"])
    asked = replace(config, max_gradients=config.max_gradients or case.max_gradients)
    rows = []
    for seed in range(min(case.num_seeds, config.num_seeds)):
        key = jax.random.fold_in(jax.random.key(seed), 17)
        ours = partial(_ours, asked, key, problem, case.nbeta, case.localization)
        rows.append(_row(problem, case.nbeta, seed, "estimate_llc", case.localization, ours) | known)
        del rows[-1]["exact"]
    return {"rows": rows}, {}


def _ours(config: Config, key: Any, problem: AnalyticProblem, nbeta: float, localization: float | None = None) -> LLCEstimate:
    return estimate_llc(
        key,
        problem.loss_fn,
        problem.center,
        problem.data,
        nbeta=nbeta,
        localization=localization,
        num_chains=config.num_chains,
        max_gradients=config.max_gradients,
        progress=False,
    )


def _sgld(config: Config, key: Any, problem: AnalyticProblem, nbeta: float, num_gradients: int) -> LLCEstimate:
    """Run SGLD as the field does: a step size for all, half of the steps dropped, the same gradients as ours."""
    target = LocalPosterior(problem.loss_fn, problem.center, nbeta, config.sgld_localization)
    draws = sample(
        key,
        SGLD(target, config.sgld_step_size),
        problem.center,
        FullBatch(problem.data),
        num_chains=config.num_chains,
        num_draws=100,
        num_burnin=num_gradients // 2,
        thinning=max(1, num_gradients // 200),
        chunk_size=5,
        mesh=chain_mesh(config.num_chains),
        progress=False,
    )
    return llc(draws, mean_loss(problem.loss_fn, problem.center, problem.data)[0])


_MAX_PEER_GRADIENTS, _PEER_CHAINS = 2000, 4
"""A run of so much takes some eight seconds, most of them devinterp's own."""

_NOT_JUDGED = "not judged"
"""devinterp gives no verdict on its estimates."""


def _devinterp(config: Config, ask: Any, nbeta: float, seed: int, num_gradients: int) -> LLCEstimate:
    """Run devinterp's estimator: half of the steps dropped, and the spread between its chains for an error bar."""
    request = {
        "lr": config.sgld_step_size,
        "localization": config.sgld_localization,
        "nbeta": nbeta,
        "num_gradients": num_gradients,
        "num_chains": _PEER_CHAINS,
        "seed": seed,
    }
    answer = ask(request)
    if "error" in answer:
        raise InputError(answer["error"])
    per_chain = np.array(answer["per_chain"])
    return LLCEstimate(
        llc=per_chain.mean(),
        std_error=per_chain.std(ddof=1) / np.sqrt(len(per_chain)),
        per_chain=per_chain,
        init_loss=np.nan,
        init_loss_std_error=np.nan,
        nbeta=nbeta,
        localization=config.sgld_localization,
        ess=np.nan,
        rhat=np.nan,
        status=_NOT_JUDGED,
        warnings=(),
        diagnostics={"gradients_per_chain": num_gradients, "virial": np.nan},
    )


def _row(problem: AnalyticProblem, nbeta: float, seed: int, method: str, localization: float, run: Any) -> dict[str, Any]:
    start = time.perf_counter()
    row = {"problem": problem.name, "dimension": problem.dimension, "nbeta": nbeta, "seed": seed, "method": method}
    row |= {"rlct": problem.rlct, "multiplicity": problem.multiplicity}
    try:
        found = run()
    except InputError as error:
        empty = dict.fromkeys(("localization", "exact", "estimate", "std_error", "gradients_per_chain", "virial", "rhat"))
        # Without an estimate the localization that `estimate_llc` would have chosen is not known, but the row must count.
        if problem.energy is not None:
            empty["exact"] = problem.energy(nbeta, localization)
        return row | empty | {"status": "error", "warnings": [str(error)], "seconds": time.perf_counter() - start}
    exact = None if problem.energy is None else problem.energy(nbeta, found.localization)
    numbers = {
        "localization": found.localization,
        "exact": exact,
        "estimate": found.llc,
        "std_error": found.std_error,
        "gradients_per_chain": found.diagnostics["gradients_per_chain"],
        "virial": found.diagnostics["virial"],
        "rhat": found.rhat,
    }
    numbers = {name: None if x is None or not np.isfinite(x) else float(x) for name, x in numbers.items()}
    return row | numbers | {"status": found.status, "warnings": list(found.warnings), "seconds": time.perf_counter() - start}


def _error(row: dict[str, Any]) -> float:
    return float("inf") if row["estimate"] is None else abs(row["estimate"] - row["exact"])


def _name(row: dict[str, Any]) -> str:
    return f"{row['problem']}, nbeta {row['nbeta']:g}, seed {row['seed']}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _median(values: list[float]) -> float | None:
    middle = float(np.median(values)) if values else np.nan
    return middle if np.isfinite(middle) else None


def _share(flags: list[bool]) -> float | None:
    return float(np.mean(flags)) if flags else None


@dataclass(frozen=True)
class _Arguments:
    config: tyro.conf.OmitArgPrefixes[Config]
    out: Path
    """Run directory. An unfinished one goes on after its last problem."""


if __name__ == "__main__":
    folder = Path("runs") / "llc_accuracy"
    presets = {
        "default": ("Everything.", _Arguments(Config(), folder)),
        "smoke": ("See in a minute that it works.", _Arguments(SMOKE, folder)),
    }
    arguments = tyro.extras.overridable_config_cli(presets, description=__doc__)
    print(table(main(arguments.config, arguments.out).results))

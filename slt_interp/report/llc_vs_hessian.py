"""The report of the study `llc-vs-hessian`: its sentences and figures, all computed from the results."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from slt_interp.estimators.llc import DO_NOT_TRUST, OK
from slt_interp.report import figures
from slt_interp.report.page import Page, Section
from slt_interp.report.population import population_section, population_sentence
from slt_interp.report.words import listed, number, numbers, show
from slt_interp.storage import RunDirectory

Results = dict[str, Any]

CLOSE = 0.02
"""A prediction this near to the truth, as a part of it, is called right."""

SYMBOLS = (
    ("L, L*", "mean loss over the n examples, in nats per example; L* is its value at the center"),
    ("center, w*", "the weights at which one asks: a minimum, or a checkpoint of training"),
    ("nβ", "number of examples n times the inverse temperature β of the posterior"),
    ("γ", "localization: the posterior carries the prior N(w*, 1/γ) on every weight"),
    ("posterior", "p(w) ∝ exp(−nβ (L(w) − L*) − γ |w − w*|² / 2)"),
    ("LLC", "local learning coefficient, nβ E[L − L*] under the posterior; dimensionless"),
    (
        "learning coefficient",
        "what the LLC tends to as nβ grows: half the number of directions that matter, at a regular minimum",
    ),
    (
        "d, rank",
        "number of weights; number of Hessian eigenvalues above 1.2e-7 d times the largest, the rounding of float32 weights",
    ),
    ("Hessian (Gaussian)", "½ tr[nβ H (nβ H + γ)⁻¹]: what the LLC would be if the loss were its second-order expansion at w*"),
    (
        "regular, singular",
        "a minimum is regular if the Hessian sees every direction in which the loss rises, and singular otherwise",
    ),
    ("V(ε)", "share of weights drawn from N(w*, 1/γ) whose loss is within ε nats of L*"),
    (
        "deepest, smooth",
        "points of the fibre of a deep linear network: the most singular one, and one where the fibre is a manifold",
    ),
)


def page(run: RunDirectory) -> Page:
    """Compose the report."""
    results = run.results
    return Page(
        title="How degenerate is a minimum? The local learning coefficient against the Hessian",
        findings=findings(results),
        sections=(
            _llc_section(results["exact"]),
            _volume_section(results["exact"]),
            _deep_linear_section(results["deep_linear"]),
            _network_section(results["networks"]),
            _training_section(results["training"]),
            _module_section(results["modules"]),
            population_section(results["population"]),
        ),
        symbols=SYMBOLS,
    )


def findings(results: Results) -> tuple[str, ...]:
    """Answer the study's questions, one sentence each."""
    return (
        _llc_sentence(results["exact"]),
        _volume_sentence(results["exact"]),
        *_deep_linear_sentences(results["deep_linear"]),
        *_network_sentences(results["networks"]),
        _training_sentence(results["training"]),
        *_module_sentences(results["modules"]),
        population_sentence(results["population"]),
    )


def _llc_section(exact: Results) -> Section:
    panels = [
        figures.Comparison(
            problem["name"],
            (*_sampled(problem["llc"], "nbeta"), [_is_trusted(problem)] * len(problem["llc"]["nbeta"])),
            _pair(problem["llc"], "nbeta", "gaussian"),
            None if problem["llc"]["exact"] is None else _pair(problem["llc"], "nbeta", "exact"),
            {"learning coefficient": problem["rlct"], "d / 2": problem["dimension"] / 2},
        )
        for problem in exact["problems"]
    ]
    sentences = (
        _llc_sentence(exact),
        f"Each panel is one ladder of temperatures at localization {exact['localization']:g}; bars are two standard errors.",
        *(f"Warning ({problem['name']}): {warning}." for problem in exact["problems"] for warning in problem["warnings"]),
    )
    table = (
        ("problem", "nβ", "exact", "sampled", "Gaussian", "rank / 2", "d / 2", "learning coefficient, multiplicity"),
        *(
            (
                problem["name"],
                f"{problem['llc']['nbeta'][-1]:.0e}",
                show(problem["llc"]["exact"] and problem["llc"]["exact"][-1]),
                f"{problem['llc']['sampled'][-1]:.3f} ± {problem['llc']['std_error'][-1]:.3f}",
                show(problem["llc"]["gaussian"][-1]),
                f"{problem['rank'] / 2:g}",
                f"{problem['dimension'] / 2:g}",
                f"{show(problem['rlct'])}, {problem['multiplicity'] or 'unknown'}",
            )
            for problem in exact["problems"]
        ),
    )
    return Section("The LLC at every scale, where the answer is known", sentences, _llc_figure(panels), table)


def _llc_figure(panels: list[figures.Comparison]) -> Any:
    return figures.comparisons(panels, xlabel=r"$n\beta$", ylabels=["LLC"])


def _llc_sentence(exact: Results) -> str:
    problems = [problem for problem in exact["problems"] if problem["llc"]["exact"] is not None]
    misses = {p["name"]: float(p["llc"]["gaussian"][-1] / p["llc"]["exact"][-1] - 1) for p in problems}
    within, count = _within([p["llc"] for p in problems])
    right = [name for name, miss in misses.items() if abs(miss) <= CLOSE]
    wrong = {name: miss for name, miss in misses.items() if abs(miss) > CLOSE}
    words = f"At the largest nβ the Hessian is right within {CLOSE:.0%} on {listed(right)}"
    if wrong:
        words += ", and " + listed(
            [f"{abs(miss):.0%} too {'small' if miss < 0 else 'large'} on {name}" for name, miss in wrong.items()]
        )
    return (
        f"{words}; the sampled LLC is within 3 standard errors of the exact value at {within} of {count} rungs of the ladders."
    )


def _volume_section(exact: Results) -> Section:
    problems = exact["problems"]
    panels = [
        figures.Comparison(
            problem["name"],
            (*_sampled(problem["volume"], "threshold"), _known(problem["volume"], "sampled")),
            _pair(problem["volume"], "threshold", "gaussian"),
            None if problem["volume"]["exact"] is None else _pair(problem["volume"], "threshold", "exact"),
        )
        for problem in problems
    ]
    figure = figures.comparisons(
        panels, xlabel=r"threshold $\epsilon$ (nats above $L^*$)", ylabels=[r"$\ln V(\epsilon)$ (nats)"]
    )
    sentences = (
        _volume_sentence(exact),
        "The sampled volumes are read from the draws of the ladders above, the Gaussian ones are the exact mass of the ellipsoid that the Hessian predicts.",
    )
    return Section("The volume of the basin", sentences, figure)


def _volume_sentence(exact: Results) -> str:
    problems = [problem for problem in exact["problems"] if problem["volume"]["exact"] is not None]
    if not problems:
        return "No exact volume is known for these problems."
    within, count = _within([p["volume"] for p in problems])
    gaps = {p["name"]: p["volume"]["gaussian"][0] - p["volume"]["exact"][0] for p in problems}
    worst = max(gaps, key=lambda name: abs(gaps[name]))
    best = min(gaps, key=lambda name: abs(gaps[name]))
    threshold = problems[0]["volume"]["threshold"][0]
    return (
        f"At ε = {threshold:g} nats ln V of the Hessian's ellipsoid is {_miss(gaps[best])} on {best}, and {_miss(gaps[worst])} on {worst}; the "
        f"sampled volume is within 3 standard errors of the exact one at {within} of {count} thresholds."
    )


def _miss(gap: float) -> str:
    return "right within .05 nats" if abs(gap) < 0.05 else f"{abs(gap):.1f} nats too {'large' if gap > 0 else 'small'}"


def _deep_linear_section(deep: Results) -> Section:
    problems = deep["problems"]
    truth = np.array([p["rlct"] for p in problems])
    last = [p["measured"][-1] for p in problems]
    figure = figures.shares(
        [p["name"] for p in problems],
        (numbers(last, "llc") / truth, numbers(last, "std_error") / truth, [m["status"] != DO_NOT_TRUST for m in last]),
        {
            "Hessian (Gaussian)": numbers(last, "gaussian") / truth,
            "rank / 2": np.array([p["rank"] for p in problems]) / 2 / truth,
            "d / 2": np.array([p["dimension"] for p in problems]) / 2 / truth,
        },
    )
    table = (
        ("network", "d", "γ", "learning coefficient, multiplicity", "sampled", "Gaussian", "rank / 2", "d / 2", "verdict"),
        *(
            (
                p["name"],
                f"{p['dimension']}",
                f"{m['localization']:.3g}",
                f"{p['rlct']:g}, {p['multiplicity']}",
                f"{m['llc']:.2f} ± {show(m['std_error'], '.2f')}",
                show(m["gaussian"], ".2f"),
                f"{p['rank'] / 2:g}",
                f"{p['dimension'] / 2:g}",
                m["status"],
            )
            for p, m in zip(problems, last, strict=True)
        ),
    )
    sentences = (
        *_deep_linear_sentences(deep),
        f"All at nβ = {last[0]['nbeta']:.0e}. At smooth points γ is large enough to keep the chains there: deeper points of the fibre, of smaller coefficient, are near. "
        "At finite nβ an LLC lies below its limit by about (multiplicity − 1) / log nβ.",
    )
    return Section("Deep linear networks, where the learning coefficient is known", sentences, figure, table)


def _deep_linear_sentences(deep: Results) -> list[str]:
    sentences = []
    for point in ("deepest", "smooth"):
        problems = [p for p in deep["problems"] if point in p["name"]]
        if not problems:
            continue
        spans = {
            what: _span([value(p) / p["rlct"] for p in problems])
            for what, value in (
                ("sampled LLC", lambda p: p["measured"][-1]["llc"]),
                ("Gaussian prediction", lambda p: number(p["measured"][-1]["gaussian"])),
                ("rank / 2", lambda p: p["rank"] / 2),
                ("d / 2", lambda p: p["dimension"] / 2),
            )
        }
        parts = listed([f"{what} {span}" for what, span in spans.items()])
        count = f"{len(problems)} {point} point{'s' * (len(problems) > 1)}"
        sentences.append(f"At {count} of deep linear networks, as multiples of the learning coefficient: {parts}.")
    return sentences


def _network_section(networks: Results) -> Section:
    found = networks["networks"]
    panels = [
        figures.Comparison(
            network["name"],
            (
                numbers(network["measured"], "nbeta"),
                numbers(network["measured"], "llc"),
                numbers(network["measured"], "std_error"),
                [m["status"] != DO_NOT_TRUST for m in network["measured"]],
            ),
            (numbers(network["measured"], "nbeta"), numbers(network["measured"], "gaussian")),
            None,
            {"rank / 2": network["rank"] / 2, "d / 2": network["dimension"] / 2},
        )
        for network in found
    ]
    figure = figures.comparisons(panels, xlabel=r"$n\beta$", ylabels=["LLC"], logarithmic=True)
    sentences = (
        *_network_sentences(networks),
        *(
            f"On {network['name']}: loss {network['loss']:.3g} nats on its {network['num_examples']} examples, {network['test_loss']:.3g} on fresh ones, gradient norm "
            f"{network['grad_norm']:.1g} after polishing."
            for network in found
        ),
    )
    table = (
        ("network", "nβ", "γ", "LLC (sampled)", "Gaussian", "rank / 2", "d / 2", "verdict"),
        *(
            (
                network["name"],
                f"{m['nbeta']:.0f}",
                f"{m['localization']:.3g}",
                f"{m['llc']:.2f} ± {show(m['std_error'], '.2f')}",
                show(m["gaussian"], ".2f"),
                f"{network['rank'] / 2:g}",
                f"{network['dimension'] / 2:g}",
                "; ".join([m["status"], *m["warnings"]]),
            )
            for network in found
            for m in network["measured"]
        ),
    )
    return Section("Trained networks", sentences, figure, table)


def _network_sentences(networks: Results) -> list[str]:
    sentences = []
    for network in networks["networks"]:
        usable = [m for m in network["measured"] if m["status"] != DO_NOT_TRUST and m["gaussian"] is not None]
        name = network["name"][0].upper() + network["name"][1:]
        head = f"{name} ({network['dimension']} weights, rank / 2 = {network['rank'] / 2:g})"
        if not usable:
            sentences.append(f"{head}: no sampled LLC is to be trusted beside a Gaussian prediction.")
            continue
        parts = [
            f"{m['llc']:.4g} ± {m['std_error']:.1g} against {m['gaussian']:.4g} ({m['gaussian'] / m['llc'] - 1:+.0%}) at nβ = {m['nbeta']:.0f}"
            for m in usable
        ]
        left_out = len(network["measured"]) - len(usable)
        tail = (
            f"; {left_out} of {len(network['measured'])} nβ are left out, not to be trusted or without a prediction"
            if left_out
            else ""
        )
        sentences.append(f"{head}: sampled LLC against Gaussian {listed(parts)}{tail}.")
    return sentences


def _training_section(training: Results) -> Section:
    checkpoints = training["checkpoints"]
    measured = [c["measured"][0] for c in checkpoints]
    figure = figures.along_training(
        numbers(checkpoints, "step"),
        {"training examples": numbers(checkpoints, "loss"), "fresh examples": numbers(checkpoints, "test_loss")},
        (numbers(measured, "llc"), numbers(measured, "std_error"), [m["status"] != DO_NOT_TRUST for m in measured]),
        numbers(measured, "gaussian"),
        numbers(measured, "num_held"),
    )
    sentences = (
        _training_sentence(training),
        f"All at nβ = {measured[0]['nbeta']:.0f} and γ = {measured[0]['localization']:.3g}. A checkpoint is no minimum: where the chains find lower losses than its own, the "
        "estimate is too small or negative, and says that it is not to be trusted.",
    )
    table = (
        ("step", "loss", "LLC (sampled)", "Gaussian", "trace", "largest, smallest eigenvalue", "verdict"),
        *(
            (
                f"{c['step']}",
                f"{c['loss']:.3g}",
                f"{m['llc']:.2f} ± {show(m['std_error'], '.2f')}",
                show(m["gaussian"], ".2f"),
                f"{c['trace']:.3g}",
                f"{c['largest']:.3g}, {c['smallest']:.2g}",
                m["status"],
            )
            for c, m in zip(checkpoints, measured, strict=True)
        ),
    )
    return Section(f"Along the training of {training['name']}", sentences, figure, table)


def _training_sentence(training: Results) -> str:
    checkpoints = training["checkpoints"]
    trusted = [c for c in checkpoints if c["measured"][0]["status"] != DO_NOT_TRUST]
    without = sum(c["measured"][0]["gaussian"] is None for c in checkpoints)
    head = (
        f"Along the training of {training['name']} the Hessian predicts no LLC at {without} of {len(checkpoints)} checkpoints (curvatures below −γ / nβ), and the "
        f"sampled LLC is to be trusted at {len(trusted)}"
    )
    if len(trusted) < 2:
        return head + "."
    first, last = trusted[0], trusted[-1]
    return (
        f"{head}: it goes from {first['measured'][0]['llc']:.1f} at step {first['step']} to {last['measured'][0]['llc']:.1f} at step {last['step']} as the loss falls from "
        f"{first['loss']:.3g} to {last['loss']:.3g} nats."
    )


def _module_section(modules: Results) -> Section:
    panels = []
    for product, cases in _by_product(modules).items():
        x, ticks = np.arange(len(cases), dtype=float), tuple(f"{case['coupling']:g}" for case in cases)
        for name in ("llc", "volume"):
            end = -1 if name == "llc" else 0
            read = {what: _ends(cases, name, what, end) for what in ("sampled", "std_error", "gaussian", "exact")}
            panels.append(
                figures.Comparison(
                    ("singular" if product == 0 else "smooth") + f" minimum (product {product:g})",
                    (x, read["sampled"], read["std_error"], [_is_trusted(case) for case in cases]),
                    (x, read["gaussian"]),
                    (x, read["exact"]) if product == 0 else None,
                    ticks=ticks,
                )
            )
    threshold = modules["cases"][0]["volume"]["threshold"][0]
    labels = [f"LLC at nβ = {modules['nbeta']:.0e}", rf"$\ln V$ at $\epsilon$ = {threshold:g} nats"]
    figure = figures.comparisons(panels, xlabel="correlation of the modules' inputs", ylabels=labels)
    table = (
        (
            "product",
            "correlation",
            "largest eigenvalues",
            "LLC exact",
            "LLC sampled",
            "LLC Gaussian",
            "ln V exact",
            "ln V sampled",
            "ln V Gaussian",
        ),
        *(
            (
                f"{case['product']:g}",
                f"{case['coupling']:g}",
                ", ".join(f"{value:.3g}" for value in sorted(case["eigenvalues"])[:-3:-1]),
                show(case["llc"]["exact"] and case["llc"]["exact"][-1]),
                f"{case['llc']['sampled'][-1]:.3f} ± {case['llc']['std_error'][-1]:.3f}",
                show(case["llc"]["gaussian"][-1]),
                show(case["volume"]["exact"] and case["volume"]["exact"][0], ".2f"),
                f"{show(case['volume']['sampled'][0], '.2f')} ± {show(case['volume']['std_error'][0], '.2f')}",
                show(case["volume"]["gaussian"][0], ".2f"),
            )
            for case in modules["cases"]
        ),
    )
    sentences = (
        *_module_sentences(modules),
        "Two linear modules of two hidden units each have an input of their own, and their outputs add: at correlation 0 each must be right by itself, at 1 "
        "only their sum matters. At product 0 both are at the origin, a singular point; at product 1 the minima are smooth.",
    )
    return Section("Two modules: does modularity broaden the basin?", sentences, figure, table)


def _module_sentences(modules: Results) -> list[str]:
    sentences = []
    for product, cases in _by_product(modules).items():
        first, last = cases[0], cases[-1]
        llcs = [f"{case['llc']['sampled'][-1]:.2f} ± {case['llc']['std_error'][-1]:.2f}" for case in (first, last)]
        growth, predicted = (
            number(last["volume"][what][0]) - number(first["volume"][what][0]) for what in ("sampled", "gaussian")
        )
        gaussian = [f"{number(case['llc']['gaussian'][-1]):.2f}" for case in (first, last)]
        sentences.append(
            f"Two modules at a {'singular' if product == 0 else 'smooth'} minimum: as the correlation of their inputs goes from {first['coupling']:g} to {last['coupling']:g} the "
            f"sampled LLC goes from {llcs[0]} to {llcs[1]} and ln V changes by {growth:+.2f}; by the Hessian the LLC goes from {gaussian[0]} to {gaussian[1]} and ln V "
            f"changes by {predicted:+.2f}."
        )
    return sentences


def _by_product(modules: Results) -> dict[float, list[Results]]:
    products = sorted({case["product"] for case in modules["cases"]})
    return {product: [case for case in modules["cases"] if case["product"] == product] for product in products}


def _within(readings: Sequence[Results]) -> tuple[int, int]:
    """Count the readings within 3 standard errors of the exact value, and all that gave a number."""
    off = [np.abs(_array(r, "sampled") - _array(r, "exact")) / np.maximum(_array(r, "std_error"), 1e-12) for r in readings]
    z = np.concatenate(off) if off else np.zeros(0)
    z = z[np.isfinite(z)]
    return int(np.sum(z <= 3)), len(z)


def _sampled(reading: Results, x: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return _array(reading, x), _array(reading, "sampled"), _array(reading, "std_error")


def _pair(reading: Results, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    return _array(reading, x), _array(reading, y)


def _array(reading: Results, name: str) -> np.ndarray:
    """Read a list as numbers, what is missing as NaN."""
    return np.array([number(x) for x in reading[name]])


def _known(reading: Results, name: str) -> list[bool]:
    return [x is not None for x in reading[name]]


def _ends(cases: Sequence[Results], name: str, what: str, end: int) -> np.ndarray:
    return np.array([number(case[name][what] and case[name][what][end]) for case in cases])


def _is_trusted(problem: Results) -> bool:
    return problem["status"] == OK


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"

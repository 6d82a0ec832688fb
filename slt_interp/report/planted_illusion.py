"""The report of the study `planted-illusion`: its sentences and figures, all computed from the run directory."""

from typing import Any

import numpy as np

from slt_interp.report import dial_figures
from slt_interp.report.page import Page, Section
from slt_interp.report.words import listed, number, show
from slt_interp.storage import RunDirectory

Results = dict[str, Any]

CELLS = {
    "genuine": "genuine circuit",
    "redundant": "redundant circuit",
    "pinned": "pinned illusion",
    "planted": "planted illusion",
}

TRAINED_CELLS = {
    "genuine": "trained circuit, refitted",
    "planted": "its planted twin, refitted",
    "genuine_frozen": "circuit, frozen alignment",
    "planted_frozen": "twin, frozen alignment",
}

_NAMES = {
    "posterior": "tempered posterior",
    "posterior_restricted": "posterior of the task's answer alone",
    "weight_noise": "weight noise",
    "weight_noise_per_layer": "weight noise, scaled by layer",
    "activation_noise": "activation noise",
    "laplace": "Laplace draws, scaled",
    "pruning": "pruning by magnitude",
    "fisher_pruning": "pruning by Fisher saliency",
    "quantization": "quantization",
    "low_rank": "low rank",
}

SYMBOLS = (
    ("genuine circuit", "the unit that says (a = b), through which the network computes its answer"),
    ("redundant circuit", "two units that say (c = d), each of which gives half"),
    (
        "planted illusion",
        "a copy of (a = b) that nothing reads, and a constant unit that is read: a patch along their sum acts as one of the circuit does",
    ),
    ("pinned illusion", "the same, but a second answer of the network reads the copy"),
    ("excess loss", "KL from the network's own answers to those of the damaged network, nats per example"),
    ("dial", "a way to damage a network; every dial is set to the same excess losses"),
    (
        "F, scaled effect F̃",
        "share of the answers that a patch changes as it should; (F − F of random maps) / (accuracy − F of random maps)",
    ),
    ("score", "mean of F̃ over the levels of excess loss"),
    (
        "AUROC",
        "chance that a circuit's score is above an illusion's, over all pairs of networks; 0.5 is chance; intervals are 95 %, by bootstrap over networks",
    ),
    (
        "γ, nβ",
        "localization and n times the inverse temperature of the posterior exp(−nβ L − γ |w − w*|² / 2), w* the weights at which it starts",
    ),
    ("half-life", "excess loss at which F̃ has fallen to a half; censored if it has not at the last level"),
    ("R-hat", "agreement of the chains in a cell's effect; 1 is perfect"),
)


def page(run: RunDirectory) -> Page:
    """Compose the report."""
    results = run.results
    return Page(
        title="Planted illusions: which ways to damage a network tell a circuit from what a probe invented",
        findings=findings(results),
        sections=(_scores(results), _curves(results), _prediction(results), _half_lives(results), _trained(results)),
        symbols=SYMBOLS,
    )


def findings(results: Results) -> tuple[str, ...]:
    """Answer the study's questions, one sentence each; what dials cannot do first."""
    dials = results["dials"]
    blind = [name for name, entry in dials.items() if _is_comparable(entry) and entry["auroc_low"] <= 0.5]
    seeing = [name for name, entry in dials.items() if _is_comparable(entry) and entry["auroc_low"] > 0.5]
    missing = [name for name, entry in dials.items() if not _is_comparable(entry)]
    pinned = [name for name, entry in dials.items() if _is_comparable(entry) and entry["auroc_pinned_low"] > 0.5]
    answers = [
        f"Over {results['settings']['num_seeds']} networks built by hand, {_count(blind, 'dial')} of {len(dials)} do not tell the genuine circuit from the planted illusion (95 % "
        f"interval of the AUROC down to chance): {_list_dials(blind)}.",
    ]
    if missing:
        answers.append(
            f"{_list_dials(missing).capitalize()} cannot be compared: {'it does' if len(missing) == 1 else 'they do'} not come near half of the excess losses, or cost too much accuracy there."
        )
    answers.append(
        f"The pinned illusion, of which half is held by a second answer, is told from the genuine circuit by {_list_dials(pinned)}; the tempered posterior of the whole loss has an AUROC of "
        f"{_auroc(dials['posterior'], '_pinned')}, that of the task's answer alone {_auroc(dials['posterior_restricted'], '_pinned')}."
    )
    answers.append(
        f"The genuine circuit is told from the planted illusion by {_list_dials(seeing)}; the tempered posterior has an AUROC of {_auroc(dials['posterior'], '')} and puts the circuit first in "
        f"{show(dials['posterior']['paired'], '.0%')} of {dials['posterior']['num_networks']} networks."
    )
    answers.append(_prediction_sentence(results))
    answers.append(_trained_sentence(results))
    return tuple(answers)


def _scores(results: Results) -> Section:
    dials = results["dials"]
    order = sorted(dials, key=lambda name: -number(dials[name]["auroc"]) if _is_comparable(dials[name]) else np.inf)
    panels = {
        title: [
            tuple(number(dials[name][f"auroc{suffix}{end}"]) for end in ("", "_low", "_high"))
            if _is_comparable(dials[name])
            else (np.nan, np.nan, np.nan)
            for name in order
        ]
        for title, suffix in (("genuine above planted", ""), ("genuine above pinned", "_pinned"))
    }
    table = (
        (
            "dial",
            "networks",
            "genuine above planted",
            "first within its network",
            "genuine above pinned",
            "redundant above planted",
            *(f"score, {title}" for title in CELLS.values()),
        ),
        *(
            (
                dial_name(name),
                str(entry["num_networks"]),
                _auroc(entry, ""),
                show(entry["paired"], ".0%"),
                _auroc(entry, "_pinned"),
                _auroc(entry, "_redundant"),
                *(show(entry["score"][cell], ".2f") for cell in CELLS),
            )
            for name in order
            for entry in (dials[name],)
        ),
    )
    sentences = (
        f"Every dial is set to the excess losses {listed([f'{level:g}' for level in results['settings']['levels']])} nats, and a network's score is the mean scaled effect over them. At the weights "
        "themselves a patch along any of the four has the same effect.",
        *(_quality_sentence(name, entry) for name, entry in dials.items() if name.startswith("posterior")),
    )
    return Section("What each dial tells apart", sentences, dial_figures.aurocs([dial_name(n) for n in order], panels), table)


def _curves(results: Results) -> Section:
    curves = results["curves"]
    shown = [name for name in results["dials"] if _is_comparable(results["dials"][name])]
    levels = np.array(results["settings"]["levels"])
    panels = {dial_name(name): {cell: _mean_curve(levels, curves[name][cell]) for cell in CELLS} for name in shown}
    first, last = (
        {cell: _mean_curve(levels, curves["posterior"][cell])[1][i] for cell in ("genuine", "planted")} for i in (0, -1)
    )
    sentences = (
        f"Along the tempered posterior the genuine circuit keeps {first['genuine']:.2f} of its effect at {levels[0]:g} nats and {last['genuine']:.2f} at {levels[-1]:g}, the planted illusion "
        f"{first['planted']:.2f} and {last['planted']:.2f}.",
        "Points are means over networks; bars are two standard errors over them.",
    )
    return Section("Survival", sentences, dial_figures.survival_curves(panels, CELLS))


def _prediction(results: Results) -> Section:
    entries = results["prediction"]
    gammas = np.array([entry["localization"] for entry in entries])

    def pair(name: str) -> np.ndarray:
        return np.array([[entry[name], entry[f"{name}_std_error"]] for entry in entries]).T

    figure = dial_figures.predictions(gammas, {cell: pair(cell) for cell in CELLS}, pair("predicted"), CELLS)
    sentences = (
        _prediction_sentence(results),
        "The prediction draws the incoming weights of the copy that nothing reads from N(w*, 1/γ) and leaves all else: as the loss vanishes only these are free. It is no fit.",
    )
    return Section("What the localization does, predicted", sentences, figure)


def _half_lives(results: Results) -> Section:
    dials = {name: entry for name, entry in results["dials"].items() if _is_comparable(entry)}
    table = (
        ("dial", *CELLS.values(), "censored (genuine and planted)"),
        *(
            (dial_name(name), *(_life(entry["half_life"][cell], results) for cell in CELLS), show(entry["censored"], ".0%"))
            for name, entry in dials.items()
        ),
    )
    sentences = (
        f"Of the tempered posterior's half-lives {show(dials['posterior']['censored'], '.0%')} are censored: a score over all levels uses what they leave out."
        if "posterior" in dials
        else "The posterior cannot be compared.",
    )
    return Section("Half-lives (median excess loss, nats)", sentences, None, table)


def _trained(results: Results) -> Section:
    trained = results["trained"]
    levels = np.array(trained["levels"])
    panels = {
        dial_name(name): {cell: _mean_curve(levels, curves[cell]) for cell in TRAINED_CELLS}
        for name, curves in trained["curves"].items()
        if _is_comparable(trained["dials"][name])
    }
    table = (
        ("dial", "networks", "trained circuit above its twin", *(f"score, {title}" for title in TRAINED_CELLS.values())),
        *(
            (
                dial_name(name),
                str(entry["num_networks"]),
                _auroc(entry, ""),
                *(show(entry["score"][cell], ".2f") for cell in TRAINED_CELLS),
            )
            for name, entry in trained["dials"].items()
        ),
    )
    sentences = (
        _trained_sentence(results),
        "Circuits are put in by interchange training, twins planted afterwards; on every draw both alignments are refitted for 150 steps, each among its own units. An earlier checkpoint has no twin "
        "that was planted later, so that checkpoints are no dial of this comparison.",
        *(_quality_sentence(name, entry) for name, entry in trained["dials"].items() if name.startswith("posterior")),
    )
    return Section("Trained circuits and their twins", sentences, dial_figures.survival_curves(panels, TRAINED_CELLS), table)


def _prediction_sentence(results: Results) -> str:
    parts = [
        f"{entry['planted']:.2f} ± {entry['planted_std_error']:.2f} at γ = {entry['localization']:g} (predicted {entry['predicted']:.2f} ± {entry['predicted_std_error']:.2f})"
        for entry in results["prediction"]
    ]
    return f"How far an illusion falls is set by the localization: at {results['prediction'][0]['excess_loss']:g} nats the planted one keeps {listed(parts)}."


def _trained_sentence(results: Results) -> str:
    trained = results["trained"]["dials"]
    parts = [f"{dial_name(name)} {_auroc(entry, '')}" for name, entry in trained.items()]
    kept, frozen = (trained["posterior"]["score"][cell] for cell in ("genuine", "genuine_frozen"))
    return (
        f"In {len(results['trained']['center'])} networks trained to have the circuit, the AUROC of circuit above twin is: {'; '.join(parts)}. Refitted, the circuit scores {show(kept, '.2f')} along "
        f"the posterior, frozen {show(frozen, '.2f')}."
    )


def _quality_sentence(name: str, entry: Results) -> str:
    return (
        f"{dial_name(name).capitalize()}: excess losses within {show(entry['loss_error'], '.0%')} of the levels; R-hat of an effect {show(entry['rhat'], '.2f')} in the median and above 1.1 in "
        f"{show(entry['rhat_above_limit'], '.0%')} of the runs."
    )


def _mean_curve(levels: np.ndarray, networks: list[list[Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over networks of the mean over chains, and its standard error, at the levels that two networks have."""
    values = np.array([[np.nan if chains is None else np.mean(chains) for chains in network] for network in networks])
    counts = np.isfinite(values).sum(axis=0)
    has = counts >= 2
    return levels[has], np.nanmean(values[:, has], axis=0), np.nanstd(values[:, has], axis=0, ddof=1) / np.sqrt(counts[has])


def _life(value: float | None, results: Results) -> str:
    return f"above {results['settings']['levels'][-1]:g}" if value is None else f"{value:.3g}"


def _is_comparable(entry: Results) -> bool:
    return entry["num_networks"] >= 2


def dial_name(name: str) -> str:
    """Write a dial's name in words."""
    stem, _, gamma = name.partition("_gamma_")
    return f"{_NAMES[stem]}, γ = {gamma}" if gamma else _NAMES[name]


def _auroc(entry: Results, suffix: str) -> str:
    if not _is_comparable(entry):
        return "not comparable"
    value, low, high = (number(entry[f"auroc{suffix}{end}"]) for end in ("", "_low", "_high"))
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def _list_dials(names: list[str]) -> str:
    return listed([dial_name(name) for name in names])


def _count(names: list[str], noun: str) -> str:
    return f"{len(names)} {noun}" if len(names) == 1 else f"{len(names)} {noun}s"

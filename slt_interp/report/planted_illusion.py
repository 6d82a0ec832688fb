"""The report of the study `planted-illusion`: its sentences and figures, all computed from the run directory."""

import itertools
from typing import Any

import numpy as np

from slt_interp.report import dial_figures
from slt_interp.report.page import Page, Section
from slt_interp.report.words import dial_name, listed, number, show
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
    "genuine_transported": "circuit, transported",
    "planted_transported": "twin, transported",
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
    (
        "half-life",
        "excess loss at which F̃ has fallen to a half; censored if it has not at the last level, below at once if it has at the first",
    ),
    (
        "frozen, transported, refitted",
        "an alignment as it was at the undamaged weights; turned as the activations have turned (orthogonal Procrustes); searched again for a short while from where it was",
    ),
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
    dials, count = results["dials"], results["settings"]["num_seeds"]
    comparable = {name: entry for name, entry in dials.items() if _is_comparable(entry)}
    blind = [name for name, entry in comparable.items() if entry["auroc_low"] <= 0.5]
    seeing = [name for name, entry in comparable.items() if entry["auroc_low"] > 0.5]
    missing = [name for name in dials if name not in comparable]
    pinned = [name for name, entry in comparable.items() if entry["auroc_pinned_low"] > 0.5]
    return (
        f"Over {count} networks built by hand, {len(blind)} of {len(dials)} dials do not tell the genuine circuit from the planted illusion (the 95 % interval of their AUROC reaches down to chance): "
        f"{_list_dials(blind)}.",
        f"{len(missing)} dials cannot be compared, since they do not come near half of the excess losses in 9 of 10 networks or cost too much accuracy there: {_list_dials(missing)}.",
        f"The pinned illusion, of which half is held by a second answer, is told from the genuine circuit by {_list_dials(pinned)}. {_pinned_sentence(results)}",
        f"The genuine circuit is told from the planted illusion by {_list_dials(seeing)}. {_posterior_sentence(results)}",
        _prediction_sentence(results),
        _trained_sentence(results),
    )


def _scores(results: Results) -> Section:
    dials = results["dials"]
    order = sorted(dials, key=lambda name: -number(dials[name]["auroc"]) if _is_comparable(dials[name]) else np.inf)
    panels = {
        title: [
            [number(dials[name][f"auroc{suffix}{end}"]) if _is_comparable(dials[name]) else np.nan for end in _ENDS]
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
    effects = [number(center[f"effect {cell}"]) for center in results["center"] for cell in CELLS]
    sentences = (
        f"Every dial is set to the excess losses {listed([f'{level:g}' for level in results['settings']['levels']])} nats, and a network's score is the mean scaled effect over those that 9 of 10 "
        f"networks have. At the weights themselves patches along the four have effects between {min(effects):.3f} and {max(effects):.3f}.",
        _restricted_sentence(results),
        *(_quality_sentence(name, entry, results) for name, entry in dials.items() if name.startswith("posterior")),
    )
    return Section("What each dial tells apart", sentences, dial_figures.aurocs([dial_name(n) for n in order], panels), table)


def _curves(results: Results) -> Section:
    curves = results["curves"]
    levels = np.array(results["settings"]["levels"])
    panels = {
        dial_name(name): {cell: _mean_curve(levels, curves[name][cell]) for cell in CELLS}
        for name, entry in results["dials"].items()
        if _is_comparable(entry)
    }
    sentences = (
        *(
            _fall_sentence(name, results)
            for name in ("posterior", "posterior_restricted")
            if _is_comparable(results["dials"][name])
        ),
        "Points are means over networks; bars are two standard errors over them. The more copies of a circuit there are, the less its own unit is held: the network may come to read a copy in its place.",
    )
    return Section("Survival", sentences, dial_figures.survival_curves(panels, CELLS) if panels else None)


def _prediction(results: Results) -> Section:
    entries = results["prediction"]
    gammas = np.array([entry["localization"] for entry in entries])

    def pair(name: str) -> np.ndarray:
        return np.array([[entry[name], entry[f"{name}_std_error"]] for entry in entries]).T

    figure = None
    if entries:
        figure = dial_figures.predictions(gammas, {cell: pair(cell) for cell in CELLS}, pair("predicted"), CELLS)
    sentences = (
        _prediction_sentence(results),
        "The prediction draws the incoming weights of the copy that nothing reads from N(w*, 1/γ) and leaves all else, with nothing fitted. It is an approximation for small losses: other weights are "
        "free, too, and the copy's outgoing weights favor values that say nothing.",
    )
    return Section("What the localization does, predicted", sentences, figure)


def _half_lives(results: Results) -> Section:
    dials = {name: entry for name, entry in results["dials"].items() if _is_comparable(entry)}
    table = (
        ("dial", "up to (nats)", *CELLS.values()),
        *(
            (dial_name(name), f"{entry['levels_used'][-1]:g}", *(_life(entry["half_lives"][cell]) for cell in CELLS))
            for name, entry in dials.items()
        ),
    )
    sentences = tuple(
        f"Along the {dial_name(name)}, {show(entry['censored'], '.0%')} of the half-lives of genuine circuits and planted illusions are censored at the last level: a score over all levels uses what "
        "they leave out."
        for name, entry in dials.items()
        if name == "posterior"
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
        "Circuits are put in by interchange training, twins planted afterwards; on every draw both alignments are refitted for a short while, the twin among its own units. In earlier "
        "checkpoints the weights that there were before planting go back in time, and the units planted last stay.",
        *(_quality_sentence(name, entry, results) for name, entry in trained["dials"].items() if name.startswith("posterior")),
    )
    figure = dial_figures.survival_curves(panels, TRAINED_CELLS) if panels else None
    return Section("Trained circuits and their twins", sentences, figure, table)


def _pinned_sentence(results: Results) -> str:
    whole, restricted = (_auroc(results["dials"][name], "_pinned") for name in ("posterior", "posterior_restricted"))
    return f"AUROC of the tempered posterior of the whole loss: {whole}; of the task's answer alone: {restricted}."


def _posterior_sentence(results: Results) -> str:
    entry = results["dials"]["posterior"]
    return (
        f"AUROC of the tempered posterior at γ = {results['settings']['localizations'][0]:g}: {_auroc(entry, '')}; within a network it puts the circuit first in {show(entry['paired'], '.0%')} of "
        f"{entry['num_networks']}."
    )


def _restricted_sentence(results: Results) -> str:
    whole, restricted = (results["joint_loss"][name] for name in ("posterior", "posterior_restricted"))
    return (
        "The posterior of the task's answer alone is set to the levels in the KL of that answer; both answers together then lose "
        f"{show(restricted[0], '.2g')} to {show(restricted[-1], '.2g')} nats, against {show(whole[0], '.2g')} to {show(whole[-1], '.2g')} for the posterior of the whole."
    )


def _fall_sentence(name: str, results: Results) -> str:
    levels = np.array(results["settings"]["levels"])
    shown, genuine, _ = _mean_curve(levels, results["curves"][name]["genuine"])
    planted = _mean_curve(levels, results["curves"][name]["planted"])[1]
    return (
        f"Along the {dial_name(name)} the genuine circuit keeps {genuine[0]:.2f} of its effect at {shown[0]:g} nats and {genuine[-1]:.2f} at {shown[-1]:g}, the planted illusion {planted[0]:.2f} and "
        f"{planted[-1]:.2f}."
    )


def _prediction_sentence(results: Results) -> str:
    entries = results["prediction"]
    if not entries:
        return "At the mildest level the posterior cannot be compared with what is predicted of the planted illusion."
    parts = [
        f"{entry['planted']:.2f} ± {entry['planted_std_error']:.2f} at γ = {entry['localization']:g} (predicted {entry['predicted']:.2f} ± {entry['predicted_std_error']:.2f})"
        for entry in entries
    ]
    kept = [entry["planted"] for entry in entries]
    rises = len(kept) > 1 and all(a < b for a, b in itertools.pairwise(kept))
    head = (
        "The weaker the localization, the further the planted illusion falls"
        if rises
        else "How far the planted illusion falls at each localization"
    )
    return f"{head}: at {entries[0]['excess_loss']:g} nats it keeps {listed(parts)}."


def _trained_sentence(results: Results) -> str:
    trained = results["trained"]["dials"]
    parts = [f"{dial_name(name)} {_auroc(entry, '')}" for name, entry in trained.items()]
    scores = trained["posterior"]["score"]
    kept, frozen, transported = (scores[f"genuine{how}"] for how in ("", "_frozen", "_transported"))
    return (
        f"In {len(results['trained']['center'])} networks trained to have the circuit, the AUROC of circuit above twin is: {'; '.join(parts)}. Refitted, the circuit scores {show(kept, '.2f')} along "
        f"the posterior, transported {show(transported, '.2f')}, frozen {show(frozen, '.2f')}."
    )


def _quality_sentence(name: str, entry: Results, results: Results) -> str:
    settings = results["settings"]
    if entry["rhat"] is None:
        return f"{dial_name(name).capitalize()}: excess losses within {show(entry['loss_error'], '.0%')} of the levels; too few draws of each chain for an R-hat."
    chance = show(settings["rhat_above_limit_by_chance"], ".0%")
    title = dial_name(name)
    return (
        f"{title[0].upper()}{title[1:]}: excess losses within {show(entry['loss_error'], '.0%')} of the levels; R-hat of an effect {show(entry['rhat'], '.2f')} in the median and above "
        f"{settings['rhat_limit']:g} in {show(entry['rhat_above_limit'], '.0%')} of the runs (perfect chains of this length: {chance})."
    )


def _mean_curve(levels: np.ndarray, networks: list[list[Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over networks of the mean over chains, and its standard error, at the levels that two networks have."""
    values = np.array([[np.nan if chains is None else np.mean(chains) for chains in network] for network in networks])
    counts = np.isfinite(values).sum(axis=0)
    has = counts >= 2
    return levels[has], np.nanmean(values[:, has], axis=0), np.nanstd(values[:, has], axis=0, ddof=1) / np.sqrt(counts[has])


def _life(entry: Results) -> str:
    if entry["median"] is not None:
        return f"{entry['median']:.3g}"
    return f"{show(entry['below_at_once'], '.0%')} below at once, {show(entry['censored'], '.0%')} censored"


def _is_comparable(entry: Results) -> bool:
    return entry["num_networks"] >= 2


_ENDS = ("", "_low", "_high")


def _auroc(entry: Results, suffix: str) -> str:
    if not _is_comparable(entry):
        return "not comparable"
    value, low, high = (number(entry[f"auroc{suffix}{end}"]) for end in ("", "_low", "_high"))
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def _list_dials(names: list[str]) -> str:
    return listed([dial_name(name) for name in names])

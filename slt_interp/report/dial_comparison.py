"""Alignments along every dial at equal loss, in a report: the circuit of a trained network."""

from typing import Any

import numpy as np

from slt_interp.estimators.llc import OK
from slt_interp.report import dial_figures
from slt_interp.report.page import Section
from slt_interp.report.words import dial_name, listed, number

Results = dict[str, Any]

LOWEST_ACCURACY = 0.75
"""Below this, halfway between chance and certainty, IIA falls for reasons that are not the alignment's."""

_OURS, _RIVAL = "posterior", "weight_noise"


def degradation_section(results: Results) -> Section:
    """Show the alignments along the posterior and its rivals."""
    levels, sites = results["degradation"]["levels"], results["alignment"]["sites"]
    names = [name for name in levels[0]["dials"] if any(level["dials"][name] is not None for level in levels)]
    curves = {site: {name: _curve(levels, name, site) for name in names} for site in sites}
    center = results["degradation"]["center_iia"]
    figure = dial_figures.alignments(curves, {site: (center[site], found["random_iia"]) for site, found in sites.items()})
    missed = [name for name in levels[0]["dials"] if any(level["dials"][name] is None for level in levels)]
    flagged = [f"{level['nbeta']:.0f}" for level in levels if level["estimate"]["status"] != OK]
    chains = len(levels[0]["dials"][_OURS]["excess_loss_per_chain"])
    sentences = (
        *(survival_sentence(results, site) for site in sites),
        *(_rivals_sentence(results, site) for site in sites if _is_above_chance(sites[site])),
        f"Every rival is set to the excess loss of the posterior, or as near as its steps allow; some or all levels are not reached by {listed([dial_name(name) for name in missed])}.",
        f"Bars are two standard errors over {chains} chains (for noise and Laplace draws: as many independent groups); pruning, quantization, low rank and checkpoints are one network each and have none. "
        "The black lines are the trained network on the same examples; alignments are the ones found there, not refitted.",
        f"The posterior chains at nβ = {', '.join(flagged)} carry a warning (see the table of section 3): their error bars may be too small."
        if flagged
        else "No posterior chain carries a warning.",
    )
    table = (
        ("excess loss (nats)", "dial", "level", "accuracy", "distance", *(f"IIA {site}" for site in sites)),
        *(
            (
                _with_error(d["excess_loss"], d["excess_loss_std_error"], ".3g", ".1g"),
                dial_name(name),
                f"nβ = {d['level']:.0f}" if name == _OURS else f"{d['level']:.3g}",
                f"{d['accuracy']:.3f}",
                f"{d['rms_distance']:.2g}",
                *(_with_error(d["sites"][site]["iia"], d["sites"][site]["iia_std_error"], ".3f", ".3f") for site in sites),
            )
            for level in levels
            for name in names
            if (d := level["dials"][name]) is not None
        ),
    )
    return Section("A circuit along every dial of damage", sentences, figure, table)


def survival_sentence(results: Results, site: str) -> str:
    """Say what the posterior leaves of an alignment, against weight noise of equal loss."""
    found, levels = results["alignment"]["sites"][site], results["degradation"]["levels"]
    head = f"In {site} the alignment found has IIA {found['iia']:.3f} (random rotations: {found['random_iia']:.3f} ± {found['random_iia_std']:.3f})"
    if not _is_above_chance(found):
        return f"{head}: no alignment there to speak of."
    gaps = _gaps(levels, _RIVAL, site)
    left_out = (
        f"{len(levels) - len(gaps)} of {len(levels)} levels are left out for a warning or an accuracy below {LOWEST_ACCURACY:g}"
    )
    if not gaps:
        return f"{head}; {left_out}, so nothing can be said of its survival."
    lower, higher = sum(gap < -3 * error for gap, error in gaps), sum(gap > 3 * error for gap, error in gaps)
    extreme = max(gaps, key=lambda entry: abs(entry[0]))
    return (
        f"{head}; at equal loss, posterior draws leave less of it than weight noise at {lower} of {len(gaps)} levels and more at {higher}, by more "
        f"than 3 standard errors (largest difference {extreme[0]:+.3f} ± {extreme[1]:.3f}; {left_out})."
    )


def _rivals_sentence(results: Results, site: str) -> str:
    levels = results["degradation"]["levels"]
    means = {}
    for name in levels[0]["dials"]:
        gaps = _gaps(levels, name, site) if name != _OURS else []
        if gaps:
            means[name] = float(np.mean([gap for gap, _ in gaps]))
    if not means:
        return f"In {site} no rival can be compared with the posterior."
    parts = [f"{dial_name(name)} {gap:+.3f}" for name, gap in sorted(means.items(), key=lambda item: item[1])]
    return f"What the posterior leaves in {site} less what a rival leaves, in the mean over the levels that both reach: {listed(parts)}."


def _gaps(levels: list[Results], rival: str, site: str) -> list[tuple[float, float]]:
    """IIA of the posterior less that of a rival, and its standard error, at all levels that can be compared."""
    gaps = []
    for level in levels:
        ours, other = level["dials"][_OURS], level["dials"][rival]
        if other is None or level["estimate"]["status"] != OK or min(ours["accuracy"], other["accuracy"]) < LOWEST_ACCURACY:
            continue
        ours, other = ours["sites"][site], other["sites"][site]
        errors = [error for error in (ours["iia_std_error"], other["iia_std_error"]) if error is not None]
        gaps.append((ours["iia"] - other["iia"], float(np.linalg.norm(errors))))
    return gaps


def _is_above_chance(found: Results) -> bool:
    return found["iia"] > found["random_iia"] + 4 * found["random_iia_std"]


def _with_error(value: float, error: float | None, form: str, error_form: str) -> str:
    """One network has no error bar."""
    return f"{value:{form}}" if error is None else f"{value:{form}} ± {error:{error_form}}"


def _curve(levels: list[Results], dial: str, site: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Excess loss, IIA and its standard error over the levels that a dial reaches."""
    readings = [level["dials"][dial] for level in levels if level["dials"][dial] is not None]
    found = [reading["sites"][site] for reading in readings]
    return (
        np.array([reading["excess_loss"] for reading in readings]),
        np.array([entry["iia"] for entry in found]),
        np.array([number(entry["iia_std_error"]) for entry in found]),
    )

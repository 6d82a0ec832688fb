"""The section on the volume of a trained network's basin: sampled by two routes, beside what its Hessian says."""

from decimal import Decimal
from typing import Any

import numpy as np

from slt_interp.estimators.volume_estimate import REFUSED
from slt_interp.report import figures
from slt_interp.report.page import Section
from slt_interp.report.words import listed, number
from slt_interp.storage import RunDirectory

Results = dict[str, Any]

ROUTES = {"subset": "subset simulation", "tempering": "tempering"}
"""How volumes are sampled."""


def volume_section(results: Results, run: RunDirectory) -> Section:
    """Compose the section of the report."""
    volume, arrays = results["volume"], run.arrays("spectrum")
    sampled = {title: _sampled(volume, name) for name, title in ROUTES.items() if volume[name] is not None}
    thresholds = np.concatenate([arrays["thresholds"], volume["thresholds"]])
    predicted = np.concatenate([arrays["log_volume"], volume["gaussian"]])
    shown = np.argsort(thresholds)
    shown = shown[thresholds[shown] >= volume["thresholds"][0] / 2]
    figure = figures.volume_curve((thresholds[shown], predicted[shown]), sampled)
    entries = {title: _entries(found) for title, found in sampled.items()}
    table = (
        ("threshold (nats)", *(f"ln V, {title}" for title in sampled), "ln V, Gaussian"),
        *(
            (f"{threshold:g}", *(by_title.get(threshold, "not asked") for by_title in entries.values()), f"{gaussian:.1f}")
            for threshold, gaussian in zip(volume["thresholds"], volume["gaussian"], strict=True)
        ),
    )
    return Section("Volume of the basin", volume_sentences(results), figure, table)


def volume_sentences(results: Results) -> tuple[str, ...]:
    """Say how much of the base measure the basin fills, by two routes, beside what the Hessian says."""
    volume = results["volume"]
    subset = _sampled(volume, "subset")
    known = np.flatnonzero(np.isfinite(subset.log_volume))
    found = [_share_sentence(volume, int(i)) for i in sorted({*known[:1], *known[-1:]})]
    if not found:
        found = ["Subset simulation gives no volume at any threshold."]
    if len(known) > 1:
        first, second = known[:2]
        slopes = [
            np.diff(values[[first, second]])[0] / np.diff(np.log(subset.thresholds[[first, second]]))[0]
            for values in (subset.log_volume, subset.predicted)
        ]
        found.append(
            f"Between {subset.thresholds[first]:g} and {subset.thresholds[second]:g} nats ln V rises by {slopes[0]:.1f} per unit of ln ε; "
            f"the Gaussian's by {slopes[1]:.1f}."
        )
    found.append(_agreement_sentence(volume))
    for name, title in ROUTES.items():
        asked = volume[name]
        if asked is None:
            continue
        route = _sampled(volume, name)
        refused = listed([f"{threshold:g}" for threshold in route.thresholds[np.isnan(route.log_volume)]])
        verdict = f"refused at {refused} nats" if asked["status"] == REFUSED else asked["status"]
        found += [f"{title.capitalize()}: {verdict}."]
        found += [f"Warning of {title}: {warning}." for warning in asked["warnings"]]
    if len(known):
        diagnostics = volume["subset"]["diagnostics"]
        found.append(
            f"Bars are two standard errors, from {diagnostics['num_seeds']} seeds, each a short line; what is counted is "
            f"{volume['subset']['counted']}."
        )
    return tuple(found)


def _sampled(volume: Results, name: str) -> figures.SampledVolume:
    """Read what one route found; tempering knows the largest thresholds alone."""
    asked = volume[name]
    values, errors = (np.array([number(x) for x in asked[field]]) for field in ("log_volume", "std_error"))
    last = slice(len(volume["thresholds"]) - len(values), None)
    thresholds, predicted = (np.array(volume[field][last], np.float64) for field in ("thresholds", "gaussian"))
    seeds = asked.get("per_seed") or np.empty((0, len(values)))
    return figures.SampledVolume(thresholds, values, errors, predicted, np.array(seeds, np.float64))


def _entries(found: figures.SampledVolume) -> dict[float, str]:
    """Write the volume at every threshold."""
    return {
        threshold: f"{value:.2f} ± {error:.2f}" if np.isfinite(value) else "refused"
        for threshold, value, error in zip(found.thresholds, found.log_volume, found.std_error, strict=True)
    }


def _share_sentence(volume: Results, index: int) -> str:
    subset = _sampled(volume, "subset")
    value, error, predicted = (float(x[index]) for x in (subset.log_volume, subset.std_error, subset.predicted))
    gap = value - predicted
    if abs(gap) <= 3 * error:
        verdict = "within 3 standard errors of that"
    else:
        verdict = f"{abs(gap):.1f} ± {error:.1f} nats {'more' if gap > 0 else 'less'}"
    return (
        f"If the loss were its Hessian's quadratic, {_exponential(predicted)} of the weights drawn from N(w*, {volume['base_scale']:.2g}²) would "
        f"have a loss within {subset.thresholds[index]:g} nats of L* (ln V = {predicted:.1f}); subset simulation finds {_exponential(value)} "
        f"(ln V = {value:.1f} ± {error:.1f}), {verdict}."
    )


def _agreement_sentence(volume: Results) -> str:
    if volume["tempering"] is None:
        return "No second route was gone: nothing checks the sampled volumes."
    subset, tempering = (_sampled(volume, name) for name in ROUTES)
    rival, rival_error = (values[-len(tempering.thresholds) :] for values in (subset.log_volume, subset.std_error))
    gaps, errors = np.abs(tempering.log_volume - rival), np.hypot(tempering.std_error, rival_error)
    both = np.flatnonzero(np.isfinite(gaps))
    if not len(both):
        return "Subset simulation and tempering have no threshold in common: nothing checks the sampled volumes."
    worst = both[np.argmax(gaps[both] / errors[both])]
    ratio = gaps[worst] / errors[worst]
    return (
        f"Tempering, another route, {'agrees' if ratio <= 3 else 'disagrees'} with subset simulation at the {len(both)} thresholds that both "
        f"reach: they are at most {ratio:.1f} standard errors apart ({gaps[worst]:.1f} ± {errors[worst]:.1f} nats at {tempering.thresholds[worst]:g})."
    )


def _exponential(log_value: float) -> str:
    """Write exp(log_value) in scientific notation, however small."""
    return f"{Decimal(float(log_value)).exp():.2g}".lower()

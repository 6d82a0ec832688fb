"""Figures of searches for circuits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from slt_interp.report.figures import PREDICTED, RIVAL, SAMPLED, Numbers, axes_grid

COLORS = {"rotation": SAMPLED, "linear": RIVAL, "RevNet": PREDICTED}
"""Of maps."""

CONTROL = "0.8"
"""Color of what random rotations reach."""

Band = tuple[float, float]
"""Mean and standard deviation over random rotations."""


@dataclass(frozen=True)
class Mark:
    """One search: IIA of the best start with its standard error, IIA of every start, and IIA of the same search in the control."""

    iia: float
    std_error: float
    restarts: Sequence[float]
    control: float | None = None


def iia_by_site(
    series: Mapping[tuple[str, int], Mapping[str, Mark]],
    random: Mapping[str, Band],
    neurons: Mapping[str, float],
    known: tuple[str, float],
) -> Figure:
    """Plot IIA by site, a mark for each map and size and a dot for each start.

    Args:
        series: for each map and size, the searches by site.
        random: of random rotations, by site.
        neurons: IIA of the best choice of neurons, by site.
        known: a site and the IIA of the alignment that is known there.
    """
    figure, (axes,) = axes_grid(1, height=5.2)
    sites = list(random)
    step = 0.78 / (len(series) + 1)
    _bands(axes, list(random.values()), 0.44)
    sizes = sorted({size for _, size in series})
    for i, ((name, size), marks) in enumerate(series.items()):
        look = "osD^v"[sizes.index(size) % 5]
        x = {site: k + (i - len(series) / 2) * step for k, site in enumerate(sites)}
        for site, mark in marks.items():
            _mark(axes, x[site], mark, COLORS[name], look, f"{name}, {size} each" if site == sites[0] else None)
        controls = [(x[site], mark.control) for site, mark in marks.items() if mark.control is not None]
        if controls:
            # One entry for all maps.
            label = None if _UNTRAINED in axes.get_legend_handles_labels()[1] else _UNTRAINED
            axes.plot(*zip(*controls, strict=True), "_", color="k", markersize=9, markeredgewidth=1.6, label=label)
    last = [k + len(series) / 2 * step for k in range(len(sites))]
    axes.plot(last, [neurons[site] for site in sites], "x", color="k", markersize=6, label="best choice of neurons")
    site, value = known
    axes.plot(sites.index(site) - 0.44, value, "*", color="k", markersize=11, label="known alignment (differences)")
    axes.set_xticks(range(len(sites)), sites)
    for k in range(len(sites) - 1):
        axes.axvline(k + 0.5, color="0.85", linewidth=0.8)
    axes.grid(visible=False, axis="x")
    axes.set(xlim=(-0.5, len(sites) - 0.5), ylim=(0.3, 1.04), ylabel="interchange intervention accuracy")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


_UNTRAINED = "the same, untrained network"


def rivals(
    networks: Mapping[str, Mapping[str, Mark]], models: Mapping[str, Mark], random: Mapping[str, Band], title: str
) -> Figure:
    """Plot IIA of rotations in two networks by site, and beside it that of several causal models at one site.

    Args:
        networks: for each, the searches by site.
        models: for each, its search.
        random: of random rotations, by causal model, where they were measured.
        title: above the second panel.
    """
    figure, (left, right) = axes_grid(2, height=4.2, sharey=True)
    for i, ((name, marks), color) in enumerate(zip(networks.items(), (SAMPLED, RIVAL), strict=True)):
        for k, mark in enumerate(marks.values()):
            _mark(left, k + 0.26 * (i - 0.5), mark, color, "os"[i], name if k == 0 else None)
    sites = list(next(iter(networks.values())))
    left.set_xticks(range(len(sites)), sites)
    places = {model: k for k, model in enumerate(models)}
    _bands(right, [random.get(model, (np.nan, np.nan)) for model in models], 0.3)
    for model, mark in models.items():
        _mark(right, places[model], mark, SAMPLED, "o", None)
    right.set_xticks(range(len(models)), [model.replace(" ", "\n") for model in models])
    right.set_title(title, fontsize=10)
    left.set_title("both equalities, by activation function", fontsize=10)
    left.set(ylim=(0.3, 1.04), ylabel="interchange intervention accuracy")
    for axes, count in ((left, len(sites)), (right, len(models))):
        axes.set_xlim(-0.5, count - 0.5)
        axes.grid(visible=False, axis="x")
    entries = dict(zip(*reversed(left.get_legend_handles_labels()), strict=True))
    entries |= dict(zip(*reversed(right.get_legend_handles_labels()), strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=len(entries))
    return figure


def divergences(
    measures: Mapping[str, Mapping[str, tuple[Numbers, Numbers]]], hypotheses: Sequence[str], labels: Mapping[str, str]
) -> Figure:
    """Plot measures of scrubbing, a panel for each and a row for each hypothesis; bars are two standard errors.

    Args:
        measures: for each measure and series, values and standard errors over hypotheses.
        hypotheses: their names.
        labels: of the horizontal axes.
    """
    figure, all_axes = axes_grid(len(measures), height=1.3 + 0.5 * len(hypotheses), sharey=True)
    rows = np.arange(len(hypotheses))[::-1]
    looks = ((SAMPLED, "o"), (RIVAL, "s"), (PREDICTED, "D"), ("0.4", "^"))
    for axes, (measure, series) in zip(all_axes, measures.items(), strict=True):
        axes.axvline(0.0, color="0.6", linewidth=1)
        for i, (name, (values, errors)) in enumerate(series.items()):
            color, look = looks[i % len(looks)]
            offset = 0.18 * (i - (len(series) - 1) / 2)
            axes.errorbar(
                values, rows - offset, xerr=2 * errors, fmt=look, color=color, markersize=4, capsize=2, label=name, linestyle=""
            )
        axes.set_title(measure, fontsize=10)
        axes.set(xlabel=labels[measure], ylim=(-0.6, len(hypotheses) - 0.4))
        axes.xaxis.set_major_locator(MaxNLocator(3))
    all_axes[0].set_yticks(rows, hypotheses)
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(looks))
    return figure


def _mark(axes: Axes, x: float, mark: Mark, color: str, look: str, label: str | None) -> None:
    """Plot one search: the starts as dots just beside their best."""
    dots = np.full(len(mark.restarts), x + 0.045)
    axes.plot(dots, mark.restarts, ".", color=color, markersize=3, alpha=0.6)
    axes.errorbar(x, mark.iia, 2 * mark.std_error, fmt=look, color=color, markersize=5, capsize=2, label=label, zorder=3)


def _bands(axes: Axes, bands: Sequence[Band], half: float) -> None:
    for k, (mean, deviation) in enumerate(bands):
        if not np.isfinite(mean):
            continue
        reach = np.array([mean - 4 * deviation, mean + 4 * deviation])
        axes.fill_between(
            [k - half, k + half],
            *np.broadcast_to(reach[:, None], (2, 2)),
            color=CONTROL,
            alpha=0.5,
            linewidth=0,
            label="random rotations ± 4 deviations" if k == 0 else None,
        )

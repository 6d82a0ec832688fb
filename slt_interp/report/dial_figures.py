"""Figures of dials that are to tell circuits from illusions."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from slt_interp.report.figures import PREDICTED, RIVAL, SAMPLED, Numbers, axes_grid
from slt_interp.report.words import dial_name

LOOKS = {
    "genuine": (SAMPLED, "o-"),
    "redundant": ("#5aa0d8", "^-"),
    "pinned": (RIVAL, "D--"),
    "planted": (PREDICTED, "s--"),
    "genuine_frozen": ("#5aa0d8", "^:"),
    "planted_frozen": ("#e3a19d", "v:"),
    "genuine_transported": ("#2f6f9f", "P-."),
    "planted_transported": ("#a8443c", "X-."),
}
"""Of each cell: circuits blue, illusions warm."""


def aurocs(names: Sequence[str], panels: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Plot the AUROC of every dial with its interval, a row for each dial and a panel for each comparison.

    Args:
        names: of the dials, best first.
        panels: for each comparison, value and interval of every dial; NaN where dials cannot be compared.
    """
    figure, all_axes = axes_grid(len(panels), height=1.2 + 0.34 * len(names), sharey=True)
    rows = np.arange(len(names))[::-1]
    for axes, (title, entries) in zip(all_axes, panels.items(), strict=True):
        values, low, high = np.array(entries, dtype=float).T
        axes.axvline(0.5, color="0.6", linestyle=":", linewidth=1)
        shown = np.isfinite(values)
        bars = np.maximum([values - low, high - values], 0.0)[:, shown]
        axes.errorbar(values[shown], rows[shown], xerr=bars, fmt="o", color=SAMPLED, capsize=3, markersize=5)
        for row in rows[~shown]:
            axes.text(0.5, row, "not comparable", ha="center", va="center", fontsize=8, color="0.35", backgroundcolor="white")
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.6, len(names) - 0.4), xlabel="AUROC (0.5 is chance)")
        axes.set_title(title, fontsize=10)
    all_axes[0].set_yticks(rows, names)
    return figure


def survival_curves(panels: Mapping[str, Mapping[str, tuple[Numbers, Numbers, Numbers]]], labels: Mapping[str, str]) -> Figure:
    """Plot the scaled effect of every cell over the excess loss, a panel for each dial; bars are two standard errors.

    Args:
        panels: for each dial and cell, excess losses, means over networks and standard errors.
        labels: of the cells.
    """
    columns = 3
    rows = -(-len(panels) // columns)
    figure, all_axes = axes_grid(columns, rows=rows, height=0.8 + 2.5 * rows, sharey=True)
    for i, (axes, (title, cells)) in enumerate(zip(all_axes, panels.items(), strict=False)):
        for cell, (excess, mean, error) in cells.items():
            color, mark = LOOKS[cell]
            axes.errorbar(excess, mean, 2 * error, fmt=mark, color=color, markersize=4, capsize=2, label=labels[cell])
        axes.set(xscale="log", ylim=(-0.05, 1.15))
        axes.set_title(title, fontsize=10)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", labelsize=8)
        if i >= len(panels) - columns:
            axes.set_xlabel("excess loss (nats)")
        if i % columns == 0:
            axes.set_ylabel(r"scaled effect $\tilde F$")
    for axes in all_axes[len(panels) :]:
        axes.remove()
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def predictions(
    localizations: Numbers,
    measured: Mapping[str, Float[np.ndarray, "2 i"]],
    predicted: Float[np.ndarray, "2 i"],
    labels: Mapping[str, str],
) -> Figure:
    """Plot the scaled effect at the mildest level over the localization, beside what is predicted of the illusion.

    Args:
        localizations: rising.
        measured: of each cell, means over networks and standard errors.
        predicted: of the planted illusion, the same.
        labels: of the cells.
    """
    figure, (axes, blank) = axes_grid(2)
    blank.remove()
    for cell, (mean, error) in measured.items():
        color, mark = LOOKS[cell]
        axes.errorbar(localizations, mean, 2 * error, fmt=mark, color=color, markersize=5, capsize=3, label=labels[cell])
    mean, error = predicted
    axes.errorbar(
        localizations, mean, 2 * error, fmt="x:", color="k", markersize=7, capsize=3, label="predicted of the planted illusion"
    )
    axes.set(xscale="log", ylim=(-0.05, 1.08), xlabel=r"localization $\gamma$", ylabel=r"scaled effect $\tilde F$")
    axes.set_xticks(localizations, [f"{gamma:g}" for gamma in localizations])
    axes.xaxis.set_minor_formatter(NullFormatter())
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    return figure


def alignments(
    sites: Mapping[str, Mapping[str, tuple[Numbers, Numbers, Numbers]]], references: Mapping[str, tuple[float, float]]
) -> Figure:
    """Plot interchange intervention accuracy along several dials at matched loss, one panel per site; bars where there are any.

    Args:
        sites: for each site and dial, (excess loss, accuracy, standard error).
        references: for each site, the accuracy at the trained weights and for random rotations.
    """
    figure, panels = axes_grid(len(sites), height=4.6, sharey=True)
    for axes, (site, dials) in zip(panels, sites.items(), strict=True):
        trained, random = references[site]
        axes.axhline(trained, color="k", linewidth=1, label="at the trained weights")
        axes.axhline(random, color="0.6", linewidth=1, linestyle=":", label="random rotations, trained weights")
        for dial, (excess, statistic, error) in dials.items():
            color, mark = DIAL_LOOKS[dial]
            wide = 2.2 if dial == "posterior" else 1.0
            bars = 2 * np.nan_to_num(error)
            axes.errorbar(
                excess, statistic, bars, fmt=mark, color=color, markersize=4, linewidth=wide, capsize=2, label=dial_name(dial)
            )
        axes.set(xscale="log", xlabel="excess loss (nats)", title=site)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    panels[0].set(ylabel="interchange intervention accuracy", ylim=(0.4, 1.02))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8.5)
    return figure


DIAL_LOOKS = {
    "posterior": (SAMPLED, "o-"),
    "weight_noise": (RIVAL, "s--"),
    "weight_noise_per_layer": ("#b58900", "D--"),
    "activation_noise": ("#2a9d5c", "^--"),
    "laplace": (PREDICTED, "v--"),
    "pruning": ("0.35", "x:"),
    "fisher_pruning": ("0.35", "+:"),
    "quantization": ("#8a5fbf", "*:"),
    "low_rank": ("#c77cba", "P:"),
    "checkpoints": ("#5f7f8f", "h:"),
}

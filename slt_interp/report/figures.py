"""Figures of reports: numbers in, a matplotlib figure out. Every one shows its uncertainty and its units."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from slt_interp.estimators.llc import DO_NOT_TRUST
from slt_interp.estimators.sweep import Sweep

Numbers = Float[np.ndarray, " i"]

STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "svg.hashsalt": "slt_interp",
    "svg.fonttype": "none",
}

SAMPLED, PREDICTED, RIVAL = "#1f5fa8", "#c0504d", "#d08a1d"
"""Colors: what was sampled, what the Hessian predicts, what it is compared with."""


def training_curve(
    steps: Int[np.ndarray, " i"],
    test_excess: tuple[Numbers, Numbers],
    test_error: tuple[Numbers, Numbers],
    train_excess: Float[np.ndarray, " step"],
) -> Figure:
    """Plot the loss above its floor over training, on fresh data and per minibatch, and the error rate; values and standard errors."""
    figure, (left, right) = axes_grid(2)
    every = np.arange(1, len(train_excess) + 1)
    keep = np.unique(np.geomspace(1, len(train_excess), 600).astype(int)) - 1
    left.plot(every[keep], train_excess[keep], color="0.75", linewidth=0.8, label="minibatch")
    for axes, (values, errors), label in ((left, test_excess, "fresh examples"), (right, test_error, "fresh examples")):
        shown = (steps > 0) & (values > 0)
        bars = 2 * errors[shown]
        lower = np.minimum(bars, 0.99 * values[shown])
        axes.errorbar(steps[shown], values[shown], yerr=(lower, bars), fmt="o-", color=SAMPLED, markersize=3, label=label)
        axes.set(xscale="log", yscale="log", xlabel="training step")
    left.set(ylabel="loss above its floor (nats)", title="Loss")
    right.set(ylabel="share answered wrong", title="Error on fresh examples")
    left.legend()
    return figure


def calibration_sweep(sweep: Sweep) -> Figure:
    """Plot the LLC over step sizes, a line for each nbeta and a panel for each localization; open marks are not to be trusted.

    Values are shown with two standard errors; points where every chain diverged are left out.
    """
    figure, all_axes = axes_grid(len(sweep.localizations), sharey=True)
    colors = colormaps["viridis"](np.linspace(0, 0.85, len(sweep.nbetas)))
    for k, axes in enumerate(all_axes):
        for j, nbeta in enumerate(sweep.nbetas):
            values, errors, status = sweep.llc[:, j, k], sweep.std_error[:, j, k], sweep.status[:, j, k]
            axes.errorbar(sweep.step_sizes, values, 2 * errors, color=colors[j], label=f"nbeta {nbeta:.3g}", capsize=2)
            for trusted in (True, False):
                chosen = (status != DO_NOT_TRUST) == trusted
                fill = colors[j] if trusted else "white"
                axes.plot(sweep.step_sizes[chosen], values[chosen], "o", color=colors[j], markersize=5, markerfacecolor=fill)
        axes.set(xscale="log", xlabel="step size", title=f"localization {sweep.localizations[k]:.3g}")
    all_axes[0].set_ylabel("LLC (open marks: not to be trusted)")
    all_axes[0].legend()
    return figure


def chain_traces(
    energy: Float[np.ndarray, "chain draw"],
    squared_distance: Float[np.ndarray, "chain draw"],
    first: int,
    thinning: int,
    predicted: float,
) -> Figure:
    """Plot nbeta (L - L*) and the distance from the center along every chain, with the Gaussian prediction of the first."""
    figure, (left, right) = axes_grid(2)
    steps = first + thinning * (np.arange(energy.shape[1]) + 1)
    window = max(1, energy.shape[1] // 25)
    for axes, series in ((left, energy), (right, np.sqrt(squared_distance))):
        axes.plot(steps, series.T, color=SAMPLED, alpha=0.18, linewidth=0.6)
        mean = series.mean(axis=0)
        smooth = np.convolve(mean, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :] - thinning * (window - 1) / 2, smooth, color="k", label="mean of all chains")
        axes.set(xlabel="step of SGLD, burn-in included")
    if np.isfinite(predicted):
        left.axhline(predicted, color=PREDICTED, linestyle="--", label="Gaussian (Hessian)")
    left.set(ylabel=r"$n\beta\,(L - L^*)$", title="Energy: its mean is the LLC")
    right.set(ylabel=r"$|w - w^*|$ (units of weight)", title="Distance from the center")
    left.legend()
    return figure


def llc_against_hessian(
    nbetas: Numbers,
    llc: Numbers,
    std_error: Numbers,
    trusted: Sequence[bool],
    curve: tuple[Numbers, Numbers],
    rank: tuple[float, float],
    dimension: int,
) -> Figure:
    """Plot the sampled LLC and its Gaussian prediction over nbeta, beside the counts rank / 2 (for two thresholds) and d / 2."""
    figure, (axes,) = axes_grid(1, height=4.8)
    axes.plot(*curve, color=PREDICTED, linestyle="--", label="Gaussian prediction from the Hessian, same localization")
    marks = np.asarray(trusted)
    axes.errorbar(nbetas, llc, yerr=2 * std_error, fmt="none", ecolor=SAMPLED, capsize=3)
    axes.plot(nbetas[marks], llc[marks], "o", color=SAMPLED, label="sampled (SGLD), bars are 2 standard errors")
    if not marks.all():
        axes.plot(
            nbetas[~marks], llc[~marks], "o", color=SAMPLED, markerfacecolor="w", label="sampled, flagged by its diagnostics"
        )
    axes.axhspan(0.5 * rank[0], 0.5 * rank[1], color="0.85", label="rank / 2, thresholds from 1e-2 to 1e-8")
    axes.axhline(0.5 * dimension, color="0.4", linestyle=":", label="d / 2")
    axes.set(xscale="log", yscale="log", xlabel=r"$n\beta$", ylabel="LLC (dimensionless)")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left")
    return figure


def eigenvalues(values: Numbers, resolved: float, rounding: float) -> Figure:
    """Plot all Hessian eigenvalues by rank, and the curvature from which on the loss, not the localization, holds a direction.

    Sizes below `rounding` are noise of the arithmetic and lie below the axis.
    """
    figure, (axes,) = axes_grid(1)
    order = np.argsort(values)[::-1]
    ranks, sizes = np.arange(1, len(values) + 1), values[order]
    axes.plot(ranks[sizes > 0], sizes[sizes > 0], ".", color=SAMPLED, markersize=4, label="positive")
    if (sizes < 0).any():
        axes.plot(ranks[sizes < 0], -sizes[sizes < 0], "x", color=PREDICTED, markersize=4, label="negative (size shown)")
    axes.axhline(resolved, color="k", linestyle="--", linewidth=1)
    axes.annotate(
        r"$\gamma / n\beta$: held by the loss above, by the localization below",
        (len(values), resolved),
        xytext=(0, 5),
        textcoords="offset points",
        ha="right",
    )
    axes.set(yscale="log", xlabel="eigenvalue, from the largest", ylabel="curvature (nats per squared unit of weight)")
    axes.set_ylim(bottom=rounding)
    axes.legend(loc="lower left")
    return figure


@dataclass(frozen=True)
class SampledVolume:
    """Log volumes of one method.

    Attributes:
        thresholds, log_volume, std_error: (threshold,).
        predicted: (threshold,), by the Gaussian.
        per_seed: (seed, threshold), or without seeds (0, threshold).
    """

    thresholds: Numbers
    log_volume: Numbers
    std_error: Numbers
    predicted: Numbers
    per_seed: Float[np.ndarray, "seed threshold"]


def volume_curve(predicted: tuple[Numbers, Numbers], sampled: Mapping[str, SampledVolume]) -> Figure:
    """Plot the log volume of the sublevel set over the threshold, and beside it what is sampled less the Gaussian.

    Args:
        predicted: thresholds and log volumes of the Gaussian.
        sampled: by one method or two; bars are two standard errors, and dashes are seeds.
    """
    figure, (left, right) = axes_grid(2)
    left.plot(*predicted, color=PREDICTED, linestyle="--", label="Hessian (Gaussian)")
    right.axhline(0.0, color=PREDICTED, linestyle="--")
    for (label, found), (color, mark) in zip(sampled.items(), ((SAMPLED, "o"), (RIVAL, "s")), strict=False):
        for axes, origin in ((left, 0.0), (right, found.predicted)):
            settings: Any = {"color": color, "markersize": 4, "capsize": 3, "label": label}
            axes.errorbar(found.thresholds, found.log_volume - origin, 2 * found.std_error, fmt=mark, **settings)
        right.plot(found.thresholds, (found.per_seed - found.predicted).T, "_", color=color, alpha=0.5, markersize=8)
    left.set(ylabel=r"$\ln V(\epsilon)$ (nats)", title="Volume")
    right.set(ylabel="nats", title="Sampled less Gaussian")
    for axes in (left, right):
        axes.set(xscale="log", xlabel=r"threshold $\epsilon$ (nats above $L^*$)")
    left.legend()
    return figure


@dataclass(frozen=True)
class Comparison:
    """One panel: what was sampled, what the Hessian predicts and what is exact, over a common axis.

    Attributes:
        title: of the panel.
        sampled: x, values, standard errors, and whether each is to be trusted.
        predicted: x and values.
        exact: x and values, or None.
        levels: values that do not depend on x, by what they are.
        ticks: names of x = 0, 1, ..., if x is a count.
    """

    title: str
    sampled: tuple[Numbers, Numbers, Numbers, Sequence[bool]]
    predicted: tuple[Numbers, Numbers]
    exact: tuple[Numbers, Numbers] | None = None
    levels: Mapping[str, float] = field(default_factory=dict)
    ticks: tuple[str, ...] = ()


def comparisons(panels: Sequence[Comparison], *, xlabel: str, ylabels: Sequence[str], logarithmic: bool = False) -> Figure:
    """Plot panels side by side, three a row at most; open marks are not to be trusted, bars are two standard errors.

    Args:
        panels: what to plot.
        xlabel: of all.
        ylabels: of each, or one for all.
        logarithmic: whether values are on a logarithmic axis.
    """
    columns = min(3, len(panels)) if len(panels) != 4 else 2
    rows = -(-len(panels) // columns)
    figure, all_axes = axes_grid(columns, rows=rows, height=0.6 + 2.9 * rows)
    dashes = ((0, (1, 1)), (0, (4, 1, 1, 1)))
    entries: dict[str, Any] = {}
    for i, (axes, panel) in enumerate(zip(all_axes, panels, strict=False)):
        if panel.exact is not None:
            axes.plot(*panel.exact, color="k", label="exact")
        axes.plot(*panel.predicted, color=PREDICTED, linestyle="--", label="Hessian (Gaussian)")
        x, values, errors, trusted = panel.sampled
        marks = np.asarray(trusted)
        axes.errorbar(x, values, 2 * errors, fmt="none", ecolor=SAMPLED, capsize=2)
        for chosen, fill, label in ((marks, SAMPLED, "sampled"), (~marks, "white", "sampled, not to be trusted")):
            if chosen.any():
                axes.plot(x[chosen], values[chosen], "o", color=SAMPLED, markersize=4, markerfacecolor=fill, label=label)
        for (label, value), dash in zip(panel.levels.items(), dashes, strict=False):
            axes.axhline(value, color="0.45", linestyle=dash, linewidth=1.2, label=label)
        axes.set_title("\n".join(textwrap.wrap(panel.title, 36)), fontsize=9)
        axes.set_ylabel(ylabels[i % len(ylabels)])
        if panel.ticks:
            axes.set_xticks(range(len(panel.ticks)), panel.ticks)
        else:
            axes.set_xscale("log")
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        if i >= len(panels) - columns:
            axes.set_xlabel(xlabel)
        entries |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    for axes in all_axes[len(panels) :]:
        axes.remove()
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=len(entries))
    return figure


def shares(names: Sequence[str], sampled: tuple[Numbers, Numbers, Sequence[bool]], others: Mapping[str, Numbers]) -> Figure:
    """Plot what methods give as a multiple of the exact value, a row for each problem; open marks are not to be trusted."""
    figure, (axes,) = axes_grid(1, height=1.2 + 0.5 * len(names))
    rows = np.arange(len(names))[::-1]
    axes.axvline(1.0, color="k", label="exact")
    values, errors, trusted = sampled
    marks = np.asarray(trusted)
    axes.errorbar(values, rows, xerr=2 * errors, fmt="none", ecolor=SAMPLED, capsize=2)
    for chosen, fill, label in ((marks, SAMPLED, "sampled"), (~marks, "white", "sampled, not to be trusted")):
        if chosen.any():
            axes.plot(values[chosen], rows[chosen], "o", color=SAMPLED, markerfacecolor=fill, label=label, zorder=3)
    # Hollow and of several sizes: where the Hessian is right they coincide.
    looks = ((PREDICTED, "s", 11), ("0.3", "^", 4), ("0.45", "x", 6))
    for (label, multiples), (color, mark, size) in zip(others.items(), looks, strict=True):
        axes.plot(multiples, rows, mark, color=color, markersize=size, markerfacecolor="none", label=label)
    axes.set_yticks(rows, ["\n".join(textwrap.wrap(name, 36)) for name in names])
    axes.set(xscale="log", xlabel="multiple of the learning coefficient", ylim=(-0.6, len(names) - 0.4))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def along_training(
    steps: Numbers,
    losses: Mapping[str, Numbers],
    llc: tuple[Numbers, Numbers, Sequence[bool]],
    predicted: Numbers,
    num_held: Numbers,
) -> Figure:
    """Plot losses, and beside them the sampled LLC and what the Hessian says, over checkpoints; step 0 is shown at 1/2."""
    figure, (left, right) = axes_grid(2)
    x = np.maximum(steps, 0.5)
    for (label, values), color in zip(losses.items(), (SAMPLED, RIVAL), strict=True):
        left.plot(x, values, "o-", color=color, markersize=3, label=label)
    values, errors, trusted = llc
    marks = np.asarray(trusted)
    right.errorbar(x, values, 2 * errors, color=SAMPLED, capsize=2, linewidth=1)
    for chosen, fill, label in ((marks, SAMPLED, "sampled"), (~marks, "white", "sampled, not to be trusted")):
        if chosen.any():
            right.plot(x[chosen], values[chosen], "o", color=SAMPLED, markersize=5, markerfacecolor=fill, label=label)
    right.plot(x, predicted, "s--", color=PREDICTED, markersize=4, label="Hessian (Gaussian)")
    right.plot(x, num_held / 2, "^:", color="0.45", markersize=4, label=r"eigenvalues above $\gamma / n\beta$, half of them")
    right.set_yscale("symlog", linthresh=10.0)
    for axes, label in ((left, "loss (nats)"), (right, "LLC (dimensionless)")):
        axes.set(xscale="log", xlabel="training step", ylabel=label)
    left.set_yscale("log")
    left.legend()
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def scatters(
    groups: Mapping[str, Numbers], values: Mapping[str, Numbers], outcome: Numbers, titles: Mapping[str, str], *, ylabel: str
) -> Figure:
    """Plot an outcome over each of several measures, one color for each group of points.

    Args:
        groups: for each group, the indices of its points.
        values: the measures, by name.
        outcome: on every vertical axis.
        titles: above the panels.
        ylabel: of the outcome.
    """
    columns = 4
    rows = -(-len(values) // columns)
    figure, all_axes = axes_grid(columns, rows=rows, height=0.6 + 2.3 * rows, sharey=True)
    colors = colormaps["viridis"](np.linspace(0, 0.85, len(groups)))
    for i, (axes, (name, x)) in enumerate(zip(all_axes, values.items(), strict=False)):
        for (label, indices), color in zip(groups.items(), colors, strict=True):
            axes.plot(x[indices], outcome[indices], "o", color=color, markersize=3.5, label=label)
        axes.set_title(titles[name], fontsize=9)
        axes.set_xlabel("\n".join(textwrap.wrap(name, 28)), fontsize=9)
        if i % columns == 0:
            axes.set_ylabel(ylabel)
    for axes in all_axes[len(values) :]:
        axes.remove()
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(groups))
    return figure


def axes_grid(columns: int, *, rows: int = 1, height: float = 3.8, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """Make a figure of the page's width, and its axes row by row."""
    figure = Figure(figsize=(9.5, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, sharey=sharey, squeeze=False).ravel())

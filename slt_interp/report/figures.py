"""Figures of reports: numbers in, a matplotlib figure out. Every one shows its uncertainty and its units."""

from collections.abc import Mapping, Sequence
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
    figure, (left, right) = _axes(2)
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
    figure, all_axes = _axes(len(sweep.localizations), sharey=True)
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
    figure, (left, right) = _axes(2)
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
    figure, (axes,) = _axes(1, height=4.8)
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
    figure, (axes,) = _axes(1)
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


def volume_curve(thresholds: Numbers, log_volume: Numbers) -> Figure:
    """Plot the log volume of the sublevel set over the threshold, from the Gaussian alone."""
    figure, (axes,) = _axes(1)
    axes.plot(
        thresholds, log_volume, color=PREDICTED, linestyle="--", label="Gaussian prediction (provisional: no sampled value yet)"
    )
    axes.set(xscale="log", xlabel=r"threshold $\epsilon$ (nats above $L^*$)", ylabel=r"$\ln V(\epsilon)$ (nats)")
    axes.legend()
    return figure


def survival(
    sites: Mapping[str, Mapping[str, tuple[Numbers, Numbers, Numbers]]], references: Mapping[str, tuple[float, float]]
) -> Figure:
    """Plot a circuit statistic along several dials at matched loss, one panel per site.

    Args:
        sites: for each site and dial, (excess loss, statistic, standard error).
        references: for each site, the statistic at the trained weights and for random rotations.
    """
    figure, panels = _axes(len(sites), sharey=True)
    marks = dict(zip(next(iter(sites.values())), ((SAMPLED, "o-"), (RIVAL, "s--")), strict=True))
    for axes, (site, dials) in zip(panels, sites.items(), strict=True):
        trained, random = references[site]
        axes.axhline(trained, color="k", linewidth=1, label="at the trained weights")
        axes.axhline(random, color="0.6", linewidth=1, linestyle=":", label="random rotations, trained weights")
        for dial, (excess, statistic, error) in dials.items():
            color, mark = marks[dial]
            axes.errorbar(excess, statistic, yerr=2 * error, fmt=mark, color=color, markersize=4, capsize=3, label=dial)
        axes.set(xscale="log", xlabel="excess loss (nats)", title=site)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    panels[0].set(ylabel="interchange intervention accuracy", ylim=(0.4, 1.02))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _axes(columns: int, *, height: float = 3.8, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9.5, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, sharey=sharey, squeeze=False).ravel())

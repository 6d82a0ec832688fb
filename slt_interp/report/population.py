"""A population of trained networks in a report: what goes with their generalization gap."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from slt_interp.estimators.llc import DO_NOT_TRUST
from slt_interp.report import figures
from slt_interp.report.page import Section
from slt_interp.report.words import numbers

Results = dict[str, Any]


def population_section(population: Results) -> Section:
    """Set every measure of the networks against their generalization gap."""
    networks = population["networks"]
    widths = sorted({network["width"] for network in networks})
    groups = {f"width {width}": np.array([i for i, n in enumerate(networks) if n["width"] == width]) for width in widths}
    correlations = _correlations(population)
    figure = figures.scatters(
        groups,
        {name: numbers(networks, field) for name, field in _measures(networks).items()},
        numbers(networks, "gap"),
        {name: f"{r:+.2f} [{low:+.2f}, {high:+.2f}]" for name, (r, low, high) in correlations.items()},
        ylabel="generalization gap (nats)",
    )
    distrusted = sum(network["status"] == DO_NOT_TRUST for network in networks)
    table = (
        ("measure", "rank correlation with the gap", "95% interval"),
        *((name, f"{r:+.2f}", f"{low:+.2f} to {high:+.2f}") for name, (r, low, high) in correlations.items()),
    )
    sentences = (
        population_sentence(population),
        f"Each point is a network trained on {population['num_examples']} digits and polished; its gap is the loss on the other digits less that on its own. All measures are "
        f"at nβ = {population['nbeta']:.0f} and γ = {population['localization']:g}, volumes at ε = {population['threshold']:g}; above each panel stand Spearman's rank correlation and its 95% interval.",
        f"Of the sampled LLCs {distrusted} of {len(networks)} carry the verdict not to be trusted; they are among the points.",
        "Information lost up to a layer is the coding rate of the inputs less that of the layer, at an error of a tenth of the activations' deviation.",
    )
    return Section("What goes with generalization in a population of networks", sentences, figure, table)


def population_sentence(population: Results) -> str:
    """Say what goes with the gap, and how surely."""
    correlations = _correlations(population)
    clear = [name for name, (_, low, high) in correlations.items() if low > 0 or high < 0]
    best = max(correlations, key=lambda name: abs(correlations[name][0]))
    r, low, high = correlations["LLC (sampled)"]
    return (
        f"Over {len(population['networks'])} small networks of {len({n['width'] for n in population['networks']})} widths, the generalization gap has rank correlation {r:+.2f} "
        f"[{low:+.2f}, {high:+.2f}] with the sampled LLC, and the strongest, {correlations[best][0]:+.2f}, with: {best}. The 95% interval excludes 0 for "
        f"{len(clear)} of {len(correlations)} measures."
    )


def _measures(networks: Sequence[Results]) -> dict[str, str]:
    lost = [name for name in networks[0] if name.startswith("information lost")]
    return {
        "LLC (sampled)": "llc",
        "LLC by the Hessian (Gaussian)": "gaussian",
        "trace of the Hessian": "trace",
        "largest eigenvalue": "largest",
        "ln V (sampled, nats)": "log_volume",
        "ln V by the Hessian (nats)": "gaussian_log_volume",
        **{f"{name} (bits)": name for name in lost},
    }


def _correlations(population: Results) -> dict[str, tuple[float, float, float]]:
    """Spearman's rank correlation of each measure with the gap, and its 95% interval.

    By Fisher's transform, with the variance 1.06 / (n - 3) of Fieller, Hartley and Pearson (1957).
    """
    from scipy.stats import spearmanr

    networks = population["networks"]
    gap, half = numbers(networks, "gap"), 1.96 * np.sqrt(1.06 / (len(networks) - 3))
    found = {}
    for name, field in _measures(networks).items():
        r = float(np.asarray(spearmanr(numbers(networks, field), gap, nan_policy="omit"))[0])
        low, high = np.tanh(np.arctanh(np.clip(r, -0.999999, 0.999999)) + np.array([-half, half]))
        found[name] = r, float(low), float(high)
    return found

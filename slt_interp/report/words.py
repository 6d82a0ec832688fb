"""Numbers, lists and names in the sentences of reports."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def listed(words: Sequence[str]) -> str:
    """Join words by commas and an "and"."""
    if not words:
        return "none of them"
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def number(value: float | None) -> float:
    """Read a number of results.json; what is missing is NaN."""
    return float("nan") if value is None else float(value)


def numbers(entries: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    """Read one field of every entry."""
    return np.array([number(entry[name]) for entry in entries])


def show(value: float | None, form: str = ".3f") -> str:
    """Format a number; what is missing or not finite is unknown."""
    return "unknown" if value is None or not np.isfinite(value) else format(value, form)


def dial_name(name: str) -> str:
    """Write a dial's name in words."""
    stem, _, gamma = name.partition("_gamma_")
    return f"{_NAMES[stem]}, γ = {gamma}" if gamma else _NAMES[name]


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
    "checkpoints": "earlier checkpoints",
}

"""Numbers and lists in the sentences of reports."""

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

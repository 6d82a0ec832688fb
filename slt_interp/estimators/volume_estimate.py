"""What an estimate of basin volumes is, whatever the method: numbers, what they count, and a verdict in words."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from slt_interp.errors import InputError
from slt_interp.tree import Params

REFUSED = "refused"


@dataclass(frozen=True)
class VolumeEstimate:
    """Log volumes log V(eps) of the weights with loss at most eps above that of the trained ones.

    Attributes:
        thresholds: (threshold,), the eps, nats above the loss at the trained weights, increasing.
        log_volume: (threshold,), nats: log probability under the base measure; log number of configurations under a
            `FloatGrid`. NaN where refused.
        std_error: (threshold,), nats.
        method: what made it.
        counted: which set of weights the numbers are about.
        status: "ok", "do not trust" or "refused" (some threshold has no number): the worst over thresholds.
        warnings: every reason for doubt, with the knob to turn.
        diagnostics: numbers behind the warnings, and what the estimate cost.
        per_seed: (seed, threshold), nats, where independent runs were made, corrected as their mean is; None otherwise.
        by_label: for every label seen, log volumes of the weights that have it and their standard errors; empty without labels.
        is_count: whether the base measure counts configurations.
    """

    thresholds: Float[np.ndarray, " threshold"]
    log_volume: Float[np.ndarray, " threshold"]
    std_error: Float[np.ndarray, " threshold"]
    method: str
    counted: str
    status: str
    warnings: tuple[str, ...]
    diagnostics: dict[str, Any]
    per_seed: Float[np.ndarray, "seed threshold"] | None = None
    by_label: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    is_count: bool = False

    @property
    def bits(self) -> Float[np.ndarray, " threshold"] | None:
        """Log number of configurations in bits, for a base measure that counts; None for others."""
        return self.log_volume / np.log(2) if self.is_count else None

    def __str__(self) -> str:
        name, unit, size = ("log number of configurations", "bits", np.log(2)) if self.is_count else ("log volume", "nats", 1.0)
        numbers = zip(self.thresholds, self.log_volume / size, self.std_error / size, strict=True)
        rows = [
            f"{value:.4g} +- {error:.2g} at {threshold:.3g}" if np.isfinite(value) else f"refused at {threshold:.3g}"
            for threshold, value, error in numbers
        ]
        head = f"{name} by {self.method}, of {self.counted}, in {unit} at thresholds in nats: {', '.join(rows)}: {self.status}"
        return "\n- ".join([head, *self.warnings])


def check_thresholds(thresholds: Any) -> Float[np.ndarray, " threshold"]:
    """Turn thresholds into an array of float64.

    Raises:
        InputError: unless they are positive, finite and increasing.

    >>> check_thresholds([0.01, 0.1]).tolist()
    [0.01, 0.1]
    """
    values = np.asarray(thresholds, np.float64)
    if values.ndim != 1 or not len(values) or not np.all((values > 0) & np.isfinite(values)) or np.any(np.diff(values) <= 0):
        raise InputError(
            f"thresholds must be a list of positive increasing numbers, nats above the loss at params, but is {values.tolist()}"
        )
    return values


def highest_losses(
    thresholds: Float[np.ndarray, " threshold"], init_loss: float, losses: Float[np.ndarray, "..."]
) -> Float[np.ndarray, " threshold"]:
    """Give the losses up to which weights count as within thresholds above `init_loss`.

    Losses are float32. One that takes few values, as error rates do, may have the one that is meant some roundings above the
    sum: it counts, where `losses` that were seen have nothing else nearby.

    >>> rates = np.array([0.0, 0.1, 0.2], np.float32)
    >>> bool(rates[1] <= np.float64(0.1)), bool(rates[1] <= highest_losses(np.array([0.1]), 0.0, rates)[0])
    (False, True)
    """
    levels = init_loss + thresholds
    for i, (level, same) in enumerate(zip(levels, same_loss(levels), strict=True)):
        off = np.abs(losses - level)
        near = losses[off <= _ROUNDINGS / _SAME * same]
        if near.size and off.min() <= same and np.ptp(near) <= same:
            levels[i] = max(level, near.max())
    return levels


def same_loss(levels: Float[np.ndarray, " threshold"]) -> Float[np.ndarray, " threshold"]:
    """Tell how far from one another losses may be that differ by rounding of their sums alone."""
    return _SAME * _EPS * np.abs(levels)


def whole_set(drop: float) -> str:
    """Name what is counted by methods that draw from all of the base measure, if they saw losses `drop` below params.

    >>> whole_set(0.0)
    'the whole sublevel set, symmetric copies of params included, each by its mass under the base measure'
    """
    below = f"; losses up to {drop:.3g} below that of params were found" if drop > 0 else ""
    return f"the whole sublevel set, symmetric copies of params included, each by its mass under the base measure{below}"


def check_labels(labels: Callable[[Params], Array], params: Params) -> None:
    """Raise InputError unless `labels` makes one integer of weights.

    >>> check_labels(lambda w: jnp.argmax(w), jnp.zeros(3))
    """
    found = jax.tree.leaves(jax.eval_shape(labels, params))
    if len(found) != 1 or found[0].shape or not (jnp.issubdtype(found[0].dtype, jnp.integer) or found[0].dtype == bool):
        shapes = ", ".join(f"{x.dtype}{list(x.shape)}" for x in found)
        raise InputError(
            f"labels must turn weights into one integer, but gives {shapes}: number the hypotheses, as by jnp.where"
        )


def rounding_warnings(thresholds: Float[np.ndarray, " threshold"], init_loss: float) -> list[str]:
    """Say when the smallest threshold drowns in the rounding of the loss, which is computed in float32."""
    rounding = _EPS * abs(init_loss)
    if thresholds[0] >= _ROUNDINGS * rounding:
        return []
    return [
        f"the smallest threshold, {thresholds[0]:.3g} nats, is within rounding of the loss at params, {init_loss:.4g}: "
        f"subtract what is constant from the loss, or keep thresholds above {_ROUNDINGS * rounding:.2g}"
    ]


_EPS, _SAME, _ROUNDINGS = float(np.finfo(np.float32).eps), 4, 32

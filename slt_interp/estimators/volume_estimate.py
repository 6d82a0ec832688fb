"""What an estimate of basin volumes is, whatever the method: numbers, what they count, and a verdict in words."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from slt_interp.bases import Base, Box, FloatGrid
from slt_interp.errors import InputError
from slt_interp.tree import Params, broadcast

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
        per_seed: (seed, threshold), nats, where independent runs were made; None otherwise.
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


def highest_losses(thresholds: Float[np.ndarray, " threshold"], init_loss: float) -> Float[np.ndarray, " threshold"]:
    """Give the losses up to which weights count as within thresholds above `init_loss`.

    Losses are float32: where they take few values, as error rates do, the one that is meant may lie a rounding above the sum.

    >>> tenth = float(np.float32(0.1))
    >>> tenth <= 0.1, bool(tenth <= highest_losses(np.array([0.1]), 0.0)[0])
    (False, True)
    """
    levels = init_loss + thresholds
    return levels + float(np.finfo(np.float32).eps) * np.abs(levels)


def counted_set(base: Base | FloatGrid, params: Params) -> str:
    """Name the set whose mass is estimated: a base measure around the weights hardly sees copies of them by symmetries.

    >>> from slt_interp.bases import Gaussian
    >>> counted_set(Gaussian(jnp.ones(2), 0.1), jnp.ones(2))
    'the sublevel set around params, where the base measure is centered; symmetric copies count by their mass there'
    >>> counted_set(Gaussian(0.0, 1.0), jnp.ones(2))
    'the whole sublevel set within the base measure, symmetric copies of params included'
    """
    centers = jax.tree.leaves(broadcast(getattr(base, "center", params), params))
    if isinstance(base, Box) or not all(np.all(c == w) for c, w in zip(centers, jax.tree.leaves(params), strict=True)):
        return "the whole sublevel set within the base measure, symmetric copies of params included"
    return "the sublevel set around params, where the base measure is centered; symmetric copies count by their mass there"


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
    rounding = float(np.finfo(np.float32).eps) * abs(init_loss)
    if thresholds[0] >= _ROUNDINGS * rounding:
        return []
    return [
        f"the smallest threshold, {thresholds[0]:.3g} nats, is within rounding of the loss at params, {init_loss:.4g}: "
        f"subtract what is constant from the loss, or keep thresholds above {_ROUNDINGS * rounding:.2g}"
    ]


_ROUNDINGS = 32

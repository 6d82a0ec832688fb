"""Invertible linear maps: alignments whose directions need not be orthogonal.

r = h A with A = U diag(exp s) V, h' = r' A^-1. Interchange through A and through A times any invertible matrix within each
variable's coordinates is the same, so that what A can do beyond a rotation is to choose the angles between variables. It can
choose them nearly parallel, too: the condition number of A says by how much it stretches what lies between them, and a small
change of an activation becomes a large one. It is reported with every alignment, kept below a bound, and may be penalized.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from slt_interp.probes.alignment import Masks, Turn, random_turn
from slt_interp.tree import register_dataclass

MAX_CONDITION = 1e3
"""No map of the search has a larger condition number: in float32 there and back is then right to 1e-4 of an activation."""


class LinearAlignment(NamedTuple):
    """An invertible matrix, and which of its columns read which variable.

    Attributes:
        matrix: A; its columns read coordinates off an activation.
        inverse: A^-1; its rows are the directions along which coordinates are written.
        masks: for each variable, 1 at the coordinates that carry it.
    """

    matrix: Float[Array, "width width"]
    inverse: Float[Array, "width width"]
    masks: Masks

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the matrix."""
        return self.matrix.shape

    @property
    def condition(self) -> Float[Array, ""]:
        """Condition number of the matrix, 1 for a rotation."""
        return jnp.linalg.cond(self.matrix)

    def exchange(
        self, base: Float[Array, "example width"], sources: Float[Array, "variable example width"]
    ) -> Float[Array, "example width"]:
        """Take each variable's coordinates from its source: h + sum_v (h_v - h) A diag(m_v) A^-1."""
        moved = ((sources - base) @ self.matrix) * self.masks[:, None, :]
        return base + moved.sum(axis=0) @ self.inverse


class _Factors(NamedTuple):
    left: Turn
    stretch: Float[Array, " width"]
    right: Turn


@partial(register_dataclass, data_fields=["condition_penalty"], meta_fields=[])
@dataclass(frozen=True)
class LinearMaps:
    """The family of invertible matrices of condition number at most `MAX_CONDITION`; a search starts from random rotations.

    Attributes:
        condition_penalty: nats for a variance of 1 of the logarithms of the singular values. 0 leaves them free; as it
            grows the family becomes that of the rotations.
    """

    condition_penalty: float | Float[Array, ""] = 0.0

    def start(self, key: Key[Array, ""], masks: Masks) -> _Factors:
        """Start from a rotation drawn uniformly."""
        width = masks.shape[1]
        return _Factors(random_turn(key, width), jnp.zeros(width), Turn(jnp.eye(width), jnp.zeros((width, width))))

    def alignment(self, found: _Factors, masks: Masks, done: Float[Array, ""]) -> LinearAlignment:
        """Multiply the factors, and their inverses in reverse."""
        del done
        left, stretch, right = found.left.rotation(), jnp.exp(_log_singular(found)), found.right.rotation()
        return LinearAlignment((left * stretch) @ right, (right.T / stretch) @ left.T, masks)

    def penalty(self, found: _Factors) -> Float[Array, ""]:
        """Penalize the spread of the singular values."""
        return self.condition_penalty * jnp.var(_log_singular(found))


def _log_singular(found: _Factors) -> Float[Array, " width"]:
    bound = jnp.log(MAX_CONDITION) / 2
    return bound * jnp.tanh(found.stretch / bound)

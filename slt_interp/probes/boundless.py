"""Learned boundaries: rotations whose number of directions for each variable is found, not given.

Variables own consecutive columns of the rotation, up to boundaries that move. While the search runs, masks are soft,
m_v(k) = sigmoid((k - b_v) / T) sigmoid((b_{v+1} - k) / T) for the column whose middle is k, and T falls; at its end they are
hard. A penalty on the share of columns that are owned asks for small subspaces: without it, a variable may as well take
directions that nothing reads.

References:
    Wu, Geiger, Icard, Potts and Goodman (2023), Interpretability at scale: identifying causal mechanisms in Alpaca,
    arXiv:2305.08809. There one variable has one boundary; pyvene's tutorial of it has the penalty.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from slt_interp.probes.alignment import Masks, Turn, random_turn
from slt_interp.probes.interchange import Alignment
from slt_interp.tree import register_dataclass

_HOT, _COLD = 0.5, 0.1
"""Temperatures at the start and at the end, in columns."""


class _Bounded(NamedTuple):
    turn: Turn
    log_shares: Float[Array, " variable_and_rest"]


@partial(register_dataclass, data_fields=["size_penalty"], meta_fields=[])
@dataclass(frozen=True)
class LearnedBoundaries:
    """The family of rotations with any number of columns for each variable; `sizes` of the search are where they start.

    Attributes:
        size_penalty: nats for owning all columns; each column costs this over the width.
    """

    size_penalty: float | Float[Array, ""] = 1.0

    def start(self, key: Key[Array, ""], masks: Masks) -> _Bounded:
        """Start from a rotation drawn uniformly; what owns no column starts with half of one."""
        width = masks.shape[1]
        sizes = jnp.append(masks.sum(axis=1), width - masks.sum())
        return _Bounded(random_turn(key, width), jnp.log(jnp.maximum(sizes, 0.5)))

    def alignment(self, found: _Bounded, masks: Masks, done: Float[Array, ""]) -> Alignment:
        """Turn the rotation, and mask what lies between the boundaries."""
        width = masks.shape[1]
        ends = width * jnp.cumsum(jax.nn.softmax(found.log_shares))[:-1, None]
        begins = jnp.concatenate([jnp.zeros((1, 1)), ends[:-1]])
        middles = jnp.arange(width) + 0.5
        temperature = _HOT + (_COLD - _HOT) * done
        soft = jax.nn.sigmoid((middles - begins) / temperature) * jax.nn.sigmoid((ends - middles) / temperature)
        hard = ((middles > begins) & (middles < ends)).astype(soft.dtype)
        return Alignment(found.turn.rotation(), jnp.where(done < 1, soft, hard))

    def penalty(self, found: _Bounded) -> Float[Array, ""]:
        """Penalize the share of columns that variables own."""
        return self.size_penalty * (1 - jax.nn.softmax(found.log_shares)[-1])

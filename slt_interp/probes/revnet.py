"""RevNet maps: nonlinear alignments, which find circuits where there are none.

r = f(h R), h' = f^-1(r') R^T, with f a chain of additive couplings y_1 = x_1 + F(x_2), y_2 = x_2 + G(y_1) of the two halves of
an activation: invertible in closed form whatever F and G are, and preserving volume. Such a map may carry the whole computation
that the network has not done, so that a high accuracy says little about the network: hold it against other networks, other
sites and rotations.

References:
    Gomez, Ren, Urtasun and Grosse (2017), The reversible residual network, arXiv:1707.04585, equations 8 and 9.
    Sutter et al. (2025), The non-linear representation dilemma, arXiv:2507.08802.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from slt_interp.errors import InputError
from slt_interp.probes.alignment import Masks, Turn, random_turn
from slt_interp.tree import register_dataclass


class Coupling(NamedTuple):
    """A layer of tanh units from one half of an activation to the other; in a map with a leading axis, one for each block."""

    incoming: Float[Array, "*block half unit"]
    bias: Float[Array, "*block unit"]
    outgoing: Float[Array, "*block unit half"]

    def __call__(self, half: Float[Array, "*example half"]) -> Float[Array, "*example half"]:
        """Compute what is added to the other half."""
        return jnp.tanh(half @ self.incoming + self.bias) @ self.outgoing


class RevNetAlignment(NamedTuple):
    """An invertible map of a rotation and coupling blocks, and which of its coordinates carry which variable.

    Attributes:
        rotation: R, (width, width).
        to_first: F of every block, from the second half to the first.
        to_second: G of every block, back.
        masks: for each variable, 1 at the coordinates that carry it.
    """

    rotation: Float[Array, "width width"]
    to_first: Coupling
    to_second: Coupling
    masks: Masks

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the rotation."""
        return self.rotation.shape

    def forward(self, activation: Float[Array, "*example width"]) -> Float[Array, "*example width"]:
        """Map an activation to coordinates."""

        def block(halves: _Halves, couplings: tuple[Coupling, Coupling]) -> tuple[_Halves, None]:
            (first, second), (to_first, to_second) = halves, couplings
            first = first + to_first(second)
            return (first, second + to_second(first)), None

        halves = tuple(jnp.split(activation @ self.rotation, 2, axis=-1))
        halves, _ = jax.lax.scan(block, halves, (self.to_first, self.to_second))
        return jnp.concatenate(halves, axis=-1)

    def inverse(self, coordinates: Float[Array, "*example width"]) -> Float[Array, "*example width"]:
        """Map coordinates to the activation that has them."""

        def block(halves: _Halves, couplings: tuple[Coupling, Coupling]) -> tuple[_Halves, None]:
            (first, second), (to_first, to_second) = halves, couplings
            second = second - to_second(first)
            return (first - to_first(second), second), None

        halves = tuple(jnp.split(coordinates, 2, axis=-1))
        halves, _ = jax.lax.scan(block, halves, (self.to_first, self.to_second), reverse=True)
        return jnp.concatenate(halves, axis=-1) @ self.rotation.T

    def exchange(
        self, base: Float[Array, "example width"], sources: Float[Array, "variable example width"]
    ) -> Float[Array, "example width"]:
        """Take each variable's coordinates from its source; right to rounding, also where the source is the base."""
        coordinates = self.forward(base)
        moved = (self.forward(sources) - coordinates) * self.masks[:, None, :]
        return self.inverse(coordinates + moved.sum(axis=0))


_Halves = tuple[Array, ...]


class _Parts(NamedTuple):
    turn: Turn
    to_first: Coupling
    to_second: Coupling


@partial(register_dataclass, data_fields=[], meta_fields=["num_blocks", "num_units"])
@dataclass(frozen=True)
class RevNets:
    """The family of RevNet maps; a search starts from random rotations, with couplings that add nothing.

    Attributes:
        num_blocks: blocks of two couplings each.
        num_units: tanh units of each coupling.
    """

    num_blocks: int = 4
    num_units: int = 64

    def start(self, key: Key[Array, ""], masks: Masks) -> _Parts:
        """Start from a rotation drawn uniformly."""
        width = masks.shape[1]
        if width % 2:
            raise InputError(
                f"a RevNet map couples two halves of an activation, but this one has {width} units: choose another site"
            )
        turn_key, first_key, second_key = jax.random.split(key, 3)
        couplings = (self._silent(key, width // 2) for key in (first_key, second_key))
        return _Parts(random_turn(turn_key, width), *couplings)

    def alignment(self, found: _Parts, masks: Masks, done: Float[Array, ""]) -> RevNetAlignment:
        """Turn the rotation; the couplings are what they are."""
        del done
        return RevNetAlignment(found.turn.rotation(), found.to_first, found.to_second, masks)

    def penalty(self, found: _Parts) -> Float[Array, ""]:
        """Prefer none."""
        del found
        return jnp.zeros(())

    def _silent(self, key: Key[Array, ""], half: int) -> Coupling:
        """Draw couplings that add nothing."""
        incoming = jax.random.normal(key, (self.num_blocks, half, self.num_units)) / jnp.sqrt(half)
        zeros = jnp.zeros((self.num_blocks, self.num_units, half))
        return Coupling(incoming, zeros[..., 0], zeros)

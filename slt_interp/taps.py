"""Taps: functions that a network calls at every named site, to look at an activation or to replace it.

`tap(site, activation) -> activation`. Patching, ablation and recording are taps: no hooks, no state, so all of them
work under `jit`, `vmap` and `grad`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import jax
from jaxtyping import Array, Float, Key

from slt_interp.tree import Params, register_dataclass

Tap = Callable[[str, Array], Array]

Damage = Callable[[Key[Array, ""]], Tap]
"""`(key) -> tap`, a pytree: activations that are damaged at random, by each key in its own way."""


INPUTS = "inputs"
"""The site of the inputs themselves, before any layer, in networks that have one: probes reach it, damage to activations does
not."""


class Network(Protocol):
    """What probes and dials need of a network: weights in, logits out, and a tap at every named site."""

    @property
    def sites(self) -> Sequence[str]:
        """Names of the activation sites, in the order of computation."""
        ...

    def apply(self, params: Params, inputs: Array, tap: Tap = ...) -> Float[Array, "example output"]:
        """Compute the logits, calling `tap` at every site."""
        ...


def no_tap(site: str, activation: Array) -> Array:
    """Leave every activation as it is.

    >>> no_tap("layer1", 3.0)
    3.0
    """
    del site
    return activation


@partial(register_dataclass, data_fields=[], meta_fields=[])
@dataclass(frozen=True)
class NoDamage:
    """The damage that leaves every activation as it is, for any key."""

    def __call__(self, key: Key[Array, ""]) -> Tap:
        """Make `no_tap`."""
        del key
        return no_tap


NO_DAMAGE: Damage = NoDamage()


def compose(first: Tap, second: Tap) -> Tap:
    """Apply two taps in turn at every site.

    >>> compose(replace("a", lambda h: h + 1), replace("a", lambda h: 2 * h))("a", 3)
    8
    """
    return lambda site, activation: second(site, first(site, activation))


def replace(site: str, function: Callable[[Array], Array]) -> Tap:
    """Make a tap that applies `function` at one site and is `no_tap` elsewhere.

    >>> replace("a", lambda h: 2 * h)("b", 3)
    3
    """
    return lambda here, activation: function(activation) if here == site else activation


@dataclass(frozen=True)
class Tapped:
    """A network whose activations go through a tap of its own before the caller's."""

    network: Network
    tap: Tap

    @property
    def sites(self) -> Sequence[str]:
        """Names of the activation sites, those of the network."""
        return self.network.sites

    def apply(self, params: Params, inputs: Array, tap: Tap = no_tap) -> Float[Array, "example output"]:
        """Compute the logits."""
        return self.network.apply(params, inputs, compose(self.tap, tap))


def damaged_runs(network: Network, damage: Damage, key: Key[Array, ""]) -> tuple[Tapped, Tapped]:
    """Make the networks that base and source inputs run through: damaged alike, and each at random for itself."""
    base_key, source_key = jax.random.split(key)
    return Tapped(network, damage(base_key)), Tapped(network, damage(source_key))


def record(network: Network, params: Params, inputs: Array) -> tuple[Array, dict[str, Array]]:
    """Run the network and keep the activation at every site.

    Returns:
        The logits, and a dict from site to activation.
    """
    activations: dict[str, Array] = {}

    def keep(site: str, activation: Array) -> Array:
        activations[site] = activation
        return activation

    logits = network.apply(params, inputs, keep)
    return logits, activations

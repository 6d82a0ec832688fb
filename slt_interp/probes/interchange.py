"""Interchange interventions, which test whether a subspace of an activation carries a causal variable.

At one site, rotate the activation h to r = h R, overwrite the coordinates that a mask gives to a variable with those of
a source input, and rotate back: r' = r_base (1 - sum_v m_v) + sum_v r_source_v m_v, h' = r' R^T. If the coordinates carry the
variable, the network now answers as the causal model does with that variable's value taken from the source. The share
of examples where it does is the interchange intervention accuracy (IIA).

Rotation, masks and examples are data, so that everything maps over them. Other invertible maps may stand where the rotation
does: anything that is an `AnyAlignment`.

References:
    Geiger et al. (2021), Causal abstractions of neural networks, arXiv:2106.02997.
    Geiger et al. (2023), arXiv:2303.02536, definitions 3.1 to 3.3.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from slt_interp.data import Counterfactuals
from slt_interp.errors import InputError
from slt_interp.taps import NO_DAMAGE, Damage, Network, damaged_runs, record, replace
from slt_interp.tree import Params, register_dataclass


class AnyAlignment(Protocol):
    """What interchange interventions need: an invertible map of an activation, and which coordinates carry which variable."""

    @property
    def masks(self) -> Float[Array, "variable width"]:
        """For each variable, 1 at the coordinates that carry it."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """(width, width) of a map of activations of that width."""
        ...

    def exchange(
        self, base: Float[Array, "example width"], sources: Float[Array, "variable example width"]
    ) -> Float[Array, "example width"]:
        """Take each variable's coordinates from its source, and all others from the base."""
        ...


class Alignment(NamedTuple):
    """Which directions of an activation are claimed to carry which variable.

    Attributes:
        rotation: orthogonal matrix R; its columns are directions in activation space.
        masks: for each variable, 1 at the columns that carry it; no column has two owners.
    """

    rotation: Float[Array, "width width"]
    masks: Float[Array, "variable width"]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the rotation."""
        return self.rotation.shape

    def exchange(
        self, base: Float[Array, "example width"], sources: Float[Array, "variable example width"]
    ) -> Float[Array, "example width"]:
        """Take each variable's coordinates from its source: h + sum_v (h_v - h) R diag(m_v) R^T.

        In this form nothing changes where the source is the base, exactly.
        """
        moved = ((sources - base) @ self.rotation) * self.masks[:, None, :]
        return base + moved.sum(axis=0) @ self.rotation.T


def block_masks(sizes: tuple[int, ...], width: int) -> Float[Array, "variable width"]:
    """Give the first columns to the first variable, the next to the second, and so on.

    >>> block_masks((1, 2), 4).tolist()
    [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 0.0]]
    """
    if sum(sizes) > width:
        raise InputError(f"{sum(sizes)} directions were asked for {sizes}, but the activation has {width}: ask for fewer")
    owner = jnp.repeat(jnp.arange(len(sizes)), jnp.array(sizes), total_repeat_length=sum(sizes))
    return jnp.zeros((len(sizes), width)).at[owner, jnp.arange(sum(sizes))].set(1.0)


def interchange(
    network: Network, params: Params, site: str, alignment: AnyAlignment, examples: Counterfactuals
) -> Float[Array, "example output"]:
    """Compute the logits on the base inputs with every variable's coordinates taken from its source.

    Args:
        network: anything with `apply(params, inputs, tap)`.
        params: its weights.
        site: where to intervene; the activation there is (example, width).
        alignment: rotation, or another invertible map, and masks.
        examples: base and source inputs.

    Raises:
        InputError: if the network has no such site, or the alignment does not fit the activation.
    """
    return network.apply(params, examples.base, replace(site, interchange_patch(network, params, site, alignment, examples)))


def interchange_patch(
    network: Network, params: Params, site: str, alignment: AnyAlignment, examples: Counterfactuals
) -> Callable[[Float[Array, "example width"]], Float[Array, "example width"]]:
    """Make the function that `interchange` applies to the activation of the base inputs; arguments and errors are the same."""
    check_site(network, site)
    num_variables = examples.sources.shape[1]
    sources = examples.sources.swapaxes(0, 1).reshape(-1, *examples.sources.shape[2:])
    activations = record(network, params, sources)[1][site]
    _check_width(alignment, activations.shape[-1], num_variables, site)
    activations = activations.reshape(num_variables, -1, activations.shape[-1])
    return lambda base: alignment.exchange(base, activations)


@partial(register_dataclass, data_fields=["alignment", "examples", "damage"], meta_fields=["network", "site"])
@dataclass(frozen=True)
class InterchangeProbe:
    """The probe `(key, params) -> {"iia", "accuracy"}` for one alignment; give it to `over_draws`.

    `iia` is the share of examples where the network answers as the intervened causal model, `accuracy` the share of
    base inputs that it answers right without intervention.
    """

    network: Network
    site: str
    alignment: AnyAlignment
    examples: Counterfactuals
    damage: Damage = NO_DAMAGE

    def __call__(self, key: Key[Array, ""], params: Params) -> dict[str, Float[Array, ""]]:
        """Measure at one weight vector."""
        network, other = damaged_runs(self.network, self.damage, key)
        patch = interchange_patch(other, params, self.site, self.alignment, self.examples)
        patched = network.apply(params, self.examples.base, replace(self.site, patch))
        plain = network.apply(params, self.examples.base)
        return {
            "iia": jnp.mean(patched.argmax(axis=-1) == self.examples.labels),
            "accuracy": jnp.mean(plain.argmax(axis=-1) == self.examples.base_labels),
        }


def check_site(network: Network, site: str) -> None:
    """Raise InputError, listing the sites, if the network has no such site."""
    if site not in network.sites:
        raise InputError(f"the network has no site {site!r}: choose one of {', '.join(network.sites)}")


def _check_width(alignment: AnyAlignment, width: int, num_variables: int, site: str) -> None:
    if alignment.shape != (width, width) or alignment.masks.shape != (num_variables, width):
        raise InputError(
            f"the alignment has a map of shape {alignment.shape} and masks of shape {alignment.masks.shape}, "
            f"but {site} has width {width} and the examples have {num_variables} variables: fit it at this site"
        )

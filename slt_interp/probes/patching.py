"""Activation patching: what a readout of the network owes to parts of its activations.

At one site, the coordinates that a mask names are replaced, on every example, by those of another run: of source inputs
(patching), of zeros, of the mean over the examples, or of other examples (ablation). The effect is the readout afterwards
less the readout before. Attribution patching predicts it to first order, for all masks from one gradient. Masks are data: any
set of units, positions or directions along the axes, and everything maps over them and over weights.

References:
    Vig et al. (2020), Causal mediation analysis for interpreting neural NLP, arXiv:2004.12265.
    Zhang and Nanda (2024), Towards best practices of activation patching in language models, arXiv:2309.16042.
    Syed, Rager and Conmy (2023), Attribution patching outperforms automated circuit discovery, arXiv:2310.10348.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from slt_interp.errors import InputError
from slt_interp.probes.interchange import check_site
from slt_interp.taps import NO_DAMAGE, Damage, Network, damaged_runs, record, replace
from slt_interp.tree import Params, register_dataclass

Readout = Callable[[Float[Array, "example *output"]], Float[Array, ""]]
"""`(logits) -> scalar`, such as a mean difference of logits or a mean loss."""

ABLATIONS = ("zero", "mean", "resample")


def patching_effects(
    network: Network,
    params: Params,
    site: str,
    masks: Float[Array, "mask *unit"],
    base: Float[Array, "example *input"],
    source: Float[Array, "example *input"],
    readout: Readout,
) -> Float[Array, " mask"]:
    """Compute the effect of taking each mask's part of the activation from the run on `source`.

    Args:
        network: anything with `apply(params, inputs, tap)` and `sites`.
        params: its weights.
        site: where to patch.
        masks: 1 at the coordinates that are replaced, 0 elsewhere; each broadcasts to the activation of one example. One for
            each unit of a layer is `jnp.eye(width)`.
        base: inputs that are run.
        source: inputs whose activations are put in, one for each of `base`.
        readout: `(logits) -> scalar`.

    Raises:
        InputError: if the network has no such site, or masks or sources do not fit.
    """
    activation = _activation(network, params, site, masks, source)
    return _effects(network, params, site, masks, base, activation, readout)


def ablation_effects(
    key: Key[Array, ""],
    network: Network,
    params: Params,
    site: str,
    masks: Float[Array, "mask *unit"],
    inputs: Float[Array, "example *input"],
    readout: Readout,
    *,
    value: str,
) -> Float[Array, " mask"]:
    """Compute the effect of taking each mask's part of the activation away.

    Args:
        key: for "resample".
        network: anything with `apply(params, inputs, tap)` and `sites`.
        params: its weights.
        site: where to ablate.
        masks: 1 at the coordinates that are taken away, 0 elsewhere.
        inputs: inputs that are run.
        readout: `(logits) -> scalar`.
        value: "zero"; "mean", over the examples; or "resample", from another example, in a random order that moves all of them.

    Raises:
        InputError: as `patching_effects`, and for another `value`.
    """
    activation = _activation(network, params, site, masks, inputs)
    if value == "zero":
        activation = jnp.zeros_like(activation)
    elif value == "mean":
        activation = jnp.broadcast_to(activation.mean(axis=0), activation.shape)
    elif value == "resample":
        order = jax.random.permutation(key, len(activation))
        # Along one random cycle no example keeps its own.
        activation = activation.at[order].set(activation[jnp.roll(order, 1)])
    else:
        raise InputError(f"value must be one of {', '.join(ABLATIONS)}, but is {value!r}")
    return _effects(network, params, site, masks, inputs, activation, readout)


def attributed_effects(
    network: Network,
    params: Params,
    site: str,
    masks: Float[Array, "mask *unit"],
    base: Float[Array, "example *input"],
    source: Float[Array, "example *input"],
    readout: Readout,
) -> Float[Array, " mask"]:
    """Predict `patching_effects` to first order in the change of the activation, from one gradient.

    Exact where the readout is linear in the activation; arguments and errors are the same.
    """
    activation = _activation(network, params, site, masks, source)
    return _attributed(network, params, site, masks, base, activation, readout)


@partial(register_dataclass, data_fields=["masks", "base", "source", "damage"], meta_fields=["network", "site", "readout"])
@dataclass(frozen=True)
class PatchingProbe:
    """The probe `(key, params) -> {"effect", "attributed"}`, each (mask,); give it to `over_draws`."""

    network: Network
    site: str
    masks: Float[Array, "mask *unit"]
    base: Float[Array, "example *input"]
    source: Float[Array, "example *input"]
    readout: Readout
    damage: Damage = NO_DAMAGE

    def __call__(self, key: Key[Array, ""], params: Params) -> dict[str, Float[Array, " mask"]]:
        """Measure at one weight vector."""
        network, other = damaged_runs(self.network, self.damage, key)
        activation = _activation(other, params, self.site, self.masks, self.source)
        arguments = network, params, self.site, self.masks, self.base, activation, self.readout
        return {"effect": _effects(*arguments), "attributed": _attributed(*arguments)}


def _activation(network: Network, params: Params, site: str, masks: Array, inputs: Array) -> Array:
    check_site(network, site)
    activation = record(network, params, inputs)[1][site]
    try:
        fits = jnp.broadcast_shapes(masks.shape[1:], activation.shape[1:]) == activation.shape[1:]
    except ValueError:
        fits = False
    if not fits:
        raise InputError(
            f"masks of shape {masks.shape} do not fit the activation at {site}, which has the shape {activation.shape[1:]} for "
            "each example: give masks (mask, *that shape)"
        )
    return activation


def _effects(
    network: Network, params: Params, site: str, masks: Array, inputs: Array, activation: Array, readout: Readout
) -> Float[Array, " mask"]:
    if len(activation) != len(inputs):
        raise InputError(f"each of {len(inputs)} base inputs needs its own source, but there are {len(activation)}")
    before = readout(network.apply(params, inputs))

    def one(mask: Array) -> Float[Array, ""]:
        # h + m (h' - h) would round where nothing is masked.
        tap = replace(site, lambda h: jnp.where(mask > 0, activation, h))
        return readout(network.apply(params, inputs, tap)) - before

    return jax.lax.map(one, masks)


def _attributed(
    network: Network, params: Params, site: str, masks: Array, inputs: Array, activation: Array, readout: Readout
) -> Float[Array, " mask"]:
    def read(change: Array) -> Float[Array, ""]:
        return readout(network.apply(params, inputs, replace(site, lambda h: h + change)))

    change = activation - record(network, params, inputs)[1][site]
    per_unit = (jax.grad(read)(jnp.zeros_like(change)) * change).sum(axis=0)
    return jax.vmap(lambda mask: jnp.sum(mask * per_unit))(masks)

"""Dormancy, which tells whether a patch acts through units that do nothing on natural inputs.

References:
    Makelov, Lange and Nanda (2023), Is this the subspace you are looking for?, arXiv:2311.17030.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from slt_interp.data import Counterfactuals
from slt_interp.probes.interchange import AnyAlignment, interchange_patch
from slt_interp.taps import Network, record, replace
from slt_interp.tree import Params

DORMANT = 1e-3
"""Units whose own value, put in from another example, moves the logits by less than this part of what units do on average (in
squares) count as dormant. Rescaling a unit, and what reads it, does not change that."""


def dormancy_share(
    network: Network, params: Params, site: str, alignment: AnyAlignment, examples: Counterfactuals
) -> Float[Array, ""]:
    """Compute the share of a patch's effect that enters through dormant units: 0 for a path in use, 1 for a planted one.

    The patch is made at the dormant units only, and at the others only; of each the root mean square change of the logits,
    centered over classes, is taken. The share is the first over the sum of both, NaN where neither changes anything.

    Args:
        network: anything with `apply(params, inputs, tap)` and `sites`; the activation at the site is (example, width).
        params: its weights.
        site: where the alignment is.
        alignment: rotation, or another invertible map, and masks.
        examples: base and source inputs.

    Raises:
        InputError: as `interchange`.
    """
    patch = interchange_patch(network, params, site, alignment, examples)
    logits, activations = record(network, params, examples.base)
    activation = activations[site]
    patched = patch(activation)

    def change(put_in: Float[Array, "example width"]) -> Float[Array, ""]:
        moved = network.apply(params, examples.base, replace(site, lambda _: put_in)) - logits
        return jnp.sqrt(jnp.mean((moved - moved.mean(axis=-1, keepdims=True)) ** 2))

    others, width = jnp.roll(activation, 1, axis=0), activation.shape[1]
    influence = jax.lax.map(lambda unit: change(jnp.where(unit, others, activation)), jnp.eye(width, dtype=bool)) ** 2
    is_dormant = influence < DORMANT * influence.mean()
    through, beside = (change(jnp.where(units, patched, activation)) for units in (is_dormant, ~is_dormant))
    return through / (through + beside)

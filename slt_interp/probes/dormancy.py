"""Dormancy, which tells whether a patch acts through units that do nothing on natural inputs.

References:
    Makelov, Lange and Nanda (2023), Is this the subspace you are looking for?, arXiv:2311.17030.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from slt_interp.data import Counterfactuals
from slt_interp.probes.interchange import Alignment, interchange_patch
from slt_interp.taps import Network, record, replace
from slt_interp.tree import Params

DORMANT = 1e-3
"""Units whose variance over the inputs is below this part of the site's mean count as dormant."""


def dormancy_share(
    network: Network, params: Params, site: str, alignment: Alignment, examples: Counterfactuals
) -> Float[Array, ""]:
    """Compute the share of a patch's effect that enters through dormant units: 0 for a path in use, 1 for a planted one.

    The patch is made at the dormant units only, and at the others only; of each the root mean square change of the logits,
    centered over classes, is taken. The share is the first over the sum of both, 0 where neither changes anything.

    Args:
        network: anything with `apply(params, inputs, tap)` and `sites`; the activation at the site is (example, width).
        params: its weights.
        site: where the alignment is.
        alignment: rotation and masks.
        examples: base and source inputs.

    Raises:
        InputError: as `interchange`.
    """
    patch = interchange_patch(network, params, site, alignment, examples)
    logits, activations = record(network, params, examples.base)
    activation = activations[site]
    patched = patch(activation)
    variance = activation.var(axis=0)
    is_dormant = variance < DORMANT * variance.mean()

    def change(units: Float[Array, " width"]) -> Float[Array, ""]:
        put_in = jnp.where(units, patched, activation)
        moved = network.apply(params, examples.base, replace(site, lambda _: put_in)) - logits
        return jnp.sqrt(jnp.mean((moved - moved.mean(axis=-1, keepdims=True)) ** 2))

    through, beside = change(is_dormant), change(~is_dormant)
    return through / jnp.where(through + beside > 0, through + beside, 1.0)

"""What a candidate circuit does, on scales that do not depend on how good the network is.

References:
    Geiger et al. (2021), Causal abstractions of neural networks, arXiv:2106.02997 (interventions and counterfactual labels).
"""

from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from slt_interp.data import Counterfactuals
from slt_interp.probes.interchange import AnyAlignment, interchange_patch
from slt_interp.taps import NO_DAMAGE, Damage, Network, damaged_runs, replace
from slt_interp.tree import Params, register_dataclass


@partial(register_dataclass, data_fields=["alignment", "swapped", "matched", "damage"], meta_fields=["network", "site"])
@dataclass(frozen=True)
class EffectProbe:
    """The probe `(key, params) -> {"effect", "disturbance", "swap_disturbance", "accuracy"}`; give it to `over_draws`.

    Attributes:
        network: anything with `apply` and `sites`.
        site: where the alignment is.
        alignment: rotation, or another invertible map, and masks.
        swapped: base inputs and sources of any values: the answer should change as the causal model's does.
        matched: base inputs and sources of the *same* values: nothing should change.

    `effect` is the share of answers that are the counterfactual ones, among examples where these differ from the base's.
    `disturbance` is the cross-entropy to the base's labels with matched sources less that without, nats; `swap_disturbance` the
    same with the swapped sources that should change the answer. A circuit has an effect near 1 and a small disturbance in units
    of its swap disturbance. Both are NaN if no counterfactual label differs.
    """

    network: Network
    site: str
    alignment: AnyAlignment
    swapped: Counterfactuals
    matched: Counterfactuals
    damage: Damage = NO_DAMAGE

    def __call__(self, key: Key[Array, ""], params: Params) -> dict[str, Float[Array, ""]]:
        """Measure at one weight vector."""
        network, other = damaged_runs(self.network, self.damage, key)

        def answers(examples: Counterfactuals) -> tuple[Array, Array]:
            patch = interchange_patch(other, params, self.site, self.alignment, examples)
            return network.apply(params, examples.base), network.apply(params, examples.base, replace(self.site, patch))

        def rise(plain: Array, patched: Array, examples: Counterfactuals) -> Float[Array, " example"]:
            loss = optax.softmax_cross_entropy_with_integer_labels
            return loss(patched, examples.base_labels) - loss(plain, examples.base_labels)

        plain, patched = answers(self.swapped)
        differs = self.swapped.labels != self.swapped.base_labels
        return {
            "effect": flip_rate(patched, self.swapped),
            "swap_disturbance": jnp.sum(differs * rise(plain, patched, self.swapped)) / differs.sum(),
            "disturbance": rise(*answers(self.matched), self.matched).mean(),
            "accuracy": jnp.mean(plain.argmax(axis=-1) == self.swapped.base_labels),
        }


def flip_rate(patched: Float[Array, "example class"], examples: Counterfactuals) -> Float[Array, ""]:
    """Compute the effect F: of the examples whose label an intervention changes, the share that patched logits answer so.

    >>> examples = Counterfactuals(jnp.zeros((2, 1)), jnp.zeros((2, 1, 1)), jnp.array([1, 0]), jnp.array([0, 0]))
    >>> float(flip_rate(jnp.array([[0.0, 1.0], [0.0, 1.0]]), examples))
    1.0
    """
    differs = examples.labels != examples.base_labels
    return jnp.sum(differs & (patched.argmax(axis=-1) == examples.labels)) / differs.sum()

"""Causal scrubbing, which tests whether a hypothesis about an activation explains all that the network does with it.

The hypothesis gives directions of one site to variables of a causal model, may call other directions irrelevant, and says
nothing of the rest. Scrubbing runs the network with each variable's directions taken from another input of the *same* value,
and the irrelevant ones from any input at all. If the hypothesis is true nothing changes. Outputs are compared example by
example: a mean loss may stay where it is while errors cancel.

References:
    Chan et al. (2022), Causal scrubbing: a method for rigorously testing interpretability hypotheses.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key

from slt_interp.data import Counterfactuals
from slt_interp.errors import InputError
from slt_interp.probes.interchange import Alignment, check_site, interchange, interchange_patch
from slt_interp.taps import NO_DAMAGE, Damage, Network, damaged_runs, record, replace
from slt_interp.tree import Params, register_dataclass


class Divergence(NamedTuple):
    """How far the scrubbed outputs are from the original ones, means over examples.

    Attributes:
        kl: KL(original || scrubbed), nats.
        jensen_shannon: Jensen-Shannon divergence, nats, at most log 2.
        squared: squared distance of the logits, each centered over classes.
        loss_gap: cross-entropy to the labels, scrubbed less original, nats.
        cancellation: E[(p_labels - p_original) log(p_original / p_scrubbed)], nats: the loss gap less the KL. Where it is far
            below 0, errors cancel in the loss, and a small loss gap says nothing for the hypothesis.
    """

    kl: Float[Array, ""]
    jensen_shannon: Float[Array, ""]
    squared: Float[Array, ""]
    loss_gap: Float[Array, ""]
    cancellation: Float[Array, ""]


def divergence(
    original: Float[Array, "example class"], scrubbed: Float[Array, "example class"], labels: Int[Array, " example"]
) -> Divergence:
    """Compare logits.

    >>> found = divergence(jnp.array([[2.0, 0.0]]), jnp.array([[2.0, 0.0]]), jnp.array([0]))
    >>> [float(x) for x in found]
    [0.0, 0.0, 0.0, 0.0, 0.0]
    """
    log_p, log_q = jax.nn.log_softmax(original), jax.nn.log_softmax(scrubbed)
    p, q, is_label = jnp.exp(log_p), jnp.exp(log_q), jax.nn.one_hot(labels, original.shape[-1])
    low, high = jnp.minimum(log_p, log_q), jnp.maximum(log_p, log_q)
    # Of equal distributions exactly their own.
    log_middle = high + jnp.log1p(jnp.expm1(low - high) / 2)
    centered = (original - scrubbed) - (original - scrubbed).mean(axis=-1, keepdims=True)

    def mean(values: Float[Array, "example class"]) -> Float[Array, ""]:
        return values.sum(axis=-1).mean()

    return Divergence(
        kl=mean(p * (log_p - log_q)),
        jensen_shannon=mean(p * (log_p - log_middle) + q * (log_q - log_middle)) / 2,
        squared=mean(centered**2),
        loss_gap=mean(is_label * (log_p - log_q)),
        cancellation=mean((is_label - p) * (log_p - log_q)),
    )


class Hypothesis(NamedTuple):
    """What the directions of a site are claimed to carry.

    Attributes:
        alignment: rotation and one mask for each variable, as for interchange interventions.
        irrelevant: 1 at the columns of the rotation that are claimed to matter for nothing, (width,). Columns under no mask are
            not spoken of, and stay as they are.
    """

    alignment: Alignment
    irrelevant: Float[Array, " width"]


class Coverage(NamedTuple):
    """Shares of the activation's variance: given to variables, called irrelevant, and not spoken of."""

    claimed: Float[Array, ""]
    irrelevant: Float[Array, ""]
    no_claim: Float[Array, ""]


def scrub(
    network: Network, params: Params, site: str, hypothesis: Hypothesis, examples: Counterfactuals
) -> Float[Array, "example output"]:
    """Compute the logits on the base inputs, scrubbed.

    Args:
        network: anything with `apply(params, inputs, tap)` and `sites`.
        params: its weights.
        site: where the hypothesis speaks.
        hypothesis: what it says.
        examples: base inputs; for each variable a source of the *same* value; and one more source, of any value, for what is
            irrelevant.

    Raises:
        InputError: if the network has no such site, masks overlap, or the hypothesis does not fit activation and examples.
    """
    return interchange(network, params, site, _as_alignment(hypothesis), examples)


def coverage(
    network: Network, params: Params, site: str, hypothesis: Hypothesis, inputs: Float[Array, "example input"]
) -> Coverage:
    """Tell for how much of the activation's variance over `inputs` the hypothesis speaks; the three shares sum to 1."""
    check_site(network, site)
    _check_overlap(hypothesis)
    activation = record(network, params, inputs)[1][site]
    rotated = (activation - activation.mean(axis=0)) @ hypothesis.alignment.rotation
    variance = jnp.mean(rotated**2, axis=0)
    total = jnp.where(variance.sum() > 0, variance.sum(), 1.0)
    claimed = (hypothesis.alignment.masks.sum(axis=0) * variance).sum() / total
    irrelevant = (hypothesis.irrelevant * variance).sum() / total
    return Coverage(claimed, irrelevant, 1 - claimed - irrelevant)


def check_comparable(first: Coverage, second: Coverage) -> None:
    """Raise InputError if two hypotheses leave unlike shares unspoken: the one that claims less breaks less.

    >>> check_comparable(Coverage(jnp.array(0.5), jnp.array(0.5), jnp.array(0.0)),
    ...                  Coverage(jnp.array(0.9), jnp.array(0.1), jnp.array(0.0)))
    """
    if abs(float(first.no_claim) - float(second.no_claim)) > _SAME_COVERAGE:
        raise InputError(
            f"the hypotheses leave {float(first.no_claim):.1%} and {float(second.no_claim):.1%} of the variance without a "
            "claim, and that which claims less breaks less: claim the rest as irrelevant, in both or in none"
        )


@partial(register_dataclass, data_fields=["hypothesis", "examples", "damage"], meta_fields=["network", "site"])
@dataclass(frozen=True)
class ScrubbingProbe:
    """The probe `(key, params) -> Divergence and Coverage as a dict` for one hypothesis; give it to `over_draws`.

    Attributes:
        examples: as for `scrub`; `base_labels` are what the loss gap is about.
    """

    network: Network
    site: str
    hypothesis: Hypothesis
    examples: Counterfactuals
    damage: Damage = NO_DAMAGE

    def __post_init__(self):
        """Look at the masks while they are numbers: within a compiled program they are not."""
        if isinstance(self.hypothesis, Hypothesis):
            _check_overlap(self.hypothesis)

    def __call__(self, key: Key[Array, ""], params: Params) -> dict[str, Float[Array, ""]]:
        """Measure at one weight vector."""
        network, other = damaged_runs(self.network, self.damage, key)
        patch = interchange_patch(other, params, self.site, _as_alignment(self.hypothesis), self.examples)
        scrubbed = network.apply(params, self.examples.base, replace(self.site, patch))
        found = divergence(network.apply(params, self.examples.base), scrubbed, self.examples.base_labels)
        covered = coverage(network, params, self.site, self.hypothesis, self.examples.base)
        return {**found._asdict(), **covered._asdict()}


def _as_alignment(hypothesis: Hypothesis) -> Alignment:
    """Treat what is irrelevant as one more variable."""
    _check_overlap(hypothesis)
    alignment, irrelevant = hypothesis
    return Alignment(alignment.rotation, jnp.concatenate([alignment.masks, irrelevant[None]]))


def _check_overlap(hypothesis: Hypothesis) -> None:
    masks, irrelevant = hypothesis.alignment.masks, hypothesis.irrelevant
    are_numbers = all(isinstance(x, jax.Array | np.ndarray) and not isinstance(x, Tracer) for x in (masks, irrelevant))
    if are_numbers and (masks.sum(axis=0) + irrelevant).max() > 1:
        raise InputError("a direction is claimed twice: masks of variables and of what is irrelevant must not overlap")


_SAME_COVERAGE = 0.02
"""Shares of variance without a claim that differ by less are called the same."""

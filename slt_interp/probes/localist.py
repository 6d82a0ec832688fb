"""Alignments to single neurons: every way to give so many neurons to each variable, and the nearest one to a rotation.

What a rotation finds and no choice of neurons does is distributed. With few neurons the choices can all be tried.

References:
    Geiger et al. (2023), arXiv:2303.02536, section 4 (localist alignments as a baseline of distributed ones).
"""

import functools
import itertools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from slt_interp.data import Counterfactuals
from slt_interp.errors import InputError
from slt_interp.probes.interchange import Alignment, block_masks, check_site, interchange
from slt_interp.taps import Network, record
from slt_interp.tree import Params

MAX_CHOICES = 100_000
"""More choices of neurons than this are not tried."""


@dataclass(frozen=True)
class LocalistFit:
    """What all choices of neurons give.

    Attributes:
        alignment: the best one.
        masks: all, (choice, variable, width).
        iia: interchange intervention accuracy of each, (choice,). The best of many choices is a little lucky: measure it again
            on other examples.
    """

    alignment: Alignment
    masks: Float[np.ndarray, "choice variable width"]
    iia: Float[np.ndarray, " choice"]


def localist_search(
    network: Network, params: Params, site: str, sizes: tuple[int, ...], examples: Counterfactuals
) -> LocalistFit:
    """Try every choice of `sizes[v]` neurons for each variable v at one site.

    Args:
        network: anything with `apply(params, inputs, tap)` and `sites`.
        params: its weights.
        site: where to intervene.
        sizes: for each variable, how many neurons it has.
        examples: base and source inputs.

    Raises:
        InputError: if there is no such site, the sizes do not fit in it, or there are more than `MAX_CHOICES` choices.
    """
    check_site(network, site)
    width = jax.eval_shape(lambda p, x: record(network, p, x)[1][site], params, examples.base).shape[-1]
    block_masks(sizes, width)  # says whether they fit
    count = math.prod(math.comb(width - sum(sizes[:v]), size) for v, size in enumerate(sizes))
    if count > MAX_CHOICES:
        raise InputError(
            f"there are {count:,} ways to choose {sizes} of {width} neurons, and at most {MAX_CHOICES:,} are tried: ask for "
            "fewer neurons, or fit a rotation (fit_alignment)"
        )
    masks = np.array(list(_choices(frozenset(range(width)), sizes, width)), np.float32)
    iia = np.asarray(_iia(network, params, site, jnp.asarray(masks), examples))
    best = int(iia.argmax())
    return LocalistFit(Alignment(jnp.eye(width), jnp.asarray(masks[best])), masks, iia)


def closest_localist(alignment: Alignment) -> Alignment:
    """Give each variable the neurons that its directions reach most into, as many as it has directions.

    The neurons are assigned so that the share of each variable's projection on its own ones, summed, is largest.

    >>> quarter = jnp.array([[0.0, 1.0], [-1.0, 0.0]])  # swaps two neurons
    >>> closest_localist(Alignment(quarter, block_masks((1, 1), 2))).masks.tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    from scipy.optimize import linear_sum_assignment

    rotation, masks = np.asarray(alignment.rotation, np.float64), np.asarray(alignment.masks)
    # Squared length of each neuron's axis within each variable's directions.
    within = masks @ (rotation**2).T
    owners = np.repeat(np.arange(len(masks)), masks.sum(axis=1).astype(int))
    rows, neurons = linear_sum_assignment(-within[owners])
    found = np.zeros_like(masks)
    found[owners[rows], neurons] = 1.0
    return Alignment(jnp.eye(len(rotation)), jnp.asarray(found))


def _choices(free: frozenset[int], sizes: tuple[int, ...], width: int):
    if not sizes:
        yield np.zeros((0, width))
        return
    for chosen in itertools.combinations(sorted(free), sizes[0]):
        row = np.zeros((1, width))
        row[0, list(chosen)] = 1.0
        for rest in _choices(free - set(chosen), sizes[1:], width):
            yield np.concatenate([row, rest])


@functools.partial(jax.jit, static_argnames=("network", "site"))
def _iia(
    network: Network, params: Params, site: str, masks: Float[Array, "choice variable width"], examples: Counterfactuals
) -> Float[Array, " choice"]:
    def one(masks: Float[Array, "variable width"]) -> Float[Array, ""]:
        logits = interchange(network, params, site, Alignment(jnp.eye(masks.shape[1]), masks), examples)
        return jnp.mean(logits.argmax(axis=-1) == examples.labels)

    return jax.lax.map(one, masks, batch_size=8)

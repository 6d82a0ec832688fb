"""Planted twins: illusions of known kind in a user's own network, to hold a candidate alignment against.

An interchange intervention can succeed through a path that the network never uses (Makelov, Lange and Nanda 2023,
arXiv:2311.17030). The twin has such a path on purpose: units u that copy the candidate's neurons and that nothing reads, and
units w that are constant on all inputs and that are read. A patch along u + w takes its values from u and acts through w: at
the trained weights it has the candidate's accuracy, and nothing in the loss holds it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from slt_interp.errors import InputError
from slt_interp.models.mlp import MLP
from slt_interp.probes.interchange import Alignment, check_site
from slt_interp.tree import Params


class Planted(NamedTuple):
    """A network of the same function with a twin in it.

    Attributes:
        network: wider at the candidate's site by two units for each neuron that the variable's directions reach into.
        params: its weights.
        genuine: the candidate's alignment in it.
        twin: the same with the planted variable's directions along u + w.
        layer: whose units the twin is made of.
        copies: of these, the units u.
    """

    network: MLP
    params: Params
    genuine: Alignment
    twin: Alignment
    layer: int
    copies: tuple[int, ...]


def plant(network: MLP, params: Params, site: str, alignment: Alignment, variable: int) -> Planted:
    """Plant the twin of one variable of a candidate alignment.

    Args:
        network: a multilayer perceptron whose nonlinearity leaves some positive number positive.
        params: its weights.
        site: where the candidate is.
        alignment: the candidate.
        variable: whose directions get a twin; those of the others stay.

    Raises:
        InputError: if there is no such hidden layer or variable.
    """
    check_site(network, site)
    if site not in network.hidden_sites:
        raise InputError(
            f"nothing can be planted at {site}, which no weights make: choose one of {', '.join(network.hidden_sites)}"
        )
    rotation, masks = np.asarray(alignment.rotation, np.float64), np.asarray(alignment.masks)
    if not 0 <= variable < len(masks):
        raise InputError(f"the alignment has variables 0 to {len(masks) - 1}, but variable is {variable}")
    layer = network.hidden_sites.index(site)
    layers = {i: {name: np.asarray(x) for name, x in part.items()} for i, part in params["layers"].items()}  # pyright: ignore
    kernel, bias, following = layers[layer]["kernel"], layers[layer]["bias"], layers[layer + 1]["kernel"]
    directions = rotation[:, masks[variable] > 0]
    neurons = np.flatnonzero(np.abs(directions).max(axis=1, initial=0.0) > REACHED)
    count, width = len(neurons), len(bias)
    constant = float(network.activation(jnp.ones(())))
    # A patch moves u and w each by half of what it moves the candidate's neurons.
    live = 2 * (directions @ directions.T @ following)[neurons]
    grown = {
        layer: {
            "kernel": np.concatenate([kernel, kernel[:, neurons], np.zeros((len(kernel), count))], axis=1),
            "bias": np.concatenate([bias, bias[neurons], np.ones(count)]),
        },
        layer + 1: {
            "kernel": np.concatenate([following, np.zeros((count, following.shape[1])), live]),
            "bias": layers[layer + 1]["bias"] - constant * live.sum(axis=0),
        },
    }
    widths = tuple(w + 2 * count * (i == layer + 1) for i, w in enumerate(network.widths))
    weights = {i: {name: jnp.asarray(x, jnp.float32) for name, x in part.items()} for i, part in (layers | grown).items()}
    new = width + 2 * count
    genuine = np.eye(new)
    genuine[:width, :width] = rotation
    wider = np.concatenate([masks, np.zeros((len(masks), 2 * count))], axis=1)
    along = np.concatenate([np.zeros((width, directions.shape[1])), directions[neurons], directions[neurons]]) / np.sqrt(2)
    is_other = (wider.sum(axis=0) > 0) & (wider[variable] == 0)
    claimed = np.concatenate([along, genuine[:, is_other]], axis=1)
    # Any basis of what is left completes a rotation.
    complete = np.linalg.svd(claimed, full_matrices=True)[0][:, claimed.shape[1] :]
    owners = np.concatenate([np.full(along.shape[1], variable), np.argmax(wider[:, is_other], axis=0)])
    twin = np.zeros_like(wider)
    twin[owners.astype(int), np.arange(len(owners))] = 1.0

    def aligned(rotation: Float[np.ndarray, "i i"], masks: Float[np.ndarray, "variable i"]) -> Alignment:
        return Alignment(jnp.asarray(rotation, jnp.float32), jnp.asarray(masks, jnp.float32))

    return Planted(
        MLP(widths, network.activation),
        {"layers": weights},
        aligned(genuine, wider),
        aligned(np.concatenate([claimed, complete], axis=1), twin),
        layer,
        tuple(range(width, width + count)),
    )


def released(key: Key[Array, ""], params: Params, layer: int, units: Sequence[int], localization: float, count: int) -> Params:
    """Draw the incoming weights and biases of units that nothing reads from N(w*, 1 / localization), and leave all else.

    An approximation of the tempered posterior at large nbeta: the outgoing weights of these units stay at 0, and no other
    weights move together. Drawn along, outgoing weights favor copies that say nothing: the posterior keeps less of a twin.

    Returns:
        Weights with leading axes (count, 1), those of (chain, draw).

    >>> params = {"layers": {0: {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}}}
    >>> released(jax.random.key(0), params, 0, (1,), 4.0, 5)["layers"][0]["kernel"].shape
    (5, 1, 2, 3)
    """
    part = params["layers"][layer]  # pyright: ignore[reportIndexIssue]
    rows, where = len(part["kernel"]) + 1, jnp.array(units)
    normal = jax.random.normal(key, (count, 1, rows, len(units))) / jnp.sqrt(localization)
    repeated = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, 1, *x.shape)), params)
    moved = {
        "kernel": repeated["layers"][layer]["kernel"].at[..., where].add(normal[:, :, 1:]),
        "bias": repeated["layers"][layer]["bias"].at[..., where].add(normal[:, :, 0]),
    }
    return {**repeated, "layers": {**repeated["layers"], layer: moved}}


REACHED = 1e-6
"""Neurons that directions reach into by less have no twin."""

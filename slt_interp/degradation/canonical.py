"""Undo symmetries of draws: what drifts along an orbit of equal networks breaks a frozen alignment and changes nothing else.

Units of a hidden layer may be permuted, and where the nonlinearity is positively homogeneous (ReLU) each may be scaled by c > 0
if what follows is divided by c. Both are exact symmetries: the network computes the same function after as before.

References:
    Ainsworth, Hayase and Srinivasa (2023), Git re-basin: merging models modulo permutation symmetries, arXiv:2209.04836.
"""

import numpy as np
from jaxtyping import Float

from slt_interp.errors import InputError
from slt_interp.tree import Params

_Array = np.ndarray


def canonicalize(params: Params, reference: Params, *, is_homogeneous: bool = True) -> Params:
    """Move a multilayer perceptron along its symmetries towards a reference, without changing its function.

    Layer by layer, from the inputs: each unit is scaled to the size of the reference's unit that it stands for, and units are
    permuted so that their incoming weights and biases match the reference's best, as directions if scales are free. Networks
    that differ by symmetries only end at distance 0.

    Args:
        params: {"layers": {i: {"kernel": (in, out), "bias": (out,)}}}, as `MLP.init` makes them, without leading axes.
        reference: weights of the same shapes.
        is_homogeneous: whether units may be scaled: for ReLU, not for tanh.

    Returns:
        New weights, numpy arrays of the same structure.

    Raises:
        InputError: if the weights are of another structure, or shapes differ.

    >>> layers = lambda a, b: {"layers": {0: {"kernel": a, "bias": np.zeros(2)}, 1: {"kernel": b, "bias": np.zeros(1)}}}
    >>> reference = layers(np.eye(2), np.ones((2, 1)))
    >>> swapped = layers(np.array([[0.0, 4.0], [2.0, 0.0]]), np.array([[0.5], [0.25]]))
    >>> canonicalize(swapped, reference)["layers"][0]["kernel"].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    layers, wanted = _layers(params), _layers(reference)
    if [k.shape for k, _ in layers] != [k.shape for k, _ in wanted]:
        raise InputError(
            f"params has kernels of shapes {[k.shape for k, _ in layers]} and the reference {[k.shape for k, _ in wanted]}: "
            "give weights of one network"
        )
    for i in range(len(layers) - 1):
        (kernel, bias), (following, last) = layers[i], layers[i + 1]
        own, other = (np.concatenate([k, b[None]]) for k, b in ((kernel, bias), wanted[i]))
        order = _match(own, other, is_homogeneous=is_homogeneous)
        kernel, bias, following, own = kernel[:, order], bias[order], following[order], own[:, order]
        if is_homogeneous:
            sizes, target = np.linalg.norm(own, axis=0), np.linalg.norm(other, axis=0)
            # A unit without incoming weights has no size to set.
            factor = np.where((sizes > 0) & (target > 0), target / np.where(sizes > 0, sizes, 1.0), 1.0)
            kernel, bias, following = kernel * factor, bias * factor, following / factor[:, None]
        layers[i], layers[i + 1] = (kernel, bias), (following, last)
    return {"layers": {i: {"kernel": kernel, "bias": bias} for i, (kernel, bias) in enumerate(layers)}}


def _match(own: Float[_Array, "in unit"], other: Float[_Array, "in unit"], *, is_homogeneous: bool) -> Float[_Array, " unit"]:
    from scipy.optimize import linear_sum_assignment

    if is_homogeneous:
        own, other = (x / np.maximum(np.linalg.norm(x, axis=0), 1e-300) for x in (own, other))
    distance = np.sum(other**2, axis=0)[:, None] + np.sum(own**2, axis=0) - 2 * other.T @ own
    return linear_sum_assignment(distance)[1]


def _layers(params: Params) -> list[tuple[_Array, _Array]]:
    try:
        parts = [params["layers"][i] for i in sorted(params["layers"])]  # pyright: ignore[reportIndexIssue]
        return [(np.asarray(part["kernel"], np.float64), np.asarray(part["bias"], np.float64)) for part in parts]
    except (TypeError, KeyError) as error:
        raise InputError(
            "canonicalize knows multilayer perceptrons only, as MLP.init makes them: {'layers': {i: {'kernel', 'bias'}}}"
        ) from error

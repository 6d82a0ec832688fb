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


def canonicalize(params: Params, reference: Params, *, is_homogeneous: bool) -> Params:
    """Move a multilayer perceptron along its symmetries towards a reference, without changing its function.

    Units of each hidden layer are permuted so that incoming and outgoing weights match the reference's best, layer after layer
    until nothing changes; where scales are free they are taken out before, and set to the reference's after. Networks that
    differ by symmetries only, and have no two units alike, end at distance 0.

    Args:
        params: {"layers": {i: {"kernel": (in, out), "bias": (out,)}}}, as `MLP.init` makes them, without leading axes.
        reference: weights of the same shapes.
        is_homogeneous: whether units may be scaled: True for ReLU only, or the function changes.

    Returns:
        New weights of the same structure and precision, numpy arrays.

    Raises:
        InputError: if the weights are of another structure, or shapes differ.

    >>> layers = lambda a, b: {"layers": {0: {"kernel": a, "bias": np.zeros(2)}, 1: {"kernel": b, "bias": np.zeros(1)}}}
    >>> reference = layers(np.eye(2), np.ones((2, 1)))
    >>> swapped = layers(np.array([[0.0, 4.0], [2.0, 0.0]]), np.array([[0.5], [0.25]]))
    >>> canonicalize(swapped, reference, is_homogeneous=True)["layers"][0]["kernel"].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    layers, wanted = _layers(params), _layers(reference)
    if [k.shape for k, _ in layers] != [k.shape for k, _ in wanted]:
        raise InputError(
            f"params has kernels of shapes {[k.shape for k, _ in layers]} and the reference {[k.shape for k, _ in wanted]}: "
            "give weights of one network"
        )
    orders = _orders(_unscaled(layers), _unscaled(wanted)) if is_homogeneous else _orders(layers, wanted)
    layers = [
        (kernel[before][:, after], bias[after])
        for (kernel, bias), before, after in zip(layers, orders[:-1], orders[1:], strict=True)
    ]
    if is_homogeneous:
        for i in range(len(layers) - 1):
            own, target = _sizes(layers[i]), _sizes(wanted[i])
            layers = _scaled(layers, i, np.where((own > 0) & (target > 0), target / np.where(own > 0, own, 1.0), 1.0))
    names = sorted(params["layers"])  # pyright: ignore[reportIndexIssue]
    dtype = np.asarray(params["layers"][names[0]]["kernel"]).dtype  # pyright: ignore[reportIndexIssue]
    return {
        "layers": {
            name: {"kernel": kernel.astype(dtype), "bias": bias.astype(dtype)}
            for name, (kernel, bias) in zip(names, layers, strict=True)
        }
    }


_Layers = list[tuple[_Array, _Array]]


def _unscaled(layers: _Layers) -> _Layers:
    """Give each hidden unit incoming weights and bias of length 1; one without any has no length to give."""
    for i in range(len(layers) - 1):
        size = _sizes(layers[i])
        layers = _scaled(layers, i, 1 / np.where(size > 0, size, 1.0))
    return layers


def _sizes(layer: tuple[_Array, _Array]) -> Float[_Array, " unit"]:
    kernel, bias = layer
    return np.sqrt(np.sum(kernel**2, axis=0) + bias**2)


def _scaled(layers: _Layers, i: int, factor: Float[_Array, " unit"]) -> _Layers:
    (kernel, bias), (following, last) = layers[i], layers[i + 1]
    return [*layers[:i], (kernel * factor, bias * factor), (following / factor[:, None], last), *layers[i + 2 :]]


def _orders(own: _Layers, other: _Layers) -> list[_Array]:
    """Find for every layer, inputs and outputs included, which own unit stands at each place."""
    from scipy.optimize import linear_sum_assignment

    orders = [np.arange(len(own[0][0])), *(np.arange(len(bias)) for _, bias in own)]
    for sweep in range(_MAX_SWEEPS):
        moved = False
        for i in range(len(own) - 1):
            (kernel, bias), (following, _) = own[i], own[i + 1]
            (target, target_bias), (target_following, _) = other[i], other[i + 1]
            likeness = target.T @ kernel[orders[i]] + np.outer(target_bias, bias)
            if sweep:
                # What follows is in order only after the first sweep.
                likeness = likeness + target_following @ following[:, orders[i + 2]].T
            order = linear_sum_assignment(-likeness)[1]
            moved |= not np.array_equal(order, orders[i + 1])
            orders[i + 1] = order
        if sweep and not moved:
            break
    return orders


def _layers(params: Params) -> _Layers:
    try:
        parts = [params["layers"][i] for i in sorted(params["layers"])]  # pyright: ignore[reportIndexIssue]
        return [(np.asarray(part["kernel"], np.float64), np.asarray(part["bias"], np.float64)) for part in parts]
    except (TypeError, KeyError) as error:
        raise InputError(
            "canonicalize knows multilayer perceptrons only, as MLP.init makes them: {'layers': {i: {'kernel', 'bias'}}}"
        ) from error


_MAX_SWEEPS = 100

"""Deep linear networks: learning coefficients by Aoyagi's formula, and at other points of the same fibre.

K(W) = 1/2 |W_L ... W_1 - M|^2 is the population loss for inputs N(0, I). All W with the same product have the same loss; the
learning coefficient differs along that fibre, and Aoyagi's is its minimum, reached at the deepest point.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from slt_interp.analytic.integrals import geometric_panels, panel_nodes, product_moments
from slt_interp.analytic.problem import AnalyticProblem
from slt_interp.errors import InputError


def deep_linear_rlct(widths: Sequence[int], rank: int) -> tuple[float, int]:
    """Compute learning coefficient and multiplicity of a linear network with a product of the given rank.

    The minimum over all weights with that product.

    References:
        Aoyagi (2024), Consideration on the learning efficiency of multiple-layered neural networks with linear units,
        Neural Networks 172:106132, theorem 1.

    >>> deep_linear_rlct([10, 10, 10], rank=1)
    (40.0, 2)
    """
    _check(widths, rank)
    excess = sorted(width - rank for width in widths)
    sums = {ell: sum(excess[: ell + 1]) for ell in range(1, len(widths))}
    chosen_ells = (
        ell for ell, s in sums.items() if s >= ell * excess[ell] and (ell + 1 == len(widths) or s < ell * excess[ell + 1])
    )
    ell = next(chosen_ells)
    s, chosen = sums[ell], excess[: ell + 1]
    a = s - (-(-s // ell) - 1) * ell
    pairs = (s**2 - sum(d**2 for d in chosen)) // 2
    regular = rank * (widths[0] + widths[-1]) - rank**2
    # In whole numbers up to the last division: (regular + pairs) / 2 + (a (ell - a) - (ell - 1) s^2) / (4 ell).
    return (2 * ell * (regular + pairs) + a * (ell - a) - (ell - 1) * s**2) / (4 * ell), a * (ell - a) + 1


def deep_linear_local_rlct(widths: Sequence[int], rank: int, first_rank: int, second_rank: int) -> tuple[float, int]:
    """Compute learning coefficient and multiplicity of a two-layer network at a point, from the ranks of W_1 and W_2.

    Block elimination takes the invertible parts out and leaves a network with product 0 at its deepest point.

    >>> deep_linear_local_rlct([10, 10, 10], rank=1, first_rank=10, second_rank=1)
    (50.0, 1)
    """
    _check(widths, rank)
    inputs, hidden, outputs = widths
    left = hidden - first_rank - second_rank + rank
    if left < 0 or not rank <= first_rank <= min(inputs, hidden) or not rank <= second_rank <= min(hidden, outputs):
        raise InputError(f"no factors of ranks {first_rank} and {second_rank} have a product of rank {rank} in {list(widths)}")
    rest, multiplicity = deep_linear_rlct([inputs - first_rank, left, outputs - second_rank], 0)
    return (outputs * first_rank + (inputs - first_rank) * second_rank) / 2 + rest, multiplicity


def deep_linear(
    key: Key[Array, ""],
    widths: Sequence[int],
    rank: int,
    *,
    point: Literal["deepest", "smooth"] = "deepest",
    num_examples: int | None = None,
) -> AnalyticProblem:
    """Draw a linear network with a product of the given rank, at a point of its fibre, in random bases.

    Args:
        key: for the bases, and the data.
        widths: inputs, hidden layers, outputs.
        rank: of the product M = W_L ... W_1.
        point: "deepest": every layer is diag(I, 0), of rank `rank`, up to rotations; "smooth": all layers but the last have the
            largest rank that their widths allow, and there the fibre is a manifold.
        num_examples: inputs drawn from N(0, I), with outputs M x; None for the population loss.

    Returns:
        A problem whose weights are a tuple of matrices (out, in). Its finite-nbeta energy is known at the deepest point for
        rank 0 where all widths are 1, or where there are two layers of which one has two outputs.
    """
    _check(widths, rank)
    *basis_keys, data_key = jax.random.split(key, len(widths) + 1)
    bases = [_rotation(k, width) for k, width in zip(basis_keys, widths, strict=True)]
    if point == "deepest":
        ranks = [rank] * (len(widths) - 1)
    elif point == "smooth":
        ranks = [min(a, b) for a, b in itertools.pairwise(widths[:-1])] + [rank]
    else:
        raise InputError(f'point must be "deepest" or "smooth", but is {point!r}')
    center = [
        np.linalg.multi_dot([bases[i + 1], np.eye(widths[i + 1], r) @ np.eye(r, widths[i]), bases[i].T])
        for i, r in enumerate(ranks)
    ]
    if point == "smooth":
        # The last layer must not care for the basis in which the others are diagonal.
        center[-1] = center[-1] @ _rotation(jax.random.fold_in(basis_keys[-1], 1), widths[-2])
    product = _product(center)
    if np.linalg.matrix_rank(product) != rank:
        raise InputError(f"rank {rank} cannot be reached at a smooth point of {list(widths)}")
    global_rlct, global_multiplicity = deep_linear_rlct(widths, rank)
    rlct, multiplicity = (global_rlct, global_multiplicity) if point == "deepest" else (_codimension(center) / 2, 1)
    params = tuple(jnp.asarray(w, jnp.result_type(float)) for w in center)
    teacher = jnp.asarray(product, jnp.result_type(float))
    data = None
    if num_examples is not None:
        x = jax.random.normal(data_key, (num_examples, widths[0]))
        data = {"x": x, "y": x @ teacher.T}
    return AnalyticProblem(
        name=f"deep linear {'-'.join(map(str, widths))} of rank {rank}, {point} point"
        + ("" if num_examples is None else f", {num_examples} examples"),
        loss_fn=_Population(teacher) if data is None else _sampled,
        center=params,
        source="Aoyagi (2024), Neural Networks 172:106132" if point == "deepest" else "half the codimension of a smooth fibre",
        rlct=rlct,
        multiplicity=multiplicity,
        global_rlct=global_rlct,
        global_multiplicity=global_multiplicity,
        data=data,
        energy=_energy(tuple(widths)) if rank == 0 and point == "deepest" and data is None else None,
    )


def _energy(widths: tuple[int, ...]) -> Any:
    if set(widths) == {1}:
        ones = (1,) * (len(widths) - 1)
        return lambda nbeta, gamma: product_moments(ones, [2] * len(ones), 0.5, nbeta, gamma)[1]
    if len(widths) == 3:
        inputs, hidden, outputs = widths
        for side, other in ((outputs, inputs), (inputs, outputs)):
            if min(side, hidden) == 2:
                return partial(_two_singular_values, larger=max(side, hidden), columns=other)
    return None


def _two_singular_values(nbeta: float, localization: float, larger: int, columns: int) -> float:
    """E[nbeta |W2 W1|^2 / 2] where W2 has two singular values u < v, and W1 as many columns.

    Given W2, the columns of W1 are Gaussian. u, v have the density (v^2 - u^2) (u v)^(larger - 2) exp(-gamma (u^2 + v^2) / 2).
    """
    log_v = np.arange(-60.0, np.log((60 + 2 * larger) / localization), 0.1) / 2
    # The kink at u = v is met by integrating u < v only, u = t v.
    t, log_lengths = panel_nodes(geometric_panels([0.0], 0.0, 1.0, 1e-9))
    v, t = np.exp(log_v)[:, None], t[None]
    u = t * v
    log_density = (
        np.log(v**2 - u**2)
        + (larger - 2) * np.log(u * v)
        - localization * (u**2 + v**2) / 2
        + 2 * np.log(v)
        - columns / 2 * (np.log(localization + nbeta * u**2) + np.log(localization + nbeta * v**2))
        + log_lengths
    )
    density = np.exp(log_density - log_density.max())
    energy = columns / 2 * nbeta * (u**2 / (localization + nbeta * u**2) + v**2 / (localization + nbeta * v**2))
    return float(np.sum(density * energy) / np.sum(density))


class _Population:
    """1/2 |W_L ... W_1 - M|^2."""

    def __init__(self, teacher: Float[Array, "output input"]):
        self.teacher = teacher

    def __call__(self, params: tuple[Array, ...], batch: None) -> Float[Array, ""]:
        return 0.5 * jnp.sum((_product(params) - self.teacher.astype(params[0].dtype)) ** 2)


def _sampled(params: tuple[Array, ...], batch: dict[str, Array]) -> Float[Array, ""]:
    outputs = batch["x"]
    for weights in params:
        outputs = outputs @ weights.T
    return 0.5 * jnp.mean(jnp.sum((outputs - batch["y"]) ** 2, axis=1))


def _product(params: Sequence[Any]) -> Any:
    total = params[0]
    for weights in params[1:]:
        total = weights @ total
    return total


def _codimension(center: Sequence[np.ndarray]) -> int:
    """Rank of the Jacobian of the product: sum_l a_l (b_l - b_(l-1)), a and b the ranks of what comes before and after layer l.

    a_l = rank(W_(l-1) ... W_1), b_l = rank(W_L ... W_(l+1)), and b_0 = 0: the rank of the whole product counts with l = 1.
    """
    layers = len(center)
    before = [center[0].shape[1]] + [np.linalg.matrix_rank(_product(center[:i])) for i in range(1, layers)]
    after = [np.linalg.matrix_rank(_product(center[i:])) for i in range(1, layers)] + [center[-1].shape[0]]
    return int(sum(a * (b - c) for a, b, c in zip(before, after, [0, *after[:-1]], strict=True)))


def _rotation(key: Key[Array, ""], width: int) -> np.ndarray:
    """Draw an orthogonal matrix, in float64: ranks are counted."""
    q, r = np.linalg.qr(np.asarray(jax.random.normal(key, (width, width)), np.float64))
    return q * np.sign(np.diagonal(r))


def _check(widths: Sequence[int], rank: int) -> None:
    if len(widths) < 3 or not 0 <= rank <= min(widths):
        raise InputError(
            f"a deep linear network needs three widths or more and a rank up to the smallest, not {widths}, {rank}"
        )

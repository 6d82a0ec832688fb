"""Sums of products of powers on separate coordinates: quadratics, monomials, normal crossings, singular blocks.

K = sum_b scale_b prod_i |u_bi|^(2 k_bi), with all u_bi separate parts of the weights. Energies and log partition functions
add over blocks b, and so do learning coefficients min_i dim(u_bi) / (2 k_bi); multiplicities minus 1 add, too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from slt_interp.analytic.integrals import log_mass, product_log_volume, product_moments
from slt_interp.analytic.problem import AnalyticProblem
from slt_interp.bases import Ball, Box, Gaussian
from slt_interp.errors import InputError


class Product(NamedTuple):
    """One block: scale prod_i |u_i|^(2 exponents_i), u_i in R^dims_i."""

    dims: tuple[int, ...]
    exponents: tuple[int, ...]
    scale: float = 1.0


def quadratic(
    curvatures: Sequence[float],
    *,
    key: Key[Array, ""] | None = None,
    base: Box | Ball | None = None,
    name: str | None = None,
) -> AnalyticProblem:
    """Make 1/2 sum_i h_i w_i^2, with any number of zeros among the curvatures; `key` rotates it, `base` is for volumes.

    >>> problem = quadratic([4.0, 1.0, 0.0])
    >>> problem.rlct, round(problem.energy(100.0, 1.0), 4)
    (1.0, 0.9938)
    """
    blocks = [Product((1,), (1,), h / 2) for h in curvatures]
    return sum_of_products(blocks, key=key, base=base, name=name or f"quadratic in {len(blocks)} dimensions")


def monomial(exponents: Sequence[int], *, in_box: bool = False, name: str | None = None) -> AnalyticProblem:
    """Make prod_i w_i^(2 k_i), a normal crossing; volumes under N(0, I), or uniform on [-1, 1]^d when `in_box`.

    >>> problem = monomial([1, 1, 1])
    >>> problem.rlct, problem.multiplicity
    (0.5, 3)
    """
    exponents = tuple(exponents)
    name = name or "monomial " + " ".join(f"w{i + 1}^{2 * k}" for i, k in enumerate(exponents))
    base = Box(-1.0, 1.0) if in_box else None
    return sum_of_products([Product((1,) * len(exponents), exponents)], base=base, name=name)


def power_sum(exponents: Sequence[int], *, in_box: bool = False, name: str | None = None) -> AnalyticProblem:
    """Make the quasi-homogeneous sum_i w_i^(2 k_i); volumes uniform on [-1, 1]^d for thresholds up to 1 when `in_box`.

    >>> round(power_sum([1, 2], in_box=True).log_volume(0.01), 4)
    -3.5885
    """
    exponents = tuple(exponents)
    name = name or "sum of " + ", ".join(f"w{i + 1}^{2 * k}" for i, k in enumerate(exponents))
    return sum_of_products([Product((1,), (k,)) for k in exponents], base=Box(-1.0, 1.0) if in_box else None, name=name)


def sum_of_products(
    blocks: Sequence[Product],
    *,
    key: Key[Array, ""] | None = None,
    base: Box | Ball | None = None,
    name: str = "sum of products",
) -> AnalyticProblem:
    """Make K = sum_b scale_b prod_i |u_bi|^(2 k_bi) on separate coordinates, rotated at random when `key` is given.

    Partition functions are those under N(0, I), which a rotation does not change. So are volumes without a `base`, known for
    one block, and for any number of blocks c w^2, c w^4 and c (x y)^2. In `Box(-a, a)` they are known where at most one block
    has several coordinates, in `Ball(0, r)` for c w^2 in every direction; then for thresholds whose sublevel set of the
    single coordinates lies inside, and NaN above.

    >>> crossing = sum_of_products([Product((1, 1), (1, 1))], base=Box(-2.0, 2.0), name="crossing lines")
    >>> round(crossing.log_volume(0.01), 4)
    -2.1437
    """
    blocks = tuple(Product(tuple(b.dims), tuple(b.exponents), float(b.scale)) for b in blocks)
    for block in blocks:
        if len(block.dims) != len(block.exponents) or min(*block.dims, *block.exponents, 1) < 1 or block.scale < 0:
            raise InputError(f"a block needs as many positive dims as exponents, and no negative scale, but is {block}")
    dimension = sum(sum(block.dims) for block in blocks)
    loss_fn: Any = _Products(blocks)
    if key is not None:
        loss_fn = _Rotated(loss_fn, random_rotation(key, dimension))
    active = [block for block in blocks if block.scale > 0]
    ratios = [[d / (2 * k) for d, k in zip(b.dims, b.exponents, strict=True)] for b in active]

    def moments(nbeta: float, localization: float) -> np.ndarray:
        # Equal blocks are many in high dimension: each kind is integrated once.
        kinds = {block: active.count(block) for block in set(active)}
        each = [
            count * np.array(product_moments(b.dims, [2 * k for k in b.exponents], b.scale, nbeta, localization))
            for b, count in kinds.items()
        ]
        return np.sum(each, axis=0) if each else np.zeros(2)

    log_volume = None
    if base is not None:
        log_volume = _bounded_log_volume(blocks, base, key is not None)
    elif len(active) == 1:
        (block,) = active
        log_volume = partial(product_log_volume, block.dims, [2 * k for k in block.exponents], block.scale)
    elif all((block.dims, block.exponents) in _TRANSFORMED for block in active):
        log_volume = partial(log_mass, partial(_log_transform, tuple((b, active.count(b)) for b in set(active))))
    return AnalyticProblem(
        name=name,
        loss_fn=loss_fn,
        center=jnp.zeros(dimension),
        source="direct integration; Watanabe (2009), Algebraic Geometry and Statistical Learning Theory, chapter 4",
        rlct=sum(min(r) for r in ratios),
        multiplicity=1 + sum(r.count(min(r)) - 1 for r in ratios),
        energy=lambda nbeta, localization: float(moments(nbeta, localization)[1]),
        base=base or Gaussian(0.0, 1.0),
        log_volume=log_volume,
        log_partition=None if base else lambda nbeta: float(moments(nbeta, 1.0)[0]),
    )


def random_rotation(key: Key[Array, ""], dimension: int) -> Float[Array, "dimension dimension"]:
    """Draw an orthogonal matrix uniformly."""
    q, r = jnp.linalg.qr(jax.random.normal(key, (dimension, dimension)))
    return q * jnp.sign(jnp.diagonal(r))


@dataclass(frozen=True)
class _Products:
    blocks: tuple[Product, ...]

    def __call__(self, w: Float[Array, " dimension"], batch: Any) -> Float[Array, ""]:
        # Blocks of one shape are computed together: thousands of them would be a program of thousands of lines.
        shapes: dict[tuple, list[tuple[int, float]]] = {}
        start = 0
        for block in self.blocks:
            shapes.setdefault((block.dims, block.exponents), []).append((start, block.scale))
            start += sum(block.dims)
        total = jnp.zeros((), w.dtype)
        for (dims, exponents), found in shapes.items():
            starts, scales = np.array([s for s, _ in found]), np.array([c for _, c in found])
            product, offset = jnp.asarray(scales, w.dtype), 0
            for dim, exponent in zip(dims, exponents, strict=True):
                part = w[starts[:, None] + offset + np.arange(dim)]
                product = product * jnp.sum(part**2, axis=1) ** exponent
                offset += dim
            total = total + jnp.sum(product)
        return total


@dataclass(frozen=True, eq=False)
class _Rotated:
    loss_fn: _Products
    rotation: Float[Array, "dimension dimension"]

    def __call__(self, w: Float[Array, " dimension"], batch: Any) -> Float[Array, ""]:
        return self.loss_fn(self.rotation.astype(w.dtype) @ w, batch)


_TRANSFORMED = ((1,), (1,)), ((1,), (2,)), ((1, 1), (1, 1))


def _log_transform(blocks: tuple[tuple[Product, int], ...], s: complex) -> complex:
    """Log E[exp(-s K)] under N(0, I) for blocks c w^2, c w^4 and c (x y)^2, continued to complex s."""
    from scipy.special import kve

    total = 0j
    for block, count in blocks:
        if block.dims == (1, 1):
            z = 1 / (8 * block.scale * complex(s))
            total += count * (np.log(kve(0, z)) + 0.5 * np.log(2 * z / np.pi))
        elif block.exponents == (2,):
            z = 1 / (32 * block.scale * complex(s))
            total += count * (np.log(kve(0.25, z)) + 0.5 * np.log(2 * z / np.pi))
        else:
            total += -0.5 * count * np.log(1 + 2 * block.scale * s)
    return total


def _bounded_log_volume(blocks: tuple[Product, ...], base: Box | Ball, is_rotated: bool) -> Callable[[float], float] | None:
    size = np.asarray(base.high if isinstance(base, Box) else base.radius)
    opposite = -np.asarray(base.low) if isinstance(base, Box) else size
    if size.ndim or size <= 0 or opposite != size or (isinstance(base, Ball) and np.any(base.center)):
        raise InputError(f"volumes are known in Box(-a, a) and Ball(0, r) with numbers a and r, but base is {base}")
    if isinstance(base, Ball):
        if not all((block.dims, block.exponents) == ((1,), (1,)) and block.scale > 0 for block in blocks):
            raise InputError(f"volumes in a ball are known for blocks c w^2 with c > 0 alone, but the blocks are {blocks}")
        return partial(_ball_log_volume, np.array([block.scale for block in blocks]), float(size))
    if is_rotated or any(dim > 1 for block in blocks for dim in block.dims):
        raise InputError("volumes in a box are known along its axes, for dims of 1: leave out the key, or the base")
    active = [block for block in blocks if block.scale > 0]
    # One coordinate alone is the simplest crossing: known for every threshold.
    crossings = [block for block in active if len(active) == 1 or len(block.dims) > 1]
    singles = [block for block in active if block not in crossings]
    return partial(_box_log_volume, singles, crossings, float(size)) if len(crossings) < 2 else None


def _ball_log_volume(scales: Float[np.ndarray, " i"], radius: float, threshold: float) -> float:
    if threshold > scales.min() * radius**2:
        return np.nan
    return float(0.5 * np.sum(np.log(threshold / scales)) - len(scales) * np.log(radius))


def _box_log_volume(singles: list[Product], crossings: list[Product], half_width: float, threshold: float) -> float:
    """Log P(sum_i c_i |w_i|^(2 k_i) + crossing <= threshold) for independent w_i, uniform on [-a, a].

    The sum over single coordinates T has P(T <= t) = C t^s with s = sum_i 1 / (2 k_i), as long as no w_i reaches a (Dirichlet's
    integral); for the crossing see `_log_crossing`. Together C threshold^s E P(crossing <= threshold (1 - V^(1/s))), V uniform.
    """
    from scipy.integrate import quad
    from scipy.special import gammaln

    inverse = np.array([1 / (2 * b.exponents[0]) for b in singles])
    logs = np.log(threshold) - np.array([np.log(b.scale * half_width ** (2 * b.exponents[0])) for b in singles])
    if np.any(logs > 0):
        return np.nan
    total = inverse.sum()
    log_power = float(inverse @ logs + gammaln(1 + inverse).sum() - gammaln(1 + total))
    if not crossings:
        return log_power
    inside = partial(_log_crossing, crossings[0], half_width)
    if not singles:
        return inside(threshold)
    mean, _ = quad(lambda v: np.exp(inside(threshold * (1 - v ** (1 / total)))), 0, 1, epsabs=0, epsrel=1e-9, limit=200)
    return float(log_power + np.log(mean))


def _log_crossing(block: Product, half_width: float, threshold: float) -> float:
    """Log P(c prod_i |w_i|^(2 k_i) <= threshold): -log of the product of |w_i / a|^(2 k_i) has a phase-type law.

    It is a sum of exponential variables with rates 1 / (2 k_i).
    """
    from scipy.linalg import expm

    rates = 1 / (2 * np.asarray(block.exponents, np.float64))
    generator = np.diag(-rates) + np.diag(rates[:-1], 1)
    log_share = np.log(threshold / block.scale) - 2 * sum(block.exponents) * np.log(half_width)
    return float(np.log(expm(-min(0.0, log_share) * generator)[0].sum()))

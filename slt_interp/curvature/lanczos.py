"""Lanczos with full reorthogonalization: products on the device, Krylov spaces and their algebra on the host.

Not matfree's `tridiag_sym`, which goes on after a Krylov space is exhausted (a low-rank Hessian, or none) and returns noise as
large as the dimension as eigenvalues, and not its stochastic quadrature, which gives neither residuals nor a bracket.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

Product = Callable[[Float[np.ndarray, " i"]], Float[np.ndarray, " i"]]
"""Multiply a symmetric matrix by a vector."""


class Krylov(NamedTuple):
    """The matrix in a Krylov space, tridiagonal, and the norm of what is left over."""

    tridiagonal: Float[np.ndarray, "step step"]
    left_over: float
    rounding: float
    """Of a product; no residual is known better."""

    def quadrature(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Give Ritz values, their weights (which sum to 1) and residuals |A v - theta v|: Gauss's rule for start.f(A).start."""
        values, vectors = np.linalg.eigh(self.tridiagonal)
        return values, vectors[0] ** 2, np.abs(max(self.left_over, self.rounding) * vectors[-1])

    def lower_quadrature(self) -> tuple[np.ndarray, np.ndarray]:
        """Give values and weights of Radau's rule with a node at 0, or just below a smallest Ritz value that is negative.

        For a positive matrix and f(h) = h / (h + c) or log(1 + h / c), whose even derivatives are negative, Gauss's rule is
        too large and this one too small (Golub and Meurant 2010, Matrices, Moments and Quadrature, theorem 6.4).
        """
        values, weights, _ = self.quadrature()
        node = min(0.0, values[0] - np.finfo(np.float32).eps * np.abs(values).max())
        size = len(values)
        shifted = self.tridiagonal - node * np.eye(size)
        if not self.left_over > 0 or np.linalg.eigvalsh(shifted)[0] <= 0:
            return values, weights
        extended = np.zeros((size + 1, size + 1))
        extended[:size, :size] = self.tridiagonal
        extended[size, size - 1] = extended[size - 1, size] = self.left_over
        extended[size, size] = node + self.left_over**2 * np.linalg.inv(shifted)[-1, -1]
        values, vectors = np.linalg.eigh(extended)
        return values, vectors[0] ** 2


class Eigenpairs(NamedTuple):
    """(pair,) eigenvalues by falling size, (pair, i) unit vectors, and (pair,) residuals: so far at most is an eigenvalue."""

    values: Float[np.ndarray, " pair"]
    vectors: Float[np.ndarray, "pair i"]
    residuals: Float[np.ndarray, " pair"]


def krylov(
    product: Product,
    start: Float[np.ndarray, " i"],
    num_products: int,
    without: Float[np.ndarray, "pair i"],
    dtype: type = np.float64,
) -> tuple[Krylov, Float[np.ndarray, "step i"]]:
    """Run Lanczos from `start`, orthogonal to the rows of `without`, until nothing is left or products run out.

    The basis has the precision `dtype`. In float32 what is left of large eigenvalues drowns those of 1e-6 of them.

    Returns:
        The matrix in the space, and the space's orthonormal basis.
    """
    basis = np.zeros((num_products, len(start)), dtype)
    start = _orthogonal(start, without)
    basis[0] = start / np.linalg.norm(start)
    diagonal, off_diagonal, scale = [], [], 0.0
    while True:
        step = len(diagonal)
        image = np.asarray(product(basis[step]), np.float64)
        scale = max(scale, float(np.linalg.norm(image)))
        diagonal.append(float(image @ basis[step]))
        for _ in range(2):
            image = _orthogonal(_orthogonal(image, without), basis[: step + 1])
        left_over = float(np.linalg.norm(image))
        # Below the rounding of a float32 product nothing new is left; NaN ends it too.
        rounding = float(_ROUNDINGS * np.finfo(np.float32).eps * scale)
        if not left_over > rounding or step + 1 == num_products:
            tridiagonal = np.diag(diagonal) + np.diag(off_diagonal, 1) + np.diag(off_diagonal, -1)
            return Krylov(tridiagonal, left_over, rounding), basis[: step + 1]
        basis[step + 1] = image / left_over
        off_diagonal.append(left_over)


def leading_eigenpairs(
    rng: np.random.Generator, product: Product, size: int, count: int, *, num_products: int, max_products: int
) -> Eigenpairs:
    """Find up to `count` eigenpairs of the largest |eigenvalue|, a multiple one as often as it occurs.

    A Krylov space holds each eigenvalue once. So spaces are built one after another, each orthogonal to the pairs that earlier
    ones found, until there are enough and nothing larger is left, none converges, or products run out.

    Args:
        rng: for starting vectors.
        product: by a symmetric matrix.
        size: of the matrix.
        count: how many pairs are wanted.
        num_products: at most in one space.
        max_products: in all.
    """
    values, residuals, vectors, spent = np.zeros(0), np.zeros(0), np.zeros((0, size), np.float32), 0
    while count and len(values) < size and spent < max_products:
        limit = min(num_products, max_products - spent, size - len(values))
        space, basis = krylov(product, rng.standard_normal(size), limit, vectors, np.float32)
        spent += len(basis)
        if not np.isfinite(space.tridiagonal).all():
            break
        ritz, rotation = np.linalg.eigh(space.tridiagonal)
        bounds = np.abs(max(space.left_over, space.rounding) * rotation[-1])
        least = np.sort(np.abs(values))[-count] if len(values) >= count else 0.0
        if np.abs(ritz).max() <= least * (1 + _CONVERGED):
            break
        largest = max(np.abs(ritz).max(), np.abs(values).max(initial=0.0))
        converged = np.flatnonzero((bounds <= _CONVERGED * np.abs(ritz)) & (np.abs(ritz) > max(least, _NOISE * largest)))
        converged = converged[np.argsort(-np.abs(ritz[converged]))][:count]
        if not len(converged):
            break
        found = rotation[:, converged].T.astype(np.float32) @ basis
        values, residuals = np.append(values, ritz[converged]), np.append(residuals, bounds[converged])
        vectors = np.concatenate([vectors, found / np.linalg.norm(found, axis=1, keepdims=True)])
    order = np.argsort(-np.abs(values))[:count]
    return Eigenpairs(values[order], vectors[order], residuals[order])


def _orthogonal(vector: np.ndarray, rows: np.ndarray) -> np.ndarray:
    # In the precision of the rows: anything else would make a copy of them. It is done twice.
    return vector - rows.T @ (rows @ vector.astype(rows.dtype)) if len(rows) else vector


_ROUNDINGS = 4
_CONVERGED, _NOISE = 1e-3, 1e-5
"""A Ritz pair has converged at this relative residual; sizes so far below the largest drown in the rounding of float32."""

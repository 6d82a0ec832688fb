"""The spectrum of the Hessian at trained weights: exact for small networks, by stochastic Lanczos quadrature for others."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from slt_interp.bases import Gaussian
from slt_interp.curvature.gaussian import gaussian_llc, log_ellipsoid_mass
from slt_interp.curvature.operators import flat_hvp
from slt_interp.data import Batch, num_examples
from slt_interp.errors import InputError
from slt_interp.posterior import LocalPosterior, LossFn, check_target
from slt_interp.tree import Params, check_key, dimension, register_dataclass

DENSE_LIMIT = 2000
"""Up to this dimension the whole matrix is computed, in float64."""


@partial(
    register_dataclass,
    data_fields=["ritz_values", "weights", "residuals"],
    meta_fields=["is_exact", "warnings"],
)
@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a Hessian, or what stochastic Lanczos quadrature knows of them.

    Attributes:
        ritz_values: (probe, i), nats per squared unit of weight, ascending. If exact: one probe, all eigenvalues.
        weights: (probe, i), how many directions each value stands for; each probe's sum to the dimension.
        residuals: (probe, i), norm of H v - theta v for the unit Ritz vector v; at most this far is an eigenvalue. If exact,
            a bound on rounding.
        is_exact: whether the whole matrix was decomposed.
        warnings: what weakens conclusions, in words.
    """

    ritz_values: Float[np.ndarray, "probe i"]
    weights: Float[np.ndarray, "probe i"]
    residuals: Float[np.ndarray, "probe i"]
    is_exact: bool
    warnings: tuple[str, ...] = field(default=())

    @property
    def trace(self) -> tuple[float, float]:
        """Trace of the Hessian and its standard error over probes (0 if exact, NaN for one probe)."""
        return self._over_probes(np.sum(self.weights * self.ritz_values, axis=1))

    @property
    def rank_threshold(self) -> float:
        """Eigenvalues above this count for `rank`: rounding error of a d x d float64 (if exact) or float32 matrix.

        If exact, also what the matrix shows of a loss that computes in lower precision.
        """
        precision = np.finfo(np.float64 if self.is_exact else np.float32).eps
        rounding = float(np.abs(self.ritz_values).max() * self.weights.sum(axis=1).mean() * precision)
        return max(rounding, float(self.residuals.max())) if self.is_exact else rounding

    def rank(self, threshold: float | None = None) -> float:
        """Count the directions with curvature above `threshold` (`rank_threshold` if not given).

        Of a trained network this number means little without its threshold: eigenvalues fall off without a gap.
        """
        threshold = self.rank_threshold if threshold is None else threshold
        return self._over_probes(np.sum(self.weights * (self.ritz_values > threshold), axis=1))[0]

    def llc(self, nbeta: float, localization: float) -> tuple[float, float]:
        """Predict E[nbeta (L - L*)] as if the loss were quadratic: 1/2 tr[N H (N H + gamma)^-1], N = nbeta.

        Returns:
            The prediction and its standard error over probes (0 if exact, NaN for one probe); NaN if some nbeta h + gamma <= 0.
        """
        return self._over_probes(gaussian_llc(self.ritz_values, self.weights, nbeta, localization))

    def log_volume(self, thresholds: Float[np.ndarray, " threshold"], base: Gaussian) -> Float[np.ndarray, " threshold"]:
        """Predict log V(eps) = log P_base(L <= L* + eps), in nats, as if the loss were quadratic.

        If the spectrum is exact, so is this, for the quadratic without its negative curvatures, which are counted as flat;
        otherwise it carries the error of the quadrature, which is not estimated.

        Args:
            thresholds: eps, nats above the loss at the center.
            base: a Gaussian around the same point with one scalar scale.
        """
        if not jax.tree_util.all_leaves([base.scale]) or jnp.ndim(base.scale) != 0:
            raise InputError("log_volume takes a base measure with one scalar scale: give Gaussian(center, scale)")
        probes, _ = self.ritz_values.shape
        scales = 0.5 * float(base.scale) ** 2 * np.maximum(self.ritz_values.ravel(), 0.0)
        return log_ellipsoid_mass(np.asarray(thresholds), scales, self.weights.ravel() / probes)

    def _over_probes(self, values: Float[np.ndarray, " probe"]) -> tuple[float, float]:
        if self.is_exact:
            return float(values[0]), 0.0
        error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
        return float(values.mean()), float(error)


def estimate_spectrum(
    key: Key[Array, ""],
    loss_fn: LossFn,
    params: Params,
    data: Batch,
    *,
    num_matvecs: int | None = None,
    num_probes: int | None = None,
) -> Spectrum:
    """Estimate the spectrum of the Hessian of the mean loss over `data` at `params`.

    Up to `DENSE_LIMIT` parameters, and unless `num_matvecs` or `num_probes` is given, the whole matrix is computed and
    decomposed in float64 (d Hessian-vector products, d^2 numbers). Otherwise stochastic Lanczos quadrature: from each
    of `num_probes` random vectors a Krylov space of `num_matvecs` dimensions with full reorthogonalization, whose
    Ritz values and weights stand for the spectrum (num_probes * num_matvecs products, d * num_matvecs numbers).

    Args:
        key: for the probe vectors.
        loss_fn: `(params, batch) -> scalar`, nats per example.
        params: the trained weights.
        data: all of it goes through the loss at once.
        num_matvecs: dimensions of a Krylov space, 64 by default.
        num_probes: random vectors, 8 by default.

    References:
        Ubaru, Chen and Saad (2017), Fast estimation of tr(f(A)) via stochastic Lanczos quadrature.
        Ghorbani, Krishnan and Xiao (2019), An investigation into neural net optimization via Hessian eigenvalue
        density, arXiv:1901.10159.

    >>> spectrum = estimate_spectrum(jax.random.key(0), lambda w, batch: 0.5 * jnp.sum(w**2), jnp.ones(3), None)
    >>> spectrum.ritz_values.tolist()
    [[1.0, 1.0, 1.0]]
    """
    check_key(key)
    if data is not None:
        num_examples(data)
    check_target(LocalPosterior(loss_fn, params, 1.0, 1.0), params, data)
    size = dimension(params)
    for name, count in (("num_matvecs", num_matvecs), ("num_probes", num_probes)):
        if count is not None and not 1 <= count <= size:
            raise InputError(f"{name} must lie between 1 and the number of parameters, {size}, but is {count}")
    if size <= DENSE_LIMIT and num_matvecs is None and num_probes is None:
        is_exact, (values, weights, residuals) = True, _dense(loss_fn, params, data)
    else:
        matvecs = min(size, num_matvecs or 64)
        is_exact, (values, weights, residuals) = False, _lanczos(key, loss_fn, params, data, matvecs, num_probes or 8)
    if not np.isfinite(values).all():
        raise InputError("the Hessian of the loss at params is not finite: check the loss there")
    warnings = []
    precision = np.finfo(np.float32).eps * np.abs(values).max()
    if values.min() < -10 * precision:
        warnings.append(
            f"the Hessian has negative eigenvalues, down to {values.min():.3g} (the largest is {values.max():.3g}): params "
            "is not exactly a minimum, and the volume counts those directions as flat"
        )
    return Spectrum(values, weights, residuals, is_exact, tuple(warnings))


def dense_hessian(loss_fn: LossFn, params: Params, data: Batch) -> tuple[Float[np.ndarray, "i i"], float]:
    """Compute the Hessian of the loss on all of `data`, symmetric, in the order of `ravel_pytree`, and its rounding error.

    In float64 if the loss can, at the cost of as many Hessian-vector products as there are weights. The rounding error bounds
    that of every eigenvalue.

    >>> dense_hessian(lambda w, batch: w[0] * w[1], jnp.ones(2), None)[0].tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    # float64 here only: in float32 the small eigenvalues drown in rounding noise of the large ones.
    try:
        with jax.enable_x64(True):
            matrix = _matrix(loss_fn, *(jax.tree.map(_to_double, tree) for tree in (params, data)))
    except TypeError:
        # The loss insists on its own precision, as a scan with a float32 carry does.
        matrix = _matrix(loss_fn, params, data)
    # Rounding makes the matrix unsymmetric, and by as much eigenvalues may be off: a loss that casts to float32 shows here.
    # Where it is infinite the caller says so.
    with np.errstate(invalid="ignore"):
        return 0.5 * (matrix + matrix.T), float(np.linalg.norm(matrix - matrix.T))


def _dense(loss_fn: LossFn, params: Params, data: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    matrix, rounding = dense_hessian(loss_fn, params, data)
    if not np.isfinite(matrix).all():
        return np.full((1, len(matrix)), np.nan), np.ones((1, len(matrix))), np.zeros((1, len(matrix)))
    values = np.linalg.eigvalsh(matrix)
    return values[None], np.ones((1, len(values))), np.full((1, len(values)), rounding)


def _matrix(loss_fn: LossFn, params: Params, data: Batch) -> np.ndarray:
    matvec, flat = flat_hvp(loss_fn, params, data)

    @jax.jit
    def columns(flat: Array, data: Batch) -> Array:
        return jax.lax.map(lambda v: matvec(v, flat, data), jnp.eye(flat.size, dtype=flat.dtype), batch_size=8)

    return np.asarray(columns(flat, data), np.float64)


def _lanczos(
    key: Key[Array, ""], loss_fn: LossFn, params: Params, data: Batch, num_matvecs: int, num_probes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    matvec, flat = flat_hvp(loss_fn, params, data)
    product = jax.jit(matvec)
    values, weights, residuals = np.zeros((3, num_probes, num_matvecs))
    for i, probe_key in enumerate(jax.random.split(key, num_probes)):
        start = np.asarray(jax.random.rademacher(probe_key, flat.shape, flat.dtype), np.float64)
        tridiagonal, left_over = _tridiagonalize(lambda v: product(jnp.asarray(v, flat.dtype), flat, data), start, num_matvecs)
        size = len(tridiagonal)
        if not np.isfinite(tridiagonal).all():
            values[i] = np.nan
            continue
        ritz, vectors = np.linalg.eigh(tridiagonal)
        values[i, :size], values[i, size:] = ritz, ritz[0]
        weights[i, :size] = flat.size * vectors[0] ** 2
        residuals[i, :size] = np.abs(left_over * vectors[-1])
    return values, weights, residuals


def _tridiagonalize(matvec: Callable, start: np.ndarray, num_matvecs: int) -> tuple[np.ndarray, float]:
    """Run Lanczos with full reorthogonalization, in float64 on the host, until the Krylov space is exhausted.

    Not matfree's `tridiag_sym`, which goes on after exhaustion (a low-rank Hessian, or none) and returns noise as large as
    the dimension as eigenvalues.

    Returns:
        The tridiagonal matrix, and the norm of what is left over, which bounds residuals.
    """
    basis, diagonal, off_diagonal, scale = [start / np.linalg.norm(start)], [], [], 0.0
    while True:
        image = np.asarray(matvec(basis[-1]), np.float64)
        scale = max(scale, float(np.linalg.norm(image)))
        diagonal.append(float(image @ basis[-1]))
        vectors = np.stack(basis)
        for _ in range(2):
            image = image - vectors.T @ (vectors @ image)
        left_over = float(np.linalg.norm(image))
        # Below the rounding of a float32 product nothing new is left; NaN ends it too.
        exhausted = not left_over > np.finfo(np.float32).eps * np.sqrt(len(start)) * scale
        if exhausted or len(diagonal) == num_matvecs:
            return np.diag(diagonal) + np.diag(off_diagonal, 1) + np.diag(off_diagonal, -1), left_over
        basis.append(image / left_over)
        off_diagonal.append(left_over)


def _to_double(x: Array) -> Array:
    # By way of numpy: an array made outside the 64-bit context would keep its precision.
    return jnp.asarray(np.asarray(x), jnp.float64 if jnp.issubdtype(x.dtype, jnp.floating) else None)

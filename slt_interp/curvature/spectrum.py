"""The spectrum of the Hessian at trained weights: exact for small networks, by stochastic Lanczos quadrature for others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key

from slt_interp.bases import Gaussian
from slt_interp.curvature.checks import NOT_FINITE, check_symmetric, kink_warnings, saddle_warnings
from slt_interp.curvature.gaussian import gaussian_llc, log_ellipsoid_mass
from slt_interp.curvature.lanczos import Eigenpairs, Product, krylov, leading_eigenpairs
from slt_interp.curvature.operators import flat_hvp
from slt_interp.data import Batch, num_examples
from slt_interp.errors import InputError
from slt_interp.posterior import LocalPosterior, LossFn, check_target
from slt_interp.tree import Params, check_key, dimension, register_dataclass

DENSE_LIMIT = 2000
"""Up to this dimension the whole matrix is computed, in float64."""


@partial(
    register_dataclass,
    data_fields=["ritz_values", "weights", "residuals", "lower"],
    meta_fields=["is_exact", "warnings"],
)
@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a Hessian, or what stochastic Lanczos quadrature knows of them.

    Attributes:
        ritz_values: (probe, i), nats per squared unit of weight. If exact: one probe, all eigenvalues, ascending.
        weights: (probe, i), how many directions each value stands for; each probe's sum to the dimension. Eigenpairs that were
            found to convergence stand in every probe, with weight 1.
        residuals: (probe, i), norm of H v - theta v for the unit Ritz vector v; at most this far is an eigenvalue. If exact,
            a bound on rounding.
        is_exact: whether the whole matrix was decomposed.
        warnings: what weakens conclusions, in words.
        lower: values and weights of a second quadrature rule from the same products; for the LLC and the log-determinant of a
            positive Hessian the first rule is too large and this one too small. None if exact.
    """

    ritz_values: Float[np.ndarray, "probe i"]
    weights: Float[np.ndarray, "probe i"]
    residuals: Float[np.ndarray, "probe i"]
    is_exact: bool
    warnings: tuple[str, ...] = field(default=())
    lower: tuple[Float[np.ndarray, "probe i"], Float[np.ndarray, "probe i"]] | None = None

    @property
    def trace(self) -> tuple[float, float]:
        """Trace of the Hessian and its standard error over probes (0 if exact, NaN for one probe)."""
        return self._sum(lambda values, weights: np.sum(weights * values, axis=1))

    @property
    def squared_norm(self) -> tuple[float, float]:
        """Squared Frobenius norm, tr H^2, and its standard error."""
        return self._sum(lambda values, weights: np.sum(weights * values**2, axis=1))

    @property
    def participation_ratio(self) -> float:
        """(tr H)^2 / tr H^2, the number of equal eigenvalues that would have the same trace and norm.

        References: Gao et al. (2017), A theory of multineuronal dimensionality, dynamics and measurement.
        """
        return self.trace[0] ** 2 / self.squared_norm[0]

    @property
    def stable_rank(self) -> float:
        """Tr H^2 / max h^2, at most the rank and insensitive to small eigenvalues.

        References: Rudelson and Vershynin (2007), Sampling from large matrices, section 1.
        """
        return self.squared_norm[0] / float(np.abs(self.ritz_values).max()) ** 2

    @property
    def rank_threshold(self) -> float:
        """Eigenvalues above this count for `rank`: what rounding the weights to float32 can make of a zero eigenvalue.

        That is the convention of numpy's `matrix_rank` at float32, d x largest x 1.2e-7, also where the matrix was computed in
        float64: weights that are a minimum in float32 are one up to their rounding. If exact, also what the matrix shows of a
        loss that computes in lower precision.
        """
        largest, size = np.abs(self.ritz_values).max(), self.weights.sum(axis=1).mean()
        rounding = float(np.finfo(np.float32).eps * size * largest)
        return max(rounding, float(self.residuals.max())) if self.is_exact else rounding

    def rank(self, threshold: float | None = None) -> float:
        """Count the directions with curvature above `threshold` (`rank_threshold` if not given).

        Of a trained network this number means little without its threshold: eigenvalues fall off without a gap.
        """
        threshold = self.rank_threshold if threshold is None else threshold
        return float(np.sum(self.weights * (self.ritz_values > threshold), axis=1).mean())

    def rank_range(self, threshold: float | None = None) -> tuple[float, float]:
        """Count directions above ten times and above a tenth of the threshold: how much `rank` depends on it."""
        threshold = self.rank_threshold if threshold is None else threshold
        return self.rank(10 * threshold), self.rank(threshold / 10)

    def llc(self, nbeta: float, localization: float) -> tuple[float, float]:
        """Predict E[nbeta (L - L*)] as if the loss were quadratic: 1/2 tr[N H (N H + gamma)^-1], N = nbeta.

        Returns:
            The prediction and its standard error, over probes and with half the distance between the two quadrature rules (0 if
            exact, NaN for one probe); NaN if some nbeta h + gamma <= 0.
        """
        return self._sum(lambda values, weights: gaussian_llc(values, weights, nbeta, localization))

    def log_determinant(self, nbeta: float, localization: float) -> tuple[float, float]:
        """Compute log det(1 + nbeta H / gamma) and its standard error; -1/2 of it is log Z under the base N(w*, 1 / gamma).

        Its derivative in log nbeta is twice `llc`. NaN if some nbeta h + gamma <= 0.
        """

        def log_determinant(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
            ratio = nbeta * values / localization
            proper = (ratio > -1) | (weights == 0)
            return np.where(proper.all(axis=1), np.sum(weights * np.log1p(np.where(ratio > -1, ratio, 0.0)), axis=1), np.nan)

        return self._sum(log_determinant)

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

    def _sum(self, function: Callable[[np.ndarray, np.ndarray], Float[np.ndarray, " probe"]]) -> tuple[float, float]:
        """Sum a function over the spectrum; `function` takes values and weights."""
        upper = function(self.ritz_values, self.weights)
        if self.is_exact:
            return float(upper[0]), 0.0
        lower = upper if self.lower is None else function(*self.lower)
        middle = (upper + lower) / 2
        error = middle.std(ddof=1) / np.sqrt(len(middle)) if len(middle) > 1 else np.nan
        return float(middle.mean()), float(np.hypot(error, (upper - lower).mean() / 2))


def estimate_spectrum(
    key: Key[Array, ""],
    loss_fn: LossFn,
    params: Params,
    data: Batch,
    *,
    num_matvecs: int | None = None,
    num_probes: int | None = None,
    block_size: int | None = None,
) -> Spectrum:
    """Estimate the spectrum of the Hessian of the mean loss over `data` at `params`.

    Up to `DENSE_LIMIT` parameters, and unless `num_matvecs` or `num_probes` is given, the whole matrix is computed and
    decomposed in float64 (d Hessian-vector products, d^2 numbers). Otherwise the leading 64 eigenpairs are computed (at most
    256 products, 192 d numbers), and in what is left stochastic Lanczos quadrature is done: from each of `num_probes` random
    vectors a Krylov space of `num_matvecs` dimensions with full reorthogonalization, whose Ritz values and weights stand for
    the spectrum.

    Args:
        key: for the probe vectors.
        loss_fn: `(params, batch) -> scalar`, nats per example.
        params: the trained weights.
        data: examples, or None if the loss has none.
        num_matvecs: dimensions of a Krylov space; by default 96, and twice as many until the Gaussian LLC is between bounds at
            most 4 % apart at every localization / nbeta above 1e-6 of the largest eigenvalue, but no more than d m^2 = 2^34
            allow (768 in 20,000 dimensions, 96 in a million).
        num_probes: random vectors; by default from 16 to 64, until the Gaussian LLC scatters over them by a standard error of
            at most 1.5 % in the same range.
        block_size: examples that go through the loss at once, all by default.

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
        values, weights, residuals = _dense(loss_fn, params, data, block_size)
        spectrum = Spectrum(values, weights, residuals, is_exact=True)
    else:
        matvec = _host_product(loss_fn, params, data, block_size)
        check_symmetric(matvec, size)
        spectrum = _stochastic(key, matvec, size, num_matvecs, num_probes)
    if not np.isfinite(spectrum.ritz_values).all():
        raise InputError(NOT_FINITE)
    return replace(
        spectrum,
        warnings=(
            *saddle_warnings(spectrum.ritz_values, spectrum.weights),
            *kink_warnings(key, loss_fn, params, data, block_size),
        ),
    )


def top_eigenpairs(
    key: Key[Array, ""], loss_fn: LossFn, params: Params, data: Batch, count: int = 50, *, block_size: int | None = None
) -> Eigenpairs:
    """Compute eigenpairs of the Hessian of the largest |eigenvalue|, multiple ones as often as they occur.

    Costs from two products for each pair, where eigenvalues are well apart, to twenty, where they crowd; about four vectors of
    memory for each.

    Args:
        key: for starting vectors.
        loss_fn: `(params, batch) -> scalar`, nats per example.
        params: the trained weights.
        data: examples, or None if the loss has none.
        count: pairs wanted; there are fewer where the rank is lower or the products do not suffice.
        block_size: examples that go through the loss at once, all by default.

    Returns:
        `Eigenpairs`, with vectors in the order of `jax.flatten_util.ravel_pytree`.

    >>> found = top_eigenpairs(jax.random.key(0), lambda w, batch: jnp.sum(jnp.arange(4.0) * w**2) / 2, jnp.ones(4), None, 2)
    >>> found.values.round(4).tolist()
    [3.0, 2.0]
    """
    check_key(key)
    check_target(LocalPosterior(loss_fn, params, 1.0, 1.0), params, data)
    size = dimension(params)
    if data is not None:
        num_examples(data)
    if not 1 <= count <= size:
        raise InputError(f"count must lie between 1 and the number of parameters, {size}, but is {count}")
    matvec = _host_product(loss_fn, params, data, block_size)
    check_symmetric(matvec, size)
    return leading_eigenpairs(_generator(key), matvec, size, count, num_products=2 * count + 20, max_products=20 * (count + 1))


def dense_hessian(
    loss_fn: LossFn, params: Params, data: Batch, block_size: int | None = None
) -> tuple[Float[np.ndarray, "i i"], float]:
    """Compute the Hessian of the loss on all of `data`, symmetric, in the order of `ravel_pytree`, and its rounding error.

    In float64 if the loss can, at the cost of as many Hessian-vector products as there are weights. The rounding error bounds
    that of every eigenvalue.

    >>> dense_hessian(lambda w, batch: w[0] * w[1], jnp.ones(2), None)[0].tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    # float64 here only: in float32 the small eigenvalues drown in rounding noise of the large ones.
    try:
        with jax.enable_x64(True):
            doubled, data_doubled = (jax.tree.map(_to_double, tree) for tree in (params, data))
            matrix = np.asarray(_matrix(loss_fn, doubled, data_doubled, block_size))
    except TypeError:
        # The loss insists on its own precision, as a scan with a float32 carry does.
        matrix = np.asarray(_matrix(loss_fn, params, data, block_size), np.float64)
    # Rounding makes the matrix unsymmetric, and by as much eigenvalues may be off: a loss that casts to float32 shows here.
    # Where it is infinite the caller says so.
    with np.errstate(invalid="ignore"):
        return 0.5 * (matrix + matrix.T), float(np.linalg.norm(matrix - matrix.T))


def _dense(loss_fn: LossFn, params: Params, data: Batch, block_size: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    matrix, rounding = dense_hessian(loss_fn, params, data, block_size)
    if not np.isfinite(matrix).all():
        return np.full((1, len(matrix)), np.nan), np.ones((1, len(matrix))), np.zeros((1, len(matrix)))
    values = np.linalg.eigvalsh(matrix)
    return values[None], np.ones((1, len(values))), np.full((1, len(values)), rounding)


@partial(jax.jit, static_argnames=("loss_fn", "block_size"))
def _matrix(loss_fn: LossFn, params: Params, data: Batch, block_size: int | None) -> Float[Array, "i i"]:
    flat, _ = ravel_pytree(params)
    vectors = jnp.eye(flat.size, dtype=flat.dtype)
    return jax.lax.map(lambda v: flat_hvp(loss_fn, params, data, v, block_size), vectors, batch_size=8)


def _stochastic(key: Key[Array, ""], matvec: Product, size: int, num_matvecs: int | None, num_probes: int | None) -> Spectrum:
    """Deflate leading eigenpairs, and run Lanczos quadrature from probes in what is left, until it is accurate."""
    rng = _generator(key)
    leading = leading_eigenpairs(
        rng, matvec, size, min(_DEFLATED, size // 4), num_products=2 * _DEFLATED, max_products=4 * _DEFLATED
    )
    rest, length, upper, lower = size - len(leading.values), num_matvecs or _MIN_LENGTH, [], []
    while True:
        space, _ = krylov(matvec, rng.standard_normal(size), min(length, rest), leading.vectors)
        if not np.isfinite(space.tridiagonal).all():
            raise InputError(NOT_FINITE)
        upper.append(_beside(leading, rest, *space.quadrature()))
        lower.append(_beside(leading, rest, *space.lower_quadrature()))
        spectrum = _joined(upper, lower)
        is_short = len(space.tridiagonal) == length and _half_gap(spectrum) > _HALF_GAP
        if num_matvecs is None and is_short and size * (2 * length) ** 2 <= _MAX_WORK:
            length, upper, lower = 2 * length, [], []
            continue
        if len(upper) < (_MIN_PROBES if num_probes is None else num_probes):
            continue
        if num_probes is not None or len(upper) == _MAX_PROBES or _probe_error(spectrum) <= _SCATTER:
            return spectrum


def _host_product(loss_fn: LossFn, params: Params, data: Batch, block_size: int | None) -> Product:
    dtype = jnp.result_type(*jax.tree.leaves(params))
    return lambda vector: np.asarray(flat_hvp(loss_fn, params, data, jnp.asarray(vector, dtype), block_size))


def _generator(key: Key[Array, ""]) -> np.random.Generator:
    return np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))


def _probe_error(spectrum: Spectrum) -> float:
    """Find the largest relative standard error, over probes, of the Gaussian LLC at any scale."""
    found = _llc_over_scales(spectrum.ritz_values, spectrum.weights)
    return float(np.max(found.std(axis=1, ddof=1) / np.sqrt(found.shape[1]) / found.mean(axis=1), initial=0.0))


def _half_gap(spectrum: Spectrum) -> float:
    """Find the largest relative half distance between the two rules' Gaussian LLCs at any scale."""
    assert spectrum.lower is not None
    upper, lower = (_llc_over_scales(*rule).mean(axis=1) for rule in ((spectrum.ritz_values, spectrum.weights), spectrum.lower))
    return float(np.max(np.abs(upper - lower) / (upper + lower), initial=0.0))


def _llc_over_scales(ritz_values: np.ndarray, weights: np.ndarray) -> Float[np.ndarray, "scale probe"]:
    """Compute twice the Gaussian LLC at every scale, negative curvatures counted as flat; no scales where nothing is curved."""
    values = np.maximum(ritz_values, 0.0)
    scales = values.max() * np.geomspace(1e-6, 1.0, 13)
    found = [np.sum(weights * values / (values + scale), axis=1) for scale in scales if scale > 0]
    return np.reshape(found, (-1, len(values)))


def _beside(
    leading: Eigenpairs, rest: int, values: np.ndarray, weights: np.ndarray, *residuals: np.ndarray
) -> list[np.ndarray]:
    """Let a probe's rule stand for the `rest` of the directions, beside the leading ones."""
    known = leading.values, np.ones(len(leading.values)), leading.residuals
    return [np.append(x, y) for x, y in zip(known, (values, rest * weights, *residuals), strict=False)]


def _joined(upper: list[list[np.ndarray]], lower: list[list[np.ndarray]]) -> Spectrum:
    values, weights, residuals = zip(*upper, strict=True)
    lower_values, lower_weights = zip(*lower, strict=True)
    return Spectrum(
        _padded(values, repeat=True),
        _padded(weights),
        _padded(residuals),
        is_exact=False,
        lower=(_padded(lower_values, repeat=True), _padded(lower_weights)),
    )


def _padded(columns: Sequence[np.ndarray], *, repeat: bool = False) -> np.ndarray:
    """Stack rows of different lengths; what is missing is 0, or repeats the last entry."""
    length = max(len(row) for row in columns)
    return np.stack([np.append(row, np.full(length - len(row), row[-1] if repeat else 0.0)) for row in columns])


_DEFLATED = 64
"""Eigenpairs taken out. With 16 probes beside so many the Gaussian LLC has a standard error of at most 2.2 %: that of R equal
directions that are left is at most sqrt(2 R / 16) of 64 + R."""

_MIN_PROBES, _MAX_PROBES, _SCATTER = 16, 64, 0.015
"""Probes, and the standard error over them, relative to the Gaussian LLC, at which they suffice."""

_MIN_LENGTH, _MAX_WORK, _HALF_GAP = 96, 2**34, 0.02
"""Of a Krylov space; d m^2 for it, seconds of orthogonalization; and half the distance of the two rules at which it is long
enough, relative to the Gaussian LLC. With the scatter it makes a standard error of 2.5 %."""


def _to_double(x: Array) -> Array:
    # By way of numpy: an array made outside the 64-bit context would keep its precision.
    return jnp.asarray(np.asarray(x), jnp.float64 if jnp.issubdtype(x.dtype, jnp.floating) else None)

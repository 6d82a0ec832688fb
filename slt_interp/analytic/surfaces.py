"""Minima along curves and surfaces, with and without singular points, and a regular regression to compare with."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from slt_interp.analytic.integrals import geometric_panels, line_mean, plane_mean
from slt_interp.analytic.problem import AnalyticProblem
from slt_interp.bases import Box, Gaussian

_SMOOTH = "the minima are a smooth hypersurface: rlct 1/2"


def ring(dimension: int = 2, *, in_box: bool = False) -> AnalyticProblem:
    """Make (|w|^2 - 1)^2, minimal on the unit sphere, at its first pole; volumes under N(0, I), or on [-2, 2]^2 when `in_box`.

    >>> round(ring().log_volume(0.01), 4)
    -2.8022
    """

    def energy(nbeta: float, localization: float) -> float:
        from scipy.special import ive

        def log_weight(r: np.ndarray) -> np.ndarray:
            # Over the angle with the center: a Bessel function.
            angular = np.log(ive(dimension / 2 - 1, localization * r)) - 0.5 * localization * (r - 1) ** 2
            return dimension / 2 * np.log(r) + angular - nbeta * (r**2 - 1) ** 2

        width = min(nbeta**-0.5, localization**-0.5)
        panels = geometric_panels([1.0], 0.0, 1 + 12 * localization**-0.5 + dimension**0.5, width / 8)
        return line_mean(lambda r: nbeta * (r**2 - 1) ** 2, log_weight, panels)

    def log_volume(threshold: float) -> float:
        from scipy.special import gammainc

        s = np.sqrt(threshold)
        if in_box:
            return float(np.log(np.pi * s / 8)) if s <= 1 else float("nan")
        high, low = gammainc(dimension / 2, (1 + s) / 2), gammainc(dimension / 2, max(0.0, 1 - s) / 2)
        return float(np.log(high - low))

    return AnalyticProblem(
        name=f"ring in {dimension} dimensions",
        loss_fn=_ring,
        center=jnp.zeros(dimension).at[0].set(1.0),
        source=_SMOOTH,
        rlct=0.5,
        multiplicity=1,
        energy=energy,
        base=Box(-2.0, 2.0) if in_box else Gaussian(0.0, 1.0),
        log_volume=log_volume,
    )


def hyperbola(*, in_box: bool = False) -> AnalyticProblem:
    """Make (a b - 1)^2 at (1, 1); volumes under N(0, I), or uniform on [-2, 2]^2 when `in_box`."""

    def energy(nbeta: float, localization: float) -> float:
        spread, width = localization**-0.5, nbeta**-0.5

        def inner(a: float) -> np.ndarray:
            low, high = 1 - 9 * spread, 1 + 9 * spread
            coarse = geometric_panels([1.0], low, high, spread / 4)
            return np.union1d(coarse, geometric_panels([1 / a], low, high, min(spread, width / abs(a)) / 2))

        def log_weight(a: float, b: np.ndarray) -> np.ndarray:
            return -nbeta * (a * b - 1) ** 2 - 0.5 * localization * ((a - 1) ** 2 + (b - 1) ** 2)

        outer = geometric_panels([0.0, 1.0], 1 - 9 * spread, 1 + 9 * spread, min(spread, width) / 4)
        return plane_mean(lambda a, b: nbeta * (a * b - 1) ** 2, log_weight, outer, inner)

    def log_volume(threshold: float) -> float:
        from scipy.integrate import quad
        from scipy.special import k0

        s = np.sqrt(threshold)
        if s >= 1:
            return float("nan")
        if in_box:
            value = ((1 + s) * (1 + np.log(4 / (1 + s))) - (1 - s) * (1 + np.log(4 / (1 - s)))) / 8
        else:
            value = quad(k0, 1 - s, 1 + s, epsabs=0, epsrel=1e-12)[0] / np.pi
        return float(np.log(value))

    return AnalyticProblem(
        name="hyperbola",
        loss_fn=_hyperbola,
        center=jnp.ones(2),
        source=_SMOOTH,
        rlct=0.5,
        multiplicity=1,
        energy=energy,
        base=Box(-2.0, 2.0) if in_box else Gaussian(0.0, 1.0),
        log_volume=log_volume,
    )


def double_well() -> AnalyticProblem:
    """Make (x^2 - 1)^2 at x = 1; volumes uniform on [-2, 2], both wells counted."""

    def energy(nbeta: float, localization: float) -> float:
        spread = localization**-0.5
        panels = geometric_panels([-1.0, 1.0], -1 - 9 * spread, 1 + 9 * spread, min(spread, nbeta**-0.5) / 8)
        return line_mean(
            lambda x: nbeta * (x**2 - 1) ** 2,
            lambda x: -nbeta * (x**2 - 1) ** 2 - 0.5 * localization * (x - 1) ** 2,
            panels,
        )

    def log_volume(threshold: float) -> float:
        s = np.sqrt(threshold)
        return float(np.log((np.sqrt(1 + s) - np.sqrt(1 - s)) / 2)) if s <= 1 else float("nan")

    return AnalyticProblem(
        name="double well",
        loss_fn=_double_well,
        center=jnp.ones(1),
        source="two regular minima",
        rlct=0.5,
        multiplicity=1,
        energy=energy,
        base=Box(-2.0, 2.0),
        log_volume=log_volume,
    )


def crossing_discs() -> AnalyticProblem:
    """Make |u|^2 |v|^2 for u and v uniform in unit discs, in coordinates where their base measure is N(0, I).

    u = x (1 - exp(-|x|^2 / 2))^(1/2) / |x| is uniform for x ~ N(0, I) in the plane, and so is v for y: losses have the law that
    they have on the discs, and the minima are two crossing planes.

    >>> round(crossing_discs().log_volume(0.1), 4)
    -1.1079
    """
    return AnalyticProblem(
        name="crossing discs",
        loss_fn=_crossing_discs,
        center=jnp.zeros(4),
        source="|u|^2 and |v|^2 are uniform on [0, 1]",
        rlct=1.0,
        multiplicity=2,
        base=Gaussian(0.0, 1.0),
        log_volume=lambda threshold: float(np.log(threshold * (1 - np.log(threshold)))) if threshold < 1 else 0.0,
    )


def cusp() -> AnalyticProblem:
    """Make (y^2 - x^3)^2 at its singular point, the origin.

    >>> round(cusp().rlct, 4)
    0.4167
    """

    def energy(nbeta: float, localization: float) -> float:
        reach = 9 * localization**-0.5

        def inner(x: float) -> np.ndarray:
            y = max(x, 0.0) ** 1.5
            width = nbeta**-0.5 / max(2 * y, nbeta**-0.25)
            coarse = geometric_panels([0.0], -reach, reach, min(reach / 40, nbeta**-0.25) / 2)
            return np.union1d(coarse, geometric_panels([-y, y], -reach, reach, width / 2))

        outer = geometric_panels([0.0], -reach, reach, min(reach / 40, nbeta ** (-1 / 6)) / 4)
        return plane_mean(
            lambda x, y: nbeta * (y**2 - x**3) ** 2,
            lambda x, y: -nbeta * (y**2 - x**3) ** 2 - 0.5 * localization * (x**2 + y**2),
            outer,
            inner,
        )

    return AnalyticProblem(
        name="cusp",
        loss_fn=_cusp,
        center=jnp.zeros(2),
        source="half of the log canonical threshold 5/6 of y^2 - x^3",
        rlct=5 / 12,
        multiplicity=1,
        energy=energy,
    )


def linear_regression(key: Key[Array, ""], num_examples: int, dimension: int) -> AnalyticProblem:
    """Draw data y = x . w + noise with N(0, I) inputs and unit noise; the center is the least-squares solution.

    `loss_fn` is half the mean squared error; it is not 0 at the center.
    """
    x_key, w_key, noise_key = jax.random.split(key, 3)
    x = jax.random.normal(x_key, (num_examples, dimension))
    y = x @ jax.random.normal(w_key, (dimension,)) + jax.random.normal(noise_key, (num_examples,))
    inputs = np.asarray(x, np.float64)
    center = np.linalg.lstsq(inputs, np.asarray(y, np.float64), rcond=None)[0]
    curvatures = np.linalg.svd(inputs, compute_uv=False) ** 2 / num_examples

    def energy(nbeta: float, localization: float) -> float:
        return float(0.5 * np.sum(nbeta * curvatures / (nbeta * curvatures + localization)))

    return AnalyticProblem(
        name=f"linear regression, {dimension} weights, {num_examples} examples",
        loss_fn=_linear_regression,
        center=jnp.asarray(center, jnp.result_type(float)),
        source="exact: the loss is quadratic",
        rlct=np.linalg.matrix_rank(inputs) / 2,
        multiplicity=1,
        data={"x": x, "y": y},
        energy=energy,
    )


def _ring(w: Float[Array, " dimension"], batch: None) -> Float[Array, ""]:
    return (jnp.sum(w**2) - 1) ** 2


def _hyperbola(w: Float[Array, "2"], batch: None) -> Float[Array, ""]:
    return (w[0] * w[1] - 1) ** 2


def _double_well(w: Float[Array, "1"], batch: None) -> Float[Array, ""]:
    return (w[0] ** 2 - 1) ** 2


def _crossing_discs(w: Float[Array, "4"], batch: None) -> Float[Array, ""]:
    return jnp.expm1(-jnp.sum(w[:2] ** 2) / 2) * jnp.expm1(-jnp.sum(w[2:] ** 2) / 2)


def _cusp(w: Float[Array, "2"], batch: None) -> Float[Array, ""]:
    return (w[1] ** 2 - w[0] ** 3) ** 2


def _linear_regression(w: Float[Array, " dimension"], batch: dict[str, Array]) -> Float[Array, ""]:
    return 0.5 * jnp.mean((batch["x"] @ w - batch["y"]) ** 2)

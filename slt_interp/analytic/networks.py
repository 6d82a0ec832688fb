"""Small nonlinear models with known learning coefficients."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from slt_interp.analytic.integrals import geometric_panels, line_mean, plane_mean, product_moments, sinh_nodes, weighted_mean
from slt_interp.analytic.problem import AnalyticProblem
from slt_interp.bases import Box
from slt_interp.errors import InputError
from slt_interp.tree import dimension

_GRID = np.linspace(-1, 1, 41)


def relu_unit() -> AnalyticProblem:
    """Make one ReLU unit a relu(b x) on inputs symmetric around 0, the truth 0, at the origin: K is a^2 b^2 E[x^2] / 4."""
    return AnalyticProblem(
        name="ReLU unit",
        loss_fn=functools.partial(_unit_loss, jax.nn.relu),
        center={"a": jnp.zeros(1), "b": jnp.zeros(1)},
        source="K is a monomial",
        rlct=0.5,
        multiplicity=2,
        data=jnp.asarray(_GRID, jnp.result_type(float)),
        energy=lambda nbeta, gamma: product_moments((1, 1), (2, 2), float(np.mean(_GRID**2)) / 4, nbeta, gamma)[1],
    )


def dead_relu() -> AnalyticProblem:
    """Make a ReLU unit that is off for all of its inputs, which are positive: K is 0 around the center (1, -1)."""
    inputs = _GRID[_GRID > 0]
    second_moment = float(np.mean(inputs**2))

    def energy(nbeta: float, localization: float) -> float:
        def k(a: float, b: np.ndarray) -> np.ndarray:
            return nbeta * second_moment / 2 * a**2 * np.maximum(b, 0.0) ** 2

        spread = localization**-0.5
        panels = geometric_panels([0.0], -1 - 9 * spread, max(1.0, 9 * spread), min(spread, nbeta**-0.5) / 4)
        return plane_mean(
            k,
            lambda a, b: -k(a, b) - 0.5 * localization * ((a - 1) ** 2 + (b + 1) ** 2),
            geometric_panels([0.0, 1.0], 1 - 9 * spread, 1 + 9 * spread, min(spread, nbeta**-0.5) / 4),
            lambda a: panels,
        )

    return AnalyticProblem(
        name="dead ReLU unit",
        loss_fn=functools.partial(_unit_loss, jax.nn.relu),
        center={"a": jnp.ones(1), "b": -jnp.ones(1)},
        source="K is 0 around the center",
        rlct=0.0,
        multiplicity=1,
        data=jnp.asarray(inputs, jnp.result_type(float)),
        energy=energy,
    )


def tanh_units(num_units: int) -> AnalyticProblem:
    """Make sum_m a_m tanh(b_m x) with the truth 0, at the origin.

    References:
        Aoyagi and Watanabe (2006), Resolution of singularities and the generalization error with Bayesian estimation for
        layered neural networks. The ideal is that of `vandermonde` with gap 2: the odd powers of tanh's series.
    """
    rlct, multiplicity = vandermonde_rlct(num_units, 2)
    return AnalyticProblem(
        name=f"tanh network with {num_units} units",
        loss_fn=functools.partial(_unit_loss, jnp.tanh),
        center={"a": jnp.zeros(num_units), "b": jnp.zeros(num_units)},
        source="Aoyagi and Watanabe (2006); Aoyagi (2010)",
        rlct=rlct,
        multiplicity=multiplicity,
        data=jnp.asarray(_GRID, jnp.result_type(float)),
        energy=_linear_energy(num_units, lambda b: np.tanh(np.multiply.outer(b, _GRID)) / np.sqrt(len(_GRID))),
    )


def vandermonde(num_units: int, gap: int = 1) -> AnalyticProblem:
    """Make 1/2 sum_l f_l^2 with f_l = sum_m a_m b_m^(gap (l - 1) + 1), l = 1 to num_units, at the origin."""
    rlct, multiplicity = vandermonde_rlct(num_units, gap)
    powers = tuple(gap * i + 1 for i in range(num_units))
    return AnalyticProblem(
        name=f"Vandermonde with {num_units} units, gap {gap}",
        loss_fn=functools.partial(_vandermonde_loss, powers),
        center={"a": jnp.zeros(num_units), "b": jnp.zeros(num_units)},
        source="Aoyagi (2010), Comm. Statist. Theory Methods 39:2667",
        rlct=rlct,
        multiplicity=multiplicity,
        energy=_linear_energy(num_units, lambda b: np.power.outer(b, powers)),
    )


def vandermonde_rlct(num_units: int, gap: int) -> tuple[float, int]:
    """Compute learning coefficient and multiplicity of a Vandermonde singularity with one input and one output.

    With i the largest integer such that gap i (i - 1) / 2 + i <= num_units,
    rlct = (num_units + gap i (i + 1) / 2) / (2 (gap i + 1)); m is 2 where equality holds, otherwise 1.

    References:
        Aoyagi (2010), A Bayesian learning coefficient of generalization error and Vandermonde matrix-type singularities.

    >>> vandermonde_rlct(4, gap=2), vandermonde_rlct(2, gap=1)
    ((1.0, 2), (0.75, 1))
    """
    if num_units < 1 or gap < 1:
        raise InputError(f"num_units and gap must be at least 1, but are {num_units} and {gap}")
    i = max(i for i in range(1, num_units + 1) if gap * i * (i - 1) / 2 + i <= num_units)
    is_tie = gap * i * (i - 1) / 2 + i == num_units
    return (num_units + gap * i * (i + 1) / 2) / (2 * (gap * i + 1)), 1 + is_tie


def tanh_network(key: Key[Array, ""], widths: tuple[int, int, int] = (3, 4, 2), num_examples: int = 256) -> AnalyticProblem:
    """Draw W2 tanh(W1 x + b1) + b2 with generic weights, which its own outputs determine up to a finite group: regular.

    References:
        Sussmann (1992), Uniqueness of the weights for minimal feedforward nets with a given input-output map.
    """
    inputs, hidden, outputs = widths
    x_key, *keys = jax.random.split(key, 5)
    shapes = {"w1": (hidden, inputs), "b1": (hidden,), "w2": (outputs, hidden), "b2": (outputs,)}
    center = {name: jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}
    x = jax.random.normal(x_key, (num_examples, inputs))
    return AnalyticProblem(
        name=f"tanh network {'-'.join(map(str, widths))}, generic",
        loss_fn=_network_loss,
        center=center,
        source="Sussmann (1992): a generic network is regular, d / 2",
        rlct=dimension(center) / 2,
        multiplicity=1,
        data={"x": x, "y": _network(center, x)},
    )


def toy_superposition(num_corners: int, num_features: int = 6) -> AnalyticProblem:
    """Make E|x - relu(W^T W x + b)|^2, x one of the unit vectors times U(0, 1), W of two rows, at the critical k-gon.

    Its W_i lie on the corners of a regular k-gon; those of the other features are 0, with biases below 0. Corners 5 and 6 are
    minima, regular but for the common rotation and the weights of dead features: rlct (3 k - 1) / 2.

    References:
        Chen et al. (2023), Dynamical versus Bayesian phase transitions in a toy model of superposition, arXiv:2310.06301.
    """
    if num_corners not in (5, 6) or num_features < num_corners:
        raise InputError(f"num_corners must be 5 or 6 and at most num_features, but they are {num_corners}, {num_features}")
    center = _polygon(num_corners, num_features)
    return AnalyticProblem(
        name=f"superposition, {num_corners}-gon of {num_features} features",
        loss_fn=_superposition_loss,
        center={name: jnp.asarray(x, jnp.result_type(float)) for name, x in center.items()},
        source="Chen et al. (2023), arXiv:2310.06301",
        rlct=(3 * num_corners - 1) / 2,
        multiplicity=1,
    )


def gaussian_mixture() -> AnalyticProblem:
    """Make KL(N(0, 1) | (1 - a) N(0, 1) + a N(b, 1)) at a = b = 0, under the box 0 <= a <= 1, |b| <= 2.

    There is no such loss outside the box: energies are those within, at localization 0 those under the box alone.
    """

    def energy(nbeta: float, localization: float) -> float:
        def k(b: float, a: np.ndarray) -> np.ndarray:
            return -nbeta * np.log1p(np.multiply.outer(a, np.expm1(b * _NODES - b**2 / 2))) @ _WEIGHTS

        smallest = min(1.0, nbeta**-0.5, max(localization, 1.0) ** -0.5) / 4
        fractions = geometric_panels([0.0], 0.0, 1.0, smallest)
        # Symmetric in b.
        return plane_mean(
            k,
            lambda b, a: -k(b, a) - 0.5 * localization * (a**2 + b**2),
            geometric_panels([0.0], 0.0, 2.0, smallest),
            lambda b: fractions,
        )

    return AnalyticProblem(
        name="Gaussian mixture, one mean fixed",
        loss_fn=_mixture_loss,
        center=jnp.zeros(2),
        source="K is equivalent to a^2 b^2: Yamazaki and Watanabe (2003)",
        rlct=0.5,
        multiplicity=2,
        energy=energy,
        base=Box(jnp.array([0.0, -2.0]), jnp.array([1.0, 2.0])),
    )


def two_component_mixture() -> AnalyticProblem:
    """Make KL(N(0, 1) | s N(b1, 1) + (1 - s) N(b2, 1)) with s = sigmoid(a), at a = b1 = b2 = 0."""
    return AnalyticProblem(
        name="Gaussian mixture of two components, truth of one",
        loss_fn=_two_component_loss,
        center=jnp.zeros(3),
        source="Yamazaki and Watanabe (2003); Aoyagi (2010)",
        rlct=0.75,
        multiplicity=1,
        energy=_two_component_energy,
    )


def _linear_energy(num_units: int, features: Callable[[np.ndarray], np.ndarray]) -> Callable[[float, float], float] | None:
    """E[nbeta K] of K = 1/2 |sum_m a_m features(b_m)|^2 at 0: a integrates out, and b is integrated up to two units."""

    def energy(nbeta: float, localization: float) -> float:
        reach = 9 * localization**-0.5
        positive = geometric_panels([0.0], 0.0, reach, min(reach / 40, nbeta**-0.5) / 4)

        def parts(*b: Any) -> tuple[np.ndarray, np.ndarray]:
            rows = np.stack([features(x) for x in np.broadcast_arrays(*b)], axis=-2)
            gram = nbeta * rows @ np.swapaxes(rows, -1, -2)
            values = np.maximum(np.linalg.eigvalsh(gram), 0.0)
            log_weight = -0.5 * np.sum(np.log(localization + values), axis=-1) - 0.5 * localization * sum(x**2 for x in b)
            return 0.5 * np.sum(values / (localization + values), axis=-1), log_weight

        if num_units == 1:
            return line_mean(lambda b: parts(b)[0], lambda b: parts(b)[1], positive)
        # Symmetric under a change of both signs; units agree where b1 = b2, and cancel where b1 = -b2.
        return plane_mean(
            lambda x, y: parts(x, y)[0],
            lambda x, y: parts(x, y)[1],
            positive,
            lambda x: np.union1d(
                geometric_panels([0.0], -reach, reach, min(reach / 40, nbeta**-0.5) / 4),
                geometric_panels([-x, x], -reach, reach, min(reach / 40, x / 8, nbeta**-0.5) / 4),
            ),
        )

    return energy if num_units <= 2 else None


def _two_component_energy(nbeta: float, localization: float) -> float:
    """E[nbeta K] of `two_component_mixture`, over the logit a, the mean m = s b1 + (1 - s) b2 and the distance d = b1 - b2.

    K is about m^2 / 2 + (s (1 - s) d^2)^2 / 4: narrow in m, wider in d. Neither an exchange of the components nor a reflection
    changes it, so that a, d > 0 tell all.
    """
    spread = localization**-0.5
    logits, log_steps = sinh_nodes(9 * spread, min(spread, 3.0))
    distances, log_lengths = sinh_nodes(13 * spread, min(spread, nbeta**-0.25))
    means, log_widths = sinh_nodes(9 * spread, min(spread, nbeta**-0.5))
    means, log_widths = np.concatenate([-means, means]), np.tile(log_widths, 2)
    values, log_weights = [], []
    for a, log_step in zip(logits, log_steps, strict=True):
        first, second = 1 / (1 + np.exp(-a)), 1 / (1 + np.exp(a))
        d, m = distances[:, None], means[None]
        b, c = m + second * d, m - first * d
        log_density = log_step + log_lengths[:, None] + log_widths - 0.5 * localization * (a**2 + b**2 + c**2)
        inside = log_density - log_density.max() > _NEGLIGIBLE
        b, c = b[inside][:, None], c[inside][:, None]
        densities = np.logaddexp(np.log(first) + b * _NODES - b**2 / 2, np.log(second) + c * _NODES - c**2 / 2)
        values.append(-nbeta * densities @ _WEIGHTS)
        log_weights.append(log_density[inside] - values[-1])
    return weighted_mean(np.concatenate(values), np.concatenate(log_weights))


def _unit_loss(activation: Callable[[Array], Array], params: dict[str, Array], inputs: Array) -> Float[Array, ""]:
    return 0.5 * jnp.mean((activation(jnp.outer(inputs, params["b"])) @ params["a"]) ** 2)


def _vandermonde_loss(powers: Sequence[int], params: dict[str, Array], batch: None) -> Float[Array, ""]:
    f = jnp.stack([jnp.sum(params["a"] * params["b"] ** power) for power in powers])
    return 0.5 * jnp.sum(f**2)


def _network(params: dict[str, Array], x: Array) -> Array:
    return jnp.tanh(x @ params["w1"].T + params["b1"]) @ params["w2"].T + params["b2"]


def _network_loss(params: dict[str, Array], batch: dict[str, Array]) -> Float[Array, ""]:
    return 0.5 * jnp.mean(jnp.sum((_network(params, batch["x"]) - batch["y"]) ** 2, axis=1))


def _superposition_loss(params: dict[str, Array], batch: None) -> Float[Array, ""]:
    gram, bias = params["w"].T @ params["w"], params["b"][:, None]
    squared = _integral(gram, bias, lambda g, b, u: g**2 * u**3 / 3 + g * b * u**2 + b**2 * u)
    slope, offset = jnp.diagonal(gram), params["b"]
    crossed = _integral(slope, offset, lambda g, b, u: g * u**3 / 3 + b * u**2 / 2)
    return (len(offset) / 3 + jnp.sum(squared) - 2 * jnp.sum(crossed)) / len(offset)


def _integral(g: Array, b: Array, antiderivative: Callable[[Array, Array, Array], Array]) -> Array:
    """Integrate a polynomial of relu(g u + b) over the part of 0 < u < 1 where g u + b > 0."""
    g, b = jnp.broadcast_arrays(g, b)
    zero = jnp.clip(-b / jnp.where(g == 0, 1.0, g), 0.0, 1.0)
    low = jnp.where(g > 0, zero, 0.0)
    high = jnp.where(g > 0, 1.0, jnp.where(g < 0, zero, jnp.where(b > 0, 1.0, 0.0)))
    return antiderivative(g, b, high) - antiderivative(g, b, low)


def _polygon(corners: int, features: int) -> dict[str, np.ndarray]:
    """Find the length of the corners and the bias at which the loss of a regular polygon is critical, in float64."""
    from scipy.optimize import minimize

    angles = 2 * np.pi * np.arange(features) / corners
    live = np.arange(features) < corners
    directions = np.stack([np.cos(angles), np.sin(angles)]) * live

    def weights(x: Any) -> dict[str, Any]:
        return {"w": x[0] * directions, "b": jnp.where(live, x[1], -1.0)}

    with jax.enable_x64(True):
        loss = jax.jit(jax.value_and_grad(lambda x: _superposition_loss(weights(x), None)))
        found = minimize(lambda x: [np.asarray(y) for y in loss(x)], np.array([1.2, -0.4]), jac=True, options={"gtol": 1e-12})
        return {name: np.asarray(x) for name, x in weights(found.x).items()}


_NEGLIGIBLE = -40.0

_HERMITE = np.polynomial.hermite_e.hermegauss(64)
_NODES, _WEIGHTS = _HERMITE[0], _HERMITE[1] / np.sum(_HERMITE[1])


def _mixture_loss(params: Float[Array, "2"], batch: None) -> Float[Array, ""]:
    a, b = params
    return -jnp.sum(_WEIGHTS * jnp.log1p(a * jnp.expm1(b * _NODES - b**2 / 2)))


def _two_component_loss(params: Float[Array, "3"], batch: None) -> Float[Array, ""]:
    a, b, c = params
    first = jax.nn.log_sigmoid(a) + b * _NODES - b**2 / 2
    return -jnp.sum(_WEIGHTS * jnp.logaddexp(first, jax.nn.log_sigmoid(-a) + c * _NODES - c**2 / 2))

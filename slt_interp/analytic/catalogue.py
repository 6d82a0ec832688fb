"""The problems with exact answers, one of each kind and size that estimators are scored on: of the LLC, and of volumes."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import jax

from slt_interp.analytic.deep_linear import deep_linear
from slt_interp.analytic.networks import (
    dead_relu,
    gaussian_mixture,
    relu_unit,
    tanh_network,
    tanh_units,
    toy_superposition,
    two_component_mixture,
    vandermonde,
)
from slt_interp.analytic.problem import AnalyticProblem
from slt_interp.analytic.products import Product, monomial, power_sum, quadratic, sum_of_products
from slt_interp.analytic.surfaces import crossing_discs, cusp, double_well, hyperbola, linear_regression, ring
from slt_interp.bases import Ball, Box

_SINGULAR = Product((1, 1), (1, 1))
_REGULAR = Product((1,), (1,), 0.5)


class Problems(Mapping[str, AnalyticProblem]):
    """Problems by name, each built when it is first asked for: most who ask want a few, and all take seconds.

    >>> problems = Problems({"a": lambda: monomial([1, 1])})
    >>> problems["a"].name, problems["a"] is problems["a"]
    ('a', True)
    """

    def __init__(self, builders: Mapping[str, Callable[[], AnalyticProblem]]):
        self._builders, self._built = dict(builders), {}

    def __getitem__(self, name: str) -> AnalyticProblem:
        """Return a problem, the same object every time: what is compiled for its loss is then found again."""
        if name not in self._built:
            self._built[name] = replace(self._builders[name](), name=name)
        return self._built[name]

    def __iter__(self) -> Iterator[str]:
        """Go through the names."""
        return iter(self._builders)

    def __len__(self) -> int:
        """Count the problems."""
        return len(self._builders)

    def __contains__(self, name: object) -> bool:
        """Whether there is a problem of that name; asking builds none."""
        return name in self._builders


@functools.cache
def catalogue() -> Problems:
    """List the problems by name; random bases and data come from fixed keys.

    >>> problem = catalogue()["deep linear 10-10-10 of rank 1, smooth point"]
    >>> problem.rlct, problem.global_rlct
    (50.0, 40.0)
    """
    key = functools.partial(jax.random.fold_in, jax.random.key(0))
    return Problems(
        {
            "quadratic in 1 dimension": lambda: quadratic([1.0]),
            "quadratic in 10 dimensions": lambda: quadratic([1.0] * 10),
            "quadratic of rank 6 in 10 dimensions": lambda: quadratic(
                [100.0, 30.0, 10.0, 3.0, 1.0, 0.3] + [0.0] * 4, key=key(1)
            ),
            "quadratic in 100 dimensions": lambda: quadratic([10 ** (-3 * i / 99) for i in range(100)], key=key(2)),
            "quadratic in 1000 dimensions": lambda: quadratic([10 ** (-3 * i / 999) for i in range(1000)]),
            "quadratic of rank 2500 in 5000 dimensions": lambda: quadratic([1.0] * 2500 + [0.0] * 2500),
            "linear regression, 20 weights, 1000 examples": lambda: linear_regression(key(3), 1000, 20),
            "monomial w1^4": lambda: monomial([2]),
            "monomial w1^2 w2^2": lambda: monomial([1, 1]),
            "monomial w1^2 w2^4": lambda: monomial([1, 2]),
            "monomial w1^2 w2^6": lambda: monomial([1, 3]),
            "monomial w1^4 w2^4": lambda: monomial([2, 2]),
            "monomial w1^2 w2^2 w3^2": lambda: monomial([1, 1, 1]),
            "sum of w1^2, w2^4": lambda: power_sum([1, 2]),
            "line and plane, x^2 (y^2 + z^2)": lambda: sum_of_products([Product((1, 2), (1, 1))]),
            "crossing planes, |u|^2 |v|^2": lambda: sum_of_products([Product((2, 2), (1, 1))]),
            "crossing axes and a parabola, x^2 y^2 + z^2": lambda: sum_of_products([_SINGULAR, Product((1,), (1,))]),
            "10 singular blocks": lambda: sum_of_products([_SINGULAR] * 10, key=key(4)),
            "10 singular blocks and 20 regular directions": lambda: sum_of_products(
                [_SINGULAR] * 10 + [_REGULAR] * 20, key=key(5)
            ),
            "50 singular blocks": lambda: sum_of_products([_SINGULAR] * 50, key=key(6)),
            "500 singular blocks and 500 regular directions": lambda: sum_of_products([_SINGULAR] * 500 + [_REGULAR] * 500),
            "2500 singular blocks": lambda: sum_of_products([_SINGULAR] * 2500),
            "ring in 2 dimensions": lambda: ring(2),
            "ring in 20 dimensions": lambda: ring(20),
            "hyperbola": hyperbola,
            "double well": double_well,
            "cusp": cusp,
            "deep linear 1-1-1 of rank 0, deepest point": lambda: deep_linear(key(7), [1, 1, 1], 0),
            "deep linear 1-1-1-1 of rank 0, deepest point": lambda: deep_linear(key(8), [1, 1, 1, 1], 0),
            "deep linear 2-2-2 of rank 0, deepest point": lambda: deep_linear(key(9), [2, 2, 2], 0),
            "deep linear 3-2-2 of rank 0, deepest point": lambda: deep_linear(key(10), [3, 2, 2], 0),
            "deep linear 2-5-2 of rank 0, deepest point": lambda: deep_linear(key(11), [2, 5, 2], 0),
            "deep linear 5-5-5 of rank 2, deepest point": lambda: deep_linear(key(12), [5, 5, 5], 2),
            "deep linear 8-4-8 of rank 2, deepest point": lambda: deep_linear(key(13), [8, 4, 8], 2),
            "deep linear 10-10-10 of rank 1, deepest point": lambda: deep_linear(key(14), [10, 10, 10], 1),
            "deep linear 10-10-10 of rank 1, smooth point": lambda: deep_linear(key(15), [10, 10, 10], 1, point="smooth"),
            "deep linear 10-10-10-10 of rank 3, deepest point": lambda: deep_linear(key(16), [10, 10, 10, 10], 3),
            "deep linear 20-10-20 of rank 5, deepest point": lambda: deep_linear(key(17), [20, 10, 20], 5),
            "deep linear 20-30-20 of rank 5, smooth point": lambda: deep_linear(key(18), [20, 30, 20], 5, point="smooth"),
            "deep linear 30-30-30 of rank 10, deepest point": lambda: deep_linear(key(19), [30, 30, 30], 10),
            "deep linear 30-50-30 of rank 5, smooth point, 1000 examples": lambda: deep_linear(
                key(20), [30, 50, 30], 5, point="smooth", num_examples=1000
            ),
            "deep linear 70-70-70 of rank 20, smooth point": lambda: deep_linear(key(21), [70, 70, 70], 20, point="smooth"),
            "ReLU unit": relu_unit,
            "dead ReLU unit": dead_relu,
            "tanh network with 1 units": lambda: tanh_units(1),
            "tanh network with 2 units": lambda: tanh_units(2),
            "tanh network with 4 units": lambda: tanh_units(4),
            "Vandermonde with 2 units, gap 1": lambda: vandermonde(2),
            "Vandermonde with 6 units, gap 1": lambda: vandermonde(6),
            "tanh network 3-4-2, generic": lambda: tanh_network(key(22)),
            "Gaussian mixture, one mean fixed": gaussian_mixture,
            "Gaussian mixture of two components, truth of one": two_component_mixture,
            "superposition, 5-gon of 6 features": lambda: toy_superposition(5),
            "superposition, 6-gon of 6 features": lambda: toy_superposition(6),
        }
    )


@functools.cache
def volume_catalogue() -> Problems:
    """List problems with exact volumes by name: of each kind under a Gaussian base measure, in a box, in a ball.

    >>> problem = volume_catalogue()["x2y2_box_a2"]
    >>> problem.base, round(problem.log_volume(1e-4), 4)
    (Box(low=-2.0, high=2.0), -4.0468)
    """
    key = functools.partial(jax.random.fold_in, jax.random.key(1))
    unit = Box(-1.0, 1.0)
    return Problems(
        {
            "quad_iso_ball_d4": lambda: quadratic([2.0] * 4, base=Ball(0.0, 1.0)),
            "quad_iso_gauss_d10": lambda: quadratic([1.0] * 10),
            "quad_iso_gauss_d100": lambda: quadratic([1.0] * 100),
            "quad_aniso_box_d4": lambda: quadratic([1.0, 2.0, 5.0, 10.0], base=unit),
            "quad_rank3_gauss_d10": lambda: quadratic([1.0] * 3 + [0.0] * 7),
            "quartic_1d_box": lambda: monomial([2], in_box=True),
            "quartic_1d_gauss": lambda: monomial([2]),
            "x2_plus_y4_box": lambda: power_sum([1, 2], in_box=True),
            "x2_plus_y4_gauss": lambda: power_sum([1, 2]),
            "x2y2_box": lambda: monomial([1, 1], in_box=True),
            "x2y2_gauss": lambda: monomial([1, 1]),
            "x2y2_box_a2": lambda: sum_of_products([_SINGULAR], base=Box(-2.0, 2.0)),
            "xyz_sq_box": lambda: monomial([1, 1, 1], in_box=True),
            "x2y4_box": lambda: monomial([1, 2], in_box=True),
            "x2y2_plus_z2_box": lambda: sum_of_products([_SINGULAR, Product((1,), (1,))], base=unit),
            "ring_box_a2": lambda: ring(in_box=True),
            "ring_gauss": ring,
            "ab_minus1_box_a2": lambda: hyperbola(in_box=True),
            "ab_minus1_gauss": hyperbola,
            "u2v2_p2q2_gauss": lambda: sum_of_products([Product((2, 2), (1, 1))]),
            "u2v2_p2q2_balls": crossing_discs,
            "double_well_box_a2": double_well,
            "xyblocks_n10_q0_gauss": lambda: sum_of_products([_SINGULAR] * 10, key=key(1)),
            "xyblocks_n50_q0_gauss": lambda: sum_of_products([_SINGULAR] * 50, key=key(2)),
            "xyblocks_n10_q20_gauss": lambda: sum_of_products([_SINGULAR] * 10 + [_REGULAR] * 20, key=key(3)),
        }
    )

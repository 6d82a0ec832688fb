"""The problems with exact answers, one of each kind and size that estimators are scored on: of the LLC, and of volumes."""

import functools
from dataclasses import replace
from types import MappingProxyType

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


@functools.cache
def catalogue() -> MappingProxyType[str, AnalyticProblem]:
    """List the problems by name; random bases and data come from fixed keys.

    >>> problem = catalogue()["deep linear 10-10-10 of rank 1, smooth point"]
    >>> problem.rlct, problem.global_rlct
    (50.0, 40.0)
    """
    key = functools.partial(jax.random.fold_in, jax.random.key(0))
    problems = [
        quadratic([1.0], name="quadratic in 1 dimension"),
        quadratic([1.0] * 10),
        quadratic([100.0, 30.0, 10.0, 3.0, 1.0, 0.3] + [0.0] * 4, key=key(1), name="quadratic of rank 6 in 10 dimensions"),
        quadratic([10 ** (-3 * i / 99) for i in range(100)], key=key(2)),
        quadratic([10 ** (-3 * i / 999) for i in range(1000)]),
        quadratic([1.0] * 2500 + [0.0] * 2500, name="quadratic of rank 2500 in 5000 dimensions"),
        linear_regression(key(3), 1000, 20),
        monomial([2]),
        monomial([1, 1]),
        monomial([1, 2]),
        monomial([1, 3]),
        monomial([2, 2]),
        monomial([1, 1, 1]),
        power_sum([1, 2]),
        sum_of_products([Product((1, 2), (1, 1))], name="line and plane, x^2 (y^2 + z^2)"),
        sum_of_products([Product((2, 2), (1, 1))], name="crossing planes, |u|^2 |v|^2"),
        sum_of_products([_SINGULAR, Product((1,), (1,))], name="crossing axes and a parabola, x^2 y^2 + z^2"),
        sum_of_products([_SINGULAR] * 10, key=key(4), name="10 singular blocks"),
        sum_of_products([_SINGULAR] * 10 + [_REGULAR] * 20, key=key(5), name="10 singular blocks and 20 regular directions"),
        sum_of_products([_SINGULAR] * 50, key=key(6), name="50 singular blocks"),
        sum_of_products([_SINGULAR] * 500 + [_REGULAR] * 500, name="500 singular blocks and 500 regular directions"),
        sum_of_products([_SINGULAR] * 2500, name="2500 singular blocks"),
        ring(2),
        ring(20),
        hyperbola(),
        double_well(),
        cusp(),
        deep_linear(key(7), [1, 1, 1], 0),
        deep_linear(key(8), [1, 1, 1, 1], 0),
        deep_linear(key(9), [2, 2, 2], 0),
        deep_linear(key(10), [3, 2, 2], 0),
        deep_linear(key(11), [2, 5, 2], 0),
        deep_linear(key(12), [5, 5, 5], 2),
        deep_linear(key(13), [8, 4, 8], 2),
        deep_linear(key(14), [10, 10, 10], 1),
        deep_linear(key(15), [10, 10, 10], 1, point="smooth"),
        deep_linear(key(16), [10, 10, 10, 10], 3),
        deep_linear(key(17), [20, 10, 20], 5),
        deep_linear(key(18), [20, 30, 20], 5, point="smooth"),
        deep_linear(key(19), [30, 30, 30], 10),
        deep_linear(key(20), [30, 50, 30], 5, point="smooth", num_examples=1000),
        deep_linear(key(21), [70, 70, 70], 20, point="smooth"),
        relu_unit(),
        dead_relu(),
        tanh_units(1),
        tanh_units(2),
        tanh_units(4),
        vandermonde(2),
        vandermonde(6),
        tanh_network(key(22)),
        gaussian_mixture(),
        two_component_mixture(),
        toy_superposition(5),
        toy_superposition(6),
    ]
    return MappingProxyType({problem.name: problem for problem in problems})


@functools.cache
def volume_catalogue() -> MappingProxyType[str, AnalyticProblem]:
    """List problems with exact volumes by name: of each kind under a Gaussian base measure, in a box, in a ball.

    >>> problem = volume_catalogue()["x2y2_box_a2"]
    >>> problem.base, round(problem.log_volume(1e-4), 4)
    (Box(low=-2.0, high=2.0), -4.0468)
    """
    key = functools.partial(jax.random.fold_in, jax.random.key(1))
    unit, name = Box(-1.0, 1.0), "volume"
    problems = {
        "quad_iso_ball_d4": quadratic([2.0] * 4, base=Ball(0.0, 1.0)),
        "quad_iso_gauss_d10": quadratic([1.0] * 10),
        "quad_iso_gauss_d100": quadratic([1.0] * 100),
        "quad_aniso_box_d4": quadratic([1.0, 2.0, 5.0, 10.0], base=unit),
        "quad_rank3_gauss_d10": quadratic([1.0] * 3 + [0.0] * 7),
        "quartic_1d_box": monomial([2], in_box=True),
        "quartic_1d_gauss": monomial([2]),
        "x2_plus_y4_box": power_sum([1, 2], in_box=True),
        "x2_plus_y4_gauss": power_sum([1, 2]),
        "x2y2_box": monomial([1, 1], in_box=True),
        "x2y2_gauss": monomial([1, 1]),
        "x2y2_box_a2": sum_of_products([_SINGULAR], base=Box(-2.0, 2.0), name=name),
        "xyz_sq_box": monomial([1, 1, 1], in_box=True),
        "x2y4_box": monomial([1, 2], in_box=True),
        "x2y2_plus_z2_box": sum_of_products([_SINGULAR, Product((1,), (1,))], base=unit, name=name),
        "ring_box_a2": ring(in_box=True),
        "ring_gauss": ring(),
        "ab_minus1_box_a2": hyperbola(in_box=True),
        "ab_minus1_gauss": hyperbola(),
        "u2v2_p2q2_gauss": sum_of_products([Product((2, 2), (1, 1))], name=name),
        "u2v2_p2q2_balls": crossing_discs(),
        "double_well_box_a2": double_well(),
        "xyblocks_n10_q0_gauss": sum_of_products([_SINGULAR] * 10, key=key(1), name=name),
        "xyblocks_n50_q0_gauss": sum_of_products([_SINGULAR] * 50, key=key(2), name=name),
        "xyblocks_n10_q20_gauss": sum_of_products([_SINGULAR] * 10 + [_REGULAR] * 20, key=key(3), name=name),
    }
    return MappingProxyType({name: replace(problem, name=name) for name, problem in problems.items()})

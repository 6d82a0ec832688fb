"""Losses whose answers are known exactly: to test samplers and estimators, and to learn what they should say."""

from slt_interp.analytic.catalogue import catalogue, volume_catalogue
from slt_interp.analytic.deep_linear import deep_linear, deep_linear_local_rlct, deep_linear_rlct
from slt_interp.analytic.modules import coupled_modules
from slt_interp.analytic.networks import (
    dead_relu,
    gaussian_mixture,
    relu_unit,
    tanh_network,
    tanh_units,
    toy_superposition,
    two_component_mixture,
    vandermonde,
    vandermonde_rlct,
)
from slt_interp.analytic.problem import AnalyticProblem
from slt_interp.analytic.products import Product, monomial, power_sum, quadratic, sum_of_products
from slt_interp.analytic.surfaces import crossing_discs, cusp, double_well, hyperbola, linear_regression, ring

__all__ = [
    "AnalyticProblem",
    "Product",
    "catalogue",
    "coupled_modules",
    "crossing_discs",
    "cusp",
    "dead_relu",
    "deep_linear",
    "deep_linear_local_rlct",
    "deep_linear_rlct",
    "double_well",
    "gaussian_mixture",
    "hyperbola",
    "linear_regression",
    "monomial",
    "power_sum",
    "quadratic",
    "relu_unit",
    "ring",
    "sum_of_products",
    "tanh_network",
    "tanh_units",
    "toy_superposition",
    "two_component_mixture",
    "vandermonde",
    "vandermonde_rlct",
    "volume_catalogue",
]

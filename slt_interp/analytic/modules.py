"""Two small networks in one, whose inputs are correlated: does modularity broaden a basin, and does the Hessian see it."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from slt_interp.analytic.integrals import geometric_panels, panel_nodes, plane_mean
from slt_interp.analytic.problem import AnalyticProblem
from slt_interp.bases import Gaussian
from slt_interp.errors import InputError


def coupled_modules(coupling: float, *, product: float = 0.0) -> AnalyticProblem:
    """Make two linear networks of two hidden units, each with an input of its own, whose outputs add: 8 weights.

    L = 1/2 E[((a . b - t) x + (c . d - t) y)^2] for standard normal inputs x and y of correlation `coupling`, and teachers t =
    `product`. Uncorrelated inputs make two modules, each with its own equation; at correlation 1 only the sum of the outputs
    matters. At t = 0 the center is the origin, where the Hessian vanishes whatever the coupling; at t > 0 minima are smooth.

    The rlct is 1, or 1/2 at coupling 1. Energies and volumes (under N(0, I)) are known for t = 0, where a . b is Laplacian.

    >>> problem = coupled_modules(0.5)
    >>> round(problem.energy(1e4, 1.0), 3), round(problem.log_volume(1e-4), 3)
    (0.991, -8.629)

    Raises:
        InputError: if the coupling is not between 0 and 1, or the product negative.
    """
    if not 0 <= coupling <= 1:
        raise InputError(f"coupling must lie between 0 and 1, but is {coupling}: it is a correlation")
    if product < 0:
        raise InputError(f"product must be 0 or positive, but is {product}")

    def loss(p: float, q: np.ndarray) -> np.ndarray:
        # Without p^2 + 2 s p q + q^2, in which digits cancel at coupling 1.
        return 0.5 * ((q + coupling * p) ** 2 + (1 - coupling**2) * p**2)

    def energy(nbeta: float, localization: float) -> float:
        reach, width = 40 / localization, min(nbeta**-0.5, 1 / localization) / 4
        return plane_mean(
            lambda p, q: nbeta * loss(p, q),
            lambda p, q: -nbeta * loss(p, q) - localization * (abs(p) + np.abs(q)),
            geometric_panels([0.0], -reach, reach, width),
            lambda p: geometric_panels([-coupling * p, 0.0], -2 * reach, 2 * reach, width),
        )

    def log_volume(threshold: float) -> float:
        rest = 1 - coupling**2
        reach = min(40.0, np.sqrt(2 * threshold / rest)) if rest > 0 else 40.0
        # In the angle there is no square root at the end.
        angle, log_lengths = panel_nodes(np.linspace(0.0, np.pi / 2, 257))
        p = reach * np.sin(angle)
        half = np.sqrt(np.maximum(2 * threshold - rest * p**2, 0.0))
        mass = np.exp(-p) / 2 * (_laplace_cdf(half - coupling * p) - _laplace_cdf(-half - coupling * p))
        return float(np.log(2 * np.sum(np.exp(log_lengths) * reach * np.cos(angle) * mass)))

    is_known = product == 0
    module = jnp.sqrt(product) * jnp.array([[1.0, 0.0], [1.0, 0.0]])
    return AnalyticProblem(
        name=f"modules of product {product:g}, coupled by {coupling:g}",
        loss_fn=_coupled_modules,
        center={"first": module, "second": module},
        source="a . b has the Laplace density" if is_known else "half the rank at a smooth minimum",
        rlct=0.5 if coupling == 1 else 1.0,
        multiplicity=1,
        data={name: jnp.full(1, x, jnp.result_type(float)) for name, x in (("coupling", coupling), ("product", product))},
        energy=energy if is_known else None,
        base=Gaussian(0.0, 1.0) if is_known else None,
        log_volume=log_volume if is_known else None,
    )


def _coupled_modules(params: dict[str, Float[Array, "2 2"]], batch: dict[str, Float[Array, "1"]]) -> Float[Array, ""]:
    # Coupling and product are data, so that all problems are one compiled program.
    s, t = batch["coupling"][0], batch["product"][0]
    p, q = (jnp.dot(*params[name]) - t for name in ("first", "second"))
    return 0.5 * ((q + s * p) ** 2 + (1 - s**2) * p**2)


def _laplace_cdf(x: np.ndarray) -> np.ndarray:
    tail = np.exp(-np.abs(x)) / 2
    return np.where(x < 0, tail, 1 - tail)

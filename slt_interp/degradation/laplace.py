"""The Laplace approximation as a dial: draws of the Gaussian that has the loss's curvature at the weights."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key

from slt_interp.curvature.spectrum import DENSE_LIMIT, dense_hessian
from slt_interp.data import Batch
from slt_interp.degradation.dials import Degraded
from slt_interp.errors import InputError
from slt_interp.posterior import LossFn
from slt_interp.tree import Params, dimension


@dataclass(frozen=True)
class Laplace:
    """Draws of N(w*, (nbeta H + gamma)^-1), negative curvatures counted as flat; the level is nbeta. Make it by `at`.

    `scaled` gives the dial of one shape: draws at one nbeta, whose displacements are multiplied by the level. At matched loss
    it tells what a Gaussian of the right shape does from what the posterior does.
    """

    curvatures: Float[Array, " i"]
    directions: Float[Array, "i i"]
    localization: float
    nbeta: float | None = None

    @classmethod
    def at(cls, loss_fn: LossFn, params: Params, data: Batch, localization: float) -> "Laplace":
        """Decompose the Hessian of the loss on `data` at `params`.

        Raises:
            InputError: if there are more weights than `DENSE_LIMIT`, or the Hessian is not finite.
        """
        if dimension(params) > DENSE_LIMIT:
            raise InputError(
                f"Laplace draws decompose the Hessian of at most {DENSE_LIMIT} weights, but params has {dimension(params)}"
            )
        hessian, _ = dense_hessian(loss_fn, params, data)
        if not np.isfinite(hessian).all():
            raise InputError("the Hessian of the loss at params is not finite: check the loss there")
        curvatures, directions = np.linalg.eigh(hessian)
        return cls(jnp.asarray(np.maximum(curvatures, 0.0)), jnp.asarray(directions), localization)

    def scaled(self, nbeta: float) -> "Laplace":
        """Fix nbeta; the level is then the factor on displacements."""
        return replace(self, nbeta=nbeta)

    def draw(self, key: Key[Array, ""], params: Params, level: float, *, num_chains: int, num_draws: int) -> Degraded:
        """Draw around `params`."""
        flat, unravel = ravel_pytree(params)
        nbeta, factor = (level, 1.0) if self.nbeta is None else (self.nbeta, level)
        normal = jax.random.normal(key, (num_chains, num_draws, flat.size))
        displacements = factor * normal / jnp.sqrt(nbeta * self.curvatures + self.localization) @ self.directions.T
        return Degraded(jax.vmap(jax.vmap(unravel))(flat + displacements))

"""How much of its input a layer keeps: the coding rate of its activations."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.jit
def coding_rate(activations: Float[Array, "example unit"], distortion: float = 0.1) -> Float[Array, ""]:
    """Count the bits per example that describe Gaussian activations of this covariance up to an error.

    1/2 log2 det(1 + C / (distortion^2 tr C / d)) for the covariance C of d units: an upper bound on what activations of any
    distribution tell at this noise. It does not depend on their scale, and is 0 for activations that do not vary.

    Args:
        activations: of a layer, over examples.
        distortion: the error's standard deviation, as a part of the root mean square deviation of a unit.

    References:
        Ma, Derksen, Hong and Wright (2007), Segmentation of multivariate mixed data via lossy data coding and compression.

    >>> x = jnp.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    >>> round(float(coding_rate(x, distortion=0.5)), 4)  # log2(1 + 4)
    2.3219
    """
    centered = activations - activations.mean(axis=0)
    singular = jnp.linalg.svd(centered, compute_uv=False)
    total = jnp.sum(singular**2)
    share = singular**2 / jnp.where(total > 0, total, 1.0)
    return 0.5 * jnp.sum(jnp.log2(1 + share * activations.shape[1] / distortion**2))

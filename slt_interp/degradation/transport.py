"""Let an alignment follow activations that drift: between a frozen alignment and one that is fitted again.

It needs activations only, and no counterfactuals: what it brings back was turned, what only a refit brings back was changed.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from slt_interp.probes.interchange import Alignment


def transport(alignment: Alignment, before: Float[Array, "example width"], after: Float[Array, "example width"]) -> Alignment:
    """Turn an alignment as its activations have turned, by orthogonal Procrustes between centered activations.

    The turn R minimizes |before R - after|; what activations do not decide stays where it was.

    Args:
        alignment: of the network before.
        before: its activations at the alignment's site.
        after: those of another network on the same examples.

    References:
        Schönemann (1966), A generalized solution of the orthogonal Procrustes problem.

    >>> import jax
    >>> before, turn = jax.random.normal(jax.random.key(0), (9, 2)), jnp.array([[0.0, 1.0], [-1.0, 0.0]])
    >>> moved = transport(Alignment(jnp.eye(2), jnp.eye(2)), before, before @ turn)
    >>> jnp.round(moved.rotation, 3).tolist()
    [[0.0, -1.0], [1.0, 0.0]]
    """
    likeness = (before - before.mean(axis=0)).T @ (after - after.mean(axis=0))
    # The smallest preference for no turn, or where activations do not vary any turn would do.
    left, _, right = jnp.linalg.svd(likeness + _STAY * jnp.linalg.norm(likeness) * jnp.eye(len(likeness)))
    return Alignment((left @ right).T @ alignment.rotation, alignment.masks)


_STAY = 1e-5

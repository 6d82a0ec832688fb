"""Dials that damage a network as compression does: pruning, quantization, low rank; and its own checkpoints.

They have no randomness: each level is one network, with axes (1, 1). Replicates are networks trained apart.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, PyTree

from slt_interp.degradation.dials import Degraded
from slt_interp.errors import InputError
from slt_interp.posterior import LossFn
from slt_interp.tree import Params

Saliency = Callable[[Params], Params]
"""`(params) -> pytree like params`, larger for weights that matter more."""


def magnitude(params: Params) -> Params:
    """Take the size of each weight for its saliency.

    >>> magnitude(jnp.array([-2.0, 1.0])).tolist()
    [2.0, 1.0]
    """
    return jax.tree.map(jnp.abs, params)


def fisher_saliency(loss_fn: LossFn, data: PyTree[Array]) -> Saliency:
    """Make the saliency w^2 F / 2, F the mean square of each example's gradient: about what the loss gains when w is set to 0.

    That holds where `loss_fn` is the negative log-likelihood of labels that were observed (F is the empirical Fisher). Of the
    KL to the network's own outputs every example's gradient is 0 at its weights, and so is this.

    References:
        LeCun, Denker and Solla (1989), Optimal brain damage.
        Theis et al. (2018), Faster gaze prediction with dense networks and Fisher pruning, arXiv:1801.05787.
    """

    @jax.jit
    def saliency(params: Params) -> Params:
        def squares(example: PyTree[Array]) -> Params:
            gradient = jax.grad(loss_fn)(params, jax.tree.map(lambda x: x[None], example))
            return jax.tree.map(jnp.square, gradient)

        fisher = jax.tree.map(lambda x: x.mean(axis=0), jax.lax.map(squares, data, batch_size=64))
        return jax.tree.map(lambda w, f: w**2 * f / 2, params, fisher)

    return saliency


@dataclass(frozen=True)
class Pruning:
    """Set the least salient weights of all matrices together to 0; the level is their share, from 0 to 1. Biases stay.

    Args:
        saliency: `magnitude`, or what `fisher_saliency` makes.

    >>> pruned = Pruning().draw(jax.random.key(0), {"w": jnp.array([[3.0, -1.0], [2.0, 4.0]])}, 0.5, num_chains=1, num_draws=1)
    >>> pruned.params["w"][0, 0].tolist()
    [[3.0, 0.0], [0.0, 4.0]]
    """

    saliency: Saliency = magnitude

    def draw(self, key: Key[Array, ""], params: Params, level: float, *, num_chains: int, num_draws: int) -> Degraded:
        """Prune."""
        del key, num_chains, num_draws
        _check_share(level)
        saliency = self.saliency(params)
        leaves, structure = jax.tree.flatten(params)
        which = [i for i, w in enumerate(leaves) if w.ndim >= 2]
        if not which:
            raise InputError("params has no matrices to prune: give arrays of two or more axes")
        ranked = jnp.concatenate([jax.tree.leaves(saliency)[i].ravel() for i in which])
        # By rank: of equally salient weights no more go than asked for.
        places = jnp.argsort(jnp.argsort(ranked))
        kept = jnp.split(places >= round(level * len(ranked)), np.cumsum([leaves[i].size for i in which])[:-1])
        for i, mask in zip(which, kept, strict=True):
            leaves[i] = jnp.where(mask.reshape(leaves[i].shape), leaves[i], 0.0)
        return _single(jax.tree.unflatten(structure, leaves))


@dataclass(frozen=True)
class Quantization:
    """Round every weight to a grid around 0; the level is its step in units of the largest weight of the array.

    Symmetric quantization to b bits has the step 1 / (2^(b - 1) - 1).

    >>> rounded = Quantization().draw(jax.random.key(0), jnp.array([0.3, -1.0, 0.8]), 0.5, num_chains=1, num_draws=1)
    >>> rounded.params[0, 0].tolist()
    [0.5, -1.0, 1.0]
    """

    def draw(self, key: Key[Array, ""], params: Params, level: float, *, num_chains: int, num_draws: int) -> Degraded:
        """Round."""
        del key, num_chains, num_draws

        def rounded(w: Array) -> Array:
            step = level * jnp.abs(w).max()
            return jnp.where(step > 0, jnp.round(w / jnp.where(step > 0, step, 1.0)) * step, w)

        return _single(jax.tree.map(rounded, params))


@dataclass(frozen=True)
class LowRank:
    """Leave out the smallest singular values of every matrix; the level is the share of its squared norm that may go with them.

    >>> cut = LowRank().draw(jax.random.key(0), jnp.diag(jnp.array([3.0, 1.0])), 0.1, num_chains=1, num_draws=1)
    >>> cut.params[0, 0].round(5).tolist()
    [[3.0, 0.0], [0.0, 0.0]]
    """

    def draw(self, key: Key[Array, ""], params: Params, level: float, *, num_chains: int, num_draws: int) -> Degraded:
        """Truncate; arrays of other than two axes stay."""
        del key, num_chains, num_draws
        _check_share(level)

        def truncated(w: Array) -> Array:
            left, values, right = jnp.linalg.svd(w, full_matrices=False)
            # What would go with this value and all smaller ones; rounding must not keep what is no part of the norm.
            below = jnp.cumsum(values[::-1] ** 2)[::-1]
            return (left * jnp.where(below > level * below[0] * (1 + 1e-6), values, 0.0)) @ right

        return _single(jax.tree.map(lambda w: truncated(w) if w.ndim == 2 else w, params))


@dataclass(frozen=True)
class Checkpoints:
    """The network as it was: the level is a step of training, and the last checkpoint up to it is taken.

    Attributes:
        steps: increasing.
        checkpoints: weights with a leading axis like `steps`, as `train` returns them.
    """

    steps: Int[Array, " checkpoint"]
    checkpoints: Params

    def draw(self, key: Key[Array, ""], params: Params, level: float, *, num_chains: int, num_draws: int) -> Degraded:
        """Look the checkpoint up; `params` are not used."""
        del key, params, num_chains, num_draws
        if level < self.steps[0]:
            raise InputError(f"there is no checkpoint up to step {level:g}: the first is that of step {int(self.steps[0])}")
        last = int(jnp.searchsorted(jnp.asarray(self.steps), level, side="right")) - 1
        return _single(jax.tree.map(lambda x: x[last], self.checkpoints))


def _single(params: Params) -> Degraded:
    return Degraded(jax.tree.map(lambda x: x[None, None], params))


def _check_share(level: float) -> None:
    if not 0 <= level <= 1:
        raise InputError(f"the level is a share, from 0 to 1, but is {level}")

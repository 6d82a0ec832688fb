"""Distributed alignment search: find the directions of an activation that carry given causal variables.

A rotation R is fitted by gradient descent so that interchange interventions along its first columns make the network
answer as the causal model does (Geiger et al. 2023, arXiv:2303.02536, section 3). R = R_0 Cayley(A) with A
skew-symmetric and R_0 a random rotation: orthogonal to rounding at every step.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from slt_interp.data import Counterfactuals
from slt_interp.probes.interchange import Alignment, block_masks, check_site, interchange
from slt_interp.taps import Network, record
from slt_interp.tree import Params


@dataclass(frozen=True)
class AlignmentFit:
    """What the search found.

    Attributes:
        alignment: the best of the restarts on held-out examples.
        restart_iia: held-out interchange intervention accuracy of every restart.
    """

    alignment: Alignment
    restart_iia: Float[np.ndarray, " restart"]


def random_rotations(key: Key[Array, ""], count: int, width: int) -> Float[Array, "count width width"]:
    """Draw orthogonal matrices uniformly (Haar measure; Mezzadri 2007, arXiv:math-ph/0609050).

    >>> r = random_rotations(jax.random.key(0), 1, 3)[0]
    >>> bool(jnp.allclose(r @ r.T, jnp.eye(3), atol=1e-6))
    True
    """
    # Drawn flat (jax.random.orthogonal does not): XLA compiles a generator of several axes many times slower.
    normal = jax.random.normal(key, (count * width * width,)).reshape(count, width, width)
    q, r = jnp.linalg.qr(normal)
    return q * jnp.sign(jnp.diagonal(r, axis1=1, axis2=2))[:, None, :]


def cayley(free: Float[Array, "width width"]) -> Float[Array, "width width"]:
    """Map any square matrix to a rotation: (I + A)^-1 (I - A) with A its skew-symmetric part; 0 maps to I.

    >>> cayley(jnp.zeros((2, 2))).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    skew = 0.5 * (free - free.T)
    identity = jnp.eye(len(free), dtype=free.dtype)
    return jnp.linalg.solve(identity + skew, identity - skew)


def fit_alignment(
    key: Key[Array, ""],
    network: Network,
    params: Params,
    site: str,
    sizes: tuple[int, ...],
    counterfactuals: Callable[[Key[Array, ""], int], Counterfactuals],
    *,
    num_steps: int = 1000,
    num_restarts: int = 3,
    batch_size: int = 512,
    held_out: int = 4096,
    learning_rate: float = 1e-2,
) -> AlignmentFit:
    """Fit a linear alignment at one site of a frozen network.

    Args:
        key: for starts, training examples and held-out examples.
        network: anything with `apply` and `sites`.
        params: its weights, which are not changed.
        site: where to intervene.
        sizes: for each variable, the number of directions it may have.
        counterfactuals: `(key, size) -> Counterfactuals`, a plain function.
        num_steps: Adam steps, with a learning rate that falls to 0 along a cosine.
        num_restarts: independent starts, run under vmap; the best on held-out examples wins.
        batch_size: fresh examples per step.
        held_out: examples that judge the restarts.
        learning_rate: Adam's.

    Raises:
        ValueError: if the network has no such site, or the sizes do not fit in it.
    """
    check_site(network, site)
    shapes = jax.eval_shape(lambda p, k: record(network, p, counterfactuals(k, 1).base)[1][site], params, key)
    masks = block_masks(sizes, shapes.shape[-1])
    keys = jax.random.split(key, num_restarts + 1)
    examples = counterfactuals(keys[0], held_out)
    rotations, iia = _search(
        keys[1:], network, params, site, masks, examples, counterfactuals, num_steps, batch_size, learning_rate
    )
    best = int(np.argmax(np.asarray(iia)))
    return AlignmentFit(Alignment(rotations[best], masks), np.asarray(iia))


@functools.partial(jax.jit, static_argnames=("network", "site", "counterfactuals", "num_steps", "batch_size"))
def refit_alignment(
    key: Key[Array, ""],
    network: Network,
    params: Params,
    site: str,
    alignment: Alignment,
    counterfactuals: Callable[[Key[Array, ""], int], Counterfactuals],
    *,
    units: Float[Array, " width"] | None = None,
    num_steps: int = 150,
    batch_size: int = 512,
    learning_rate: float = 1e-2,
) -> Alignment:
    """Let a frozen alignment follow a network that has moved: a short search from where it is. Maps over weights.

    Args:
        key: for training examples.
        network: anything with `apply` and `sites`.
        params: its weights.
        site: where the alignment is.
        alignment: what to start from; its masks stay.
        counterfactuals: `(key, size) -> Counterfactuals`, a plain function.
        units: 1 at the units among which directions may turn, all if not given; a planted twin is confined to its own, or it
            would find the genuine circuit beside it.
        num_steps: Adam steps, with a learning rate that falls to 0 along a cosine.
        batch_size: fresh examples per step.
        learning_rate: Adam's.

    Raises:
        InputError: if there is no such site, or the alignment does not fit it.
    """
    among = jnp.ones(alignment.rotation.shape) if units is None else jnp.outer(units, units)

    def rotated(free: Array) -> Alignment:
        return Alignment(cayley(among * free) @ alignment.rotation, alignment.masks)

    free = _descend(key, network, params, site, rotated, len(among), counterfactuals, num_steps, batch_size, learning_rate)
    return rotated(free)


@functools.partial(jax.jit, static_argnames=("network", "site", "counterfactuals", "num_steps", "batch_size"))
def _search(
    keys: Key[Array, " restart"],
    network: Network,
    params: Params,
    site: str,
    masks: Float[Array, "variable width"],
    examples: Counterfactuals,
    counterfactuals: Callable,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
) -> tuple[Float[Array, "restart width width"], Float[Array, " restart"]]:
    def one(key: Key[Array, ""]) -> tuple[Array, Array]:
        start_key, data_key = jax.random.split(key)
        start = random_rotations(start_key, 1, masks.shape[1])[0]

        def rotated(free: Array) -> Alignment:
            return Alignment(start @ cayley(free), masks)

        free = _descend(
            data_key, network, params, site, rotated, masks.shape[1], counterfactuals, num_steps, batch_size, learning_rate
        )
        rotation, _ = rotated(free)
        logits = interchange(network, params, site, Alignment(rotation, masks), examples)
        return rotation, jnp.mean(logits.argmax(axis=-1) == examples.labels)

    return jax.vmap(one)(keys)


def _descend(
    key: Key[Array, ""],
    network: Network,
    params: Params,
    site: str,
    rotated: Callable[[Float[Array, "width width"]], Alignment],
    width: int,
    counterfactuals: Callable,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
) -> Float[Array, "width width"]:
    """Lower the cross-entropy to counterfactual labels from free = 0, where `rotated` is the start."""
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))

    def loss(free: Array, batch: Counterfactuals) -> Array:
        logits = interchange(network, params, site, rotated(free), batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

    def step(t: Array, carry: tuple) -> tuple:
        free, state = carry
        batch = counterfactuals(jax.random.fold_in(key, t), batch_size)
        updates, state = optimizer.update(jax.grad(loss)(free, batch), state)
        return optax.apply_updates(free, updates), state

    zero = jnp.zeros((width, width))
    free, _ = jax.lax.fori_loop(0, num_steps, step, (zero, optimizer.init(zero)))
    return free

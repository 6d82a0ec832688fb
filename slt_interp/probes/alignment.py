"""Distributed alignment search: find the directions of an activation that carry given causal variables.

A map is fitted by gradient descent so that interchange interventions at its first coordinates make the network answer as the
causal model does (Geiger et al. 2023, arXiv:2303.02536, section 3). What is searched over is a `Family`. That of the paper are
the rotations, R = R_0 Cayley(A) with A skew-symmetric and R_0 a random rotation: orthogonal to rounding at every step. Wider
families reach more, and mean less: a map that is wide enough finds anything anywhere.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from slt_interp.data import Counterfactuals
from slt_interp.errors import InputError
from slt_interp.probes.descent import Loss, descend
from slt_interp.probes.interchange import Alignment, AnyAlignment, block_masks, check_site, interchange
from slt_interp.taps import Network, record
from slt_interp.tree import Params, register_dataclass

Masks = Float[Array, "variable width"]

_Kind = TypeVar("_Kind", bound=AnyAlignment, covariant=True)


class Family(Protocol[_Kind]):
    """What a search is over: a pytree of its settings, whose methods are pure."""

    def start(self, key: Key[Array, ""], masks: Masks) -> Any:
        """Draw where a search starts, a pytree of floating arrays."""
        ...

    def alignment(self, found: Any, masks: Masks, done: Float[Array, ""]) -> _Kind:
        """Make the alignment; `done`, from 0 to 1, is the share of the search that is over, and 1 at its end only."""
        ...

    def penalty(self, found: Any) -> Float[Array, ""]:
        """Say what is added to the loss, nats."""
        ...


@dataclass(frozen=True)
class AlignmentFit(Generic[_Kind]):
    """What the search found.

    Attributes:
        alignment: the best of the restarts on held-out examples.
        restart_iia: held-out interchange intervention accuracy of every restart. A few good ones among many bad say that the
            search is hard. All bad do not say that there is nothing: at the inputs of hierarchical equality there are exact
            alignments, which 20 restarts miss.
    """

    alignment: _Kind
    restart_iia: Float[np.ndarray, " restart"]


class Turn(NamedTuple):
    """A rotation on its way from where it starts, which stays."""

    start: Float[Array, "width width"]
    free: Float[Array, "width width"]

    def rotation(self) -> Float[Array, "width width"]:
        """Turn the start."""
        return jax.lax.stop_gradient(self.start) @ cayley(self.free)


def random_turn(key: Key[Array, ""], width: int) -> Turn:
    """Start from a rotation drawn uniformly."""
    return Turn(random_rotations(key, 1, width)[0], jnp.zeros((width, width)))


@functools.partial(register_dataclass, data_fields=[], meta_fields=[])
@dataclass(frozen=True)
class Rotations:
    """The family of all rotations."""

    def start(self, key: Key[Array, ""], masks: Masks) -> Turn:
        """Start from a rotation drawn uniformly."""
        return random_turn(key, masks.shape[1])

    def alignment(self, found: Turn, masks: Masks, done: Float[Array, ""]) -> Alignment:
        """Turn it."""
        del done
        return Alignment(found.rotation(), masks)

    def penalty(self, found: Turn) -> Float[Array, ""]:
        """Prefer none."""
        del found
        return jnp.zeros(())


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
    family: Family[_Kind] = Rotations(),
    num_steps: int = 1000,
    num_restarts: int = 3,
    batch_size: int = 512,
    held_out: int = 4096,
    learning_rate: float = 1e-2,
) -> AlignmentFit[_Kind]:
    """Fit an alignment at one site of a frozen network.

    Args:
        key: for starts, training examples and held-out examples.
        network: anything with `apply` and `sites`.
        params: its weights, which are not changed.
        site: where to intervene.
        sizes: for each variable, the number of directions it may have.
        counterfactuals: `(key, size) -> Counterfactuals`, a plain function.
        family: what to search over.
        num_steps: Adam steps, with a learning rate that falls to 0 along a cosine.
        num_restarts: independent starts, run under vmap; the best on held-out examples wins.
        batch_size: fresh examples per step.
        held_out: examples that judge the restarts.
        learning_rate: Adam's.

    Raises:
        InputError: if the network has no such site, or the sizes do not fit in it.
    """
    draws = jax.tree.map(lambda w: w[None], params)
    settings = (num_steps, num_restarts, batch_size, held_out, learning_rate)
    return _fit(key, network, draws, site, sizes, counterfactuals, family, *settings)


def fit_robust_alignment(
    key: Key[Array, ""],
    network: Network,
    draws: Params,
    site: str,
    sizes: tuple[int, ...],
    counterfactuals: Callable[[Key[Array, ""], int], Counterfactuals],
    *,
    family: Family[_Kind] = Rotations(),
    num_steps: int = 1000,
    num_restarts: int = 3,
    batch_size: int = 512,
    held_out: int = 4096,
    learning_rate: float = 1e-2,
) -> AlignmentFit[_Kind]:
    """Fit one alignment to all draws at once: what it finds is not an accident of one weight vector.

    The loss is averaged over draws, and so is the accuracy of restarts.

    Args:
        key: as for `fit_alignment`, and so for all that is not named here.
        network: its.
        draws: weights with leading axes (chain, draw).
        site: its.
        sizes: its.
        counterfactuals: its.
        family: its.
        num_steps: its.
        num_restarts: its.
        batch_size: fresh examples per step, divided evenly among the draws (rounded up).
        held_out: examples on which every draw is judged.
        learning_rate: its.

    Raises:
        InputError: as `fit_alignment`, and if draws have no leading axes.
    """
    if len({jnp.shape(leaf)[:2] for leaf in jax.tree.leaves(draws)}) != 1:
        raise InputError(
            "draws must have the same leading axes (chain, draw) in every leaf: give `Draws.collected` of a run with "
            "`collect=keep_params`, or use fit_alignment for one weight vector"
        )
    flat = jax.tree.map(lambda w: w.reshape(-1, *w.shape[2:]), draws)
    settings = (num_steps, num_restarts, batch_size, held_out, learning_rate)
    return _fit(key, network, flat, site, sizes, counterfactuals, family, *settings)


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
    nearby = _Nearby(alignment.rotation, among)
    loss = _loss(network, jax.tree.map(lambda w: w[None], params), site, nearby, alignment.masks, counterfactuals, batch_size)
    free, _ = descend(key, loss, jnp.zeros(among.shape), num_steps=num_steps, learning_rate=learning_rate)
    return nearby.alignment(free, alignment.masks, jnp.ones(()))


class _Nearby(NamedTuple):
    """The family of rotations in reach of one, among some units."""

    rotation: Float[Array, "width width"]
    among: Float[Array, "width width"]

    def start(self, key: Key[Array, ""], masks: Masks) -> Float[Array, "width width"]:
        del key, masks
        return jnp.zeros(self.among.shape)

    def alignment(self, found: Float[Array, "width width"], masks: Masks, done: Float[Array, ""]) -> Alignment:
        del done
        return Alignment(cayley(self.among * found) @ self.rotation, masks)

    def penalty(self, found: Float[Array, "width width"]) -> Float[Array, ""]:
        del found
        return jnp.zeros(())


def _fit(
    key: Key[Array, ""],
    network: Network,
    draws: Params,
    site: str,
    sizes: tuple[int, ...],
    counterfactuals: Callable,
    family: Family[_Kind],
    num_steps: int,
    num_restarts: int,
    batch_size: int,
    held_out: int,
    learning_rate: float,
) -> AlignmentFit[_Kind]:
    check_site(network, site)
    params = jax.tree.map(lambda w: w[0], draws)
    shapes = jax.eval_shape(lambda p, k: record(network, p, counterfactuals(k, 1).base)[1][site], params, key)
    masks = block_masks(sizes, shapes.shape[-1])
    keys = jax.random.split(key, num_restarts + 1)
    examples = counterfactuals(keys[0], held_out)
    alignments, iia = _search(
        keys[1:], network, draws, site, masks, examples, counterfactuals, family, num_steps, batch_size, learning_rate
    )
    best = int(np.argmax(np.asarray(iia)))
    return AlignmentFit(jax.tree.map(lambda x: x[best], alignments), np.asarray(iia))


@functools.partial(jax.jit, static_argnames=("network", "site", "counterfactuals", "num_steps", "batch_size"))
def _search(
    keys: Key[Array, " restart"],
    network: Network,
    draws: Params,
    site: str,
    masks: Masks,
    examples: Counterfactuals,
    counterfactuals: Callable,
    family: Family[_Kind],
    num_steps: int,
    batch_size: int,
    learning_rate: float,
) -> tuple[_Kind, Float[Array, " restart"]]:
    loss = _loss(network, draws, site, family, masks, counterfactuals, batch_size)

    def one(key: Key[Array, ""]) -> tuple[_Kind, Array]:
        start_key, data_key = jax.random.split(key)
        start = family.start(start_key, masks)
        found, _ = descend(data_key, loss, start, num_steps=num_steps, learning_rate=learning_rate)
        alignment = family.alignment(found, masks, jnp.ones(()))

        def iia(params: Params) -> Float[Array, ""]:
            logits = interchange(network, params, site, alignment, examples)
            return jnp.mean(logits.argmax(axis=-1) == examples.labels)

        return alignment, jax.lax.map(iia, draws).mean()

    return jax.vmap(one)(keys)


def _loss(
    network: Network, draws: Params, site: str, family: Family, masks: Masks, counterfactuals: Callable, batch_size: int
) -> Loss:
    """Make the cross-entropy to counterfactual labels, averaged over draws that share the examples of a step."""
    num_draws = jax.tree.leaves(draws)[0].shape[0]
    each = -(-batch_size // num_draws)

    def loss(found: Any, key: Key[Array, ""], done: Float[Array, ""]) -> Float[Array, ""]:
        alignment = family.alignment(found, masks, done)

        def one(params: Params, batch: Counterfactuals) -> Float[Array, ""]:
            logits = interchange(network, params, site, alignment, batch)
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

        drawn = counterfactuals(key, num_draws * each)
        if num_draws == 1:
            # Mapped over one draw, XLA's program costs twice as much.
            missed = one(jax.tree.map(lambda w: w[0], draws), drawn)
        else:
            batches = jax.tree.map(lambda x: x.reshape(num_draws, each, *x.shape[1:]), drawn)
            missed = jax.vmap(one)(draws, batches).mean()
        return missed + family.penalty(found)

    return loss

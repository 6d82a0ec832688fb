"""Training with optax: a jitted loop that keeps checkpoints on a log schedule, and a polish to a nearby minimum."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key
from tqdm.auto import tqdm

from slt_interp.data import Batch
from slt_interp.posterior import LossFn
from slt_interp.tree import Params, norm


@dataclass(frozen=True)
class Training:
    """What `train` kept.

    Attributes:
        params: final weights.
        steps: steps at which checkpoints were kept, 0 and the last included.
        checkpoints: weights at those steps, a pytree with a leading axis.
        losses: minibatch loss at every step, nats per example.
    """

    params: Params
    steps: Int[np.ndarray, " checkpoint"]
    checkpoints: Params
    losses: Float[np.ndarray, " step"]


def log_schedule(num_steps: int, num_checkpoints: int) -> Int[np.ndarray, " checkpoint"]:
    """Space steps evenly in their logarithm, from 0 and 1 to num_steps, without repeats.

    >>> log_schedule(1000, 5).tolist()
    [0, 1, 10, 100, 1000]
    """
    return np.unique(np.concatenate([[0], np.geomspace(1, num_steps, num_checkpoints - 1).round()])).astype(int)


def train(
    key: Key[Array, ""],
    loss_fn: LossFn,
    params: Params,
    batches: Callable[[Key[Array, ""]], Batch],
    optimizer: optax.GradientTransformation,
    *,
    num_steps: int,
    num_checkpoints: int = 20,
    progress: bool = True,
) -> Training:
    """Minimize the loss by an optax optimizer.

    Args:
        key: step t uses fold_in(key, t) for its batch.
        loss_fn: `(params, batch) -> scalar`, nats per example.
        params: initial weights.
        batches: `(key) -> batch`, registered as a pytree.
        optimizer: an optax gradient transformation.
        num_steps: steps to make.
        num_checkpoints: how many weights to keep, on a log schedule.
        progress: whether to show a progress bar.
    """
    schedule = log_schedule(num_steps, num_checkpoints)
    state, checkpoints, losses = optimizer.init(params), [params], []
    with tqdm(total=num_steps, desc="train", unit="step", disable=not progress, leave=False) as bar:
        for start, stop in itertools.pairwise(schedule):
            for begin in range(start, stop, _SEGMENT):
                count = min(_SEGMENT, stop - begin)
                params, state, part = _segment(key, loss_fn, params, state, batches, optimizer, begin, count)
                losses.append(np.asarray(part)[:count])
                bar.set_postfix_str(f"loss {losses[-1][-1]:.4g}")
                bar.update(count)
            checkpoints.append(params)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *checkpoints)
    return Training(params, schedule, stacked, np.concatenate(losses))


@dataclass(frozen=True)
class Polish:
    """What `polish` did: weights, and loss (nats), gradient norm before and after, and how far it moved."""

    params: Params
    loss_before: float
    loss_after: float
    grad_norm_before: float
    grad_norm_after: float
    distance: float


def polish(loss_fn: LossFn, params: Params, data: Batch, *, num_steps: int) -> Polish:
    """Move to a nearby minimum of the full-data loss by L-BFGS (optax's, with a zoom line search).

    An LLC is defined at a minimum; weights after minibatch training are none. The weights returned are the last ones,
    which have the lowest loss: the line search never accepts an increase.
    """
    before, gradient = _value_and_grad(loss_fn, params, data)
    polished = _minimize(loss_fn, params, data, num_steps)
    after, gradient_after = _value_and_grad(loss_fn, polished, data)
    moved = norm(jax.tree.map(jnp.subtract, polished, params))
    return Polish(polished, float(before), float(after), float(norm(gradient)), float(norm(gradient_after)), float(moved))


_SEGMENT = 256
"""Steps between two looks of the host."""


@functools.partial(jax.jit, static_argnames=("loss_fn", "optimizer"))
def _segment(
    key: Key[Array, ""],
    loss_fn: LossFn,
    params: Params,
    state: Any,
    batches: Callable,
    optimizer: optax.GradientTransformation,
    start: int,
    count: int,
) -> tuple[Params, Any, Float[Array, " step"]]:
    """Make `count` steps, a number that is data, so that every segment is the same program."""

    def step(i: Array, carry: tuple) -> tuple:
        params, state, losses = carry
        batch = batches(jax.random.fold_in(key, start + i))
        loss, gradient = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, losses.at[i].set(loss)

    return jax.lax.fori_loop(0, count, step, (params, state, jnp.zeros(_SEGMENT)))


@functools.partial(jax.jit, static_argnames="loss_fn")
def _value_and_grad(loss_fn: LossFn, params: Params, data: Batch) -> tuple[Float[Array, ""], Params]:
    return jax.value_and_grad(loss_fn)(params, data)


@functools.partial(jax.jit, static_argnames=("loss_fn", "num_steps"))
def _minimize(loss_fn: LossFn, params: Params, data: Batch, num_steps: int) -> Params:
    def loss(params: Params) -> Float[Array, ""]:
        return loss_fn(params, data)

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        params, state = carry
        value, gradient = value_and_grad(params, state=state)
        updates, state = optimizer.update(gradient, state, params, value=value, grad=gradient, value_fn=loss)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=num_steps)
    return params

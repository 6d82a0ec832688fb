"""The one loop by which probes fit something: Adam on ever new examples, jitted and mapped by whoever calls it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

Loss = Callable[[Any, Key[Array, ""], Float[Array, ""]], Float[Array, ""]]
"""`(found, key, done) -> scalar` to be lowered; `done`, from 0 to 1, is the share of steps that have been made."""


def descend(
    key: Key[Array, ""], loss: Loss, start: Any, *, num_steps: int, learning_rate: float, stop_after: int | None = None
) -> tuple[Any, Float[Array, " step"]]:
    """Lower a loss by Adam, whose learning rate falls to 0 along a cosine.

    Args:
        key: step t uses fold_in(key, t).
        loss: pure; draws its examples by the key.
        start: a pytree of floating arrays.
        num_steps: steps to make.
        stop_after: end after so many of them: a checkpoint on the way of the same descent.
        learning_rate: Adam's at the start.

    Returns:
        What `start` has become, and the loss before every step.

    >>> found, losses = descend(
    ...     jax.random.key(0), lambda x, key, done: (x - 3.0) ** 2, jnp.zeros(()), num_steps=200, learning_rate=0.1
    ... )
    >>> round(float(found), 2), float(losses[0])
    (3.0, 9.0)
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))

    def step(carry: tuple, t: Array) -> tuple[tuple, Array]:
        found, state = carry
        value, gradient = jax.value_and_grad(loss)(found, jax.random.fold_in(key, t), t / num_steps)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(found, updates), state), value

    (found, _), losses = jax.lax.scan(
        step, (start, optimizer.init(start)), jnp.arange(num_steps if stop_after is None else stop_after)
    )
    return found, losses

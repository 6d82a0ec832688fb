"""The bridge from `llc_accuracy.py` to devinterp in another interpreter (`llc_peer.py`), which asks for losses and gradients.

Losses of the catalogue are JAX functions, and devinterp samples torch modules. Restating each in torch could restate it
wrongly; here both sample the same function, and the interpreter of the peer needs torch and devinterp only.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from slt_interp.analytic import AnalyticProblem

LossAndGradient = Callable[[Float[np.ndarray, " dimension"]], Float[Array, " dimension_and_1"]]


@contextmanager
def connect(python: str | None) -> Iterator[Connection | None]:
    """Start `llc_peer.py` where there is an interpreter for it; it ends with the connection."""
    if python is None:
        yield None
        return
    ours, theirs = Pipe()
    command = [python, str(Path(__file__).with_name("llc_peer.py")), str(theirs.fileno())]
    # What libraries print must not get into the table.
    with subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=sys.stderr), ours:
        theirs.close()
        yield ours


def flat_loss(problem: AnalyticProblem) -> tuple[Float[np.ndarray, " dimension"], LossAndGradient]:
    """Make the center as one vector, and a function of such a vector: the loss on all data, followed by its gradient."""
    center, unravel = ravel_pytree(problem.center)

    @jax.jit
    def loss_and_gradient(weights: Any) -> Any:
        loss, gradient = jax.value_and_grad(lambda w: problem.loss_fn(unravel(w), problem.data))(weights)
        return jnp.append(loss, gradient)

    return np.asarray(center, np.float32), loss_and_gradient


def serve(
    peer: Connection, center: Float[np.ndarray, " dimension"], loss_and_gradient: LossAndGradient, request: dict[str, Any]
) -> dict[str, Any]:
    """Send a request, then losses and gradients for as long as the peer asks for them; an empty message precedes its answer."""
    try:
        peer.send(request | {"center": center.tolist()})
        while weights := peer.recv_bytes():
            peer.send_bytes(np.asarray(loss_and_gradient(np.frombuffer(weights, np.float32)), np.float32).tobytes())
        return peer.recv()
    except (EOFError, BrokenPipeError):
        raise RuntimeError("devinterp ended without an answer: what it said is above") from None

"""The contract of every sampling kernel.

A kernel is a frozen dataclass registered as a pytree: its target and its hyperparameters are fields, its methods are
pure. It is passed to jitted code as an argument, so another nbeta, center or step size compiles nothing, and a kernel
whose leaves carry a leading axis is a ladder. What adapts lives in the state; `step` never adapts.
"""

from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from slt_interp.data import Batch
from slt_interp.posterior import LocalPosterior
from slt_interp.tree import Params, Real, dot


class Info(NamedTuple):
    """What a diagnosis needs of one step. All of it belongs to the state that was handed to `step`.

    Attributes:
        loss: loss on the step's batch, nats per example.
        grad_norm: Euclidean norm of the gradient of the potential.
        squared_distance: |w - w*|^2 over the sampled coordinates.
        virial: (w - w*) . grad U; its mean at stationarity is the number of sampled coordinates, whatever U.
        virial_localization: the part of `virial` that the base measure contributes.
        is_finite: whether loss and gradient are finite.
        acceptance: Metropolis acceptance probability; None for unadjusted kernels.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    squared_distance: Float[Array, ""]
    virial: Float[Array, ""]
    virial_localization: Float[Array, ""]
    is_finite: Bool[Array, ""]
    acceptance: Float[Array, ""] | None = None


class Kernel(Protocol):
    """What `sample` needs of a kernel; `state.params` is the position."""

    @property
    def target(self) -> LocalPosterior:
        """The distribution that is sampled."""
        ...

    @property
    def step_size(self) -> Real:
        """How far a step goes; each kernel says in what sense."""
        ...

    def init(self, key: Key[Array, ""], params: Params, batch: Batch) -> Any:
        """Make the state of a chain that starts at `params`."""
        ...

    def adapt(self, key: Key[Array, ""], state: Any, batch: Batch) -> tuple[Any, Info]:
        """Make one transition that may change what adapts."""
        ...

    def step(self, key: Key[Array, ""], state: Any, batch: Batch) -> tuple[Any, Info]:
        """Make one transition, with everything that adapts frozen."""
        ...


def inspect(target: LocalPosterior, params: Params, loss: Float[Array, ""], gradient: Params) -> Info:
    """Measure a state from the loss and the gradient of the potential there."""
    displacement = target.restrict(target.displacement(params))
    grad_norm = jnp.sqrt(dot(gradient, gradient))
    return Info(
        loss=loss,
        grad_norm=grad_norm,
        squared_distance=dot(displacement, displacement),
        virial=dot(displacement, gradient),
        virial_localization=dot(displacement, target.base.gradient(params)),
        is_finite=jnp.isfinite(loss) & jnp.isfinite(grad_norm),
    )

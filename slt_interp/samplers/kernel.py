"""The contract of every sampling kernel.

A kernel is a frozen dataclass registered as a pytree: its target and its hyperparameters are fields, its methods are
pure. It is passed to jitted code as an argument, so another nbeta, center or step size compiles nothing, and a kernel
whose leaves carry a leading axis is a ladder. What adapts lives in the state; `step` never adapts.
"""

from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from slt_interp.bases import BASES
from slt_interp.data import Batch
from slt_interp.posterior import LocalPosterior
from slt_interp.tree import Params, dot


class Info(NamedTuple):
    """What a diagnosis needs of one step.

    All of it belongs to the state that was handed to `step`; `MALA` and `HMC` average it over the points of the step's
    trajectory, with the probabilities of going there: the same expectation, with less noise. (The spread of such averages is
    smaller than that of the states.)

    Attributes:
        loss: loss on the step's batch, nats per example.
        grad_norm: Euclidean norm of the gradient of the potential.
        squared_distance: |w - w*|^2 over the sampled coordinates.
        virial: (w - w*) . grad U; its mean at stationarity is the number of sampled coordinates, whatever U.
        virial_localization: the part of `virial` that the base measure contributes.
        stiffness: |grad U|^2 / virial in the kernel's metric, a mean of the curvatures of U, wherever the chain is thirty
            times hotter than it should be (virial above thirty times its mean), and 0 elsewhere. A chain that diverges
            runs along the stiffest direction, whose curvature this then is. Of a draw's steps, the first non-zero one.
        num_gradients: gradients that the step took.
        is_finite: whether loss and gradient were finite.
        acceptance: Metropolis acceptance probability; None for unadjusted kernels.
    """

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    squared_distance: Float[Array, ""]
    virial: Float[Array, ""]
    virial_localization: Float[Array, ""]
    stiffness: Float[Array, ""]
    num_gradients: Float[Array, ""]
    is_finite: Bool[Array, ""]
    acceptance: Float[Array, ""] | None = None


class Kernel(Protocol):
    """What `sample` needs of a kernel; `state.params` is the position."""

    full_batch: ClassVar[bool]
    """Whether every step must see the same data, as a Metropolis test does."""

    @property
    def target(self) -> LocalPosterior:
        """The distribution that is sampled."""
        ...

    @property
    def step_size(self) -> Any:
        """How far a step goes; each kernel says in what sense."""
        ...

    def init(self, key: Key[Array, ""], params: Params, batch: Batch) -> Any:
        """Make the state of a chain that starts at `params`."""
        ...

    def adapt(self, key: Key[Array, ""], state: Any, batch: Batch) -> tuple[Any, Info]:
        """Make one transition that may change what adapts; `adapt = step` where nothing does."""
        ...

    def step(self, key: Key[Array, ""], state: Any, batch: Batch) -> tuple[Any, Info]:
        """Make one transition, with everything that adapts frozen."""
        ...


def inspect(
    target: LocalPosterior, params: Params, loss: Float[Array, ""], gradient: Params, metric: Params | None = None
) -> Info:
    """Measure a state from the loss and the gradient of the potential there; `metric` is the kernel's, if it has one."""
    displacement = target.restrict(target.displacement(params))
    virial, squared_force = dot(displacement, gradient), dot(gradient, gradient)
    felt = squared_force if metric is None else dot(gradient, jax.tree.map(jnp.multiply, metric, gradient))
    is_hot = virial > _HOT * jnp.asarray(target.dimension())
    grad_norm = jnp.sqrt(squared_force)
    squared_distance = dot(displacement, displacement)
    if isinstance(target.localization, BASES):
        virial_localization = dot(displacement, target.base.gradient(params))
    else:
        virial_localization = jnp.asarray(target.localization) * squared_distance
    return Info(
        loss=loss,
        grad_norm=grad_norm,
        squared_distance=squared_distance,
        virial=virial,
        virial_localization=virial_localization,
        stiffness=jnp.where(is_hot, felt / jnp.where(is_hot, virial, 1.0), 0.0),
        num_gradients=jnp.full((), 1.0 if target.control is None else 2.0),
        is_finite=jnp.isfinite(loss) & jnp.isfinite(grad_norm),
    )


_HOT = 30

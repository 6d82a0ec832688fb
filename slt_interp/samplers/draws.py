"""What `sample` gives back, and what can be kept of a draw."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, PyTree

from slt_interp.samplers.kernel import Info, Kernel
from slt_interp.storage import read_arrays
from slt_interp.tree import Params, register_dataclass

if TYPE_CHECKING:
    import xarray


@functools.partial(
    register_dataclass,
    data_fields=["info", "collected", "is_finite", "stiffness", "num_gradients", "state", "kernel"],
    meta_fields=["num_warmup", "num_burnin", "thinning"],
)
@dataclass(frozen=True)
class Draws:
    """What `sample` kept.

    Arrays lie in memory, or are memory maps of the files in the `checkpoint` directory that was given.

    Attributes:
        info: `Info` with axes (chain, draw), each number averaged over the `thinning` steps of its draw.
        collected: what `collect` returned at the last of those steps, a pytree (chain, draw, *event).
        is_finite: for each chain, whether loss and gradient were finite at every step, warm-up and burn-in included.
        stiffness: for each chain, the first `Info.stiffness` of all its steps that is not 0.
        num_gradients: for each chain, gradients of all its steps.
        state: the kernel's state after the last step, (chain, ...).
        kernel: the kernel that ran, with its target.
        num_warmup, num_burnin, thinning: the settings, in steps.
    """

    info: Info
    collected: PyTree[np.ndarray]
    is_finite: Bool[np.ndarray, " chain"]
    stiffness: Float[np.ndarray, " chain"]
    num_gradients: Float[np.ndarray, " chain"]
    state: Any
    kernel: Kernel
    num_warmup: int
    num_burnin: int
    thinning: int

    @property
    def num_steps(self) -> int:
        """Steps that every chain made."""
        return self.num_warmup + self.num_burnin + self.thinning * self.loss.shape[1]

    @property
    def loss(self) -> Float[np.ndarray, "chain draw"]:
        """Loss averaged over the steps of each draw, nats per example."""
        return np.asarray(self.info.loss)

    def to_xarray(self) -> "xarray.Dataset":
        """Convert to an `xarray.Dataset`, which arviz takes; xarray must be installed.

        Variables are the scalars of `Info` and the leaves of `collected`, by their paths, with dimensions chain, draw
        and, for the axes of an event, NAME_dim_0, NAME_dim_1, ...
        """
        import xarray

        leaves = jax.tree_util.tree_leaves_with_path(named(self.info, self.collected))
        arrays = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}
        variables = {
            name: (("chain", "draw", *(f"{name}_dim_{i}" for i in range(x.ndim - 2))), x) for name, x in arrays.items()
        }
        settings = {"num_warmup": self.num_warmup, "num_burnin": self.num_burnin, "thinning": self.thinning}
        return xarray.Dataset(variables, attrs=settings)


def starting(kernel: Kernel, state: Any, is_finite: Bool[np.ndarray, " chain"]) -> Draws:
    """Say where chains are, with no step made: `sample(previous=...)` goes on from there with `kernel`.

    Args:
        kernel: what will run.
        state: of every chain, (chain, ...).
        is_finite: which chains have been finite so far.
    """
    none = np.zeros(len(is_finite))
    info = Info(*[jnp.zeros((len(is_finite), 0))] * len(Info._fields))
    return Draws(info, None, is_finite, none, none, state, kernel, 0, 0, 1)


def keep_params(state: Any, info: Info) -> Params:
    """Keep the weights of every draw: give it to `sample` as `collect`."""
    del info
    return state.params


def keep_nothing(state: Any, info: Info) -> None:
    """Keep no more than the scalars of `Info`."""
    del state, info


def read_draws(path: str | Path) -> dict[str, np.ndarray]:
    """Read the draws that a run with `checkpoint=path` has written so far, while it goes on or afterwards.

    Returns:
        Memory maps with axes (chain, draw, *event), by name: those of `Info`, and `collected` with the path of each leaf
        (bfloat16 ones as raw bytes, which .npy has no name for).

    Raises:
        InputError: if there are none.
    """
    return read_arrays(Path(path) / "draws")


def named(info: Info, collected: PyTree) -> dict[str, Any]:
    """Name what is kept of draws: the scalars of `Info`, and `collected`."""
    return {**{name: value for name, value in info._asdict().items() if value is not None}, "collected": collected}


def stability_warning(kernel: Kernel, stiffness: Float[np.ndarray, " chain"], num_steps: int) -> str | None:
    """Say that the step size is above the limit of stability that the chains' own traces show; None if it is not.

    Of a schedule, the largest step size in `num_steps` counts.

    Unadjusted kernels are stable where step_size times the curvature of the potential is below 4. `Info.stiffness` never
    exceeds the largest curvature of a quadratic, and comes within a few percent of it in a chain that diverges.
    """
    if kernel.full_batch:
        return None
    hot = np.asarray(stiffness)[np.asarray(stiffness) > 0]
    largest = float(np.median(hot)) if len(hot) else 0.0
    step = float(np.max(step_sizes(kernel, num_steps)))
    if not step * largest > _STABILITY:
        return None
    return (
        f"step_size {step:.3g} is above the limit of stability, {_STABILITY} / {largest:.3g} = {_STABILITY / largest:.3g}, as "
        "the chains' own traces show: take less than half of that"
    )


def step_sizes(kernel: Kernel, num_steps: int) -> np.ndarray:
    """Evaluate the step size, or a schedule of it at up to 65 of its steps."""
    step_size: Any = kernel.step_size
    if not callable(step_size):
        return np.asarray(step_size)
    return np.array([np.asarray(step_size(int(t))) for t in np.unique(np.linspace(0, num_steps, 65).astype(int))])


_STABILITY = 4

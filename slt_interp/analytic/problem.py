"""What is known of a loss: its learning coefficient, energies at finite temperature, volumes."""

from collections.abc import Callable
from dataclasses import dataclass

from slt_interp.bases import Base
from slt_interp.data import Batch
from slt_interp.posterior import LossFn
from slt_interp.tree import Params, dimension


@dataclass(frozen=True, eq=False)
class AnalyticProblem:
    """A loss with a center, and the exact answers at that center. What is not known is None.

    K = L - L(center) throughout.

    Attributes:
        name: unique within the catalogue.
        loss_fn: `(params, batch) -> scalar`, nats per example.
        center: w*, a minimum of the loss.
        source: where the answers come from.
        rlct: learning coefficient at `center`, for base densities that are smooth and positive there.
        multiplicity: its multiplicity m: -log Z(nbeta) = rlct log nbeta - (m - 1) log log nbeta + O(1).
        global_rlct, global_multiplicity: the same over all minima of equal loss.
        data: what `loss_fn` wants as a batch; None where it ignores it.
        energy: `(nbeta, localization) -> E[nbeta K]` under exp(-nbeta K - localization |w - center|^2 / 2), to 6 digits or
            better: what an LLC estimate converges to at these settings.
        base: the probability measure that the next two are about.
        log_volume: `threshold -> log P_base(K <= threshold)`.
        log_partition: `nbeta -> log E_base exp(-nbeta K)`.
    """

    name: str
    loss_fn: LossFn
    center: Params
    source: str
    rlct: float | None = None
    multiplicity: int | None = None
    global_rlct: float | None = None
    global_multiplicity: int | None = None
    data: Batch = None
    energy: Callable[[float, float], float] | None = None
    base: Base | None = None
    log_volume: Callable[[float], float] | None = None
    log_partition: Callable[[float], float] | None = None

    @property
    def dimension(self) -> int:
        """Number of weights."""
        return dimension(self.center)

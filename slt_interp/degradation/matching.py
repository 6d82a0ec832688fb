"""Set a dial to a wanted excess loss, so that dials can be compared at equal damage."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Key

from slt_interp.data import Batch
from slt_interp.degradation.dials import Degraded, Dial
from slt_interp.errors import InputError
from slt_interp.posterior import LossFn
from slt_interp.probes.draws import over_draws
from slt_interp.tree import Params, register_dataclass


class Matched(NamedTuple):
    """A dial at a wanted excess loss.

    Attributes:
        level: where the dial stands.
        degraded: its draws there.
        excess_loss: mean over its chains of L(w) - L(w*), nats per example.
        std_error: over chains.
    """

    level: float
    degraded: Degraded
    excess_loss: float
    std_error: float


@partial(register_dataclass, data_fields=["data"], meta_fields=["loss_fn"])
@dataclass(frozen=True)
class LossProbe:
    """The probe `(key, params) -> {"loss"}`: the mean loss over fixed data, nats per example."""

    loss_fn: LossFn
    data: Batch

    def __call__(self, key: Key[Array, ""], params: Params) -> dict[str, Float[Array, ""]]:
        """Measure at one weight vector."""
        del key
        return {"loss": self.loss_fn(params, self.data)}


def match(
    key: Key[Array, ""],
    dial: Dial,
    params: Params,
    probe: LossProbe,
    excess_loss: float,
    *,
    bracket: tuple[float, float],
    num_chains: int,
    num_draws: int,
) -> Matched:
    """Find the level at which a dial raises the loss by `excess_loss` on average.

    The dial is read with the same random numbers at every level, which makes the mean loss a continuous function; its
    crossing is found by Brent's method in the logarithm of the level, to 1 % of the excess loss or better.

    Args:
        key: for the dial.
        dial: cheap to read, and continuous in its level for a fixed key.
        params: the weights that are degraded.
        probe: measures the loss.
        excess_loss: nats per example, positive.
        bracket: levels below and above the wanted one.
        num_chains: independent groups of degraded networks.
        num_draws: networks in each.

    Raises:
        InputError: if the excess loss is not positive, or the dial does not reach it within the bracket.
    """
    from scipy.optimize import root_scalar

    if not (np.isfinite(excess_loss) and excess_loss > 0):
        raise InputError(
            f"excess_loss must be positive, but is {excess_loss:.3g}: a dial cannot lower the loss below that of params; "
            "polish them first if it should be possible"
        )
    floor = float(probe(key, params)["loss"])

    def measure(log_level: float) -> tuple[Degraded, np.ndarray]:
        degraded = dial.draw(key, params, float(np.exp(log_level)), num_chains=num_chains, num_draws=num_draws)
        losses = np.asarray(over_draws(key, probe, degraded.params)["loss"], dtype=np.float64)
        return degraded, losses.mean(axis=1) - floor

    def gap(log_level: float) -> float:
        found = measure(log_level)[1].mean()
        return np.log(max(found, 1e-12) / excess_loss)

    low, high = np.log(bracket)
    if not gap(low) * gap(high) <= 0:
        reached = [measure(end)[1].mean() for end in (low, high)]
        raise InputError(
            f"the dial gives excess losses of {reached[0]:.3g} and {reached[1]:.3g} nats at levels {bracket[0]:.3g} and "
            f"{bracket[1]:.3g}, and {excess_loss:.3g} does not lie between: widen the bracket, or ask for another loss"
        )
    level = root_scalar(gap, bracket=(low, high), method="brentq", xtol=1e-3).root
    degraded, per_chain = measure(level)
    error = per_chain.std(ddof=1) / np.sqrt(num_chains) if num_chains > 1 else float("nan")
    return Matched(float(np.exp(level)), degraded, float(per_chain.mean()), float(error))

"""How much of a base measure the basin of a trained network fills, by two routes that fail in different ways."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from slt_interp.bases import Gaussian
from slt_interp.data import Batch
from slt_interp.errors import InputError
from slt_interp.estimators.subset import subset_simulation
from slt_interp.estimators.volume import tempered_volume
from slt_interp.estimators.volume_estimate import REFUSED, VolumeEstimate
from slt_interp.posterior import LossFn
from slt_interp.tree import Params


def volume_by_two_routes(
    key: Key[Array, ""],
    loss_fn: LossFn,
    params: Params,
    data: Batch,
    thresholds: Float[np.ndarray, " threshold"],
    *,
    base: Gaussian,
    num_tempered: int,
    subset: Mapping[str, int],
    tempering: Mapping[str, int],
    progress: bool,
) -> dict[str, Any]:
    """Estimate log volumes by a round of subset simulation, and by one of tempering at the `num_tempered` largest at most.

    `subset` and `tempering` are settings of `subset_simulation` and `tempered_volume`. A route that cannot be gone is refused
    with its reason, as a threshold that is out of reach.

    Returns:
        The thresholds, and of each route what goes into results.json; None for tempering if `num_tempered` is 0.
    """

    def ask(method: Callable[..., VolumeEstimate], key: Array, thresholds: Float[np.ndarray, " threshold"]) -> dict[str, Any]:
        try:
            found = method(key, loss_fn, params, data, thresholds, base=base, progress=progress)
        except InputError as error:
            unknown = np.full(len(thresholds), np.nan)
            return {"log_volume": unknown, "std_error": unknown, "status": REFUSED, "warnings": [str(error)]}
        names = ("log_volume", "std_error", "status", "warnings", "counted", "per_seed", "diagnostics")
        return {name: getattr(found, name) for name in names}

    subset_key, ladder_key = jax.random.split(key)
    return {
        "thresholds": thresholds,
        "subset": ask(partial(subset_simulation, max_rounds=1, **subset), subset_key, thresholds),
        "tempering": ask(partial(tempered_volume, max_rounds=1, **tempering), ladder_key, thresholds[-num_tempered:])
        if num_tempered
        else None,
    }

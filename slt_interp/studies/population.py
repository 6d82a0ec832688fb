"""A population of small trained networks: what goes with their generalization gap."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key
from tqdm.auto import tqdm

from slt_interp.bases import Gaussian
from slt_interp.curvature.spectrum import estimate_spectrum
from slt_interp.estimators.calibration import customary_nbeta
from slt_interp.estimators.estimate import estimate_llc
from slt_interp.estimators.llc import mean_loss
from slt_interp.estimators.subset import subset_simulation
from slt_interp.models.mlp import MLP
from slt_interp.posterior import LossFn
from slt_interp.probes.coding_rate import coding_rate
from slt_interp.studies.networks import SMOOTHING, SmoothedCrossEntropy
from slt_interp.tasks import digits
from slt_interp.training import polish
from slt_interp.tree import Params

NUM_EXAMPLES = 256
"""Few, so that there is a gap."""

LOCALIZATION, THRESHOLD = 100.0, 0.1


def measure_population(
    key: Key[Array, ""],
    num_networks: int,
    widths: Sequence[int],
    train_steps: int,
    polish_steps: int,
    max_gradients: int,
    *,
    progress: bool,
) -> list[dict[str, Any]]:
    """Train networks of a few widths, each at a weight decay and a seed of its own, and measure every one at its minimum."""
    data, test = digits.digits()
    data, test = (
        {name: x[:NUM_EXAMPLES] for name, x in data.items()},
        {name: jnp.concatenate([x[NUM_EXAMPLES:], test[name]]) for name, x in data.items()},
    )
    nbeta = customary_nbeta(NUM_EXAMPLES)
    found = []
    counts = [len(part) for part in np.array_split(np.arange(num_networks), len(widths))]
    with tqdm(total=num_networks, desc="population", unit="network", disable=not progress, leave=False) as bar:
        for i, (width, count) in enumerate(zip(widths, counts, strict=True)):
            network = MLP((digits.NUM_INPUTS, width, digits.NUM_CLASSES))
            loss_fn = SmoothedCrossEntropy(network, SMOOTHING)
            decays = np.geomspace(*_WEIGHT_DECAYS, count)
            init_key, measure_key = jax.random.split(jax.random.fold_in(key, i))
            trained = _train(loss_fn, jax.vmap(network.init)(jax.random.split(init_key, count)), data, decays, train_steps)
            for j, decay in enumerate(decays):
                params = jax.tree.map(lambda x, j=j: x[j], trained)
                params = polish(loss_fn, params, data, num_steps=polish_steps).params
                spectrum_key, llc_key, volume_key = jax.random.split(jax.random.fold_in(measure_key, j), 3)
                spectrum = estimate_spectrum(spectrum_key, loss_fn, params, data)
                estimate = estimate_llc(
                    llc_key,
                    loss_fn,
                    params,
                    data,
                    nbeta=nbeta,
                    localization=LOCALIZATION,
                    num_chains=8,
                    max_gradients=max_gradients,
                    progress=False,
                )
                base, thresholds = Gaussian(params, LOCALIZATION**-0.5), np.array([THRESHOLD])
                volume = subset_simulation(
                    volume_key,
                    loss_fn,
                    params,
                    data,
                    thresholds,
                    base=base,
                    num_particles=100,
                    num_seeds=3,
                    max_rounds=1,
                    progress=False,
                )
                lost = _information_lost(network, params, data["inputs"])
                train_loss, test_loss = (mean_loss(loss_fn, params, examples)[0] for examples in (data, test))
                found.append(
                    {
                        "width": width,
                        "weight_decay": decay,
                        "train_loss": train_loss,
                        "gap": test_loss - train_loss,
                        "llc": estimate.llc,
                        "llc_std_error": estimate.std_error,
                        "status": estimate.status,
                        "gaussian": spectrum.llc(nbeta, LOCALIZATION)[0],
                        "trace": spectrum.trace[0],
                        "largest": float(spectrum.ritz_values.max()),
                        "log_volume": volume.log_volume[0],
                        "log_volume_std_error": volume.std_error[0],
                        "gaussian_log_volume": float(spectrum.log_volume(thresholds, base)[0]),
                        **{f"information lost up to {site}": float(bits) for site, bits in lost.items()},
                    }
                )
                bar.update()
    return found


def _train(
    loss_fn: LossFn, params: Params, data: dict[str, Array], decays: Float[np.ndarray, " network"], num_steps: int
) -> Params:
    """Train all networks of one width at once, each with its own weight decay."""

    @jax.jit
    @jax.vmap
    def train(params: Params, decay: Float[Array, ""]) -> Params:
        optimizer = optax.adamw(optax.cosine_decay_schedule(_LEARNING_RATE, num_steps), weight_decay=decay)

        def step(carry: tuple, _: None) -> tuple[tuple, None]:
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss_fn)(params, data), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=num_steps)
        return params

    return train(params, jnp.asarray(decays, jnp.float32))


@functools.partial(jax.jit, static_argnames="network")
def _information_lost(network: MLP, params: Params, inputs: Float[Array, "example input"]) -> dict[str, Float[Array, ""]]:
    """Compute how many bits per example each layer's coding rate is below that of the inputs."""
    kept = {}

    def tap(site: str, activations: Array) -> Array:
        kept[site] = activations
        return activations

    kept["output"] = network.apply(params, inputs, tap)
    first = coding_rate(inputs)
    return {site: first - coding_rate(x) for site, x in kept.items()}


_LEARNING_RATE = 1e-2

_WEIGHT_DECAYS = (1e-4, 1e-1)
"""The smallest and the largest, of each width."""

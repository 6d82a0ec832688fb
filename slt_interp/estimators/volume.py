"""`estimate_volume`: how much of a base measure lies within a loss of the trained weights.

V(eps) = P_base(L(w) <= L(w*) + eps), by methods that count different sets and fail in different ways:

- "tempering": the whole sublevel set, by reweighting a ladder of temperatures (`temper`);
- "subset": the whole sublevel set with all its symmetric copies, by a population that descends into it (`subset`);
- "rays": the part that straight lines from w* reach, good near minima that a quadratic describes (`rays`);
- "gaussian": the ellipsoid that gradient and Hessian at w* predict, exactly.

The loss is any scalar function of the weights: `behavioral_kl` makes the one that asks for the same behavior.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from slt_interp.bases import Base, FloatGrid, Gaussian
from slt_interp.curvature.gaussian import log_ellipsoid_mass
from slt_interp.curvature.spectrum import DENSE_LIMIT, dense_hessian
from slt_interp.data import MAX_FULL_BATCH, Batch, FullBatch, Minibatches, is_large
from slt_interp.errors import InputError
from slt_interp.estimators.ladder import Ladder
from slt_interp.estimators.llc import DO_NOT_TRUST, OK
from slt_interp.estimators.rays import ray_volume
from slt_interp.estimators.readings import LEAST_EXCHANGE, LogVolume
from slt_interp.estimators.subset import subset_simulation
from slt_interp.estimators.tempering import ladders
from slt_interp.estimators.volume_estimate import (
    REFUSED,
    VolumeEstimate,
    check_labels,
    check_thresholds,
    rounding_warnings,
    whole_set,
)
from slt_interp.posterior import LocalPosterior, LossFn, check_target
from slt_interp.samplers.chains import chain_mesh, sample
from slt_interp.samplers.hmc import HMC
from slt_interp.tree import Params, Real, broadcast, check_key, dimension


def estimate_volume(
    key: Key[Array, ""],
    loss_fn: LossFn,
    params: Params,
    data: Batch,
    thresholds: Any,
    *,
    base: Base | FloatGrid,
    method: str = "tempering",
    labels: Callable[[Params], Int[Array, ""]] | None = None,
    progress: bool = True,
) -> VolumeEstimate:
    """Estimate log V(eps), the log mass of the weights whose loss is at most eps above that at `params`.

    Args:
        key: typed PRNG key.
        loss_fn: any scalar function `(params, batch) -> scalar`: mean negative log-likelihood, `behavioral_kl`, an error rate.
            Rays and the Gaussian need its derivatives, subset simulation is faster with them.
        params: the trained weights.
        data: passed to the loss whole; None if it ignores its batch. "tempering" on more than 8,192 examples takes minibatches,
            and the loss must be a mean over examples.
        thresholds: the eps, nats above the loss at params (or the loss's units), positive and increasing.
        base: `Gaussian`, `Box`, `Ball`, or for the number of configurations of a floating-point format `FloatGrid`.
        method: "tempering", "subset", "rays" or "gaussian".
        labels: `(params) -> int`, computed on draws, splits the volume (volume per hypothesis); for "tempering" and "subset".
        progress: whether to show a progress bar.

    Returns:
        A `VolumeEstimate`; `print` it. Settings of a method are arguments of `tempered_volume`,
        `subset_simulation` and `ray_volume`.

    Raises:
        InputError, TypeError, ValueError: one sentence for what cannot be used; see `check_target`.

    >>> found = estimate_volume(jax.random.key(0), lambda w, batch: jnp.sum(w**2) / 2, jnp.zeros(2), None, [1e-3, 1e-2],
    ...                         base=Gaussian(0.0, 1.0), method="gaussian")
    >>> found.log_volume.round(3).tolist()  # log(1 - exp(-eps))
    [-6.908, -4.61]
    """
    if method not in _METHODS:
        raise InputError(f"method must be {', '.join(map(repr, _METHODS[:-1]))} or {_METHODS[-1]!r}, but is {method!r}")
    if method == "subset":
        return subset_simulation(key, loss_fn, params, data, thresholds, base=base, labels=labels, progress=progress)
    if isinstance(base, FloatGrid):
        raise InputError(f"a FloatGrid counts numbers, which only method='subset' does, but method is {method!r}")
    if method == "tempering":
        return tempered_volume(key, loss_fn, params, data, thresholds, base=base, labels=labels, progress=progress)
    if labels is not None:
        raise InputError(
            f"labels split draws, which 'tempering' and 'subset' make, but method is {method!r}: leave one of them out"
        )
    if method == "rays":
        return ray_volume(key, loss_fn, params, data, thresholds, base=base)
    return gaussian_volume(key, loss_fn, params, data, thresholds, base=base)


_METHODS = ("tempering", "subset", "rays", "gaussian")


def tempered_volume(
    key: Key[Array, ""],
    loss_fn: LossFn,
    params: Params,
    data: Batch,
    thresholds: Any,
    *,
    base: Base,
    labels: Callable[[Params], Int[Array, ""]] | None = None,
    num_chains: int = 8,
    num_draws: int = 400,
    precision: float = 0.05,
    max_rounds: int = 4,
    progress: bool = True,
) -> VolumeEstimate:
    """Read log volumes from a ladder of temperatures, as cold as the smallest threshold asks; see `temper`.

    The first `num_draws` steps are doubled, in `max_rounds` at most, until the standard error of every threshold is at most
    `precision` nats, or a tenth of that times |log V| where that is larger (an error that is looked at until it is small is a
    little too small); other arguments are those of `estimate_volume`.
    What a ladder refuses is given no number: see `readings.refuse_doubtful`.
    """
    check_key(key)
    thresholds = check_thresholds(thresholds)
    if not (precision > 0 and max_rounds >= 1):
        raise InputError(
            f"precision must be positive and max_rounds at least 1, but they are {precision} and {max_rounds}: leave them out "
            "for 0.05 nats and 4"
        )
    if labels is not None:
        check_labels(labels, params)
    probe_key, ladder_key = jax.random.split(key)
    max_nbeta, spent = _coldest(probe_key, LocalPosterior(loss_fn, params, 1 / thresholds[0], base), params, data, progress)
    growing = ladders(
        ladder_key,
        loss_fn,
        params,
        data,
        base=base,
        max_nbeta=max_nbeta,
        num_chains=num_chains,
        num_draws=num_draws,
        labels=labels,
        progress=progress,
    )
    for num_rounds, ladder in enumerate(growing, start=1):
        reading = _read(ladder, thresholds)
        if num_rounds == max_rounds or _is_enough(ladder, reading, precision):
            break
    if reading is None:
        raise InputError(
            f"draws at nbeta {max_nbeta:.3g} hardly reach the largest threshold, {thresholds[-1]:.3g}, above the loss at "
            "params: move the base measure nearer to params, or raise the thresholds"
        )
    reached, found = reading
    reasons = list(found.warnings)
    if not reached.all():
        reasons.append(
            f"hardly a draw at nbeta {max_nbeta:.3g} lies below thresholds up to {thresholds[~reached][-1]:.3g}: call "
            "temper(max_nbeta=...) and its log_volume with more"
        )

    def given(values: np.ndarray) -> np.ndarray:
        """Put values at the thresholds that were reached among all."""
        wide = np.full(len(thresholds), np.nan)
        wide[reached] = values
        return wide

    log_volume, std_error = given(found.log_volume), given(found.std_error)
    split = {} if labels is None else ladder.log_volume_by_label(thresholds[reached])
    return VolumeEstimate(
        thresholds,
        log_volume,
        std_error,
        "tempering",
        whole_set(ladder.init_loss - ladder.lowest_loss),
        REFUSED if np.isnan(log_volume).any() else DO_NOT_TRUST if ladder.sampling_warnings else OK,
        (*reasons, *ladder.sampling_warnings, *rounding_warnings(thresholds, ladder.init_loss)),
        {
            "num_rungs": len(ladder.nbetas),
            "max_nbeta": float(ladder.nbetas[-1]),
            "gradients": spent + ladder.gradients_per_chain * ladder.loss.shape[1],
            "smallest_exchange": float(ladder.exchange.min()),
            "round_trips_per_chain": ladder.round_trips,
            "saddle_point": found.saddle_point.tolist(),
        },
        by_label={name: (given(value), given(error)) for name, (value, error) in split.items()},
    )


class _Reading(NamedTuple):
    """Which thresholds a ladder reaches, and its log volumes there."""

    reached: Bool[np.ndarray, " threshold"]
    found: LogVolume


def _read(ladder: Ladder, thresholds: Float[np.ndarray, " threshold"]) -> _Reading | None:
    reached = np.array([ladder.reaches(threshold) for threshold in thresholds])
    return _Reading(reached, ladder.log_volume(thresholds[reached])) if reached.any() else None


def _is_enough(ladder: Ladder, reading: _Reading | None, precision: float) -> bool:
    """Whether errors are small at all thresholds that are reached, or more draws would not help."""
    if reading is None or not ladder.exchange.min() >= LEAST_EXCHANGE:
        return True
    found = reading.found
    limit = precision * np.maximum(1.0, np.abs(found.log_volume) / 10)
    # The error covers the difference between the families. What is refused for want of a saddle point will be refused again.
    return bool(np.all((found.std_error <= limit) | (np.isnan(found.log_volume) & np.isnan(found.saddle_point))))


def _coldest(key: Key[Array, ""], target: LocalPosterior, params: Params, data: Batch, progress: bool) -> tuple[float, float]:
    """Choose the coldest rung: twice (1 + LLC) / eps, beyond the saddle point, with the LLC of a short run there.

    The first run is at the nbeta of `target`, 1 / eps. Where the LLC rises with nbeta, as in a network, others follow. Of many
    examples a part is enough. Also returns the gradients of all.
    """
    check_target(target, params, data)
    key, seen_key = jax.random.split(key)
    if is_large(data):
        # The weights are no minimum of a part; with a control variate they are as much of one as of the whole.
        target = target.with_control_variate(data)
        data = Minibatches(data, MAX_FULL_BATCH)(seen_key)
    init_loss = float(target.loss(target.position(params), data))
    coldest = threshold_nbeta = float(target.nbeta)
    spent = 0.0
    for look in range(_MAX_LOOKS):
        nbeta = coldest
        draws = sample(
            jax.random.fold_in(key, look),
            HMC(replace(target, nbeta=nbeta), 0.1),
            params,
            FullBatch(data),
            num_chains=4,
            num_warmup=200,
            num_draws=50,
            mesh=chain_mesh(4),
            progress=progress,
        )
        spent += float(draws.num_gradients.sum())
        energy = nbeta * (float(draws.loss[draws.is_finite].mean()) - init_loss)
        coldest = max(nbeta, 2 * (1 + max(0.0, energy)) * threshold_nbeta)
        if coldest <= _SETTLED * nbeta:
            break
    return coldest, spent


_MAX_LOOKS, _SETTLED = 6, 1.2


def gaussian_volume(
    key: Key[Array, ""], loss_fn: LossFn, params: Params, data: Batch, thresholds: Any, *, base: Base
) -> VolumeEstimate:
    """Compute the mass of {g.(w - w*) + (w - w*) H (w - w*) / 2 <= eps} under a Gaussian base, wherever its center.

    g and H are gradient and Hessian of the loss at params; negative curvatures are counted as flat. Along flat directions the
    gradient still has its say. Costs as many Hessian-vector products as there are weights, and is exact for a quadratic loss.

    >>> found = gaussian_volume(jax.random.key(0), lambda w, batch: jnp.sum(w), jnp.zeros(4), None, [2.0],
    ...                         base=Gaussian(0.0, 1.0))  # a half space: log Phi(1)
    >>> found.log_volume.round(3).tolist()
    [-0.173]
    """
    check_key(key)
    thresholds = check_thresholds(thresholds)
    check_target(LocalPosterior(loss_fn, params, 1.0, base), params, data)
    if not isinstance(base, Gaussian):
        raise InputError(f"method='gaussian' is about a Gaussian base measure, not a {type(base).__name__}: give a Gaussian")
    if dimension(params) > DENSE_LIMIT:
        raise InputError(
            f"method='gaussian' decomposes the Hessian of at most {DENSE_LIMIT} weights, but params has {dimension(params)}: "
            "estimate_spectrum(...).log_volume approximates it"
        )
    init_loss, gradient = jax.value_and_grad(loss_fn)(params, data)
    hessian, rounding = dense_hessian(loss_fn, params, data)
    scale, slope = _flat(base.scale, params), _flat(gradient, params)
    values, vectors = np.linalg.eigh(scale[:, None] * hessian * scale)
    # In whitened coordinates y = (w - base center) / scale: standard normal along every eigenvector.
    offset = vectors.T @ ((_flat(base.center, params) - _flat(params, params)) / scale)
    slopes = vectors.T @ (scale * slope)
    limit = max(np.abs(values).max() * _FLAT, rounding * scale.max() ** 2)
    curved = values > limit
    flat_slopes, bends = slopes[~curved], values[curved]
    shifts = offset[curved] + slopes[curved] / bends
    lowered = np.sum(slopes[curved] ** 2 / bends) / 2
    log_volume = log_ellipsoid_mass(
        thresholds + lowered - flat_slopes @ offset[~curved],
        bends / 2,
        np.ones(len(bends)),
        shifts**2,
        float(np.linalg.norm(flat_slopes)),
    )
    warnings = rounding_warnings(thresholds, float(init_loss))
    num_negative = int(np.sum(values < -limit))
    if num_negative:
        warnings.append(
            f"{num_negative} of {len(values)} curvatures are negative, down to {values.min():.2g} in units of the base "
            "measure: params is no minimum, and the volume counts those directions as flat; train on, or use method='subset'"
        )
    if not curved.all():
        warnings.append(
            f"{int(np.sum(~curved))} of {len(values)} directions have no positive curvature, and only the base measure bounds "
            "them here: if the loss bends there at higher order, the volume is smaller; compare with method='subset'"
        )
    return VolumeEstimate(
        thresholds,
        log_volume,
        np.zeros(len(thresholds)),
        "the Gaussian approximation",
        "the ellipsoid that gradient and Hessian at params predict, whatever the loss is farther away",
        DO_NOT_TRUST if num_negative else OK,
        tuple(warnings),
        {"rank": int(curved.sum()), "gradient_norm": float(np.linalg.norm(slope)), "predicted_descent": float(lowered)},
    )


class Reference(NamedTuple):
    """Inputs, and the log probabilities of a network's answers to them."""

    inputs: Array
    log_probabilities: Float[Array, "*example class"]


def behavioral_kl(
    apply: Callable[[Params, Any], Float[Array, "*example class"]], params: Params, inputs: Any
) -> tuple[LossFn, Reference]:
    """Make the loss that asks for the behavior of a trained network: mean KL(its soft outputs || those of other weights).

    The trained weights are an exact minimum of it, of loss 0, whatever they were trained on.

    Args:
        apply: `(params, inputs) -> logits`, with classes along the last axis.
        params: the trained weights.
        inputs: with a leading example axis.

    Returns:
        The loss and its data, for the arguments of these names.

    >>> loss_fn, data = behavioral_kl(lambda w, x: x * w, jnp.array([1.0, 2.0]), jnp.ones((3, 1)))
    >>> float(loss_fn(jnp.array([1.0, 2.0]), data)), float(loss_fn(jnp.array([2.0, 1.0]), data)) > 0.1
    (0.0, True)
    """
    return _BehavioralKL(apply), Reference(inputs, jax.nn.log_softmax(apply(params, inputs)))


@dataclass(frozen=True)
class _BehavioralKL:
    """Equal for equal `apply`, so that another network of the kind compiles nothing."""

    apply: Callable[[Params, Any], Float[Array, "*example class"]]

    def __call__(self, params: Params, batch: Reference) -> Float[Array, ""]:
        found = jax.nn.log_softmax(self.apply(params, batch.inputs))
        return jnp.mean(jnp.sum(jnp.exp(batch.log_probabilities) * (batch.log_probabilities - found), axis=-1))


_FLAT = 1e-10
"""Curvatures below this part of the largest are rounding of a float64 decomposition."""


def _flat(value: PyTree[Real], params: Params) -> Float[np.ndarray, " i"]:
    wide = jax.tree.map(lambda p, x: jnp.broadcast_to(jnp.asarray(x), p.shape).ravel(), params, broadcast(value, params))
    return np.asarray(ravel_pytree(wide)[0], np.float64)

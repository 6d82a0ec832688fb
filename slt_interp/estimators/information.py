"""What per-example losses of posterior draws say of generalization: WBIC, WAIC, functional variance, singular fluctuation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from slt_interp.data import Batch, num_examples
from slt_interp.errors import InputError
from slt_interp.estimators.calibration import customary_nbeta
from slt_interp.posterior import LossFn
from slt_interp.samplers.diagnostics import std_error
from slt_interp.samplers.draws import Draws
from slt_interp.samplers.kernel import Info


@dataclass(frozen=True)
class Information:
    """Information criteria at an inverse temperature beta = nbeta / n, each (value, Monte Carlo standard error).

    Attributes:
        training_loss: Bayes training loss -(1/n) sum_i log E[p(x_i | w)], nats per example.
        functional_variance: V = sum_i Var[log p(x_i | w)], nats squared.
        waic: training_loss + beta V / n, nats per example: what the Bayes generalization loss is on average.
        singular_fluctuation: beta V / 2; its mean over datasets is Watanabe's nu(beta).
        gibbs_training_loss: E[L], nats per example.
    """

    training_loss: tuple[float, float]
    functional_variance: tuple[float, float]
    waic: tuple[float, float]
    singular_fluctuation: tuple[float, float]
    gibbs_training_loss: tuple[float, float]


def information(losses: Float[np.ndarray, "chain draw example"], nbeta: float) -> Information:
    """Compute information criteria from per-example losses of draws of the posterior at `nbeta`.

    Args:
        losses: -log p(x_i | w) for every draw w and every one of the n examples that the posterior is of, nats; collected
            with `keep_example_losses`. At least two chains: errors are a jackknife's over chains.
        nbeta: at which they were drawn; n for the ordinary posterior.

    References:
        Watanabe (2010), Asymptotic equivalence of Bayes cross validation and widely applicable information criterion in
        singular learning theory, JMLR 11, equations 4 to 9.

    >>> information(np.zeros((2, 3, 5)), nbeta=5.0).waic
    (0.0, 0.0)
    """
    losses = np.asarray(losses, np.float64)
    if losses.ndim != 3 or losses.shape[0] < 2 or losses.shape[1] < 2:
        raise InputError(f"losses must have axes (chain, draw, example), at least two of the first two, not {losses.shape}")
    if not nbeta > 0:
        raise InputError(f"nbeta must be positive, but is {nbeta}: the number of examples is the ordinary posterior's")
    chains, _, count = losses.shape
    lowest = losses.min(axis=(0, 1))
    # Sums over draws, chain by chain, so that leaving one out is a subtraction.
    likelihood = np.exp(lowest - losses).mean(axis=1)
    shifted = losses - losses.mean(axis=(0, 1))
    first, second = shifted.mean(axis=1), (shifted**2).mean(axis=1)

    def evaluate(chosen: np.ndarray) -> np.ndarray:
        training = np.mean(lowest - np.log(likelihood[chosen].mean(axis=0)))
        variance = np.sum(second[chosen].mean(axis=0) - first[chosen].mean(axis=0) ** 2)
        beta = nbeta / count
        gibbs = losses.mean(axis=(0, 1)).mean() + first[chosen].mean()
        return np.array([training, variance, training + beta * variance / count, beta * variance / 2, gibbs])

    every = np.arange(chains)
    left_out = np.stack([evaluate(every != c) for c in every])
    errors = np.sqrt((chains - 1) * left_out.var(axis=0))
    return Information(*((float(v), float(e)) for v, e in zip(evaluate(every >= 0), errors, strict=True)))


def wbic(draws: Draws, num_examples: int) -> tuple[float, float]:
    """Compute WBIC, n E[L] at nbeta = n / log n: the free energy -log Z(n) up to terms of order sqrt(log n), in nats.

    Returns:
        WBIC and its Monte Carlo standard error.

    Raises:
        InputError: if the draws are of another nbeta.

    References:
        Watanabe (2013), A widely applicable Bayesian information criterion, JMLR 14, equation 3.
    """
    wanted, nbeta = customary_nbeta(num_examples), float(draws.kernel.target.nbeta)
    if abs(nbeta / wanted - 1) > 1e-3:
        raise InputError(f"WBIC is defined at nbeta = n / log n = {wanted:.6g}, but the draws are of nbeta {nbeta:.6g}")
    losses = draws.loss[np.asarray(draws.is_finite)].astype(np.float64)
    return float(num_examples * losses.mean()), float(num_examples * std_error(losses))


def keep_example_losses(loss_fn: LossFn, data: Batch) -> Callable[[Any, Info], Float[Array, " example"]]:
    """Make the `collect` that keeps the loss of every example of `data` at each draw."""
    num_examples(data)
    return jax.tree_util.Partial(_example_losses, jax.tree_util.Partial(loss_fn), data)


def _example_losses(loss_fn: LossFn, data: Batch, state: Any, info: Info) -> Float[Array, " example"]:
    del info
    return jax.vmap(lambda example: loss_fn(state.params, jax.tree.map(lambda x: jnp.asarray(x)[None], example)))(data)

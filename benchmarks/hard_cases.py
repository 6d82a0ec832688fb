"""The cases on which estimates are known to fail, each at one nbeta and localization, with a value to compare with.

Thin arms, which chains hardly enter; minibatches at a singular point; a ReLU network; a deep linear network with many flat
directions; deep linear networks at their deepest points, beside Aoyagi's coefficient, and large ones at smooth points, with a
small budget. Where neither quadrature nor coefficient is known the value is that of a long run of NUTS on the full batch, with
its own error.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from slt_interp import NUTS, FullBatch, LocalPosterior, chain_mesh, llc, mean_loss, sample
from slt_interp.analytic import AnalyticProblem, catalogue, deep_linear, monomial
from slt_interp.estimators.calibration import customary_nbeta
from slt_interp.models.mlp import MLP
from slt_interp.training import polish, train
from slt_interp.tree import Params


@dataclass(frozen=True)
class HardCase:
    """A problem at one temperature, and how to know the answer.

    Attributes:
        problem: what the estimator gets.
        nbeta, localization: where.
        same: a problem with the same excess loss that is cheaper to sample, or has an exact energy or coefficient.
        max_gradients: the estimator's budget per chain; None for its own.
        num_draws: of NUTS and each of its chains; none where an energy or a coefficient is known.
        num_seeds: of the estimator.
    """

    problem: AnalyticProblem
    nbeta: float
    localization: float
    same: AnalyticProblem
    max_gradients: int | None = None
    num_draws: int = 0
    num_seeds: int = 2


def hard_cases() -> tuple[HardCase, ...]:
    """Make the cases, from fixed keys."""
    key = jax.random.key(1)
    arms = [monomial([1, 1]), monomial([1, 1, 1])]
    singular = deep_linear(key, [3, 2, 2], 0)
    sampled, num_examples = _with_data(key, singular)
    network = _relu_network(key)
    flat = deep_linear(key, [20, 10, 20], 5)
    deepest = [p for p in catalogue().values() if "deepest" in p.name and p.energy is None and p.dimension <= _MAX_DEEPEST]
    return (
        *(HardCase(problem, 1e6, 1.0, problem) for problem in arms),
        HardCase(sampled, customary_nbeta(num_examples), 1.0, singular, max_gradients=20_000),
        HardCase(network, customary_nbeta(_NUM_EXAMPLES), 1.0, network, num_draws=600),
        HardCase(flat, 1e4, 10.0, flat, max_gradients=20_000, num_draws=200),
        *(HardCase(problem, 1e5, 1.0, problem) for problem in deepest),
        *_large(key),
    )


def reference(case: HardCase) -> dict[str, float | None]:
    """Find what an estimate at the case's nbeta and localization should be, and how well that is known."""
    problem = case.same
    if case.num_draws == 0:
        known = problem.rlct if problem.energy is None else problem.energy(case.nbeta, case.localization)
        return {"reference": known, "reference_std_error": 0.0} | dict.fromkeys(
            ("reference_rhat", "reference_gradients_per_chain")
        )
    target = LocalPosterior(problem.loss_fn, problem.center, case.nbeta, case.localization)
    draws = sample(
        jax.random.key(2),
        NUTS(target, step_size=0.05, max_tree_depth=7),
        problem.center,
        FullBatch(problem.data),
        num_chains=_NUTS_CHAINS,
        num_warmup=_NUTS_WARMUP,
        num_draws=case.num_draws,
        mesh=chain_mesh(_NUTS_CHAINS),
        progress=False,
    )
    found = llc(draws, mean_loss(problem.loss_fn, problem.center, problem.data)[0])
    return {
        "reference": found.llc,
        "reference_std_error": found.std_error,
        "reference_rhat": found.rhat,
        "reference_gradients_per_chain": found.diagnostics["gradients_per_chain"],
    }


_NUTS_CHAINS, _NUTS_WARMUP = 16, 200
_NUM_EXAMPLES = 500
_MAX_DEEPEST = 2000
_LARGE = {224: 2000, 707: 200}
"""Width of the two layers, 100,352 and 999,698 weights, and gradients per chain."""


def _large(key: Any) -> list[HardCase]:
    problems = {count: deep_linear(key, [width] * 3, width // 3, point="smooth") for width, count in _LARGE.items()}
    return [HardCase(p, 1e5, 1.0, p, max_gradients=count, num_seeds=1) for count, p in problems.items()]


def _with_data(key: Any, problem: AnalyticProblem, num_examples: int = 10_000) -> tuple[AnalyticProblem, int]:
    """Draw data whose mean loss is the population loss of a linear network, up to a constant, while minibatches are noisy.

    Inputs are whitened, and the noise of the outputs is orthogonal to them: the center stays the minimum.
    """
    x_key, noise_key = jax.random.split(key)
    teacher = np.asarray(problem.loss_fn.teacher, np.float64)
    inputs, _ = np.linalg.qr(np.asarray(jax.random.normal(x_key, (num_examples, teacher.shape[1])), np.float64))
    noise = np.asarray(jax.random.normal(noise_key, (num_examples, teacher.shape[0])), np.float64)
    noise -= inputs @ (inputs.T @ noise)
    x = inputs * np.sqrt(num_examples)
    data = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(x @ teacher.T + noise, jnp.float32)}
    sampled = AnalyticProblem(
        name=problem.name + f", minibatches of {num_examples} examples",
        loss_fn=_linear_loss,
        center=problem.center,
        source=problem.source,
        data=data,
    )
    return sampled, num_examples


def _linear_loss(params: tuple[Array, ...], batch: dict[str, Array]) -> Float[Array, ""]:
    outputs = batch["x"]
    for weights in params:
        outputs = outputs @ weights.T
    return 0.5 * jnp.mean(jnp.sum((outputs - batch["y"]) ** 2, axis=1))


def _relu_network(key: Any) -> AnalyticProblem:
    """Train a ReLU network with twice the units of its teacher on noisy outputs, down to a minimum."""
    x_key, teacher_key, noise_key, start_key, train_key = jax.random.split(key, 5)
    teacher, student = MLP((4, 3, 1)), MLP((4, 6, 1))
    x = jax.random.normal(x_key, (_NUM_EXAMPLES, 4))
    weights = jax.tree.map(lambda w: 2 * w, teacher.init(teacher_key))
    y = teacher.apply(weights, x) + jax.random.normal(noise_key, (_NUM_EXAMPLES, 1))
    data = {"x": x, "y": y}

    def loss_fn(params: Params, batch: dict[str, Array]) -> Float[Array, ""]:
        return 0.5 * jnp.mean((student.apply(params, batch["x"]) - batch["y"]) ** 2)

    start, adam = student.init(start_key), optax.adam(1e-2)
    trained = train(train_key, loss_fn, start, FullBatch(data), adam, num_steps=5000, num_checkpoints=2, progress=False)
    return AnalyticProblem(
        name=f"ReLU network 4-6-1, {_NUM_EXAMPLES} examples",
        loss_fn=loss_fn,
        center=polish(loss_fn, trained.params, data, num_steps=1000).params,
        source="a long run of NUTS",
        data=data,
    )

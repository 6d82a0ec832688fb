"""Every kernel against its exact discrete-time law on quadratics.

Unadjusted kernels: a step is a linear map of (w, v) plus noise, whose stationary covariance solves a discrete Lyapunov
equation; the docstrings state the closed forms, repeated here. Metropolis kernels: the target itself. Each test has two step
sizes, two nbeta and two localizations.
"""

import functools
import math
from itertools import product

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize

from slt_interp import (
    HMC,
    MALA,
    NUTS,
    SGHMC,
    SGLD,
    SGNHT,
    Box,
    FullBatch,
    LocalPosterior,
    Minibatches,
    RMSPropSGLD,
    keep_params,
    sample,
)
from slt_interp.samplers.diagnostics import std_error

CURVATURE = np.array([1.0, 0.25, 0.05, 0.0])
NBETAS, LOCALIZATIONS, RELATIVE_STEPS = (30.0, 100.0), (4.0, 16.0), (0.4, 2.0)
SETTINGS = [
    # By default one setting, of the kernels that take minibatches with their noise.
    pytest.param(*setting, marks=[] if setting == (100.0, 16.0, 2.0) else [pytest.mark.slow])
    for setting in product(NBETAS, LOCALIZATIONS, RELATIVE_STEPS)
]


def quadratic(w, batch):
    """Curvatures CURVATURE, each as often as w has rows; with a batch, a gradient noise that does not depend on w."""
    noise = 0.0 if batch is None else jnp.sum(jnp.mean(batch, axis=0) * w)
    return 0.5 * jnp.sum(jnp.asarray(CURVATURE, jnp.float32) * w**2) + noise


def check_law(draws, variances):
    """Compare mean squares with the law, over chains, draws and copies, within 4 standard errors of at most 3 %.

    `variances` has the shape of the weights, or (chain, 1, *weights) where chains have laws of their own.
    """
    ratios = np.asarray(draws.collected, np.float64) ** 2 / variances
    ratios = ratios.reshape(*ratios.shape[:2], -1, len(CURVATURE)).mean(axis=2)
    for i in range(len(CURVATURE)):
        error = std_error(ratios[..., i])
        assert error < 0.03
        assert abs(ratios[..., i].mean() - 1) < 4 * error, (i, ratios[..., i].mean(), error)


def run_chains(key, kernel, params, batches, *, relaxation, num_draws=300, num_chains=32, extra_burnin=0, **settings):
    """Draws half a relaxation time apart (in steps), after twelve of them."""
    return sample(
        key,
        kernel,
        params,
        batches,
        num_chains=num_chains,
        num_draws=num_draws,
        num_burnin=math.ceil(12 * relaxation) + extra_burnin,
        thinning=max(1, math.ceil(relaxation / 2)),
        collect=keep_params,
        progress=False,
        **settings,
    )


def overdamped(step_size, s, noise, *, averaged=False):
    if averaged:
        return (1 + step_size * noise / (4 * (1 - step_size * s / 4))) / s
    return (1 + step_size * noise / 4) / (s * (1 - step_size * s / 4))


def underdamped(step_size, s, noise, friction):
    c = np.exp(-friction * np.sqrt(step_size))
    return (1 + step_size * noise * (1 + c) / (4 * (1 - c) * (1 - step_size * s / 4))) / s


def thermostatted(step_size, s, noise, friction):
    """SGNHT's for many coordinates: the friction x that keeps the mean squared velocity at 1."""

    def at(x):
        c, temperature = np.exp(-x * np.sqrt(step_size)), friction / x
        p = temperature + step_size * noise / ((1 - c**2) * (1 - step_size * s / 4))
        return c, temperature, p

    def heat(x):
        c, temperature, p = at(x)
        return np.mean(p * (1 + c**2) + temperature * (1 - c**2)) / 2 - 1

    c, temperature, p = at(scipy.optimize.brentq(heat, friction / 2, friction * 20 + 20 * np.sqrt(step_size) * np.max(noise)))
    return (p * (1 + c) ** 2 + temperature * (1 - c) * (3 + c)) / (4 * s)


def test_closed_forms_solve_the_lyapunov_equation():
    for step_size, s, noise, friction in product((0.01, 0.05), (3.0, 60.0), (0.0, 40.0), (1.0, 10.0)):
        h = np.sqrt(step_size)
        c = np.exp(-friction * h)
        kick = np.array([[1, 0], [-h * s, 1]])
        drift = np.array([[1, h / 2], [0, 1]])
        half = drift @ np.diag([1, c]) @ drift
        step = half @ kick
        entered = half @ np.diag([0, step_size * noise]) @ half.T + drift @ np.diag([0, 1 - c**2]) @ drift.T
        covariance = scipy.linalg.solve_discrete_lyapunov(step, entered)
        np.testing.assert_allclose(underdamped(step_size, s, noise, friction), covariance[0, 0], rtol=1e-9)
        # No friction left, c = 0: Leimkuhler-Matthews; and both without gradient noise are exact.
        np.testing.assert_allclose(underdamped(step_size, s, noise, 1e9), overdamped(step_size, s, noise, averaged=True))
        np.testing.assert_allclose(underdamped(step_size, s, 0.0, friction), 1 / s)
        np.testing.assert_allclose(thermostatted(step_size, np.array([s]), np.zeros(1), friction), 1 / s)
        # At a thermostat temperature T: the same Lyapunov equation with noise T (1 - c^2).
        x = friction * 1.3
        c, temperature = np.exp(-x * h), 1 / 1.3
        half = drift @ np.diag([1, c]) @ drift
        entered = half @ np.diag([0, step_size * noise]) @ half.T + drift @ np.diag([0, temperature * (1 - c**2)]) @ drift.T
        covariance = scipy.linalg.solve_discrete_lyapunov(half @ kick, entered)
        p = temperature + step_size * noise / ((1 - c**2) * (1 - step_size * s / 4))
        np.testing.assert_allclose((p * (1 + c) ** 2 + temperature * (1 - c) * (3 + c)) / (4 * s), covariance[0, 0], rtol=1e-9)


@pytest.mark.parametrize(("nbeta", "localization", "relative_step"), SETTINGS)
@pytest.mark.slow
@pytest.mark.parametrize("averaged", [False, True])
def test_sgld(key, averaged, nbeta, localization, relative_step):
    s = nbeta * CURVATURE + localization
    step_size = relative_step / s[0]
    kernel = SGLD(LocalPosterior(quadratic, jnp.zeros(4), nbeta, localization), step_size, leimkuhler_matthews=averaged)
    draws = run_chains(key, kernel, jnp.zeros(4), FullBatch(None), relaxation=2 / (step_size * localization))
    check_law(draws, overdamped(step_size, s, 0.0, averaged=averaged))


@pytest.mark.slow
@pytest.mark.parametrize(("nbeta", "localization", "relative_step"), SETTINGS)
def test_preconditioned_sgld_with_the_preconditioner_that_warm_up_froze(key, nbeta, localization, relative_step):
    s = nbeta * CURVATURE + localization
    kernel = RMSPropSGLD(LocalPosterior(quadratic, jnp.zeros(4), nbeta, localization), relative_step / s[0])
    relaxation = 2 * s[0] / (relative_step * localization)
    draws = run_chains(key, kernel, jnp.zeros(4), FullBatch(None), relaxation=relaxation, num_warmup=100)
    moment = np.asarray(draws.state.second_moment, np.float64)[:, None]
    assert (moment < 1).all(), "the preconditioner has moved"
    p = 1 / (np.sqrt(moment) + 0.1)
    assert kernel.step_size * (p * s).max() < 4
    check_law(draws, overdamped(kernel.step_size * p, s, 0.0))


FRICTIONS = (1.0, 10.0, 40.0)


@pytest.mark.slow
@pytest.mark.parametrize("friction", FRICTIONS)
@pytest.mark.parametrize(("nbeta", "localization", "relative_step"), SETTINGS)
def test_sghmc(key, friction, nbeta, localization, relative_step):
    s = nbeta * CURVATURE + localization
    step_size = relative_step / s[0]
    kernel = SGHMC(LocalPosterior(quadratic, jnp.zeros(4), nbeta, localization), step_size, friction)
    relaxation = max(friction / localization, 2 / friction) / np.sqrt(step_size)
    check_law(
        run_chains(key, kernel, jnp.zeros(4), FullBatch(None), relaxation=relaxation), underdamped(step_size, s, 0.0, friction)
    )


COPIES = 64
"""Copies of each coordinate, so that the thermostat's own fluctuations, of variance 1 / (4 * 64), do not matter."""


@pytest.mark.slow
@pytest.mark.parametrize("friction", FRICTIONS)
@pytest.mark.parametrize(("nbeta", "localization", "relative_step"), SETTINGS)
def test_sgnht(key, friction, nbeta, localization, relative_step):
    s = nbeta * CURVATURE + localization
    step_size = relative_step / s[0]
    params = jnp.zeros((COPIES, 4))
    kernel = SGNHT(LocalPosterior(quadratic, params, nbeta, localization), step_size, friction)
    relaxation = max(friction / localization, 2 / friction) / np.sqrt(step_size)
    draws = run_chains(key, kernel, params, FullBatch(None), relaxation=relaxation, num_chains=8, num_draws=100)
    check_law(draws, thermostatted(step_size, s, np.zeros(4), friction))


LAWS = {
    "SGLD": (SGLD, overdamped),
    "Leimkuhler-Matthews": (
        functools.partial(SGLD, leimkuhler_matthews=True),
        functools.partial(overdamped, averaged=True),
    ),
    "RMSPropSGLD": (RMSPropSGLD, lambda step_size, s, noise: overdamped(step_size / 1.1, s, noise)),
    "SGHMC 2": (functools.partial(SGHMC, friction=2.0), functools.partial(underdamped, friction=2.0)),
    "SGHMC 10": (functools.partial(SGHMC, friction=10.0), functools.partial(underdamped, friction=10.0)),
    "SGNHT 2": (functools.partial(SGNHT, friction=2.0), functools.partial(thermostatted, friction=2.0)),
    "SGNHT 10": (functools.partial(SGNHT, friction=10.0), functools.partial(thermostatted, friction=10.0)),
}


@pytest.mark.parametrize(("nbeta", "localization", "relative_step"), SETTINGS)
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name.endswith(" 2") else ()) for name in LAWS])
def test_minibatch_noise_enters_as_the_law_says(key, name, nbeta, localization, relative_step):
    build, law = LAWS[name]
    s = nbeta * CURVATURE + localization
    step_size = relative_step / s[0]
    size = 5
    x = jax.random.normal(jax.random.key(7), (400, COPIES, 4))
    # As large as brings temperatures a good part up: step_size * noise is about 1.
    x = (x - x.mean(axis=0)) * np.sqrt(size / step_size) / nbeta
    noise = nbeta**2 * np.asarray(x, np.float64).var(axis=0) / size
    params = jnp.zeros((COPIES, 4))
    kernel = build(LocalPosterior(quadratic, params, nbeta, localization), step_size)
    relaxation = max(2 / (step_size * localization), max(10 / localization, 1) / np.sqrt(step_size))
    # The thermostat moves to its place at the rate heat'(x), of `thermostatted`: about .01 per unit of time here.
    extra = math.ceil(1000 / np.sqrt(step_size)) if isinstance(kernel, SGNHT) else 0
    draws = run_chains(
        key, kernel, params, Minibatches(x, size), relaxation=relaxation, num_chains=8, num_draws=60, extra_burnin=extra
    )
    check_law(draws, law(step_size, s, noise))


@pytest.mark.slow
@pytest.mark.parametrize("name", LAWS)
def test_control_variate_takes_the_noise_out_of_every_minibatch_kernel(key, name):
    build, law = LAWS[name]
    nbeta, localization = 100.0, 16.0
    s = nbeta * CURVATURE + localization
    step_size, size = 2.0 / s[0], 5
    # The law above with this noise would be 1.5 times wider or more; here the noise does not depend on w, and drops out.
    x = jax.random.normal(jax.random.key(7), (400, 1, 4))
    x = (x - x.mean(axis=0)) * np.sqrt(size / step_size) / nbeta
    params = jnp.zeros((1, 4))
    target = LocalPosterior(quadratic, params, nbeta, localization).with_control_variate(x)
    kernel = build(target, step_size)
    if isinstance(kernel, SGNHT):
        pytest.skip("SGNHT's law is for many coordinates")
    relaxation = max(2 / (step_size * localization), max(10 / localization, 1) / np.sqrt(step_size))
    draws = run_chains(key, kernel, params, Minibatches(x, size), relaxation=relaxation)
    check_law(draws, law(step_size, s, 0.0))
    np.testing.assert_array_equal(draws.num_gradients, 2 * draws.num_steps)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MALA", "HMC", "NUTS"])
def test_metropolis_kernels_have_the_truncated_law_in_a_box(key, name):
    half_width = 0.15
    w = np.linspace(-half_width, half_width, 10_001)
    density = np.exp(-50.0 * CURVATURE[:, None] * w**2)
    variances = np.sum(density * w**2, axis=1) / np.sum(density, axis=1)
    target = LocalPosterior(quadratic, jnp.zeros(4), 100.0, Box(-half_width, half_width))
    kernel = METROPOLIS[name](target, 0.02 if name == "MALA" else 0.15)
    # Most of the larger steps lead out of the box.
    draws = run_chains(key, kernel, jnp.zeros(4), FullBatch(None), relaxation={"MALA": 80, "HMC": 40, "NUTS": 3}[name])
    check_law(draws, variances)


METROPOLIS = {"MALA": MALA, "HMC": HMC, "NUTS": NUTS}


@pytest.mark.parametrize(("nbeta", "localization", "relative_step"), SETTINGS)
@pytest.mark.parametrize("name", ["MALA", "HMC", pytest.param("NUTS", marks=pytest.mark.slow)])
def test_metropolis_kernels_are_exact_at_any_step(key, name, nbeta, localization, relative_step):
    s = nbeta * CURVATURE + localization
    step_size = relative_step / s[0]
    kernel = METROPOLIS[name](
        LocalPosterior(quadratic, jnp.zeros(4), nbeta, localization), step_size if name == "MALA" else step_size**0.5
    )
    relaxation = {"MALA": 4 / (step_size * localization), "HMC": 12, "NUTS": 2}[name]
    draws = run_chains(key, kernel, jnp.zeros(4), FullBatch(None), relaxation=relaxation)
    check_law(draws, 1 / s)
    check_averages(draws, nbeta, s)


@pytest.mark.slow
@pytest.mark.parametrize("name", METROPOLIS)
def test_warm_up_finds_step_and_metric_and_changes_no_law(key, name):
    nbeta, localization = 1e4, 4.0
    s = nbeta * CURVATURE + localization
    kernel = METROPOLIS[name](LocalPosterior(quadratic, jnp.zeros(4), nbeta, localization), 1e-4)
    draws = run_chains(key, kernel, jnp.zeros(4), FullBatch(None), relaxation=10, num_warmup=400)
    check_law(draws, 1 / s)
    check_averages(draws, nbeta, s)
    # sigma^2 estimates 1 / s: a mean of about 100 squares of a normal has a relative error of sqrt(2 / 100) on the log scale.
    scale = np.log(np.asarray(draws.state.scale) ** 2 * s)
    assert abs(scale.mean(axis=0)).max() < 4 * np.sqrt(2 / 100)
    # Dual averaging ends near its target on whole steps; a quarter of the steps are smaller and accept more.
    acceptance = draws.info.acceptance.mean()
    target = float(kernel.target_acceptance)
    assert target - 0.05 < acceptance < target + (1 - target) / 4 + 0.05


def check_averages(draws, nbeta, s):
    """`Info`, averaged over trajectories, has the exact means: energy 1/2 sum k / s, virial d, squared distance sum 1 / s."""
    k = nbeta * CURVATURE
    for values, exact in (
        (nbeta * draws.loss, 0.5 * np.sum(k / s)),
        (draws.info.virial, len(s)),
        (draws.info.virial_localization, np.sum((s - k) / s)),
        (draws.info.squared_distance, np.sum(1 / s)),
    ):
        error = std_error(values)
        assert error < 0.03 * exact
        assert abs(np.mean(values, dtype=np.float64) - exact) < 4 * error


@pytest.mark.parametrize("num_leapfrog", [1, 8])
def test_hmc_goes_to_the_end_of_its_trajectories(key, num_leapfrog):
    """Where nothing holds it: mean squared displacement d (num_leapfrog h)^2 E[v^2], v uniform in [1/2, 1] or log-uniform."""
    step, dimension = 0.1, 5
    target = LocalPosterior(lambda w, batch: 0.0 * jnp.sum(w), jnp.zeros(dimension), nbeta=1.0, localization=1e-12)
    kernel = HMC(target, step, num_leapfrog=num_leapfrog)
    start = kernel.init(key, jnp.zeros(dimension), None)
    moved = jax.jit(jax.vmap(lambda key: kernel.step(key, start, None)[0].params))(jax.random.split(key, 20_000))
    squares = np.sum(np.asarray(moved, np.float64) ** 2, axis=1)
    exact = dimension * (num_leapfrog * step) ** 2 * (0.75 * 7 / 12 + 0.25 * (1 - np.exp(-7)) / 7)
    assert abs(squares.mean() - exact) < 4 * squares.std() / np.sqrt(len(squares))


@pytest.mark.slow
def test_blackjax_agrees(key):
    """An independent oracle, at the docstrings' conversions: SGLD and MALA at half the step size, HMC at the same."""
    nbeta, localization = 30.0, 4.0
    s = nbeta * CURVATURE + localization
    step_size = 0.8 / s[0]

    def density(w):
        return -0.5 * jnp.sum(jnp.asarray(s) * w**2)

    def run(step, state, position):
        def chain(key):
            def one(carry, key):
                carry = step(key, carry)
                return carry, position(carry) ** 2

            return jax.lax.scan(one, state, jax.random.split(key, 6000))[1]

        return np.asarray(jax.jit(jax.vmap(chain))(jax.random.split(key, 16)), np.float64)[:, 500::5]

    zero = jnp.zeros(4)
    sgld = blackjax.sgld(lambda w, _: -jnp.asarray(s) * w)
    mala = blackjax.mala(density, step_size / 2)
    hmc = blackjax.hmc(density, step_size**0.5, jnp.ones(4), 8)
    theirs = {
        "SGLD": run(lambda key, w: sgld.step(key, w, None, step_size / 2), zero, lambda w: w),
        "MALA": run(lambda key, state: mala.step(key, state)[0], mala.init(zero), lambda state: state.position),
        "HMC": run(lambda key, state: hmc.step(key, state)[0], hmc.init(zero), lambda state: state.position),
    }
    ours = {"SGLD": (SGLD, step_size, 25), "MALA": (MALA, step_size, 50), "HMC": (HMC, step_size**0.5, 8)}
    for name, (build, size, relaxation) in ours.items():
        kernel = build(LocalPosterior(quadratic, zero, nbeta, localization), size)
        draws = run_chains(jax.random.key(1), kernel, zero, FullBatch(None), relaxation=relaxation)
        for i in range(4):
            left, right = np.asarray(draws.collected[..., i], np.float64) ** 2, theirs[name][..., i]
            assert abs(left.mean() - right.mean()) < 4 * np.hypot(std_error(left), std_error(right)), name

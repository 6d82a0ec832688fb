from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp.bases import Gaussian
from slt_interp.degradation.dials import TemperedLadder, TemperedPosterior, WeightNoise
from slt_interp.degradation.matching import DistanceProbe, LossProbe, match, match_posterior
from slt_interp.errors import InputError
from slt_interp.estimators.ladder import Ladder
from slt_interp.samplers.hmc import HMC

DATA = jax.random.normal(jax.random.key(1), (200, 5))
PARAMS = {"w": DATA.mean(axis=0)}


def loss_fn(params, batch):
    return 0.5 * jnp.mean(jnp.sum((params["w"] - batch) ** 2, axis=1))


def excess(params):
    floor = loss_fn(PARAMS, DATA)
    return np.asarray(jax.vmap(jax.vmap(lambda p: loss_fn(p, DATA) - floor))(params), np.float64)


def test_weight_noise_has_its_level_as_standard_deviation(key):
    degraded = WeightNoise().draw(key, PARAMS, 0.3, num_chains=50, num_draws=40)
    z = (np.asarray(degraded.params["w"]) - np.asarray(PARAMS["w"])) / 0.3
    assert z.shape == (50, 40, 5)
    assert abs(z.var() - 1) < 4 * np.sqrt(2 / z.size)


def test_equal_keys_give_equal_noise_at_every_level(key):
    small, large = (WeightNoise().draw(key, PARAMS, s, num_chains=2, num_draws=3).params["w"] - PARAMS["w"] for s in (0.1, 1.0))
    np.testing.assert_allclose(10 * small, large, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("nbeta", [20.0, 200.0])
def test_tempered_posterior_raises_the_loss_by_its_exact_amount(key, nbeta):
    dial = TemperedPosterior(loss_fn, DATA, 2.0, batch_size=200, num_burnin=500, thinning=20, tolerance=0.02, progress=False)
    degraded = dial.draw(key, PARAMS, nbeta, num_chains=16, num_draws=200)
    exact = 5 / 2 / (nbeta + 2)
    per_chain = excess(degraded.params).mean(axis=1)
    error = per_chain.std(ddof=1) / 4
    # The step adds the tolerance, 2 %; gradient noise of variance nbeta^2 / 200 <= nbeta + 2 adds at most as much again; and
    # the pilot that sets the step knows the energy to a factor of 2 (4 chains x 5 directions).
    assert abs(per_chain.mean() - exact) < 4 * error + exact * 2 * (0.02 + 0.02)
    assert degraded.estimate.nbeta == nbeta


@pytest.mark.parametrize("wanted", [1e-3, 0.1])
def test_match_meets_the_wanted_loss_and_the_exact_level(key, wanted):
    found = match(
        key, WeightNoise(), PARAMS, LossProbe(loss_fn, DATA), wanted, bracket=(1e-4, 10.0), num_chains=20, num_draws=100
    )
    assert found.excess_loss == pytest.approx(wanted, rel=0.01)
    # E[excess] = 5 sigma^2 / 2; over 2,000 draws its relative sd is sqrt(2 / 5 / 2000), and sigma's half of that.
    assert abs(found.level / np.sqrt(wanted / 2.5) - 1) < 4 * 0.5 * np.sqrt(2 / 5 / 2000) + 0.005
    assert excess(found.degraded.params).mean() == pytest.approx(found.excess_loss, rel=1e-3)
    assert 0 < found.std_error < 0.05 * wanted


def test_dials_are_matched_by_distance_too(key):
    found = match(key, WeightNoise(), PARAMS, DistanceProbe(PARAMS), 0.5, bracket=(1e-3, 10.0), num_chains=8, num_draws=8)
    assert found.excess_loss == pytest.approx(0.5, rel=0.01)
    # The squared distance is level^2 times chi-squared: mean d, variance 2 d, of 64 draws.
    assert found.level**2 * 5 == pytest.approx(0.5, rel=0.01 + 4 * np.sqrt(2 / 5 / 64))


def test_loss_beyond_the_dial_is_an_error(key):
    with pytest.raises(ValueError, match=r"excess losses of .* does not lie between: widen the bracket"):
        match(key, WeightNoise(), PARAMS, LossProbe(loss_fn, DATA), 100.0, bracket=(1e-4, 1.0), num_chains=4, num_draws=4)


@pytest.mark.slow
def test_posterior_is_matched_at_the_exact_nbeta_from_a_poor_guess(key):
    kernel = partial(HMC, step_size=0.1)
    dial = TemperedPosterior(loss_fn, DATA, 2.0, kernel, num_burnin=200, thinning=5, progress=False)
    wanted, counts = 0.05, {"num_chains": 16, "num_draws": 100}
    # E[L - L*] = d / 2 / (nbeta + gamma) for d = 5.
    matched = match_posterior(key, dial, PARAMS, LossProbe(loss_fn, DATA), wanted, llc=20.0, **counts)
    exact = 2.5 / (matched.level + 2)
    assert abs(matched.excess_loss - exact) < 4 * matched.std_error
    assert abs(np.log(matched.excess_loss / wanted)) < 0.1


@pytest.mark.parametrize(("excess_loss", "llc", "name"), [(0.0, 1.0, "excess_loss"), (0.1, -1.0, "llc")])
def test_losses_and_guesses_that_are_not_positive_are_refused(key, excess_loss, llc, name):
    dial = TemperedPosterior(loss_fn, DATA, 2.0)
    with pytest.raises(InputError, match=f"{name} must be positive"):
        match_posterior(key, dial, PARAMS, LossProbe(loss_fn, DATA), excess_loss, llc=llc, num_chains=2, num_draws=2)


def test_rungs_of_a_ladder_are_a_dial(key):
    nbetas = np.array([0.0, 1.0, 10.0, 100.0])
    rng = np.random.default_rng(0)
    # Draws of the quadratic posterior: variance 1 / (nbeta + 2), two chains from the base before two from the weights.
    weights = np.asarray(PARAMS["w"]) + rng.normal(size=(4, 4, 50, 5)) / np.sqrt(nbetas + 2)[:, None, None, None]
    loss = np.asarray(jax.vmap(jax.vmap(jax.vmap(lambda w: loss_fn({"w": w}, DATA))))(jnp.asarray(weights, jnp.float32)))
    ladder = Ladder(
        nbetas=nbetas,
        loss=loss,
        mean_loss=loss,
        squared_distance=np.sum((weights - PARAMS["w"]) ** 2, axis=-1),
        virial=None,
        is_from_base=np.array([True, True, False, False]),
        replica=np.zeros(loss.shape, int),
        exchange=np.ones(3),
        init_loss=float(loss_fn(PARAMS, DATA)),
        rounding=0.0,
        base=Gaussian(PARAMS, 0.5**0.5),
        dimension=5,
        params={"w": weights},
        num_lost=0,
        gradients_per_chain=1.0,
    )
    dial = TemperedLadder(ladder)
    few = dial.draw(key, PARAMS, 12.0, num_chains=3, num_draws=2)
    np.testing.assert_array_equal(few.params["w"], weights[2][[2, 3, 0]][:, [0, 49]])
    found = match(key, dial, PARAMS, LossProbe(loss_fn, DATA), 0.2, bracket=(0.5, 200.0), num_chains=4, num_draws=50)
    # It ends at a rung: 5 / 2 / 12 at nbeta 10 is the nearest, known to the error of 200 draws of a chi-squared.
    assert abs(found.excess_loss / (2.5 / 12) - 1) < 4 * np.sqrt(2 / 5 / 200)
    with pytest.raises(InputError, match="the ladder has 4 chains of 50 draws, but 5 of 50 are asked for"):
        dial.draw(key, PARAMS, 12.0, num_chains=5, num_draws=50)

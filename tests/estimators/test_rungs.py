"""Where rungs belong, against what exact energies and a base measure in one dimension ask for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp import HMC, Gaussian, LocalPosterior, analytic, temper
from slt_interp.errors import InputError
from slt_interp.estimators import families, rungs
from slt_interp.estimators.families import Families
from slt_interp.estimators.rungs import place_rungs
from slt_interp.samplers.exchange import ReplicaExchange

FIRST, TOP = 2.0, 2.0 * 3.0**6
TRIPLED = np.concatenate([[0.0], FIRST * 3.0 ** np.arange(7)])

ROUNDING = 1e-14
"""Of the exponential of a logarithm, at most 7.3, after a dozen operations of float64."""


def half_square(w, batch):
    return 0.5 * jnp.sum(w**2)


def _target(loss_fn, max_nbeta):
    return LocalPosterior(loss_fn, jnp.zeros(1), max_nbeta, Gaussian(0.0, 1.0))


def _families():
    return Families(jnp.zeros(1), None, num_chains=2, progress=False)


def _spaced(mean, variance):
    unknown = np.array([np.nan])
    pilot = rungs._Pilot(TRIPLED, None, jnp.ones(8), *(np.concatenate([unknown, x]) for x in (mean, variance)))
    reached = rungs._reached(pilot, TRIPLED)
    return rungs._spaced(reached, TRIPLED, 2 + int(np.ceil(reached[-1] - ROUNDING)))


@pytest.mark.parametrize("coefficient", [4.0, 100.0, 1e4])
def test_exact_energies_of_a_coefficient_give_rungs_in_a_ratio(coefficient):
    nbetas = TRIPLED[1:]
    found = _spaced(coefficient / nbetas, coefficient / nbetas**2)
    # nbeta L has the standard deviation sqrt(coefficient) everywhere, and neighbors are 1.4 of these apart. What the means of
    # two rungs N and 3 N say, with u = log 3, counts where it is more: the root of coefficient (1 / N - 1 / 3N) sqrt(N 3N) / u
    # = coefficient 2 sinh(u / 2) / u, which is 1.025 times as much. The last gap would be a part of one: all shrink instead.
    u = np.log(3.0)
    scatter = np.sqrt(coefficient * 2 * np.sinh(u / 2) / u)
    gaps = np.ceil(np.log(TOP / FIRST) * scatter / 1.4)
    assert found[0] == 0
    assert found[-1] == TOP
    np.testing.assert_allclose(found[1:], np.geomspace(FIRST, TOP, int(gaps) + 1), rtol=ROUNDING)
    assert (1 - 1 / gaps) / 1.026 < np.log(found[2] / found[1]) / (1.4 / np.sqrt(coefficient)) < 1


def test_a_fall_of_the_mean_between_two_rungs_of_the_pilot_gets_rungs_there():
    # Nothing scatters, and gaps are the pilot's, but for one of them, u = log 3 wide, which is to get 7: the scatter there is
    # 7 * 1.4 / u, whose square is the fall per unit of log nbeta, times the geometric mean of both nbetas.
    u = np.log(3.0)
    fall = (7 * 1.4 / u) ** 2 * u / np.sqrt(TRIPLED[3] * TRIPLED[4])
    found = _spaced(np.where(np.arange(7) < 3, fall, 0.0), np.zeros(7))
    expected = np.concatenate([TRIPLED[:3], np.geomspace(TRIPLED[3], TRIPLED[4], 8), TRIPLED[5:]])
    np.testing.assert_allclose(found, expected, rtol=ROUNDING)


def test_first_rung_is_where_draws_of_the_base_are_worth_the_share(key):
    # E exp(-k N w^2 / 2) = (1 + k N)^(-1/2) =: m_k under N(0, 1), so that draws are worth m_1^2 / m_2, that is
    # (1 + 2N)^(1/2) / (1 + N), of their number: .3 at the root of .09 (1 + N)^2 = 1 + 2N, 20.71.
    share = rungs._FIRST_ESS
    exact = max(np.roots([share**2, 2 * share**2 - 2, share**2 - 1]))
    assert exact == pytest.approx(20.71, abs=0.005)
    found = rungs.first_rung(key, _target(half_square, 1e6), jnp.zeros(1), None, 1e6)
    # Delta method: log share is off by the mean of 2 x / m_1 - x^2 / m_2 over draws x = exp(-N w^2 / 2), log N by that over
    # the slope N / (1 + 2N) - N / (1 + N) = -.466: .087 for 1024 draws.
    one, two, three, four = (1 + np.arange(1, 5) * exact) ** -0.5
    variance = 4 * two / one**2 - 4 * three / (one * two) + four / two**2 - 1
    slope = exact / (1 + 2 * exact) - exact / (1 + exact)
    assert abs(np.log(found / exact)) < 4 * np.sqrt(variance / rungs._BASE_DRAWS) / abs(slope)


def test_first_rung_is_at_most_the_top(key):
    assert rungs.first_rung(key, _target(half_square, 0.03), jnp.zeros(1), None, 0.03) == 0.03


def test_base_at_which_the_loss_is_hardly_ever_finite_is_one_sentence(key):
    def loss_fn(w, batch):
        return jnp.where(jnp.all(w == 0), 0.0, jnp.inf)

    with pytest.raises(InputError, match="the loss is finite at 0 of 1024 draws of the base measure") as caught:
        place_rungs(key, _target(loss_fn, 10.0), _families())
    assert "\n" not in str(caught.value)


TINY = 0.03
"""Far below the first rung, 20.7: pilot and ladder are the base, and four rungs that triple up to this."""


def _gradients(num_rungs, num_steps):
    """8 leapfrog steps of every rung above the base, and one gradient at the draw of the base."""
    return num_steps * (8 * (num_rungs - 1) + 1)


@pytest.fixture
def runs(monkeypatch):
    """Record what `Families.run` gives."""
    found, run = [], Families.run

    def recorded(*arguments, **settings):
        found.append(run(*arguments, **settings))
        return found[-1]

    monkeypatch.setattr(Families, "run", recorded)
    return found


def _quadratic_ladder(nbetas):
    target = LocalPosterior(half_square, jnp.zeros(3), np.asarray(nbetas, np.float32), Gaussian(0.0, 1.0))
    scale = 1 / np.sqrt(1 + np.repeat(np.asarray(nbetas, np.float32)[:, None], 3, axis=1))
    return ReplicaExchange(HMC(target, np.full(len(nbetas), 0.7, np.float32), scale=scale))


def test_chains_that_move_to_other_rungs_start_at_the_weights_of_the_nearest(key):
    place = families.Place(np.array([0.0, 1.0, 10.0]), jax.random.normal(key, (2, 3, 3)))
    moved = families._at(place, _quadratic_ladder([0.0, 0.5, 2.0, 4.0, 20.0]), None)
    np.testing.assert_array_equal(moved.state.params, np.asarray(place.params)[:, [0, 1, 1, 2, 2]])
    assert moved.num_steps == 0


@pytest.mark.slow
def test_ladder_beyond_the_budget_is_given_up_after_its_pilot(key, runs):
    kernel, _, spent = place_rungs(key, _target(half_square, TINY), _families(), max_gradients=1)
    assert kernel is None
    assert len(runs) == 1
    assert spent == _gradients(5, 100 + 50)


@pytest.mark.slow
def test_top_below_the_first_rung_makes_a_ladder_of_four_above_the_base(key, runs):
    kernel, _, spent = place_rungs(key, _target(half_square, TINY), _families())
    assert kernel is not None
    # Rounded to float32 once.
    np.testing.assert_allclose(
        kernel.target.nbeta, TINY * np.array([0, 1 / 27, 1 / 9, 1 / 3, 1]), rtol=float(np.finfo(np.float32).eps)
    )
    steps = np.asarray(kernel.step_size)
    assert steps.shape == (5,)
    assert np.all((steps > 0) & (steps <= 1))
    # A pilot and two trials; nothing is added between neighbors that nearly always swap.
    assert len(runs) == 3
    # And half of the chains are annealed.
    annealing = 4 * rungs.ANNEALING / 2
    assert spent == _gradients(5, 100 + 50) + annealing + 2 * _gradients(5, 50)
    assert spent == pytest.approx(annealing + sum(np.mean([draws.num_gradients for draws in pair]) for pair in runs))


@pytest.mark.slow
def test_a_ladder_leaves_of_the_budget_what_its_draws_need(key):
    found = []
    for budget in (5_000, 12_000, 25_000, 40_000):
        kernel, _, spent = place_rungs(key, _target(half_square, TINY), _families(), max_gradients=budget)
        found.append(kernel is not None)
        assert kernel is None or spent + _gradients(5, (5 * rungs.BURNIN + rungs.FEWEST) // 8) <= budget
    assert found[0] is False
    assert found[-1] is True


def test_pilot_learns_from_the_family_that_has_settled_where_the_other_is_on_its_way():
    rng = np.random.default_rng(0)
    near, far = rng.gamma(3.0, size=(2, 4, 50, 3)) * np.array([1.0, 0.3, 0.1])
    far[..., 2] = 1e3 * rng.random((4, 1)) + far[..., 2]
    found = rungs._settled([far, near])
    # Where both have settled the pooled variance is that of either; far chains scatter a million times as much.
    np.testing.assert_array_equal(found, [np.arange(8), np.arange(8), [4, 5, 6, 7, 4, 5, 6, 7]])


@pytest.mark.slow
def test_ladder_of_a_stiff_quadratic_with_flat_directions_has_few_rungs_and_the_exact_volume(key):
    problem = analytic.quadratic([1.0, 3.0, 10.0, 30.0, 100.0, 300.0] + [0.0] * 54)
    ladder = temper(key, problem.loss_fn, problem.center, None, base=problem.base, max_nbeta=1e4, progress=False)
    # 1.4 scatters of sqrt(3) to a gap, over 13 e-folds; trials may add a few.
    assert len(ladder.nbetas) < 40
    volume = ladder.log_volume([1e-3, 1e-2])
    assert np.all(np.abs(volume.log_volume - [problem.log_volume(t) for t in (1e-3, 1e-2)]) < 4 * volume.std_error)


def test_a_ladder_of_thousands_of_rungs_is_refused_before_it_is_run(key, monkeypatch):
    # Where floats round the loss by more than 1 / nbeta, energies scatter with nbeta: a list of these rungs would not fit.
    monkeypatch.setattr(rungs, "_reached", lambda pilot, nbetas: np.linspace(0.0, 1e11, len(nbetas) - 1))
    with pytest.raises(InputError, match="would need 100,000,000,002 rungs, and at most 400 are run"):
        place_rungs(key, _target(half_square, 100.0), _families())


def test_a_gap_in_which_two_phases_coexist_is_divided_by_what_they_scatter_together():
    nbetas = np.concatenate([[0.0], 100.0 * 1.2 ** np.arange(35)])
    rng = np.random.default_rng(0)
    families = [rng.gamma(4.0, 1 / np.maximum(nbetas, 1.0), (4, 50, 36)) for _ in range(2)]
    np.testing.assert_array_equal(rungs._phase_parts(families, nbetas), 1)
    # At one rung the first family is 60 higher in nbeta L: together they scatter by 30, and gaps of log 1.2 are 5.5 of that.
    families[0][:, :, 20] += 60 / nbetas[20]
    parts = rungs._phase_parts(families, nbetas)
    np.testing.assert_array_equal(parts[[19, 20]], 6)
    np.testing.assert_array_equal(np.delete(parts, [19, 20]), 1)
    # Of a ladder of 36 rungs there is room for 12, and here 32 would be put in.
    families[0][:, :, 20] += 120 / nbetas[20]
    crowded = rungs._phase_parts(families, nbetas)
    assert crowded.sum() == len(crowded) + 12
    # A family that has not arrived at any colder rung is no phase.
    families[0][:, :, 20:] += 60 / nbetas[20:]
    np.testing.assert_array_equal(rungs._phase_parts(families, nbetas), 1)


def test_the_widest_gaps_are_divided_first_where_there_is_little_room():
    parts = np.array([1, 2, 5, 1, 4])
    np.testing.assert_array_equal(rungs._limited(parts, 8), parts)
    np.testing.assert_array_equal(rungs._limited(parts, 5.5), [1, 1, 5, 1, 2])
    np.testing.assert_array_equal(rungs._limited(parts, -3), 1)


def test_gaps_are_divided_at_equal_ratios():
    found = rungs._divided(np.array([0.0, 1.0, 8.0, 16.0]), np.array([2, 3, 1]))
    np.testing.assert_allclose(found, [0.0, 0.25, 1.0, 2.0, 4.0, 8.0, 16.0])


@pytest.mark.slow
def test_neighbors_that_hardly_swap_get_a_rung_between_them(key, runs, monkeypatch):
    # Rungs as far apart as the pilot's, a factor of 3, where 20 directions swap with a probability of about .03.
    monkeypatch.setattr(rungs, "_reached", lambda pilot, nbetas: np.arange(len(nbetas) - 1.0))
    target = LocalPosterior(half_square, jnp.zeros(20), 1e3, Gaussian(0.0, 1.0))
    kernel, _, _ = place_rungs(key, target, Families(jnp.zeros(20), None, num_chains=2, progress=False))
    before, after = (np.asarray(k.target.nbeta) for k in (runs[0][0].kernel, kernel))
    assert len(after) > len(before)
    assert np.max(np.diff(np.log(after[2:]))) < 0.6 * np.log(3)

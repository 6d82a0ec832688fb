"""The ladder against exact volumes, energies and partition functions."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from slt_interp import Ball, Box, FloatGrid, Gaussian, LocalPosterior, temper
from slt_interp.analytic import catalogue
from slt_interp.errors import InputError
from slt_interp.estimators.ladder import Ladder
from slt_interp.estimators.llc import DO_NOT_TRUST, OK
from slt_interp.estimators.reference import Descent
from slt_interp.estimators.reweighting import block_sums, spread
from slt_interp.estimators.rounding import loss_rounding
from slt_interp.estimators.tempering import ladders

EPS = np.array([1e-3, 1e-2, 1e-1])


def _temper(name, key=0, **settings):
    problem = catalogue()[name]
    run = {"base": problem.base, "max_nbeta": 3e3, "progress": False} | settings
    return problem, temper(jax.random.key(key), problem.loss_fn, problem.center, problem.data, **run)


@pytest.fixture(scope="module")
def crossing():
    return _temper("monomial w1^2 w2^2", num_draws=200, keep_params=True)


@pytest.mark.slow
def test_volumes_of_crossing_lines_are_exact(crossing):
    problem, ladder = crossing
    found = ladder.log_volume(EPS)
    exact = np.array([problem.log_volume(threshold) for threshold in EPS])
    assert ladder.status == OK, ladder
    assert np.all(np.abs(found.log_volume - exact) < 4 * found.std_error)
    assert np.all(found.std_error < 0.1)
    assert np.all(np.diff(found.log_volume) > 0)
    # MBAR solves for each rung's share to 1e-3 / sqrt(draws) / rungs: 2.5e-6 with 8 chains of 200 draws and ten rungs.
    assert ladder.log_volume([1e9]).log_volume[0] == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_energies_and_partition_functions_of_every_rung_are_exact(crossing):
    problem, ladder = crossing
    curve, partition = ladder.llc_curve(), ladder.log_partition()
    energies = np.array([problem.energy(nbeta, 1.0) for nbeta in curve.nbetas])
    assert np.all(np.abs(curve.llc - energies) < 4 * curve.std_error)
    # N^2 Var(L) = E - dE / d log N
    step = 1e-3
    slopes = [(problem.energy(n * (1 + step), 1.0) - problem.energy(n, 1.0)) / step for n in curve.nbetas]
    assert np.all(np.abs(curve.heat_capacity - (energies - slopes)) < 4 * curve.heat_capacity_std_error + step)
    exact = np.array([problem.log_partition(nbeta) for nbeta in partition.nbetas[1:]])
    assert np.all(np.abs(partition.log_z[1:] - exact) < 4 * partition.std_error[1:])


@pytest.mark.slow
def test_a_constant_loss_has_coefficient_zero_however_few_the_rungs(crossing):
    flat = np.zeros_like(crossing[1].loss[:3])
    losses = {"loss": flat, "mean_loss": flat, "init_loss": 0.0}
    ladder = dataclasses.replace(crossing[1], nbetas=crossing[1].nbetas[:3], **losses)
    found = ladder.learning_coefficient()
    assert (found.coefficient, found.multiplicity, found.std_error) == (0.0, 1, 0.0)


@pytest.mark.slow
def test_kept_weights_are_those_of_the_losses(crossing):
    problem, ladder = crossing
    top = ladder.draws(-1)
    losses = jax.vmap(jax.vmap(lambda w: problem.loss_fn(w, None)))(jnp.asarray(top))
    np.testing.assert_allclose(losses, ladder.loss[-1], rtol=1e-5, atol=1e-12)


@pytest.mark.slow
def test_saddle_point_is_good_to_its_next_term(crossing):
    # Stirling's series for Gamma(2 - something): 1 / (12 (1 + LLC)) to first order, with LLC between 0 and 1/2.
    _, ladder = crossing
    found = ladder.log_volume(EPS)
    assert np.all(np.abs(found.saddle_point - found.log_volume) < 1 / 12 + 4 * found.std_error)


@pytest.mark.slow
def test_a_run_that_is_to_have_more_draws_goes_on(crossing, tmp_path):
    _, whole = crossing
    for num_draws in (100, 200):
        _, ladder = _temper("monomial w1^2 w2^2", num_draws=num_draws, keep_params=True, checkpoint=tmp_path)
    np.testing.assert_array_equal(whole.loss, ladder.loss)


def _synthetic(shift=0.0, exchange=0.5, init_loss=0.0, rounding=0.0):
    """A ladder of independent exact draws: a quadratic in 4 dimensions under N(0, 1)."""
    nbetas = np.concatenate([[0.0], np.geomspace(1.0, 100.0, 6)])
    loss = np.random.default_rng(0).gamma(2.0, 1 / (1 + nbetas)[:, None, None], (7, 8, 200))
    is_from_base = np.arange(8) < 4
    loss[1:, is_from_base] *= 1 + shift
    replica = np.broadcast_to(np.arange(7)[:, None, None], loss.shape)
    return Ladder(
        nbetas,
        loss,
        loss,
        loss,
        None,
        is_from_base,
        replica,
        np.full(6, exchange),
        init_loss,
        rounding,
        Gaussian(0.0, 1.0),
        4,
        None,
        0,
        0.0,
    )


@pytest.mark.parametrize("offset", [0.5, 1e3])
def test_rounding_of_a_loss_with_an_offset_is_that_of_its_floats(offset):
    target = LocalPosterior(lambda w, batch: offset + 0.5 * jnp.sum(w**2), jnp.zeros(4), 1.0, Gaussian(0.0, 1.0))
    params = 1e-2 * jax.random.normal(jax.random.key(0), (8, 4))
    spacing = np.spacing(np.float32(offset))
    # Roundings by half a spacing make fourth differences of (1 + 4 + 6 + 4 + 1) / 2 spacings at most, and count as 8 / sqrt(70)
    # of one; and eps times a float is between one spacing and two.
    upper = np.hypot(8 * np.sqrt(12 / 70), 2)
    assert 1 <= np.sqrt(12) / spacing * loss_rounding(target, params, None) <= upper


def test_rungs_that_rounding_reaches_give_no_coefficient():
    # Six rungs up to 100 above the base, .01 / rounding below the second of them.
    with pytest.raises(InputError, match="this ladder has 1 that can be read"):
        _synthetic(rounding=5e-3).learning_coefficient()
    with pytest.raises(InputError, match="this ladder has 0 that can be read"):
        _synthetic(rounding=1.0).learning_coefficient()
    ladder = _synthetic(rounding=1e-2)
    assert np.all(ladder.llc_curve().std_error >= ladder.nbetas[1:] * 1e-2)


def test_rungs_whose_draws_all_have_one_loss_give_no_coefficient():
    ladder = _synthetic()
    flat = ladder.loss * (ladder.nbetas < 100)[:, None, None]
    found = dataclasses.replace(ladder, loss=flat, mean_loss=flat).learning_coefficient()
    assert np.all(np.isfinite([found.coefficients, found.std_errors]))


@pytest.mark.slow
def test_every_other_ladder_has_twice_the_draws_and_begins_with_those_before():
    problem = catalogue()["monomial w1^4"]
    settings = {"base": problem.base, "max_nbeta": 30.0, "num_chains": 4, "num_draws": 10, "progress": False}
    first, second = itertools.islice(ladders(jax.random.key(0), problem.loss_fn, problem.center, None, **settings), 2)
    assert second.loss.shape[2] == 20
    np.testing.assert_array_equal(second.loss[:, :, :10], first.loss)


def test_labels_split_a_volume_as_the_exact_law_does():
    ladder, threshold = _synthetic(), 0.5
    coin = np.random.default_rng(1).uniform(size=ladder.loss.shape) < 0.3
    law = stats.gamma(2.0)  # of the loss, under the base
    for labels, parts in [
        # A label that knows nothing of the loss, and one that knows nothing else.
        (coin, {1: np.log(0.3), 0: np.log(0.7)}),
        (ladder.loss > 0.2, {0: np.log(law.cdf(0.2) / law.cdf(threshold)), 1: np.log(1 - law.cdf(0.2) / law.cdf(threshold))}),
    ]:
        found = dataclasses.replace(ladder, labels=labels.astype(int)).log_volume_by_label([threshold])
        assert found.keys() == parts.keys()
        for name, (value, error) in found.items():
            assert abs(value[0] - law.logcdf(threshold) - parts[name]) < 4 * error[0]
            assert error[0] < 0.1
        whole = ladder.log_volume([threshold]).log_volume
        np.testing.assert_allclose(np.logaddexp(found[0][0], found[1][0]), whole, atol=1e-12)
    never, only_one = np.zeros_like(coin), np.zeros_like(coin)
    never[ladder.loss > 1.0] = True
    only_one[:, ladder.is_from_base] = True
    found = dataclasses.replace(ladder, labels=never.astype(int)).log_volume_by_label([threshold])
    assert found[1][0] == -np.inf
    assert np.isnan(found[1][1])
    found = dataclasses.replace(ladder, labels=only_one.astype(int)).log_volume_by_label([threshold])
    assert np.all(np.isinf([found[0][1], found[1][1]])), "a label of one family alone is known to no precision"
    with pytest.raises(InputError, match=r"call temper\(labels=...\)"):
        ladder.log_volume_by_label([threshold])


def test_verdict_names_its_reason():
    assert _synthetic().status == OK
    assert str(_synthetic()).endswith("ok")
    for ladder, reason in [
        (_synthetic(shift=0.5), "disagree in log Z"),
        (_synthetic(exchange=0.01), "first-order transition"),
        (_synthetic(init_loss=0.01), "no minimum"),
    ]:
        assert ladder.status == DO_NOT_TRUST
        assert reason in str(ladder)


def test_error_bars_include_the_difference_of_the_families():
    apart = _synthetic(shift=0.5).log_partition()
    assert np.all(apart.std_error[2:] > 2 * _synthetic().log_partition().std_error[2:])


def test_learning_coefficient_of_independent_draws_is_that_of_the_quadratic():
    found = _synthetic().learning_coefficient()
    # 4 directions of curvature: coefficient 2, multiplicity 1, though the energy at the first rung is half of that.
    assert found.covers(2.0, 1), found
    assert found.probability[0] > found.probability[1]
    apart = _synthetic(shift=0.5).learning_coefficient()
    # Losses of one family scaled by 1.5 add a quarter to energies, about .5, but leave log Z its slope. As the covariance knows
    # that the families differ, the fit does not follow those energies; otherwise the answer would move by a standard error.
    assert abs(apart.coefficients[0] - found.coefficients[0]) < 0.5 * found.std_errors[0]
    assert any("disagree in log Z" in warning for warning in apart.warnings)


def test_a_virial_whose_mean_is_known_takes_the_noise_from_a_learning_coefficient():
    ladder = _synthetic()
    # (w - w*) . grad U = (nbeta + 1) |w|^2 is 2 (nbeta + 1) times the loss: no scatter of an energy is left.
    virial = 2 * (1 + ladder.nbetas)[:, None, None] * ladder.loss
    found, alone = dataclasses.replace(ladder, virial=virial).learning_coefficient(), ladder.learning_coefficient()
    assert found.covers(2.0, 1), found
    assert found.std_errors[0] < alone.std_errors[0]
    assert found.probability[0] > alone.probability[0]
    # What a law neglects remains: were all 13 readings of 2 worth as much, a thousandth of it over the root of 13.
    assert found.std_errors[0] > 1e-3 * 2 / np.sqrt(13)


def test_a_virial_that_is_off_its_mean_is_no_control():
    # A loss that is infinite beyond a wall has another mean: the density ends there.
    ladder = _synthetic()
    virial = 1.3 * 2 * (1 + ladder.nbetas)[:, None, None] * ladder.loss
    found, alone = dataclasses.replace(ladder, virial=virial).learning_coefficient(), ladder.learning_coefficient()
    np.testing.assert_array_equal(found.coefficients, alone.coefficients)
    assert any("standard errors off its mean, the dimension" in warning for warning in found.warnings)
    assert not alone.warnings


@pytest.mark.slow
def test_the_mean_virial_of_a_ladder_is_the_dimension_wherever_the_base_is(key):
    def read(base):
        settings = {"max_nbeta": 1e3, "num_draws": 200, "progress": False}
        return temper(key, lambda w, batch: 0.5 * jnp.sum(w**2) + jnp.abs(w[0]), jnp.zeros(3), None, base=base, **settings)

    virial = read(Gaussian(0.5, 1.0)).virial
    moved = block_sums(virial - virial.mean(axis=(1, 2), keepdims=True), 10).T / virial[0].size
    # Of 8 chains five standard errors are as rare as 3.6 of a normal, at each of about ten rungs.
    assert np.all(np.abs(virial.mean(axis=(1, 2)) - 3) < 5 * spread(moved, 8))
    assert read(Box(-1.0, 1.0)).virial is None


def test_cold_rungs_where_the_families_differ_give_no_learning_coefficient():
    ladder, found = _synthetic(), []
    for factor in (2.0, 20.0):
        mean_loss = ladder.mean_loss.copy()
        mean_loss[-1, ladder.is_from_base] *= factor
        found.append(dataclasses.replace(ladder, mean_loss=mean_loss).learning_coefficient())
    np.testing.assert_array_equal(found[0].coefficients, found[1].coefficients)
    assert any("differ above nbeta 39.8, which is left out" in warning for warning in found[0].warnings)


def test_an_infinite_loss_at_the_base_and_a_family_of_one_chain_give_a_learning_coefficient():
    ladder = _synthetic()
    loss = ladder.loss.copy()
    loss[0, 0, 0] = np.inf
    assert dataclasses.replace(ladder, loss=loss, mean_loss=loss).learning_coefficient().covers(2.0, 1)
    few = {name: getattr(ladder, name)[:, 3:] for name in ("loss", "mean_loss", "replica")}
    assert dataclasses.replace(ladder, is_from_base=ladder.is_from_base[3:], **few).learning_coefficient().covers(2.0, 1)


def test_learning_coefficient_needs_rungs_and_draws():
    whole = _synthetic()
    short = dataclasses.replace(whole, **{name: getattr(whole, name)[:4] for name in ("nbetas", "loss", "mean_loss")})
    with pytest.raises(
        InputError, match=r"needs 4 rungs .*, 4 chains and 10 draws, but this ladder has 3 that can be read, 8 and 200"
    ):
        short.learning_coefficient()


def test_bad_input_gets_one_sentence():
    problem = catalogue()["monomial w1^4"]

    def run(**settings):
        defaults = {"base": Gaussian(0.0, 1.0), "max_nbeta": 10.0, "progress": False}
        return temper(jax.random.key(0), problem.loss_fn, problem.center, None, **(defaults | settings))

    for settings, message in [
        ({"base": 1.0}, "base must be a Gaussian, Box or Ball"),
        ({"base": FloatGrid("float16", 1.0)}, "a FloatGrid counts numbers .* estimate_volume with method='subset'"),
        ({"max_nbeta": 0.0}, "max_nbeta must be positive"),
        ({"num_chains": 5}, "num_chains must be even"),
        ({"base": Box(1.0, 2.0)}, "params lie outside the base measure"),
    ]:
        with pytest.raises(InputError, match=message):
            run(**settings)
    ladder = _synthetic()
    for thresholds in ([0.1, 0.01], [-0.1, 0.1]):
        with pytest.raises(InputError, match="thresholds must be positive and increasing"):
            ladder.log_volume(thresholds)
    with pytest.raises(InputError, match="raise max_nbeta"):
        ladder.log_volume([1e-6])
    with pytest.raises(InputError, match="keep_params=True"):
        ladder.draws(0)


def test_losses_at_a_threshold_count_whatever_their_rounding():
    ladder = _synthetic()
    rates = (np.round(100 * ladder.loss).astype(np.float32) / np.float32(100)).astype(np.float64)
    few = dataclasses.replace(ladder, loss=rates, mean_loss=rates)
    # float32(.2) is above .2, and the next rate above it .21.
    assert np.any((rates > 0.2) & (rates < 0.205))
    assert few.log_volume([0.2]).log_volume[0] == few.log_volume([0.205]).log_volume[0]


def test_a_ladder_refuses_what_its_families_do_not_agree_on():
    # Losses four times as large take log 4 from log Z for each of two units of the coefficient: 2.8 nats at the coldest rung.
    apart = _synthetic(shift=3.0)
    found = apart.log_volume([0.05, 5.0])
    assert np.isnan(found.log_volume[0])
    assert np.isnan(found.std_error[0])
    assert found.family_gap[0] > 2
    assert abs(found.log_volume[1] - stats.gamma(2.0).logcdf(5.0)) < 4 * found.std_error[1]
    assert any("chains from the base and from the weights differ by up to" in warning for warning in found.warnings)
    by_label = dataclasses.replace(apart, labels=np.zeros(apart.loss.shape, int)).log_volume_by_label([0.05, 5.0])
    np.testing.assert_array_equal(np.isnan(by_label[0][0]), [True, False])
    unknown = _synthetic(exchange=np.nan)
    assert unknown.status == DO_NOT_TRUST
    assert np.all(np.isnan(unknown.log_volume([0.05, 5.0]).log_volume))
    stuck = _synthetic(exchange=0.01).log_volume([0.05, 5.0])
    assert np.all(np.isnan(stuck.log_volume))
    assert "neighbors swap with a probability of 0.01 only" in stuck.warnings[0]
    assert not _synthetic().log_volume([0.05, 5.0]).warnings


def test_a_threshold_above_all_finite_losses_gives_their_mass():
    ladder = _synthetic()
    found = ladder.log_volume([2000.0])
    # At a thousandth of the first rung, nbeta 1, energies are 2e-3 under that base.
    assert found.saddle_point[0] == pytest.approx(0, abs=3e-3)
    assert found.log_volume[0] == pytest.approx(0, abs=1e-5)
    # Of a base with an infinite loss at three quarters of its mass a quarter is left, below a third: compared and not refused.
    loss = ladder.loss.copy()
    loss[0][:, np.arange(200) % 4 > 0] = np.inf
    quarter = dataclasses.replace(ladder, loss=loss).log_volume([2000.0])
    assert quarter.log_volume[0] == pytest.approx(np.log(0.25), abs=4 * quarter.std_error[0])
    assert not quarter.warnings


def test_energies_are_counted_from_the_lowest_loss_and_thresholds_from_the_weights():
    ladder = _synthetic()
    # All losses .02 higher, and the weights .005 above the minimum that a descent from them reached.
    moved = {"loss": ladder.loss + 0.02, "mean_loss": ladder.mean_loss + 0.02, "init_loss": 0.025, "descent": Descent(0.02)}
    found = dataclasses.replace(ladder, **moved)
    np.testing.assert_allclose(found.llc_curve().llc, ladder.llc_curve().llc, atol=1e-9)
    expected = ladder.log_volume([0.055, 0.105]).log_volume
    np.testing.assert_allclose(found.log_volume([0.05, 0.1]).log_volume, expected, atol=1e-9)
    assert any("0.005 nats below that at the weights was found, 0.5 times" in warning for warning in found.warnings)
    assert not found.sampling_warnings
    # Without the descent nothing shows in 4 dimensions but the lowest of the draws.
    assert dataclasses.replace(found, descent=Descent()).lowest_loss == found.loss.min()
    going_on = dataclasses.replace(ladder, descent=Descent(0.0, unfinished=3.0))
    assert "still going down when its steps were used up, by 3 times" in going_on.warnings[0]


def test_round_trips_are_counted_from_base_to_top_and_back():
    ladder = _synthetic()
    replica = np.array(ladder.replica)
    # In the first chain replica 3 is at the base, at the top, and at the base again; in the second it never comes back.
    for chain, draw, rung in [(0, 10, 0), (0, 20, 6), (0, 30, 0), (1, 20, 6)]:
        replica[[rung, 3], chain, draw] = [3, rung]
    assert dataclasses.replace(ladder, replica=replica).round_trips == 1 / 8


def test_two_phases_are_named_and_doubted_where_chains_do_not_change():
    ladder = _synthetic()
    assert ladder.two_phases is None
    # At the fourth rung above the base, nbeta 15.8, half of all draws are 1 nat per example higher.
    for high, is_stuck in [((slice(None), slice(None, None, 2)), False), (slice(None, None, 2), True)]:
        loss = ladder.loss.copy()
        loss[4][high] += 1.0
        found = dataclasses.replace(ladder, loss=loss)
        assert "first-order transition, near nbeta 15.8" in str(found)
        assert any("between which chains hardly change near nbeta 15.8" in w for w in found.warnings) == is_stuck


def _hole(w, batch):
    """A hole of width .5 in a plateau: in many dimensions a first-order transition, at which the plateau is left."""
    return 1 - jnp.exp(-2 * jnp.sum(w**2))


@pytest.mark.slow
def test_volumes_across_a_first_order_transition_are_right_and_it_is_named(key):
    base, law = Gaussian(0.0, 1.0), stats.chi2(9)
    ladder = temper(key, _hole, jnp.zeros(9), None, base=base, max_nbeta=300.0, num_draws=800, progress=False)
    found, exact = ladder.log_volume([0.1, 0.5]), law.logcdf(-np.log1p(-np.array([0.1, 0.5])) / 2)
    assert np.all(np.abs(found.log_volume - exact) < 4 * found.std_error)
    # Energies by quadrature over the squared radius: where they fall fastest the phases weigh as much as one another.
    squares = np.linspace(0, 60, 600_001)
    losses, nbetas = 1 - np.exp(-2 * squares), np.geomspace(5.0, 100.0, 400)
    weights = [law.pdf(squares) * np.exp(-n * losses) for n in nbetas]
    energies = [n * (w @ losses) / w.sum() for n, w in zip(nbetas, weights, strict=True)]
    at = np.argmin(np.diff(energies))
    named = float(ladder.two_phases.split("near nbeta ")[1].split(":")[0])
    # An error of log Z is one of the phases' odds, which change with log nbeta by the difference of their energies.
    difference = max(energies[at - 60 : at]) - min(energies[at : at + 60])
    nearest = np.abs(np.log(ladder.nbetas[1:] / nbetas[at])).min()
    assert abs(np.log(named / nbetas[at])) < nearest + 4 * found.std_error.max() / difference


@pytest.mark.slow
def test_weights_that_are_no_minimum_do_not_lower_the_coefficient(key):
    # In 60 dimensions draws are far above the minimum: no loss among them is as low as that at the weights.
    loss_fn, off = (lambda w, batch: 0.5 * jnp.sum(w**2)), jnp.full(60, 0.017)
    settings = {"base": Gaussian(0.0, 1.0), "max_nbeta": 1e3, "num_draws": 100, "progress": False}
    ladder = temper(key, loss_fn, off, None, **settings)
    assert ladder.loss.min() > ladder.init_loss
    curve = ladder.llc_curve()
    assert np.all(np.abs(curve.llc - 30 * curve.nbetas / (1 + curve.nbetas)) < 4 * curve.std_error)
    assert any("the weights are no minimum" in warning for warning in ladder.warnings)
    assert not ladder.sampling_warnings


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "law"),
    [
        (Gaussian(0.4, 0.7), stats.norm(0.4, 0.7)),
        (Box(-0.5, 1.5), stats.uniform(-0.5, 2.0)),
        (Ball(0.3, 0.9), stats.uniform(-0.6, 1.8)),
    ],
    ids=["Gaussian", "Box", "Ball"],
)
def test_every_base_has_mass_one_and_the_volume_of_an_interval_off_its_center(base, law, key):
    settings = {"max_nbeta": 4e3, "num_draws": 200, "progress": False}
    ladder = temper(key, lambda w, batch: 0.5 * jnp.sum(w**2), jnp.zeros(1), None, base=base, **settings)
    found, ends = ladder.log_volume([1e-3, 0.1, 1e4]), np.sqrt(2 * np.array([1e-3, 0.1]))
    assert np.all(np.abs(found.log_volume[:2] - np.log(law.cdf(ends) - law.cdf(-ends))) < 4 * found.std_error[:2])
    assert found.log_volume[2] == pytest.approx(0, abs=1e-5)

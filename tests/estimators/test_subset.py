import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from slt_interp import analytic
from slt_interp.analytic.products import Product
from slt_interp.bases import Ball, Box, FloatGrid, Gaussian
from slt_interp.errors import InputError
from slt_interp.estimators import subset
from slt_interp.estimators.descents import Descents, combine
from slt_interp.estimators.subset import subset_simulation
from slt_interp.estimators.volume_estimate import highest_losses
from slt_interp.estimators.walks import Particle, Reflective
from slt_interp.posterior import LocalPosterior
from slt_interp.samplers.chains import chain_mesh

THRESHOLDS = [1e-4, 1e-3, 1e-2, 1e-1]
QUIET = {"progress": False}
SINGULAR = Product((1, 1), (1, 1))


def half_square(w, batch):
    return 0.5 * jnp.sum(w**2)


def slope(w, batch):
    return jnp.sum(w)


def agrees(found, exact):
    return np.all(np.abs(found.log_volume - exact) < 4 * found.std_error)


@pytest.mark.parametrize(
    ("base", "level", "law"),
    [
        # The projection on (1, 1, 1) is N(0, 1) off-center, cut at the level.
        (Gaussian(0.5, jnp.array([1.0, 2.0, 0.5])), 0.3, stats.norm(1.5, np.sqrt(5.25))),
        # The sum of three uniforms, by Irwin and Hall.
        pytest.param(Box(0.0, 1.0), 1.2, stats.irwinhall(3), marks=pytest.mark.slow),
        # One coordinate of a ball in three dimensions is a beta variable.
        pytest.param(Ball(0.0, 1.0), 0.4, stats.beta(2, 2, loc=-np.sqrt(3), scale=2 * np.sqrt(3)), marks=pytest.mark.slow),
    ],
    ids=["Gaussian", "Box", "Ball"],
)
def test_moves_leave_the_restricted_base_measure_as_it_is(base, level, law, key):
    walk = Reflective(LocalPosterior(slope, jnp.zeros(3), 1.0, base))
    draw_key, move_key = jax.random.split(key)
    draws = jax.vmap(lambda k: walk.sample(k, None))(jax.random.split(draw_key, 4000))
    keep = np.flatnonzero(np.asarray(draws.loss) <= level)
    inside = Particle(draws.position[keep], draws.loss[keep])

    @jax.jit
    def move(particles, key):
        keys = jax.random.split(key, len(keep))
        return jax.vmap(lambda k, p: walk.move(k, p, level, 0.8, None))(keys, particles)

    for k in jax.random.split(move_key, 3):
        inside, free = move(inside, k)
    losses = np.asarray(inside.loss)
    assert losses.max() <= level
    assert 0.1 < float(free.mean()) < 0.9
    np.testing.assert_allclose(losses, np.asarray(inside.position).sum(axis=1), atol=1e-5)
    # A Kolmogorov-Smirnov statistic beyond that of 4 standard errors of a normal: p = 6e-5.
    assert stats.kstest(losses, lambda x: law.cdf(x) / law.cdf(level)).pvalue > 6e-5


def test_a_trajectory_of_accepted_steps_runs_back_along_itself():
    walk = Reflective(LocalPosterior(half_square, jnp.zeros(4), 1.0, Gaussian(0.2, 1.5)))
    place, velocity = jnp.array([0.3, -0.2, 0.1, 0.4]), jnp.array([1.0, 0.5, -2.0, 0.7])
    there, speed = walk._drift(place, velocity, 0.4)
    back, last = walk._drift(there, -speed, 0.4)
    np.testing.assert_allclose(back, place, atol=1e-6)
    np.testing.assert_allclose(last, -velocity, atol=1e-6)


@pytest.mark.parametrize(
    "problem",
    [
        analytic.quadratic([3.0, 1.0, 0.3]),
        pytest.param(analytic.quadratic([1.0] * 10), marks=pytest.mark.slow, id="10 dimensions"),
        pytest.param(analytic.hyperbola(in_box=True), marks=pytest.mark.slow, id="hyperbola"),
    ],
    ids=lambda problem: problem.name,
)
def test_volumes_are_exact_within_their_errors(problem, key):
    found = subset_simulation(
        key, problem.loss_fn, problem.center, None, THRESHOLDS, base=problem.base, num_particles=100, max_rounds=2, **QUIET
    )
    assert agrees(found, [problem.log_volume(t) for t in THRESHOLDS])
    assert (found.status, found.warnings) == ("ok", ())
    assert np.all(np.diff(found.log_volume) > 0)
    assert np.all(np.diff(found.per_seed, axis=1) > 0)
    # In 10 dimensions are 33 levels of variance .8 / (.2 * 100). Of eight seeds in two rounds come the error of their mean,
    # .41, that of half the variance with six degrees of freedom, .38, and .3 of it, .2: together .59. Others have fewer levels.
    assert np.all((found.std_error > 0) & (found.std_error < 0.7))


@pytest.mark.slow
@pytest.mark.parametrize(
    "problem",
    [
        analytic.monomial([1, 1], in_box=True),
        analytic.sum_of_products([SINGULAR] * 10, key=jax.random.key(1), name="10 singular blocks"),
    ],
    ids=lambda problem: problem.name,
)
def test_volumes_are_as_accurate_as_promised(problem, key):
    found = subset_simulation(key, problem.loss_fn, problem.center, None, THRESHOLDS, base=problem.base, **QUIET)
    exact = np.array([problem.log_volume(t) for t in THRESHOLDS])
    assert agrees(found, exact)
    assert np.all(found.std_error < np.maximum(0.1, 0.01 * np.abs(exact)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("curvatures", "num_particles", "num_moves"),
    [(np.geomspace(0.1, 100.0, 20), 50, 8), (np.geomspace(0.1, 100.0, 20), 100, 2), (np.ones(60), 100, 8)],
    ids=["few particles", "few moves", "60 dimensions"],
)
def test_the_log_of_a_volume_that_is_right_in_the_mean_is_corrected(curvatures, num_particles, num_moves, key, monkeypatch):
    problem, rounds = analytic.quadratic([float(h) for h in curvatures]), []
    monkeypatch.setattr(subset, "conclude", lambda found, *others: rounds.extend(found))
    run = {"num_particles": num_particles, "num_moves": num_moves, "precision": 0.0, "max_rounds": 25, **QUIET}
    subset_simulation(key, problem.loss_fn, problem.center, None, [1e-3], base=problem.base, **run)
    exact, together = problem.log_volume(1e-3), combine(rounds)
    raw = np.concatenate([found.log_volume for found in rounds]).mean()
    # Of 100 seeds, whose mean alone would be wrong.
    assert abs(together.log_volume[0] - exact) < 4 * together.std_error[0] + together.bias_error[0]
    assert exact - raw > 4 * together.spread[0] / 10
    # Four seeds know their error; and pieces of the way tell the variance better than its ends do.
    each = [combine([found]) for found in rounds]
    z = [(found.log_volume[0] - exact) / np.hypot(found.std_error[0], found.bias_error[0]) for found in each]
    assert np.sum(np.square(z)) < stats.chi2(25).isf(1e-3)
    by_pieces = [2 * (found.log_volume[0] - r.log_volume.mean()) for found, r in zip(each, rounds, strict=True)]
    assert np.std(by_pieces) < 0.7 * np.std([found.spread[0] ** 2 for found in each])


def test_variance_adds_up_over_pieces_between_marks():
    rng = np.random.default_rng(0)
    steps = rng.standard_normal((4, 400, 4)) - 5
    log_volume = np.cumsum(steps.sum(axis=2), axis=1)
    known = Descents(log_volume[:, -1:], *np.zeros((2, 4, 1)), log_volume[:, :-1], {}, 0.0, 0, 0, 1.0)
    found = combine([known])
    # 400 pieces of variance 4 from four seeds: 1200 degrees of freedom. Without marks there would be 3.
    variance = 2 * (found.log_volume[0] - log_volume[:, -1].mean())
    assert abs(variance - 1600) < 4 * 1600 * np.sqrt(2 / 1200)
    assert found.bias_error[0] == pytest.approx(0.3 * variance / 2)
    # The error of half the variance; the mean of squared variances, each of 3 degrees of freedom, is 5 / 3 of the variance's.
    of_variance = found.std_error[0] ** 2 - max(variance, found.spread[0] ** 2) / 4
    assert of_variance == pytest.approx(1600**2 / 4 * 2 / 1200 * 5 / 3, rel=0.4)
    # What is below a threshold has no say in it.
    halfway = known._replace(log_volume=log_volume[:, 199:200])
    assert 2 * (combine([halfway]).log_volume[0] - log_volume[:, 199].mean()) < 0.75 * variance


@pytest.mark.parametrize(
    ("losses", "level"),
    [
        # A fifth of ten lie strictly below the third.
        ([9, 8, 7, 6, 5, 4, 3, 2, 1, 0], np.nextafter(np.float32(2), np.float32(0))),
        # Ties with it go, and few are left.
        ([5, 5, 5, 5, 5, 5, 5, 5, 5, 1], np.nextafter(np.float32(5), np.float32(0))),
        # What is lowest of all is the last level.
        ([9, 8, 7, 6, 1, 1, 1, 1, 1, 1], 1.0),
        # How few lie below a tie has no say in whether it goes.
        ([9] * 10 + [1] * 9 + [0], np.nextafter(np.float32(1), np.float32(0))),
        ([3] * 10, 3.0),
        # XLA takes subnormal numbers for 0.
        ([1, 1, 1, 1, 1, 1, 1, 0, -1, -1], -np.finfo(np.float32).tiny),
        ([1, 1, 1, 1, 1, 1, 1, np.finfo(np.float32).tiny, -1, -1], 0.0),
    ],
)
def test_next_level_is_below_the_loss_that_a_fifth_lie_below(losses, level):
    found = subset._next_level(np.array(losses, np.float32))
    assert found.dtype == np.float32
    assert found == level


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.0, 6.0])
def test_a_loss_of_few_values_around_0_is_counted_right(shift, key):
    def num_errors(w, batch):
        return jnp.sum((w < 0).astype(jnp.float32)) - shift

    found = subset_simulation(key, num_errors, jnp.ones(20), None, [2.5], base=Gaussian(0.0, 1.0), max_rounds=3, **QUIET)
    assert agrees(found, stats.binom(20, 0.5).logcdf([2.0]))


@pytest.mark.slow
def test_a_loss_of_few_values_is_counted_right_all_the_way_down(key):
    # Each value holds a part of .316 of the one above: of a hundred particles about as often as not a tenth lies below the tie.
    def steps(w, batch):
        return -jnp.floor(jnp.log(jnp.maximum(jnp.abs(w[0]), 1e-30)) / np.log(0.316))

    run = {"base": Box(-1.0, 1.0), "num_particles": 100, "num_seeds": 40, "max_rounds": 1, **QUIET}
    found = subset_simulation(key, steps, jnp.full(1, 0.316**28.5), None, [8.5], **run)
    assert abs(found.log_volume[0] - 20 * np.log(0.316)) < 4 * found.diagnostics["spread"][0] / np.sqrt(40)


@pytest.mark.parametrize(
    ("name", "replacement"),
    [("chain_mesh", lambda num_seeds: chain_mesh(1)), ("_choose_block_size", lambda *_: 1)],
    ids=["on one device", "one particle at a time"],
)
def test_numbers_do_not_depend_on_devices_or_blocks(name, replacement, key, monkeypatch):
    problem = analytic.quadratic([3.0, 1.0])
    run = {"base": problem.base, "num_particles": 20, "num_moves": 1, "max_rounds": 1, **QUIET}
    assert chain_mesh(4).size == 4
    spread = subset_simulation(key, problem.loss_fn, problem.center, None, [0.1], **run)
    assert spread.diagnostics["num_levels"] >= 1
    monkeypatch.setattr(subset, name, replacement)
    other = subset_simulation(key, problem.loss_fn, problem.center, None, [0.1], **run)
    np.testing.assert_allclose(other.per_seed, spread.per_seed, rtol=1e-12)


@pytest.mark.parametrize("base", [Gaussian(0.7, 2.0), Box(-1.0, 3.0), Ball(0.3, 1.0)])
def test_everything_has_volume_one(base, key):
    found = subset_simulation(key, half_square, jnp.zeros(2), None, [1e6], base=base, num_particles=20, max_rounds=1, **QUIET)
    assert abs(found.log_volume[0]) < 1e-3
    assert found.bits is None


def test_labels_split_the_volume_between_two_wells(key):
    problem = analytic.double_well()

    def left_or_right(w):
        return jnp.where(w[0] > 0, 1, 0)

    found = subset_simulation(
        key, problem.loss_fn, problem.center, None, [0.3], base=problem.base, labels=left_or_right, max_rounds=1, **QUIET
    )
    assert set(found.by_label) == {0, 1}
    half = problem.log_volume(0.3) - np.log(2)
    for value, error in found.by_label.values():
        assert abs(value[0] - half) < 4 * error[0]
    np.testing.assert_allclose(np.logaddexp(*(value for value, _ in found.by_label.values())), found.log_volume, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("center", "radius"), [([0.3], 0.5), ([0.3, -0.2], 0.1)])
def test_float_grid_counts_what_brute_force_counts(center, radius, key):
    center = np.float32(center)

    def steep(w, batch):
        return jnp.sum(jnp.abs(w - center) ** 0.5)

    thresholds = np.array([0.05, 0.1, 0.3])
    every = np.arange(2**16).astype(np.uint16).view(np.float16)
    numbers = np.unique(every[np.isfinite(every)].astype(np.float32))
    near = [np.sqrt(np.abs(numbers[np.abs(numbers - c) <= radius] - c)) for c in center]
    losses = near[0] if len(near) == 1 else np.add.outer(*near)
    counts = [np.sum(losses <= threshold) for threshold in thresholds]
    base = FloatGrid("float16", radius)
    found = subset_simulation(
        key, steep, jnp.array(center), None, thresholds, base=base, num_particles=60, max_rounds=1, **QUIET
    )
    assert base.log_total(jnp.array(center)) == pytest.approx(np.log(losses.size))
    assert agrees(found, np.log(counts))
    np.testing.assert_allclose(found.bits, found.log_volume / np.log(2))
    assert "number of configurations" in str(found)


@pytest.mark.slow
def test_a_set_at_the_wall_of_a_box_is_counted(key):
    found = subset_simulation(
        key, slope, jnp.zeros(3), None, [1e-8, 1e-4], base=Box(0.0, 1.0), num_particles=200, max_rounds=1, **QUIET
    )
    assert agrees(found, 3 * np.log([1e-8, 1e-4]) - np.log(6))


@pytest.mark.slow
def test_threshold_below_the_lowest_loss_is_refused_and_says_so(key):
    found = subset_simulation(
        key,
        lambda w, batch: jnp.where(jnp.all(w == 0), 0.0, jnp.maximum(half_square(w, batch), 0.1)),
        jnp.zeros(2),
        None,
        [0.05, 0.5],
        base=Gaussian(0.0, 1.0),
        num_particles=100,
        max_rounds=1,
        **QUIET,
    )
    assert found.status == "refused"
    assert np.isnan(found.log_volume).tolist() == [True, False]
    assert abs(found.log_volume[1] - np.log(1 - np.exp(-0.5))) < 4 * found.std_error[1]
    assert "no seed could go below 0.1 above the loss at params" in found.warnings[0]


@pytest.mark.slow
def test_moves_too_few_and_short_are_found_out(key):
    problem = analytic.quadratic([1.0] * 30)
    found = subset_simulation(
        key,
        problem.loss_fn,
        problem.center,
        None,
        [1e-1],
        base=problem.base,
        num_particles=30,
        num_moves=1,
        max_rounds=1,
        **QUIET,
    )
    exact, correction = problem.log_volume(1e-1), found.diagnostics["correction"][0]
    assert found.log_volume[0] - correction < exact - 4 * found.diagnostics["spread"][0] / np.sqrt(4)
    assert agrees(found, exact)
    assert found.status != "ok"
    assert "num_moves" in found.warnings[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"thresholds": [0.1, 0.01]}, r"thresholds must be a list of positive increasing numbers.* \[0.1, 0.01\]"),
        ({"thresholds": [0.0, 0.1]}, "thresholds must be a list of positive"),
        ({"num_seeds": 2}, "num_seeds must be at least 3, but is 2"),
        ({"base": Box(1.0, 2.0)}, "params lie outside the base measure, a Box"),
        ({"base": FloatGrid("float16", -1.0)}, "radius of a FloatGrid must not be negative"),
        ({"base": FloatGrid("float32", 1.0), "params": jnp.zeros(2, jnp.float16)}, "cannot hold every float32"),
    ],
)
def test_bad_input_is_one_sentence(change, message, key):
    settings = {"params": jnp.zeros(2), "data": None, "thresholds": [0.1], "base": Gaussian(0.0, 1.0)} | change
    with pytest.raises(InputError, match=message) as caught:
        subset_simulation(key, half_square, **settings, **QUIET)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("size", "thresholds"), [(10, [0.1]), (4, [0.25]), (4, [0.25, 0.5])])
def test_an_error_rate_counts_at_a_threshold_that_is_one_of_its_values(size, thresholds, key):
    # float32(0.1) is above 0.1. Signs of normal weights are coins: binomial numbers of errors.
    def error_rate(w, batch):
        return jnp.mean((w < 0).astype(jnp.float32))

    settings = {"base": Gaussian(0.0, 1.0), "num_particles": 100, "max_rounds": 1, **QUIET}
    found = subset_simulation(key, error_rate, jnp.ones(size), None, thresholds, **settings)
    assert agrees(found, stats.binom(size, 0.5).logcdf(np.round(np.array(thresholds) * size)))


def test_the_answer_names_the_set_and_counts_in_bits(key):
    def ask(base, center):
        settings = {"num_particles": 20, "num_moves": 1, "max_rounds": 1, **QUIET}
        return subset_simulation(key, half_square, center, None, [1.0], base=base, **settings)

    assert ask(Gaussian(0.0, 1.0), jnp.zeros(2)).counted.endswith("under the base measure")
    assert "below that of params were found" in ask(Gaussian(0.0, 1.0), jnp.ones(2)).counted
    count = ask(FloatGrid("float16", 1.0), jnp.ones(2))
    assert f"{count.bits[0]:.4g} +-" in str(count)
    assert "in bits" in str(count)


def test_losses_a_rounding_above_a_threshold_count_only_where_they_are_what_it_means():
    near, few = np.float32(0.1), np.arange(-1, 2, dtype=np.float32) * np.spacing(np.float32(0.1))
    assert highest_losses(np.array([0.1]), 0.0, np.array([0.0, near, 0.2])) == near
    # Sums of as many errors are rounded in several ways.
    assert highest_losses(np.array([0.1]), 0.0, near + few) == near + few[-1]
    # Of many values one rounding apart none is meant more than its neighbors.
    dense = near + np.arange(-8, 9, dtype=np.float32) * np.spacing(near)
    np.testing.assert_array_equal(highest_losses(np.array([0.1, 0.2]), 0.0, dense), [0.1, 0.2])

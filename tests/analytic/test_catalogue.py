"""Every problem of the catalogue against plain Monte Carlo on its own loss, and what a minimum must be."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp import analytic
from slt_interp.analytic.catalogue import Problems
from slt_interp.bases import Ball, Box
from slt_interp.errors import InputError
from slt_interp.tree import normal_like

CATALOGUE = analytic.catalogue()
SMALL = [name for name, problem in CATALOGUE.items() if problem.dimension <= 40]


def centered_box(half_width):
    return Box(-half_width, half_width)


def excess(problem, draws):
    losses = jax.lax.map(lambda w: problem.loss_fn(w, problem.data), draws, batch_size=1000)
    return np.asarray(losses, np.float64) - float(problem.loss_fn(problem.center, problem.data))


def gaussian_draws(problem, key, scale):
    keys = jax.random.split(key, 40_000)
    return jax.vmap(lambda k: jax.tree.map(lambda c, z: c + scale * z, problem.center, normal_like(k, problem.center)))(keys)


@pytest.mark.parametrize("name", [name for name in CATALOGUE if name.startswith("deep linear")])
def test_a_deep_linear_problem_is_as_large_as_its_name_says(name):
    widths = tuple(map(int, name.split()[2].split("-")))
    shapes = [w.shape for w in jax.tree.leaves(CATALOGUE[name].center)]
    assert sorted(shapes) in (sorted(itertools.pairwise(widths)), sorted(itertools.pairwise(widths[::-1])))


@pytest.mark.parametrize("name", [name for name in CATALOGUE if re.search(r" in \d+ dimension", name)])
def test_a_problem_has_as_many_weights_as_its_name_says(name):
    assert CATALOGUE[name].dimension == int(re.search(r"(\d+) dimension", name)[1])


def test_a_problem_is_built_when_it_is_asked_for_and_once():
    built = []
    problems = Problems({name: lambda name=name: built.append(name) or analytic.monomial([1]) for name in ("a", "b")})
    assert list(problems) == ["a", "b"]
    assert len(problems) == 2
    assert "b" in problems
    assert not built
    first = problems["b"]
    assert problems["b"] is first
    assert first.name == "b"
    assert built == ["b"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CATALOGUE)
def test_center_is_a_minimum_and_nothing_near_it_is_lower(key, name):
    problem = CATALOGUE[name]

    def near(key):
        step = normal_like(key, problem.center)
        if problem.base is not None and problem.base.is_bounded:
            step = jax.tree.map(jnp.abs, step)
        return problem.loss_fn(jax.tree.map(lambda c, z: c + 1e-2 * z, problem.center, step), problem.data)

    @jax.jit
    def measure(keys):
        return jax.value_and_grad(problem.loss_fn)(problem.center, problem.data), jax.lax.map(near, keys)

    (loss, gradient), others = measure(jax.random.split(key, 10))
    scale = max(float(loss), 1.0)
    assert all(float(jnp.abs(g).max()) < 1e-6 * scale for g in jax.tree.leaves(gradient))  # float32
    assert float(others.min()) >= float(loss) - 1e-6 * scale


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SMALL if CATALOGUE[name].energy])
def test_energy_is_that_of_weighted_draws(key, name):
    problem, localization = CATALOGUE[name], 2.0
    draws = gaussian_draws(problem, key, localization**-0.5)
    if name == "Gaussian mixture, one mean fixed":
        # There is no loss outside of its box.
        draws = draws[np.isfinite(jax.vmap(problem.base.potential)(draws))]
    k = excess(problem, draws)
    nbeta = 1 / np.mean(k)  # so that the weights do not degenerate
    weights = np.exp(-nbeta * k)
    weights /= weights.sum()
    mean = np.sum(weights * nbeta * k)
    error = np.sqrt(np.sum(weights**2 * (nbeta * k - mean) ** 2))
    assert error < 0.1 * mean
    assert abs(problem.energy(nbeta, localization) - mean) < 4 * error


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SMALL if CATALOGUE[name].log_volume and CATALOGUE[name].base])
def test_volume_and_partition_function_are_those_of_draws_from_the_base(key, name):
    problem = CATALOGUE[name]
    keys = jax.random.split(key, 40_000)
    k = excess(problem, jax.vmap(lambda k: problem.base.sample(k, problem.center))(keys))
    threshold = np.quantile(k, 0.2)
    share = np.mean(k <= threshold)
    assert abs(np.exp(problem.log_volume(threshold)) - share) < 4 * np.sqrt(share / len(k))
    if problem.log_partition is not None:
        nbeta = 1 / np.mean(k)
        boltzmann = np.exp(-nbeta * k)
        assert abs(np.exp(problem.log_partition(nbeta)) - boltzmann.mean()) < 4 * boltzmann.std() / np.sqrt(len(k))


@pytest.mark.slow
@pytest.mark.parametrize("name", analytic.volume_catalogue())
def test_volume_of_the_catalogue_is_that_of_draws_from_the_base(key, name):
    problem = analytic.volume_catalogue()[name]
    exact, count = np.exp(problem.log_volume(0.1)), 100_000
    draws = jax.vmap(lambda k: problem.base.sample(k, problem.center))(jax.random.split(key, count))
    share = np.mean(excess(problem, draws) <= 0.1)
    # Where hardly a draw is expected this says that there is hardly one: a Poisson number.
    assert abs(share - exact) < 4 * np.sqrt(exact * (1 - exact) / count) + 4 / count


@pytest.mark.parametrize(
    "problem",
    [
        pytest.param(analytic.power_sum([2, 2, 1]), id="quartics"),
        pytest.param(analytic.quadratic([1.0, 0.0, 4.0], base=centered_box(0.5)), id="flat direction in a box"),
        pytest.param(
            analytic.sum_of_products(
                [analytic.Product((1, 1), (1, 2), 3.0), analytic.Product((1,), (2,)), analytic.Product((1,), (1,), 0.5)],
                base=centered_box(2.0),
                name="crossing and curves",
            ),
            id="crossing and curves in a box",
        ),
        pytest.param(analytic.quadratic([1.0, 3.0], key=jax.random.key(5), base=Ball(0.0, 2.0)), id="rotated in a ball"),
        pytest.param(analytic.monomial([2], in_box=True), id="one coordinate"),
    ],
)
def test_volumes_beyond_the_table_are_those_of_draws(problem, key):
    draws = jax.vmap(lambda k: problem.base.sample(k, problem.center))(jax.random.split(key, 100_000))
    k = excess(problem, draws)
    for threshold in (0.02, 0.1):
        share = np.exp(problem.log_volume(threshold))
        assert abs(share - np.mean(k <= threshold)) < 4 * np.sqrt(share * (1 - share) / len(k))


def test_volumes_are_unknown_where_the_base_cuts_the_sublevel_set():
    assert np.isnan(analytic.quadratic([1.0], base=Ball(0.0, 1.0)).log_volume(0.6))
    assert np.isnan(analytic.quadratic([1.0, 2.0], base=centered_box(1.0)).log_volume(0.6))
    assert analytic.monomial([2], in_box=True).log_volume(2.0) == 0
    two = analytic.sum_of_products([analytic.Product((1, 1), (1, 1))] * 2, base=centered_box(1.0), name="two crossings")
    assert two.log_volume is None


@pytest.mark.slow
def test_energies_tend_to_the_learning_coefficient():
    for problem in CATALOGUE.values():
        if problem.energy and problem.multiplicity == 1 and problem.rlct:
            # The leading term of the error is a power of 1 / nbeta, the cusp's the slowest: 1000^(-1/12) = .56.
            far, further = (abs(problem.energy(nbeta, 1.0) / problem.rlct - 1) for nbeta in (1e6, 1e9))
            assert further < max(0.6 * far, 1e-5), problem.name


@pytest.mark.slow
@pytest.mark.parametrize(("widths", "rank"), [([4, 4, 4], 1), ([5, 3, 4], 2), ([4, 6, 5, 3], 2)])
def test_smooth_point_has_the_jacobian_rank_of_its_neighborhood(key, widths, rank):
    problem = analytic.deep_linear(key, widths, rank, point="smooth")

    def product(params):
        total = params[0]
        for w in params[1:]:
            total = w @ total
        return total

    def jacobian(params):
        blocks = jax.tree.leaves(jax.jacobian(product)(params))
        return np.concatenate([np.asarray(b).reshape(product(params).size, -1) for b in blocks], axis=1)

    at_center = np.linalg.matrix_rank(jacobian(problem.center), tol=1e-4)
    assert at_center == 2 * problem.rlct
    # Move along the fibre, by Newton steps back to it: the rank stays, so that the fibre is a manifold of that codimension.
    near = jax.tree.map(lambda w, z: w + 0.1 * z, problem.center, normal_like(key, problem.center))
    flat, unravel = jax.flatten_util.ravel_pytree(near)
    for _ in range(20):
        residual = np.asarray(product(unravel(flat)) - product(problem.center)).ravel()
        flat = flat - np.linalg.pinv(jacobian(unravel(flat)), rcond=1e-3) @ residual
    assert np.abs(product(unravel(flat)) - product(problem.center)).max() < 1e-5
    assert np.linalg.matrix_rank(jacobian(unravel(flat)), tol=1e-3) == at_center


def test_rotation_changes_no_loss(key):
    block = analytic.Product((1, 1), (1, 1))
    plain = analytic.sum_of_products([block] * 3, name="plain")
    rotated = analytic.sum_of_products([block] * 3, key=key, name="rotated")
    w = jax.random.normal(key, (6,))
    rotation = rotated.loss_fn.rotation
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(6), atol=1e-6)
    assert float(rotated.loss_fn(w, None)) == pytest.approx(float(plain.loss_fn(rotation @ w, None)), rel=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: analytic.deep_linear(jax.random.key(0), [3, 2, 3], 3), "rank up to the smallest"),
        (lambda: analytic.deep_linear(jax.random.key(0), [3, 2, 3], 1, point="flat"), '"deepest" or "smooth"'),
        (lambda: analytic.deep_linear_local_rlct([3, 2, 3], 0, 2, 2), "no factors of ranks 2 and 2"),
        (lambda: analytic.vandermonde_rlct(0, 1), "must be at least 1"),
        (lambda: analytic.toy_superposition(4), "5 or 6"),
        (lambda: analytic.sum_of_products([analytic.Product((1, 1), (1,))], name="x"), "as many positive dims"),
        (lambda: analytic.quadratic([1.0], base=Box(0.0, 1.0)), r"known in Box\(-a, a\) and Ball\(0, r\)"),
        (lambda: analytic.quadratic([1.0], base=Box(-1.0, jnp.ones(1))), r"with numbers a and r"),
        (lambda: analytic.quadratic([1.0, 0.0], base=Ball(0.0, 1.0)), "c > 0 alone"),
        (lambda: analytic.quadratic([1.0], key=jax.random.key(0), base=Box(-1.0, 1.0)), "leave out the key, or the base"),
    ],
)
def test_bad_input_is_one_sentence(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("coupling", [0.0, 0.9, 1.0])
def test_coupled_modules_have_the_energies_and_volumes_of_draws(coupling):
    problem = analytic.coupled_modules(coupling)
    # The products of two modules: a . b in two dimensions each.
    p, q = np.sum(np.prod(np.random.default_rng(0).standard_normal((2, 2, 400_000, 2)), axis=1), axis=-1)
    k = 0.5 * (p**2 + q**2 + 2 * coupling * p * q)
    for threshold in (1e-2, 1.0):
        share = np.mean(k <= threshold)
        assert abs(np.exp(problem.log_volume(threshold)) - share) < 4 * np.sqrt(share / len(k))
    weights = np.exp(-10 * k) / np.sum(np.exp(-10 * k))
    mean = np.sum(weights * 10 * k)
    assert abs(problem.energy(10.0, 1.0) - mean) < 4 * np.sqrt(np.sum(weights**2 * (10 * k - mean) ** 2))
    # At large nbeta the energy is the learning coefficient, at any localization it depends on nbeta / localization^2 alone.
    assert problem.energy(1e7, 1.0) == pytest.approx(problem.rlct, abs=0.01)
    assert problem.energy(9e4, 3.0) == pytest.approx(problem.energy(1e4, 1.0), abs=1e-6)
    params = {"first": jnp.array([[1.0, 2.0], [3.0, -1.0]]), "second": jnp.array([[0.5, 1.0], [1.0, 1.0]])}
    expected = 0.5 * (1 + 1.5**2 + 2 * coupling * 1.5)
    assert float(problem.loss_fn(params, problem.data)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("coupling", "rank"), [(0.0, 2), (0.9, 2), (1.0, 1)])
def test_coupled_modules_at_a_smooth_minimum_have_the_rank_of_their_hessian(coupling, rank):
    problem = analytic.coupled_modules(coupling, product=1.0)
    hessian = jax.hessian(lambda w: problem.loss_fn({"first": w[0], "second": w[1]}, problem.data))
    values = np.linalg.eigvalsh(np.reshape(hessian(jnp.stack([problem.center["first"], problem.center["second"]])), (8, 8)))
    assert np.sum(values > 1e-5) == rank == 2 * problem.rlct
    np.testing.assert_allclose(values[-2:], [2 * (1 - coupling), 2 * (1 + coupling)], atol=1e-5)

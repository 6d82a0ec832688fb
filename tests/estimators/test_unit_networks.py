"""Networks sum_m a_m f(b_m) with more units than quadrature can take: energies without a ladder, and what they can tell.

Given b the loss is a quadratic of a, which integrates out under the base measure N(0, I): with F the features of the units, a
row each, b has the density exp(-|b|^2 / 2) det(1 + nbeta F F^T)^(-1/2), and nbeta L the conditional mean tr(nbeta F F^T (1 +
nbeta F F^T)^-1) / 2. Few numbers are left, which Metropolis moves of all sizes mix well, near singularities too: so energies
are known to .2 % at temperatures far below those that a sampler of all weights reaches.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.interpolate import CubicSpline

from slt_interp import Gaussian, temper
from slt_interp.analytic import catalogue
from slt_interp.estimators.coefficient import fit_coefficient

pytestmark = pytest.mark.slow

GRID = np.linspace(-1, 1, 41)
FEATURES = {
    "tanh network with 2 units": lambda b: jnp.tanh(jnp.outer(b, GRID)) / np.sqrt(len(GRID)),
    "tanh network with 4 units": lambda b: jnp.tanh(jnp.outer(b, GRID)) / np.sqrt(len(GRID)),
    "Vandermonde with 6 units, gap 1": lambda b: b[:, None] ** jnp.arange(1, 7),
}
NUM_CHAINS = 512


def half_log_det(log_nbeta, b, features):
    """Take 1/2 log det(1 + nbeta F F^T), by Gram-Schmidt on (sqrt(nbeta) F, 1), twice for rows that are nearly parallel."""
    rows = list(jnp.concatenate([jnp.exp(log_nbeta / 2) * features(b), jnp.eye(len(b))], axis=1))
    total = 0.0
    for i, row in enumerate(rows):
        total += 0.5 * jnp.log(row @ row)
        for j in [*range(i + 1, len(rows))] * 2:
            rows[j] = rows[j] - (rows[j] @ row) / (row @ row) * row
    return total


def propose(key, b):
    """Shift one b or all, or scale all, one, or its distance to another or to minus another; also the log of the Jacobian."""
    number_key, size_key, shift_key = jax.random.split(key, 3)
    # A kind of move, one of b, how far the other is from it, and a sign.
    kind, i, gap, sign = jax.random.randint(number_key, (4,), 0, jnp.array([5, len(b), len(b) - 1, 2]))
    size, width, *normal = [*jax.random.uniform(size_key, (2,)), *jax.random.normal(shift_key, (len(b) + 1,))]
    shift, stretch = 10 ** (6.5 * size - 6) * jnp.array(normal[1:]), normal[0] * jnp.where(width < 0.5, 0.3, 1.5)
    is_one, other = jnp.arange(len(b)) == i, b[(i + 1 + gap) % len(b)] * jnp.where(sign == 1, 1.0, -1.0)
    moves = [
        (b + is_one * shift, 0.0),
        (b + shift, 0.0),
        (b * jnp.exp(stretch), len(b) * stretch),
        (jnp.where(is_one, b * jnp.exp(stretch), b), stretch),
        (jnp.where(is_one, other + (b - other) * jnp.exp(stretch), b), stretch),
    ]
    positions, jacobians = zip(*moves, strict=True)
    return jnp.stack(positions)[kind], jnp.stack(jacobians)[kind]


@functools.partial(jax.jit, static_argnames=("features", "num_readings"))
def sweep(key, log_nbeta, b, features, num_readings):
    """Move all chains, and read their conditional energies every tenth time, (reading, chain)."""

    def log_density(b):
        return -half_log_det(log_nbeta, b, features) - 0.5 * b @ b

    def move(b, key):
        there_key, accept_key = jax.random.split(key)
        there, jacobian = propose(there_key, b)
        log_ratio = log_density(there) - log_density(b) + jacobian
        return jnp.where(jnp.log(jax.random.uniform(accept_key)) < log_ratio, there, b), None

    def read(b, key):
        keys = jax.vmap(lambda key: jax.random.split(key, 10))(jax.random.split(key, len(b)))
        b = jax.vmap(lambda b, keys: jax.lax.scan(move, b, keys)[0])(b, keys)
        return b, jax.vmap(lambda b: jax.jvp(lambda x: half_log_det(x, b, features), (log_nbeta,), (1.0,))[1])(b)

    return jax.lax.scan(read, b, jax.random.split(key, num_readings))


@functools.cache
def energies(name, largest, num_readings=100):
    """Log nbeta, two to a factor of 10 from 1 on, energies and errors between chains, which start where the last ones ended."""
    with jax.enable_x64(True):
        b = jax.random.normal(jax.random.key(0), (NUM_CHAINS, *catalogue()[name].center["b"].shape))
        log_nbetas, found = np.log(10) * np.arange(0, np.log10(largest) + 0.1, 0.5), []
        for i, log_nbeta in enumerate(log_nbetas):
            keys = jax.random.split(jax.random.key(i + 1))
            b, _ = sweep(keys[0], log_nbeta, b, FEATURES[name], num_readings // 2)
            b, read = sweep(keys[1], log_nbeta, b, FEATURES[name], num_readings)
            found.append(np.asarray(read).mean(axis=0))
    return log_nbetas, np.mean(found, axis=1), np.std(found, axis=1) / np.sqrt(NUM_CHAINS)


def test_chains_of_the_features_alone_agree_with_quadrature():
    log_nbetas, mean, error = energies("tanh network with 2 units", 1e8)
    exact = [catalogue()["tanh network with 2 units"].energy(np.exp(x), 1.0) for x in log_nbetas]
    assert np.all(error < 0.003)
    assert np.all(np.abs(mean - exact) < 4 * error)


@pytest.mark.parametrize("name", ["tanh network with 4 units", "Vandermonde with 6 units, gap 1"])
def test_a_ladder_has_the_energies_of_chains_of_the_features_alone(name, key):
    problem = catalogue()[name]
    run = {"num_chains": 16, "num_draws": 1000, "progress": False}
    ladder = temper(key, problem.loss_fn, problem.center, problem.data, base=Gaussian(0.0, 1.0), max_nbeta=1e5, **run)
    log_nbetas, mean, error = energies(name, 1e9)
    curve = ladder.llc_curve()
    is_cold = curve.nbetas >= 1
    assert is_cold.sum() > 6
    exact = CubicSpline(log_nbetas, mean)(np.log(curve.nbetas[is_cold]))
    assert np.all(np.abs(curve.llc[is_cold] - exact) < 4 * np.hypot(curve.std_error[is_cold], error.max()))


@pytest.mark.parametrize("relative", [0.01, 0.002])
@pytest.mark.parametrize(
    ("name", "coefficient"), [("tanh network with 4 units", 1.0), ("Vandermonde with 6 units, gap 1", 1.5)]
)
def test_energies_known_to_a_part_in_500_up_to_an_nbeta_of_1e9_do_not_tell_these_double_poles(name, coefficient, relative):
    log_nbetas, mean, _ = energies(name, 1e9)
    curve, t = CubicSpline(log_nbetas, mean), np.log(np.geomspace(30.0, 1e9, 12))
    increments = np.array([curve.integrate(*ends) for ends in itertools.pairwise(t)])
    errors = relative * np.concatenate([curve(t), np.sqrt(np.diff(t)) * curve(t[1:])])
    found = fit_coefficient(t, curve(t), increments, np.diag(errors**2))
    assert not found.is_resolved
    assert found.probability[1] > 0.02
    assert abs(found.coefficient - coefficient) < 0.03 * coefficient

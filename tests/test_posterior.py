import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp.bases import Gaussian
from slt_interp.errors import InputError
from slt_interp.posterior import LocalPosterior, check_target

CENTER = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[0.5]])}


def loss_fn(params, batch):
    return 0.5 * jnp.sum(params["a"] ** 2) + jnp.sum(params["b"] ** 4)


@pytest.mark.parametrize("localization", [3.0, Gaussian({"a": jnp.ones(2), "b": 0.0}, {"a": 2.0, "b": jnp.array([[0.1]])})])
@pytest.mark.parametrize("mask", [None, {"a": jnp.array([True, False]), "b": True}])
def test_gradient_is_that_of_the_potential_on_sampled_coordinates(localization, mask):
    target = LocalPosterior(loss_fn, CENTER, 7.0, localization, mask)
    point = jax.tree.map(lambda x: x + 0.3, CENTER)
    loss, gradient = target.value_and_grad(point, None)
    expected = jax.grad(target.potential)(point, None)
    if mask is not None:
        expected["a"] = expected["a"] * jnp.array([1.0, 0.0])
    assert float(loss) == pytest.approx(float(loss_fn(point, None)))
    for name in CENTER:
        np.testing.assert_allclose(gradient[name], expected[name], rtol=1e-5)
    assert float(target.dimension()) == (3 if mask is None else 2)


def test_localization_gamma_is_the_gaussian_of_that_precision():
    point = jax.tree.map(lambda x: x + 0.3, CENTER)
    by_number = LocalPosterior(loss_fn, CENTER, 7.0, 4.0).potential(point, None)
    by_measure = LocalPosterior(loss_fn, CENTER, 7.0, Gaussian(CENTER, 0.5)).potential(point, None)
    assert float(by_number) == pytest.approx(float(by_measure), rel=1e-6)


def test_gaussian_draws_have_its_moments(key):
    base = Gaussian(CENTER, {"a": 2.0, "b": 0.1})
    draws = jax.vmap(lambda k: base.sample(k, CENTER))(jax.random.split(key, 20_000))
    for name, scale in (("a", 2.0), ("b", 0.1)):
        assert np.all(np.abs(draws[name].mean(axis=0) - CENTER[name]) < 4 * scale / np.sqrt(20_000))
        assert np.all(np.abs(draws[name].var(axis=0) / scale**2 - 1) < 4 * np.sqrt(2 / 20_000))


def test_weights_below_float32_are_sampled_in_float32_and_cast_for_the_loss():
    seen = []

    def loss(w, batch):
        seen.append(w.dtype)
        return jnp.sum(w**2)

    target = LocalPosterior(loss, jnp.ones(3, jnp.bfloat16), 1.0, 1.0)
    position = target.position(target.center)
    value, gradient = target.value_and_grad(position, None)
    assert (position.dtype, value.dtype, gradient.dtype) == (jnp.float32, jnp.float32, jnp.float32)
    assert set(seen) == {jnp.dtype(jnp.bfloat16)}


class Unhashable:
    __hash__ = None

    def __call__(self, params, batch):
        return jnp.zeros(())


@pytest.mark.parametrize(
    ("kind", "target", "message"),
    [
        (TypeError, LocalPosterior(Unhashable(), CENTER, 1.0, 1.0), "loss_fn must be hashable, but Unhashable is not"),
        (TypeError, LocalPosterior(lambda p, b: p["a"], CENTER, 1.0, 1.0), r"real scalar.* returned float32\[2\]"),
        (TypeError, LocalPosterior(lambda p, b: (p["a"].sum(), 1), CENTER, 1.0, 1.0), "real scalar.* returned tuple"),
        (InputError, LocalPosterior(loss_fn, CENTER, -1.0, 1.0), "nbeta must be finite and not negative, but is -1.0"),
        (InputError, LocalPosterior(loss_fn, CENTER, 1.0, 0.0), "localization must be positive, but is 0.0"),
    ],
)
def test_what_cannot_be_sampled_gets_one_clear_sentence(kind, target, message):
    with pytest.raises(kind, match=message) as caught:
        check_target(target, CENTER, None)
    assert "\n" not in str(caught.value)


def test_start_of_another_structure_is_an_error():
    with pytest.raises(ValueError, match=r"at \['b'\] params has no leaf and center has shape \(1, 1\)"):
        check_target(LocalPosterior(loss_fn, CENTER, 1.0, 1.0), {"a": CENTER["a"]}, None)


def test_control_variate_is_unbiased_exact_at_the_center_and_the_gradient_of_what_it_says():
    data = jax.random.normal(jax.random.key(0), (50, 3))

    def loss_fn(w, batch):
        return jnp.mean(jnp.tanh(batch @ w) ** 2)

    center, point = jnp.array([0.3, -0.2, 0.5]), jnp.array([0.4, 0.0, 0.3])
    plain = LocalPosterior(loss_fn, center, 7.0, 2.0)
    controlled = plain.with_control_variate(data, block_size=16)
    batches = data.reshape(10, 5, 3)
    for w in (center, point):
        values, gradients = jax.vmap(lambda batch, w=w: controlled.value_and_grad(w, batch))(batches)
        value, gradient = plain.value_and_grad(w, data)
        np.testing.assert_allclose(values.mean(), value, rtol=1e-5)
        np.testing.assert_allclose(gradients.mean(axis=0), gradient, rtol=1e-4, atol=1e-5)
    at_center = jax.vmap(lambda batch: controlled.value_and_grad(center, batch))(batches)
    np.testing.assert_allclose(at_center[1], np.broadcast_to(plain.value_and_grad(center, data)[1], (10, 3)), atol=1e-5)
    g = jax.grad(loss_fn)
    wanted = g(point, batches[0]) - g(center, batches[0]) + g(center, data)
    got = controlled.value_and_grad(point, batches[0])[1] - plain.base.gradient(point)
    np.testing.assert_allclose(got, 7.0 * wanted, rtol=1e-4, atol=1e-5)

    def noise(target, t):
        at = center + t * (point - center)
        return np.linalg.norm(jax.vmap(lambda batch: target.value_and_grad(at, batch)[1])(batches).std(axis=0))

    # It vanishes at the center and grows in proportion to the distance, to first order.
    assert noise(controlled, 0.02) < 0.04 * noise(plain, 0.02)
    np.testing.assert_allclose(noise(controlled, 0.02), 2 * noise(controlled, 0.01), rtol=0.05)

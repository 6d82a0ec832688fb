"""A multilayer perceptron in flax nnx, seen by the rest of the package as a pytree of weights and functions of it."""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from slt_interp.taps import INPUTS, Tap, no_tap
from slt_interp.tree import Params


@dataclass(frozen=True)
class MLP:
    """A network of the given widths, inputs and outputs included; the site `layer1` is the first hidden layer.

    Two networks of equal widths and nonlinearity are equal, so that jitted functions of them are shared.

    >>> network = MLP((16, 16, 16, 16, 2))
    >>> network.sites
    ('inputs', 'layer1', 'layer2', 'layer3')
    >>> params = network.init(jax.random.key(0))
    >>> network.apply(params, jax.numpy.ones((5, 16))).shape
    (5, 2)
    """

    widths: tuple[int, ...]
    activation: Callable[[Array], Array] = jax.nn.relu

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the inputs and of the hidden layers, whose activations follow the nonlinearity."""
        return (INPUTS, *self.hidden_sites)

    @property
    def hidden_sites(self) -> tuple[str, ...]:
        """Names of the hidden layers."""
        return tuple(f"layer{i + 1}" for i in range(len(self.widths) - 2))

    @functools.partial(jax.jit, static_argnums=0)
    def init(self, key: Key[Array, ""]) -> Params:
        """Draw initial weights (flax's defaults): {"layers": {i: {"kernel": (in, out), "bias": (out,)}}}."""
        return nnx.to_pure_dict(nnx.state(_Module(self.widths, self.activation, nnx.Rngs(key)), nnx.Param))

    def apply(
        self, params: Params, inputs: Float[Array, "*example input"], tap: Tap = no_tap
    ) -> Float[Array, "*example output"]:
        """Compute the logits, calling `tap` at the inputs and at every hidden layer."""
        return nnx.merge(_graph(self), params)(inputs, tap)


@functools.cache
def _graph(network: MLP) -> nnx.GraphDef:
    """Find the module's structure, without its weights."""
    return nnx.graphdef(nnx.eval_shape(lambda: _Module(network.widths, network.activation, nnx.Rngs(0))))


class _Module(nnx.Module):
    def __init__(self, widths: Sequence[int], activation: Callable[[Array], Array], rngs: nnx.Rngs):
        self.activation = activation
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)])

    def __call__(self, inputs: Array, tap: Tap) -> Array:
        *hidden, head = self.layers
        # Examples run along the last axis within: products of a few units are faster so on CPUs.
        activation = jnp.moveaxis(tap(INPUTS, inputs), -1, 0)
        for i, layer in enumerate(hidden):
            rows = jnp.moveaxis(self.activation(_affine(layer, activation)), 0, -1)
            activation = jnp.moveaxis(tap(f"layer{i + 1}", rows), -1, 0)
        return jnp.moveaxis(_affine(head, activation), 0, -1)


def _affine(layer: nnx.Linear, columns: Float[Array, "in *example"]) -> Float[Array, "out *example"]:
    assert layer.bias is not None, "every layer is made with a bias"
    products = jnp.tensordot(layer.kernel[...], columns, axes=(0, 0))
    return products + layer.bias[...].reshape(-1, *[1] * (products.ndim - 1))

"""A small decoder-only transformer in flax nnx, seen by the rest of the package as a pytree of weights and functions of it.

Layer norm comes before each block, positions are learned, attention is causal, and every block adds to one residual stream.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from slt_interp.errors import InputError
from slt_interp.taps import Tap, no_tap
from slt_interp.tree import Params


@dataclass(frozen=True)
class Transformer:
    """A causal language model over `vocab` tokens and at most `length` positions.

    Its sites in the order of computation, with N counting layers from 1; head_width is width / heads:

    | site | activation | axes |
    |---|---|---|
    | `embed` | residual stream where it starts | (example, position, width) |
    | `layerN.pattern` | attention probabilities | (example, head, query, key) |
    | `layerN.heads` | what each head found, before it is projected back | (example, position, head, head_width) |
    | `layerN.attention` | what attention adds to the stream | (example, position, width) |
    | `layerN.neurons` | hidden layer of the MLP, after its GELU | (example, position, 4 width) |
    | `layerN.mlp` | what the MLP adds to the stream | (example, position, width) |
    | `layerN` | residual stream after the layer | (example, position, width) |
    | `final` | residual stream after the last layer norm | (example, position, width) |

    Two networks of equal settings are equal, so that jitted functions of them are shared.

    >>> network = Transformer(vocab=11, length=5, layers=1, width=8, heads=2)
    >>> network.sites
    ('embed', 'layer1.pattern', 'layer1.heads', 'layer1.attention', 'layer1.neurons', 'layer1.mlp', 'layer1', 'final')
    >>> params = jax.eval_shape(network.init, jax.random.key(0))  # network.init(key) for numbers, not only shapes
    >>> jax.eval_shape(network.apply, params, jnp.zeros((3, 5), int)).shape
    (3, 5, 11)

    Args:
        vocab: number of tokens.
        length: longest sequence.
        layers: pairs of an attention and an MLP block.
        width: of the residual stream; a multiple of `heads`.
        heads: attention heads per layer.
    """

    vocab: int
    length: int
    layers: int = 2
    width: int = 64
    heads: int = 4

    def __post_init__(self):
        if self.width % self.heads:
            raise InputError(f"width must be a multiple of heads, but they are {self.width} and {self.heads}")

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the activations, in the order of computation."""
        parts = (".pattern", ".heads", ".attention", ".neurons", ".mlp", "")
        return ("embed", *(f"layer{i + 1}{part}" for i in range(self.layers) for part in parts), "final")

    @functools.partial(jax.jit, static_argnums=0)
    def init(self, key: Key[Array, ""]) -> Params:
        """Draw initial weights (flax's defaults): {"tokens": ..., "positions": ..., "layers": {i: ...}, "norm": ..., ...}."""
        return nnx.to_pure_dict(nnx.state(_Module(self, nnx.Rngs(key)), nnx.Param))

    def apply(
        self, params: Params, tokens: Int[Array, "example position"], tap: Tap = no_tap
    ) -> Float[Array, "example position vocab"]:
        """Compute the logits of the token after each position, calling `tap` at every site."""
        if tokens.shape[1] > self.length:
            raise InputError(
                f"tokens have {tokens.shape[1]} positions, but the network has {self.length}: cut them, or raise length"
            )
        return nnx.merge(_graph(self), params)(tokens, tap)


@functools.cache
def _graph(network: Transformer) -> nnx.GraphDef:
    """Find the module's structure, without its weights."""
    return nnx.graphdef(nnx.eval_shape(lambda: _Module(network, nnx.Rngs(0))))


class _Module(nnx.Module):
    def __init__(self, settings: Transformer, rngs: nnx.Rngs):
        width = settings.width
        self.tokens = nnx.Embed(settings.vocab, width, rngs=rngs)
        self.positions = nnx.Embed(settings.length, width, rngs=rngs)
        self.layers = nnx.List([_Layer(width, settings.heads, rngs) for _ in range(settings.layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, settings.vocab, rngs=rngs)

    def __call__(self, tokens: Array, tap: Tap) -> Array:
        positions = self.positions(jnp.arange(tokens.shape[1]))
        stream = tap("embed", self.tokens(tokens) + positions)
        for i, layer in enumerate(self.layers):
            stream = layer(stream, functools.partial(_at_layer, tap, f"layer{i + 1}"))
        return _rowwise(self.head, tap("final", _rowwise(self.norm, stream)))


class _Layer(nnx.Module):
    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.heads = heads
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.query_key_value = nnx.Linear(width, 3 * width, rngs=rngs)
        self.attention_out = nnx.Linear(width, width, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)
        self.mlp_in = nnx.Linear(width, 4 * width, rngs=rngs)
        self.mlp_out = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, stream: Array, tap: Tap) -> Array:
        projected = _rowwise(lambda x: self.query_key_value(self.attention_norm(x)), stream)
        found = self._attend(projected, tap)
        stream = stream + tap(".attention", _rowwise(self.attention_out, found))
        neurons = tap(".neurons", _rowwise(lambda x: jax.nn.gelu(self.mlp_in(self.mlp_norm(x))), stream))
        return tap("", stream + tap(".mlp", _rowwise(self.mlp_out, neurons)))

    def _attend(self, projected: Array, tap: Tap) -> Array:
        query, key, value = jnp.split(projected, 3, axis=-1)
        example, position, width = query.shape
        query, key, value = (x.reshape(example, position, self.heads, width // self.heads) for x in (query, key, value))
        scores = jnp.einsum("eqhw,ekhw->ehqk", query, key) * query.shape[-1] ** -0.5
        earlier = jnp.tril(jnp.ones((position, position), bool))
        pattern = tap(".pattern", jax.nn.softmax(jnp.where(earlier, scores, -jnp.inf)))
        return tap(".heads", jnp.einsum("ehqk,ekhw->eqhw", pattern, value)).reshape(example, position, width)


def _rowwise(function: Callable[[Array], Array], activation: Array) -> Array:
    """Apply a function of rows to examples and positions as one axis: its gradients are then plain matrix products."""
    rows = function(activation.reshape(-1, activation.shape[-1]))
    return rows.reshape(*activation.shape[:-1], rows.shape[-1])


def _at_layer(tap: Tap, layer: str, part: str, activation: Array) -> Array:
    return tap(layer + part, activation)

"""High-level causal models: what an activation might carry, as plain functions.

A variable is a function of the input, and the model's output a function of the variables' values and of the input, for what the
model reads from it directly. An interchange intervention takes each variable's value from a source input; the model says how
the network should then answer.

References:
    Geiger et al. (2021), Causal abstractions of neural networks, arXiv:2106.02997.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Array, Float, Int

from slt_interp.data import Counterfactuals
from slt_interp.errors import InputError

Values = Array
"""Of one variable, (example, ...): a truth value, a class, a vector."""


@dataclass(frozen=True)
class CausalModel:
    """Variables and what follows from them; equal models are those of equal functions.

    Attributes:
        variables: each `(inputs) -> values`, both with a leading example axis.
        output: `(values, inputs) -> labels`, given a tuple with the values of each variable.

    >>> import jax.numpy as jnp
    >>> parity = CausalModel((lambda x: x[:, 0] > 0, lambda x: x[:, 1] > 0), lambda v, x: (v[0] ^ v[1]).astype(int))
    >>> base, sources = jnp.array([[1.0, 1.0]]), jnp.array([[[-1.0, 1.0], [1.0, 1.0]]])
    >>> intervened(parity, base, sources).labels.tolist()
    [1]
    """

    variables: tuple[Callable[[Float[Array, "example *input"]], Values], ...]
    output: Callable[[tuple[Values, ...], Float[Array, "example *input"]], Int[Array, " example"]]


def intervened(
    model: CausalModel, base: Float[Array, "example *input"], sources: Float[Array, "example variable *input"]
) -> Counterfactuals:
    """Say what the model answers on `base` with every variable's value taken from its source.

    Raises:
        InputError: if there are not as many sources as variables.
    """
    if sources.shape[:2] != (len(base), len(model.variables)):
        raise InputError(
            f"the model has {len(model.variables)} variables and there are {len(base)} base inputs, but sources has the "
            f"leading axes {sources.shape[:2]}: give (example, variable, ...)"
        )
    taken = tuple(variable(sources[:, v]) for v, variable in enumerate(model.variables))
    own = tuple(variable(base) for variable in model.variables)
    return Counterfactuals(base, sources, model.output(taken, base), model.output(own, base))

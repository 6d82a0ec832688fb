"""Networks built by hand in which it is known what is a circuit and what an illusion: the cases that a dial must tell apart.

A network answers hierarchical equality. Its first layer is relu(a - b), relu(b - a), relu(c - d), relu(d - c); in the second,
relu(1 - k sum) says of each pair whether it is equal; the third takes the difference of both. A second answer says one of the
values again. Beside what computes the answer, the second layer holds units that only an intervention can put to use. Each
*cell* is a span of directions of that layer, along which a patch makes the network answer as the causal model does:

| cell | what carries the value | what a patch acts through | held by the loss |
|---|---|---|---|
| genuine | the unit of (a = b) | the same | its sum with the copies below |
| redundant | two units of (c = d) of half weight | the same | their sum |
| planted | a copy u of (a = b) that nothing reads | a constant unit w that is read | no |
| pinned | the same, but the second answer reads u | the same | u, by the second answer |
| noisy | as planted | w varies a little with the inputs | no |
| null | as planted | the difference of the two units of (c = d), always 0, which are read differently | no |

A copy that nothing reads may come to be read in place of the original, at no cost: the more copies, the less is the genuine
unit itself held. Sums that are held, not units, are what a loss knows.

References:
    Makelov, Lange and Nanda (2023), Is this the subspace you are looking for? An interpretability illusion for subspace
    activation patching, arXiv:2311.17030 (dormant and disconnected directions).
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from slt_interp.errors import InputError
from slt_interp.models.mlp import MLP
from slt_interp.probes.interchange import Alignment
from slt_interp.taps import Tap, no_tap
from slt_interp.tree import Params

SITE, ENTITY_SIZE = "layer2", 2

VARIABLE = {"genuine": "left", "planted": "left", "pinned": "left", "noisy": "left", "null": "left", "redundant": "right"}
"""The variable of each cell: left is (a = b), right (c = d)."""


@dataclass(frozen=True)
class Answers:
    """A network of two answers, of which probes and losses see the first, or both at once.

    Args:
        network: its four outputs are the logits of both answers, each of two classes.
        joint: whether to see both: the four combinations, whose logits are the sums. A KL between joint answers is the sum of
            the KLs of each.
    """

    network: MLP
    joint: bool = False

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the activation sites, those of the network."""
        return self.network.sites

    def apply(self, params: Params, inputs: Array, tap: Tap = no_tap) -> Float[Array, "example output"]:
        """Compute the logits."""
        logits = self.network.apply(params, inputs, tap)
        if not self.joint:
            return logits[:, :2]
        return (logits[:, :2, None] + logits[:, None, 2:]).reshape(len(logits), 4)


class Cells(NamedTuple):
    """A network and what is known of it.

    Attributes:
        network: outputs 0 and 1 are the answer to the task, 2 and 3 the second answer; see `Answers`.
        params: its weights.
        alignments: of each cell, at `SITE`, with one variable.
        sources: of each illusion, the unit u that patches take values from.
    """

    network: MLP
    params: Params
    alignments: dict[str, Alignment]
    sources: dict[str, int]


def build_cells(rng: np.random.Generator, illusions: tuple[str, ...] = ("planted", "pinned")) -> Cells:
    """Build a network at random: of another sharpness, confidence and size of units each time, but of the same function.

    The sharpness k is log-uniform between 4 and 8, so that at most 1 of 100 differing pairs counts as equal; answers have
    probability .95 to .99; every unit is scaled by a factor, log-uniform between .7 and 1.4, and what reads it divided by it.

    Args:
        rng: for what is random.
        illusions: what to plant beside the genuine and the redundant circuit. Each adds a copy of (a = b), to which the network
            may shift its circuit: with many the genuine one is held no longer.

    Raises:
        InputError: for an unknown illusion.

    >>> cells = build_cells(np.random.default_rng(0))
    >>> cells.network.widths, sorted(cells.alignments)
    ((8, 8, 7, 3, 4), ['genuine', 'pinned', 'planted', 'redundant'])
    """
    if unknown := set(illusions) - {"planted", "pinned", "noisy", "null"}:
        raise InputError(f"there is no illusion {sorted(unknown)[0]!r}: choose among planted, pinned, noisy, null")
    roles = [(role, kind) for kind in illusions for role in ("u", "w") if (role, kind) != ("w", "null")]
    unit = {name: i for i, name in enumerate([("left", ""), ("right", ""), ("right again", ""), *roles])}
    count, inputs = len(unit), 4 * ENTITY_SIZE
    scale, inner, outer = (np.exp(rng.uniform(-_SPREAD, _SPREAD, size)) for size in (count, inputs, 3))
    # The difference of both is to be 0.
    scale[2] = scale[1]

    identity, is_left = np.eye(ENTITY_SIZE), np.arange(inputs) < inputs / 2
    first = np.kron(np.eye(2), np.block([[identity, -identity], [-identity, identity]]))
    sharpness = np.exp(rng.uniform(*np.log(_SHARPNESS)))
    second = np.zeros((inputs, count))
    for (role, kind), i in unit.items():
        if role != "w":
            second[:, i] = -sharpness * (~is_left if role.startswith("right") else is_left)
        elif kind == "noisy":
            second[:, i] = _NOISE * rng.normal(size=inputs)

    # What the third layer makes of units of scale 1: (a = b) - (c = d), and what patches act through.
    read = np.zeros(count)
    read[:3] = 1.0, -0.5, -0.5
    for (role, kind), i in unit.items():
        if role == "w":
            # A patch along u + w moves w by half of what u differs.
            read[i] = 2 * scale[i] / scale[unit["u", kind]]
    if "null" in illusions:
        read[1:3] += np.sqrt(2) * scale[1] / scale[unit["u", "null"]] * np.array([1.0, -1.0])
    constant = sum(read[i] for (role, _), i in unit.items() if role == "w")
    again = np.zeros(count)
    if "pinned" in illusions:
        again[unit["u", "pinned"]] = 1.0
    third = np.stack([read, -read, again], axis=1)

    task, other = np.log(1 / rng.uniform(0.01, 0.05, (2, 1)) - 1) * np.array([0.5, -0.5])
    last = np.zeros((3, 4))
    last[:2, :2], last[2, 2:] = 2 * task, 2 * other
    layers = (
        (first * inner, np.zeros(inputs)),
        (second / inner[:, None] * scale, scale),
        (third / scale[:, None] * outer, np.array([-constant, constant, 0.0]) * outer),
        (last / outer[:, None], -np.concatenate([task, other])),
    )
    weights = {i: {"kernel": jnp.float32(kernel), "bias": jnp.float32(bias)} for i, (kernel, bias) in enumerate(layers)}

    axes = np.eye(count)
    directions = {"genuine": axes[:, [0]], "redundant": axes[:, [1, 2]]}
    for kind in illusions:
        acts = (axes[:, [1]] - axes[:, [2]]) / np.sqrt(2) if kind == "null" else axes[:, [unit["w", kind]]]
        directions[kind] = axes[:, [unit["u", kind]]] + acts
    network = MLP((inputs, inputs, count, 3, 4))
    alignments = {name: aligned(along) for name, along in directions.items()}
    return Cells(network, {"layers": weights}, alignments, {kind: unit["u", kind] for kind in illusions})


def aligned(directions: Float[np.ndarray, "width direction"]) -> Alignment:
    """Make the alignment that gives the span of orthogonal directions to one variable.

    >>> aligned(np.array([[1.0], [1.0]])).masks.tolist()
    [[1.0, 0.0]]
    """
    count = directions.shape[1]
    basis = directions / np.linalg.norm(directions, axis=0)
    # Any basis of what is left completes a rotation.
    rotation = np.concatenate([basis, np.linalg.svd(basis, full_matrices=True)[0][:, count:]], axis=1)
    return Alignment(jnp.float32(rotation), jnp.float32(np.arange(len(rotation))[None] < count))


_SHARPNESS, _SPREAD = (4.0, 8.0), np.log(1.4)

_NOISE = 0.02
"""Of the incoming weights of a constant unit that is to vary."""

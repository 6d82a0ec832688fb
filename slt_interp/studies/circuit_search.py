"""Where the study `hierarchical-equality` looks for (a = b) and (c = d), and what it holds against what it finds.

Alignments are searched at every site, with maps that reach ever more, of two sizes and from many starts. Beside them stand a
network that was not trained, another that computes with sigmoids, labels that were shuffled, other causal models, single
neurons, and at the inputs an alignment that is known: what a search does not find need not be absent.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from tqdm.auto import tqdm

from slt_interp.data import Counterfactuals
from slt_interp.models.mlp import MLP
from slt_interp.probes.alignment import Family, Rotations, fit_alignment, random_rotations
from slt_interp.probes.interchange import Alignment, AnyAlignment, InterchangeProbe, block_masks
from slt_interp.probes.linear import LinearAlignment, LinearMaps
from slt_interp.probes.localist import closest_localist, localist_search
from slt_interp.probes.revnet import RevNets
from slt_interp.probes.scrubbing import Hypothesis, ScrubbingProbe
from slt_interp.storage import Arrays
from slt_interp.taps import INPUTS, Tap, no_tap
from slt_interp.tasks.hierarchical_equality import (
    ENTITY_SIZE,
    MODELS,
    NUM_INPUTS,
    Interventions,
    draw_counterfactuals,
    draw_scrubbing,
)
from slt_interp.tree import Params

MAPS: dict[str, Family] = {"rotation": Rotations(), "linear": LinearMaps(), "RevNet": RevNets()}
"""What is searched over, by what it reaches."""

BOTH, SHUFFLED = "both equalities", "shuffled labels"

OTHER_MODELS = ("left equality", "first argument")

FIRST_LAYER = "layer1"
"""Where other causal models are looked for, and the hypothesis is scrubbed."""


@dataclass(frozen=True)
class Search:
    """How much is searched.

    Attributes:
        maps: names of `MAPS`.
        sizes: directions that each variable may have, the largest last.
        num_steps: Adam steps of a search.
        num_restarts: starts of each search with rotations and linear maps at a hidden layer.
        num_input_restarts: theirs at the inputs.
        num_revnet_restarts: starts with RevNet maps, everywhere.
        num_examples: fresh ones on which the best of the starts is measured again.
        num_random: random rotations at each site.
        num_neurons: neurons that each variable has where choices of single ones are tried, all of them.
    """

    maps: tuple[str, ...]
    sizes: tuple[int, ...]
    num_steps: int
    num_restarts: int
    num_input_restarts: int
    num_revnet_restarts: int
    num_examples: int
    num_random: int
    num_neurons: int

    def restarts(self, name: str, site: str) -> tuple[int, int]:
        """Tell how many runs of how many starts there are, equal runs being one compiled program."""
        if name == "RevNet":
            return 1, self.num_revnet_restarts
        return (-(-self.num_input_restarts // self.num_restarts) if site == INPUTS else 1), self.num_restarts


@dataclass(frozen=True)
class AtAnySite:
    """A network of layers of equal width, cut at a site that is a number: one program searches all of them.

    Its weights are {"layers": those of the MLP, "site": 0 for the inputs, i for the i-th hidden layer}.

    >>> network, key = MLP((4, 4, 4, 2)), jax.random.key(0)
    >>> cut, x = AtAnySite(network), jax.random.normal(key, (3, 4))
    >>> logits = cut.apply(at_site(network, network.init(key), "layer2"), x)
    >>> bool(jnp.allclose(logits, network.apply(network.init(key), x), atol=1e-6))
    True
    """

    network: MLP

    @property
    def sites(self) -> tuple[str, ...]:
        """The one there is."""
        return (_CHOSEN,)

    def apply(self, params: Params, inputs: Float[Array, "example width"], tap: Tap = no_tap) -> Float[Array, "example output"]:
        """Compute the logits, calling `tap` at the chosen site; every hidden layer is computed before it and after it."""
        *hidden, head = (params["layers"][i] for i in range(len(self.network.widths) - 1))
        activation = inputs
        for i, layer in enumerate(hidden):
            activation = jnp.where(i < params["site"], self.network.activation(_affine(layer, activation)), activation)
        activation = tap(_CHOSEN, activation)
        for i, layer in enumerate(hidden):
            activation = jnp.where(i < params["site"], activation, self.network.activation(_affine(layer, activation)))
        return _affine(head, activation)


_CHOSEN = "chosen"


def at_site(network: MLP, params: Params, site: str) -> Params:
    """Make the weights of `AtAnySite`."""
    return {**params, "site": jnp.int32(network.sites.index(site))}


@dataclass(frozen=True)
class ShuffledLabels:
    """Counterfactuals whose labels are those of other examples: nothing carries what they say."""

    counterfactuals: Callable[[Key[Array, ""], int], Counterfactuals]

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def __call__(self, key: Key[Array, ""], size: int) -> Counterfactuals:
        """Draw and shuffle."""
        draw_key, order_key = jax.random.split(key)
        examples = self.counterfactuals(draw_key, size)
        return examples._replace(labels=jax.random.permutation(order_key, examples.labels))


def difference_alignment() -> Alignment:
    """Make an alignment of the inputs which every right network has: (a - b) / sqrt 2 carries (a = b), and so for c, d."""
    pair = np.kron(np.array([[1, 1], [-1, 1]]), np.eye(ENTITY_SIZE)) / np.sqrt(2)
    differences_first = np.arange(NUM_INPUTS).reshape(2, 2, ENTITY_SIZE).swapaxes(0, 1).reshape(-1)
    columns = np.kron(np.eye(2), pair)[:, differences_first]
    return Alignment(jnp.asarray(columns, jnp.float32), block_masks((ENTITY_SIZE, ENTITY_SIZE), NUM_INPUTS))


def search_circuits(
    key: Key[Array, ""], search: Search, networks: dict[str, tuple[MLP, Params]], *, progress: bool
) -> tuple[dict[str, Any], Arrays]:
    """Search everywhere.

    Args:
        key: for starts and examples.
        search: how much.
        networks: "trained", "untrained" and "sigmoid", each with its weights; all layers of all have the width of the inputs.
        progress: whether to show a bar.

    Returns:
        `fits`: of each search its network, causal model, map, site, size, the IIA of the best start on fresh examples with its
        standard error, of every start on held-out ones, and the condition number of a linear map. `random`: IIA of random
        rotations by model and site. `neurons`: IIA by site of the best choice of neurons and of the one closest to the
        rotation. `known`: IIA of `difference_alignment`. `accuracy` of each network. And the rotations that were found, as
        arrays named by site and size.
    """
    fit_key, test_key, random_key, choice_key = jax.random.split(key, 4)
    tests = {
        model: draw(jax.random.fold_in(test_key, i), search.num_examples) for i, (model, draw) in enumerate(_models().items())
    }
    plan = list(_plan(search, networks["trained"][0].sites))
    fits, rotations = [], {}
    for i, entry in enumerate(tqdm(plan, desc="searches", unit="search", disable=not progress, leave=False)):
        network, params = networks[entry["network"]]
        found, alignment = _fit(jax.random.fold_in(fit_key, i), search, network, params, entry, tests[entry["model"]])
        fits.append({**entry, **found})
        if entry["map"] == "rotation" and (entry["network"], entry["model"]) == ("trained", BOTH):
            rotations[entry["site"], entry["size"]] = alignment
    network, params = networks["trained"]
    known = _iia(network, at_site(network, params, INPUTS), _stack([difference_alignment()]), tests[BOTH])
    found = {
        "num_examples": search.num_examples,
        "num_neurons": search.num_neurons,
        "fits": fits,
        "random": list(_random(random_key, search, network, params, tests)),
        "neurons": _neurons(choice_key, search, network, params, rotations, tests[BOTH]),
        "known": _share(known[0], search.num_examples),
        "accuracy": {name: _accuracy(net, weights, tests[BOTH]) for name, (net, weights) in networks.items()},
    }
    return found, {f"rotation {site} {size}": np.asarray(fit.rotation) for (site, size), fit in rotations.items()}


def scrub_circuits(
    key: Key[Array, ""], network: MLP, params: Params, rotations: dict[int, Array], num_examples: int, num_blocks: int = 16
) -> dict[str, Any]:
    """Scrub hypotheses about `FIRST_LAYER`: the rotation found, the same with its variables swapped, and random rotations.

    All claim that the directions of no variable are irrelevant, and so speak of the whole activation.

    Args:
        key: for examples and random rotations.
        network: the network.
        params: its weights.
        rotations: found, by the number of directions of each variable.
        num_examples: base inputs, divided evenly among the blocks (rounded up).
        num_blocks: independent groups of examples, for standard errors; random rotations are drawn anew for each.

    Returns:
        `hypotheses`: for each its name, size, and of every measure the mean over blocks and its standard error.
    """
    example_key, random_key, probe_key = jax.random.split(key, 3)
    examples = [draw_scrubbing(k, -(-num_examples // num_blocks)) for k in jax.random.split(example_key, num_blocks)]
    hypotheses = []
    for size, rotation in rotations.items():
        width = len(rotation)
        masks = block_masks((size, size), width)
        random = random_rotations(jax.random.fold_in(random_key, size), num_blocks, width)
        same = jnp.broadcast_to(rotation, random.shape)
        for name, turned, claimed in (("found", same, masks), ("swapped", same, masks[::-1]), ("random", random, masks)):
            claims = [Hypothesis(Alignment(one, claimed), 1 - claimed.sum(axis=0)) for one in turned]
            read = _scrub(probe_key, network, params, _stack(claims), _stack(examples))
            hypotheses.append({"hypothesis": name, "size": size, **_over_blocks(read)})
    return {"site": FIRST_LAYER, "num_blocks": num_blocks, "hypotheses": hypotheses}


def _models() -> dict[str, Callable[[Key[Array, ""], int], Counterfactuals]]:
    others = {name: Interventions(MODELS[name]) for name in OTHER_MODELS}
    return {BOTH: draw_counterfactuals, SHUFFLED: ShuffledLabels(draw_counterfactuals), **others}


def _plan(search: Search, sites: Sequence[str]):
    """List the searches: the trained network in full, everything it is held against with the largest size."""
    largest = search.sizes[-1]
    for name in search.maps:
        for site in sites:
            for size in search.sizes:
                yield {"network": "trained", "model": BOTH, "map": name, "site": site, "size": size}
            yield {"network": "untrained", "model": BOTH, "map": name, "site": site, "size": largest}
    for site in sites:
        yield {"network": "sigmoid", "model": BOTH, "map": "rotation", "site": site, "size": largest}
    for model in (SHUFFLED, *OTHER_MODELS):
        yield {"network": "trained", "model": model, "map": "rotation", "site": FIRST_LAYER, "size": largest}


def _fit(
    key: Key[Array, ""], search: Search, network: MLP, params: Params, entry: dict[str, Any], examples: Counterfactuals
) -> tuple[dict[str, Any], AnyAlignment]:
    """Search at one site, in runs of equal numbers of starts, and measure the best of all again."""
    weights, sizes = at_site(network, params, entry["site"]), (entry["size"],) * examples.sources.shape[1]
    num_runs, num_restarts = search.restarts(entry["map"], entry["site"])
    fits = [
        fit_alignment(
            run_key,
            AtAnySite(network),
            weights,
            _CHOSEN,
            sizes,
            _models()[entry["model"]],
            family=MAPS[entry["map"]],
            num_steps=search.num_steps,
            num_restarts=num_restarts,
            batch_size=_BATCH_SIZE,
        )
        for run_key in jax.random.split(key, num_runs)
    ]
    best = max(fits, key=lambda fit: fit.restart_iia.max()).alignment
    found = {
        **_share(_iia(network, weights, _stack([best]), examples)[0], search.num_examples),
        "restart_iia": np.concatenate([fit.restart_iia for fit in fits]),
        "condition": float(best.condition) if isinstance(best, LinearAlignment) else None,
    }
    return found, best


def _random(key: Key[Array, ""], search: Search, network: MLP, params: Params, tests: dict[str, Counterfactuals]):
    """Measure random rotations, of the largest size: both equalities at every site, other models where they are looked for."""
    places = [(BOTH, site) for site in network.sites] + [(model, FIRST_LAYER) for model in OTHER_MODELS]
    for i, (model, site) in enumerate(places):
        examples = tests[model]
        masks = block_masks((search.sizes[-1],) * examples.sources.shape[1], NUM_INPUTS)
        rotations = random_rotations(jax.random.fold_in(key, i), search.num_random, NUM_INPUTS)
        alignments = _stack([Alignment(rotation, masks) for rotation in rotations])
        iia = _iia(network, at_site(network, params, site), alignments, examples)
        yield {"model": model, "site": site, "iia": iia.mean(), "iia_std": iia.std(ddof=1)}


def _neurons(
    key: Key[Array, ""],
    search: Search,
    network: MLP,
    params: Params,
    rotations: dict[tuple[str, int], Any],
    examples: Counterfactuals,
) -> dict[str, dict[str, Any]]:
    """Measure the best choice of neurons at each site, chosen on other examples, and the closest to the rotation found."""
    others = draw_counterfactuals(key, _NUM_CHOOSING)
    found = {}
    for site in network.sites:
        weights = at_site(network, params, site)
        best = localist_search(AtAnySite(network), weights, _CHOSEN, (search.num_neurons,) * 2, others).alignment
        closest = closest_localist(rotations[site, search.sizes[-1]])
        iia = _iia(network, weights, _stack([best, closest]), examples)
        found[site] = {name: _share(share, search.num_examples) for name, share in zip(("best", "closest"), iia, strict=True)}
    return found


def _iia(network: MLP, weights: Params, alignments: AnyAlignment, examples: Counterfactuals) -> Float[np.ndarray, " map"]:
    """Measure alignments, which have a leading axis."""
    return np.asarray(_measure(network, weights, alignments, examples), np.float64)


@functools.partial(jax.jit, static_argnames=("network",))
def _measure(network: MLP, weights: Params, alignments: AnyAlignment, examples: Counterfactuals) -> Float[Array, " map"]:
    def one(alignment: AnyAlignment) -> Float[Array, ""]:
        return InterchangeProbe(AtAnySite(network), _CHOSEN, alignment, examples)(jax.random.key(0), weights)["iia"]

    return jax.lax.map(one, alignments)


@functools.partial(jax.jit, static_argnames=("network",))
def _scrub(
    key: Key[Array, ""], network: MLP, params: Params, hypotheses: Hypothesis, examples: Counterfactuals
) -> dict[str, Float[Array, " block"]]:
    def one(block: tuple[Hypothesis, Counterfactuals]) -> dict[str, Float[Array, ""]]:
        return ScrubbingProbe(network, FIRST_LAYER, *block)(key, params)

    return jax.lax.map(one, (hypotheses, examples))


def _over_blocks(read: dict[str, Array]) -> dict[str, float]:
    found = {}
    for name, values in read.items():
        values = np.asarray(values, np.float64)
        found |= {name: values.mean(), f"{name}_std_error": values.std(ddof=1) / np.sqrt(len(values))}
    return found


def _accuracy(network: MLP, params: Params, examples: Counterfactuals) -> float:
    return float(jnp.mean(network.apply(params, examples.base).argmax(axis=-1) == examples.base_labels))


def _share(iia: float, count: int) -> dict[str, float]:
    """Give a share of `count` examples its standard error."""
    # With two right and two wrong ones added (Agresti and Coull 1998), as it is 0 at a share of 1 otherwise.
    moved = (iia * count + 2) / (count + 4)
    return {"iia": float(iia), "std_error": float(np.sqrt(moved * (1 - moved) / (count + 4)))}


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _affine(layer: dict[str, Array], x: Float[Array, "example width"]) -> Float[Array, "example output"]:
    return x @ layer["kernel"] + layer["bias"]


_BATCH_SIZE = 256
"""Examples per step of a search."""

_NUM_CHOOSING = 512
"""Examples on which choices of neurons are compared."""

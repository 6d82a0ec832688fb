"""Where the two variables of hierarchical equality are, by every search: sections of the report on that study.

An alignment counts as found if the lower end of its interval (two standard errors) lies above everything that says nothing of
training: random rotations, up to four standard deviations above their mean, and the same search in an untrained network.
"""

from typing import Any

import numpy as np

from slt_interp.report import circuit_figures as figures
from slt_interp.report.circuit_figures import Mark
from slt_interp.report.page import Section
from slt_interp.report.words import listed, show
from slt_interp.taps import INPUTS

Results = dict[str, Any]

BOTH, SHUFFLED = "both equalities", "shuffled labels"

CARRIED = 0.9
"""IIA from which on a site is said to carry both variables."""

ALIKE = 0.05
"""Starts whose IIA differs by less from that of the best are said to agree with it."""

LEARNED = 0.9
"""A network that answers less of the base inputs right has not learned the task."""

SYMBOLS = (
    (
        "inputs, layer1, ...",
        "where an interchange intervention takes place: before the first layer, or after a layer's activation function",
    ),
    (
        "rotation, linear, RevNet",
        "maps of a site's activations to coordinates: orthogonal, any invertible matrix, any chain of couplings by small networks",
    ),
    ("size, n each", "coordinates that each of the two variables may have"),
    ("start", "where a search begins, drawn at random; the best of several is kept and measured again on fresh examples"),
    ("condition", "largest over smallest singular value of a linear map: 1 for a rotation"),
    (
        "control",
        "what says nothing of training: random rotations (mean + 4 standard deviations), the same search in an untrained network",
    ),
    (
        "known alignment",
        "(a − b) / √2 carries (a = b) and (c − d) / √2 carries (c = d): true of the inputs of every network that is right",
    ),
    (
        "choice of neurons",
        "every way to give as many single neurons to each variable is tried; the best one is measured again on other examples",
    ),
    (
        "scrubbing",
        "each variable's directions are taken from another input with the same value of it, all others from any input: if the hypothesis is true, no output changes",
    ),
    ("KL, Jensen-Shannon", "divergence of the scrubbed outputs from the original ones, mean over examples, in nats"),
    ("cancellation", "loss gap less KL: far below 0 where errors cancel in the mean loss"),
)


def sections(results: Results) -> tuple[Section, ...]:
    """Make the sections on both stages."""
    search = results["search"]
    return _where(search), _rivals(search), _scrubbing(results["scrubbing"])


def findings(results: Results) -> tuple[str, ...]:
    """Answer, one sentence each: are the variables formed, is the search hard, what do wide maps say, is it the whole story."""
    search = results["search"]
    hard = tuple(missed_sentence(search, site) for site in _sites(search) if _verdict(search, site) == "none")
    sentences = (formed_sentence(search), *hard, flexible_sentence(search), scrubbing_sentence(results["scrubbing"]))
    return tuple(sentence for sentence in sentences if sentence)


def formed_sentence(search: Results) -> str:
    """Say whether the network forms the variables, and in which layers."""
    by_verdict = {
        verdict: [s for s in _hidden(search) if _verdict(search, s) == verdict] for verdict in ("whole", "part", "none")
    }
    whole, part = by_verdict["whole"], by_verdict["part"]
    told = {
        site: f"{site} ({_told(_best(search, site))}; controls reach {_bar(search, site, _linear(search)):.3f})"
        for site in _hidden(search)
    }
    if whole:
        head = f"The network forms (a = b) and (c = d): linear maps find both in {listed([told[s] for s in whole])}"
        tail = f", in part in {listed([told[s] for s in part])}" if part else ""
    elif part:
        head = f"The network forms (a = b) and (c = d) in part at most: linear maps find more than controls in {listed([told[s] for s in part])}"
        tail = f", but nowhere an IIA of {CARRIED:g}"
    else:
        return f"No linear map finds (a = b) and (c = d) in any hidden layer: {listed(list(told.values()))}."
    rest = f"; above controls there is nothing in {listed([told[s] for s in by_verdict['none']])}" if by_verdict["none"] else ""
    return f"{head}{tail}{rest}."


def missed_sentence(search: Results, site: str) -> str:
    """Say of a site where no linear map was found whether the search is hard or the concept absent."""
    fits = _linear_fits(search, site)
    starts = np.concatenate([fit["restart_iia"] for fit in fits])
    best = _best(search, site)
    alike = " alike" if np.ptp(starts) < 2 * ALIKE else ""
    head = f"At {site} all {len(starts)} starts of linear maps fail{alike} (IIA {starts.min():.3f} to {starts.max():.3f})"
    rivals = {"a choice of neurons": search["neurons"][site]["best"]}
    if site == INPUTS:
        rivals = {"the known alignment": search["known"], **rivals}
    better = {name: entry for name, entry in rivals.items() if _low(entry) > _high(best)}
    if not better:
        return f"{head}, and no alignment is known that does better: nothing there says that the variables are present, though a search cannot prove their absence."
    names = listed([f"{name} (IIA {_share(entry)})" for name, entry in better.items()])
    is_there = any(_low(entry) > _bar(search, site, ()) for entry in better.values())
    if is_there:
        return f"{head}, but what they look for is there: better is {names}, and every such alignment is a rotation. There the search is hard, not the concept absent."
    return f"{head}, although better is {names}, and that is a rotation: there the search is hard. Random rotations reach as much, so that the concept may be absent, too."


def starts_sentence(search: Results) -> str:
    """Say how many starts agree where something was found."""
    told = []
    for site in _sites(search):
        if _verdict(search, site) == "none":
            continue
        for fit in (_fit(search, site, name, _sizes(search)[-1]) for name in _linear(search)):
            starts = np.array(fit["restart_iia"])
            agree = int(np.sum(starts > starts.max() - ALIKE))
            told.append((agree / len(starts), f"{agree} of {len(starts)} ({fit['map']}, {site})"))
    if not told:
        return "No search found anything, so that starts cannot disagree."
    word = "easy" if min(share for share, _ in told) > 0.5 else "hard at places"
    return f"Where linear maps find something, the search is {word}: within {ALIKE:g} of the best start are {listed([text for _, text in told])}."


def flexible_sentence(search: Results) -> str:
    """Say whether RevNet maps find the variables where linear maps do not; empty if none were searched."""
    if "RevNet" not in _maps(search):
        return ""
    untrained = max(
        (_fit(search, site, "RevNet", _sizes(search)[-1], "untrained") for site in _sites(search)), key=lambda fit: fit["iia"]
    )
    tail = f"in the untrained network they reach {_share(untrained)} at most"
    extra = [
        fit
        for fit in (_best(search, site, ("RevNet",)) for site in _sites(search) if _verdict(search, site) == "none")
        if _low(fit) > _bar(search, fit["site"], ("RevNet",))
    ]
    if _low(untrained) > CARRIED:
        return f"RevNet maps find the variables in an untrained network, too (IIA {_share(untrained)} at its {untrained['site']}): what they find says nothing of training."
    if not extra:
        return f"RevNet maps find nothing where linear maps find nothing; {tail}."
    places = listed([f"{fit['site']} (IIA {_share(fit)})" for fit in extra])
    return (
        f"RevNet maps find both variables in {places}, where linear maps find nothing: too good to be the "
        f"network's own, as such a map can compute from a layer what the layer does not hold ready; {tail}."
    )


def size_sentence(search: Results) -> str:
    """Compare the smallest number of directions with the largest."""
    sizes = _sizes(search)
    if len(sizes) == 1:
        return f"Only {sizes[0]} directions for each variable were tried."
    pairs = [
        (_fit(search, site, name, sizes[-1]), _fit(search, site, name, sizes[0]))
        for name in _linear(search)
        for site in _sites(search)
    ]
    return f"With {sizes[-1]} directions for each variable instead of {sizes[0]}, IIA {_compared(pairs)}."


def map_sentence(search: Results) -> str:
    """Compare rotations with all invertible matrices."""
    if "linear" not in _maps(search):
        return "Only rotations were searched."
    pairs = [
        (_fit(search, site, "linear", size), _fit(search, site, "rotation", size))
        for size in _sizes(search)
        for site in _sites(search)
    ]
    condition = max(fit["condition"] for fit, _ in pairs)
    return f"With invertible matrices instead of rotations, IIA {_compared(pairs)}; their condition numbers stay below {np.ceil(condition * 10) / 10:.1f}."


def sigmoid_sentence(search: Results) -> str:
    """Compare the activation functions."""
    accuracy = search["accuracy"]["sigmoid"]
    if accuracy < LEARNED:
        return f"The sigmoid network has not learned the task (it answers {accuracy:.3f} of the base inputs right), so that nothing can be said of its circuits."
    size = _sizes(search)[-1]
    told = []
    for site in _hidden(search):
        ours, other = _fit(search, site, "rotation", size), _fit(search, site, "rotation", size, "sigmoid")
        gap, error = other["iia"] - ours["iia"], np.hypot(other["std_error"], ours["std_error"])
        word = "as much" if abs(gap) <= 3 * error else "more" if gap > 0 else "less"
        told.append(f"{word} in {site} ({_share(other)} against {_share(ours)})")
    return f"In a sigmoid network (accuracy {accuracy:.4f}), rotations find, beside the ReLU network, {listed(told)}; one network of each kind was trained."


def model_sentence(search: Results) -> str:
    """Say which other causal models the first layer fits."""
    told = []
    for fit in search["fits"]:
        if fit["model"] in (BOTH, SHUFFLED):
            continue
        random = _random(search, fit["site"], fit["model"])
        word = "fits" if _low(fit) > random["iia"] + 4 * random["iia_std"] else "does not fit better than random rotations"
        told.append(f"{fit['model']} {word} (IIA {_share(fit)}; random {random['iia']:.3f} ± {random['iia_std']:.3f})")
    shuffled = next(fit for fit in search["fits"] if fit["model"] == SHUFFLED)
    return f"Other causal models in {shuffled['site']}: {listed(told)}. With shuffled labels, of which nothing can be found, the search gives {_share(shuffled)}."


def neuron_sentence(search: Results) -> str:
    """Say how far single neurons carry what rotations find."""
    told = []
    for site in _hidden(search):
        best, closest = search["neurons"][site]["best"], search["neurons"][site]["closest"]
        rotation = _fit(search, site, "rotation", _sizes(search)[-1])
        told.append(
            f"{_share(best)} in {site} (nearest to the rotation: {closest['iia']:.3f}; the rotation itself: {rotation['iia']:.3f})"
        )
    return f"The best of all choices of {search['num_neurons']} neurons for each variable has IIA {listed(told)}."


def scrubbing_sentence(scrubbing: Results) -> str:
    """Say how much of the outputs the best rotation explains, and whether the loss hides errors."""
    by_name = {
        entry["hypothesis"]: entry for entry in scrubbing["hypotheses"] if entry["size"] == scrubbing["hypotheses"][-1]["size"]
    }
    found, swapped, random = by_name["found"], by_name["swapped"], by_name["random"]
    wrong = min(swapped["kl"], random["kl"])
    gap, error = wrong - found["kl"], np.hypot(found["kl_std_error"], max(swapped["kl_std_error"], random["kl_std_error"]))
    explains = (
        f"leaves {found['kl'] / wrong:.1%} of the divergence of the better wrong hypothesis"
        if gap > 3 * error
        else "is no better than a wrong hypothesis"
    )
    exact = "no" if found["kl"] < 3 * found["kl_std_error"] else "some"
    cancels = found["cancellation"] < -0.1 * found["kl"] and found["cancellation"] < -3 * found["cancellation_std_error"]
    loss = "and errors cancel in the loss" if cancels else "and no errors cancel in the loss"
    return (
        f"Scrubbed in {scrubbing['site']}, the rotation found with {found['size']} directions for each variable {explains}: KL {_value(found, 'kl')} nats, against {_value(swapped, 'kl')} with "
        f"the variables swapped and {_value(random, 'kl')} for random rotations. It leaves {exact} error, {loss} (cancellation {found['cancellation']:+.4f} nats)."
    )


def _where(search: Results) -> Section:
    series = {
        (name, size): {
            site: _mark(
                _fit(search, site, name, size),
                _fit(search, site, name, size, "untrained") if size == _sizes(search)[-1] else None,
            )
            for site in _sites(search)
        }
        for name in _maps(search)
        for size in _sizes(search)
    }
    random = {site: (entry["iia"], entry["iia_std"]) for site in _sites(search) for entry in (_random(search, site),)}
    neurons = {site: entry["best"]["iia"] for site, entry in search["neurons"].items()}
    figure = figures.iia_by_site(series, random, neurons, (INPUTS, search["known"]["iia"]))
    hard = (missed_sentence(search, site) for site in _sites(search) if _verdict(search, site) == "none")
    sentences = (
        formed_sentence(search),
        *hard,
        starts_sentence(search),
        flexible_sentence(search),
        size_sentence(search),
        map_sentence(search),
        f"Large marks are the best start, measured on {search['num_examples']} fresh examples with two standard errors; small dots are all starts, on the held-out examples that chose it. At the "
        "inputs the variables are in the data: what is found there, the network need not have formed.",
    )
    return Section(
        "Where are the variables? Every search at every site", tuple(filter(None, sentences)), figure, _table(search)
    )


def _table(search: Results) -> tuple[tuple[str, ...], ...]:
    header = ("network", "causal model", "site", "map", "size", "IIA", "starts: worst to best", "condition")
    rows = (
        (
            fit["network"],
            fit["model"],
            fit["site"],
            fit["map"],
            str(fit["size"]),
            _share(fit),
            f"{min(fit['restart_iia']):.3f} to {max(fit['restart_iia']):.3f} ({len(fit['restart_iia'])})",
            "" if fit["condition"] is None else show(fit["condition"], ".2f"),
        )
        for fit in search["fits"]
    )
    return header, *rows


def _rivals(search: Results) -> Section:
    size = _sizes(search)[-1]
    networks = {
        title: {site: _mark(_fit(search, site, "rotation", size, name)) for site in _sites(search)}
        for title, name in (("ReLU", "trained"), ("sigmoid", "sigmoid"))
    }
    others = [fit for fit in search["fits"] if fit["model"] != BOTH]
    site = others[0]["site"]
    models = {BOTH: _mark(_fit(search, site, "rotation", size)), **{fit["model"]: _mark(fit) for fit in others}}
    random = {entry["model"]: (entry["iia"], entry["iia_std"]) for entry in search["random"] if entry["site"] == site}
    figure = figures.rivals(networks, models, random, f"causal models in {site}")
    sentences = (
        sigmoid_sentence(search),
        model_sentence(search),
        neuron_sentence(search),
        f"All are rotations with {size} directions for each variable; marks, bars and dots as above.",
    )
    table = (
        ("site", "best choice of neurons", "nearest to the rotation", "rotation", "random rotations"),
        *(
            (
                site,
                _share(entry["best"]),
                _share(entry["closest"]),
                _share(_fit(search, site, "rotation", size)),
                f"{_random(search, site)['iia']:.3f} ± {_random(search, site)['iia_std']:.3f}",
            )
            for site, entry in search["neurons"].items()
        ),
    )
    return Section("Another activation function, other causal models, single neurons", sentences, figure, table)


def _scrubbing(scrubbing: Results) -> Section:
    entries, sizes = scrubbing["hypotheses"], sorted({entry["size"] for entry in scrubbing["hypotheses"]})
    measures = {
        title: {
            f"{size} directions for each variable": (
                np.array([entry[name] for entry in entries if entry["size"] == size]),
                np.array([entry[f"{name}_std_error"] for entry in entries if entry["size"] == size]),
            )
            for size in sizes
        }
        for title, name in MEASURES.items()
    }
    labels = {title: "squared logits" if name == "squared" else "nats" for title, name in MEASURES.items()}
    figure = figures.divergences(
        measures, [HYPOTHESES[entry["hypothesis"]] for entry in entries if entry["size"] == sizes[0]], labels
    )
    sentences = (
        scrubbing_sentence(scrubbing),
        f"Bars are two standard errors over {scrubbing['num_blocks']} groups of examples; random rotations are drawn anew for each group. Every hypothesis calls the directions of no variable "
        "irrelevant, so that all speak of the whole activation and can be compared.",
    )
    table = (
        ("hypothesis", "size", *MEASURES, "variance claimed for variables", "called irrelevant"),
        *(
            (
                HYPOTHESES[entry["hypothesis"]].replace("\n", " "),
                str(entry["size"]),
                *(_value(entry, name) for name in MEASURES.values()),
                f"{entry['claimed']:.1%}",
                f"{entry['irrelevant']:.1%}",
            )
            for entry in entries
        ),
    )
    return Section("Does the alignment explain the outputs? Causal scrubbing", sentences, figure, table)


MEASURES = {
    "KL": "kl",
    "Jensen-Shannon": "jensen_shannon",
    "squared": "squared",
    "loss gap": "loss_gap",
    "cancellation": "cancellation",
}

HYPOTHESES = {"found": "the rotation\nfound", "swapped": "its variables\nswapped", "random": "random\nrotations"}


def _sites(search: Results) -> list[str]:
    return list(search["neurons"])


def _hidden(search: Results) -> list[str]:
    return [site for site in _sites(search) if site != INPUTS]


def _maps(search: Results) -> list[str]:
    return list(dict.fromkeys(fit["map"] for fit in search["fits"]))


def _linear(search: Results) -> tuple[str, ...]:
    return tuple(name for name in _maps(search) if name != "RevNet")


def _sizes(search: Results) -> list[int]:
    return sorted({fit["size"] for fit in search["fits"]})


def _fit(search: Results, site: str, name: str, size: int, network: str = "trained") -> Results:
    wanted = {"site": site, "map": name, "size": size, "network": network, "model": BOTH}
    return next(fit for fit in search["fits"] if wanted.items() <= fit.items())


def _linear_fits(search: Results, site: str) -> list[Results]:
    return [_fit(search, site, name, size) for name in _linear(search) for size in _sizes(search)]


def _best(search: Results, site: str, maps: tuple[str, ...] | None = None) -> Results:
    fits = [_fit(search, site, name, size) for name in maps or _linear(search) for size in _sizes(search)]
    return max(fits, key=lambda fit: fit["iia"])


def _random(search: Results, site: str, model: str = BOTH) -> Results:
    return next(entry for entry in search["random"] if (entry["model"], entry["site"]) == (model, site))


def _bar(search: Results, site: str, maps: tuple[str, ...]) -> float:
    """Tell what controls of these maps reach."""
    random, size = _random(search, site), _sizes(search)[-1]
    return max([random["iia"] + 4 * random["iia_std"], *(_high(_fit(search, site, name, size, "untrained")) for name in maps)])


def _verdict(search: Results, site: str) -> str:
    """Tell whether linear maps find the variables at a site: "whole", "part" or "none"."""
    low = _low(_best(search, site))
    if low <= _bar(search, site, _linear(search)):
        return "none"
    return "whole" if low >= CARRIED else "part"


def _compared(pairs: list[tuple[Results, Results]]) -> str:
    """Compare fits pairwise, first less second."""
    gaps = [(new["iia"] - old["iia"], np.hypot(new["std_error"], old["std_error"]), new) for new, old in pairs]
    higher, lower = sum(gap > 3 * error for gap, error, _ in gaps), sum(gap < -3 * error for gap, error, _ in gaps)
    gap, error, fit = max(gaps, key=lambda entry: abs(entry[0]))
    return (
        f"is higher in {higher} and lower in {lower} of {len(gaps)} comparisons by more than 3 standard errors (largest difference {gap:+.3f} ± {error:.3f}: {fit['map']}, "
        f"{fit['site']}, {fit['size']} each)"
    )


def _mark(fit: Results, control: Results | None = None) -> Mark:
    return Mark(fit["iia"], fit["std_error"], fit["restart_iia"], None if control is None else control["iia"])


def _low(entry: Results) -> float:
    return entry["iia"] - 2 * entry["std_error"]


def _high(entry: Results) -> float:
    return entry["iia"] + 2 * entry["std_error"]


def _share(entry: Results) -> str:
    return f"{entry['iia']:.3f} ± {entry['std_error']:.1g}"


def _told(fit: Results) -> str:
    return f"IIA {_share(fit)}, {fit['map']}, {fit['size']} each"


def _value(entry: Results, name: str) -> str:
    return f"{show(entry[name], '.4f')} ± {show(entry[f'{name}_std_error'], '.4f')}"

"""Whether the loss holds a circuit: the judgement of a candidate alignment along the tempered posterior.

A candidate is measured on draws of rising excess loss, beside its planted twin (`planted`), which nothing in the loss holds,
and beside random maps. What counts is where the twin has died: there a candidate that lives is held. Where the twin lives, too,
the localization keeps everything near the weights, and there is nothing to be told. Chains are the unit of replication.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from slt_interp.errors import InputError

HELD, NOT_HELD, NO_WINDOW, NOT_EQUILIBRATED = "held", "not held", "no window", "not equilibrated"

_Array = np.ndarray


@dataclass(frozen=True)
class Survival:
    """What probes say of a candidate at levels of rising excess loss, one number for each chain: the mean over its draws.

    Attributes:
        excess_loss: of the levels, rising, nats.
        effect: of the candidate, after a short refit from its frozen alignment (`EffectProbe`), (level, chain).
        twin: the same of its planted twin, on the same chains.
        frozen: of the candidate without a refit.
        random: of random maps, not refitted.
        disturbance: of the candidate, nats.
        swap_disturbance: of the candidate, nats.
        accuracy: of the networks.
        rhat: of the candidate's effect at each level, over chains and draws.
        dormancy: the candidate's dormancy share at the weights themselves.
        ceiling: accuracy at the weights themselves.
        localization: gamma of the posterior.
    """

    excess_loss: Float[_Array, " level"]
    effect: Float[_Array, "level chain"]
    twin: Float[_Array, "level chain"]
    frozen: Float[_Array, "level chain"]
    random: Float[_Array, "level chain"]
    disturbance: Float[_Array, "level chain"]
    swap_disturbance: Float[_Array, "level chain"]
    accuracy: Float[_Array, "level chain"]
    rhat: Float[_Array, " level"]
    dormancy: float
    ceiling: float
    localization: float

    @property
    def scaled(self) -> Float[_Array, " level"]:
        """F~ of the candidate: (F - F_random) / (accuracy - F_random), 1 for a circuit that is all there."""
        return (self.effect - self.random).mean(axis=1) / self.room.mean(axis=1)

    @property
    def scaled_twin(self) -> Float[_Array, " level"]:
        """F~ of the twin."""
        return (self.twin - self.random).mean(axis=1) / self.room.mean(axis=1)

    @property
    def scaled_frozen(self) -> Float[_Array, " level"]:
        """F~ of the candidate without a refit."""
        return (self.frozen - self.random).mean(axis=1) / self.room.mean(axis=1)

    @property
    def room(self) -> Float[_Array, "level chain"]:
        """What an effect can be above that of random maps."""
        return self.accuracy - self.random


@dataclass(frozen=True)
class Verdict:
    """A word for the candidate, and why; `print` it.

    Attributes:
        word: "held", "not held", "no window" or "not equilibrated".
        reasons: in words.
        num_levels: so many levels were good enough to be judged.
        frozen: F~ of the alignment as it was, without a refit, at these levels; never decisive, for real circuits drift.
    """

    word: str
    reasons: tuple[str, ...]
    num_levels: int
    frozen: tuple[float, ...]

    def __str__(self) -> str:
        frozen = f", F~ without a refit {', '.join(f'{value:.2f}' for value in self.frozen)}" if self.frozen else ""
        reasons = "\n- ".join([f"{self.word} ({self.num_levels} levels judged{frozen})", *self.reasons])
        rates = operating_rates()
        known = " and ".join(
            f"{entry['held']:.0%} ({entry['low']:.0%} to {entry['high']:.0%}) of {entry['num_networks']} known {name}"
            for name, entry in ((name, rates[name]) for name in ("circuits", "illusions"))
        )
        return f"{reasons}\n(such verdicts called held {known})"


def naturalness(found: Survival, *, confidence: float = 0.95) -> Verdict:
    """Judge whether the loss holds a candidate.

    "Held" is a claim at the given confidence; "not held" says that it cannot be made, with what was seen instead.

    Levels count where the accuracy is at least 0.9 of the ceiling. There must be some ("no window"), the probe must agree
    between chains, with an R-hat of at most 2 or a deviation between chains of at most .05 ("not equilibrated"), and the
    twin must be dead at the mildest of them, F~ below 0.5 ("no window": the localization holds it). Then the candidate is held
    if at every level, by one-sided t tests over chains at the given confidence, corrected for their number after Holm, (i) its
    F~ is above 0.8; (ii) it is above the twin's by more than 0.1, paired by chain; (iii) its disturbance is below a quarter of
    its swap disturbance; and (iv) its dormancy share is below 0.25.

    The limits of F~, twin, disturbance and dormancy are those of a pilot on 19 networks; those of R-hat and of random maps were
    set on 12 others. `operating_rates` says how often verdicts were right on networks that none were set on. A loss holds what
    it holds: an illusion of which half serves another output may be, too, unless the loss is restricted.

    Raises:
        InputError: if shapes do not fit, or there are fewer than 4 chains.

    References:
        Holm (1979), A simple sequentially rejective multiple test procedure.
    """
    _check(found)
    good = found.accuracy.mean(axis=1) >= _ACCURACY * found.ceiling
    # A network that has failed once is not judged at worse levels, though by chance it may answer better there.
    good &= np.cumprod(good).astype(bool)
    if not good.any():
        return Verdict(
            NO_WINDOW, (f"no level keeps {_ACCURACY:.0%} of the accuracy of the weights: take milder levels",), 0, ()
        )
    count = int(good.sum())
    frozen = tuple(float(value) for value in found.scaled_frozen[:count])
    # Where chains differ by less than the margins, it does not matter that they differ by more than each varies.
    spread = found.effect[:count].std(axis=1, ddof=1)
    apart = np.flatnonzero((spread > _SPREAD) & ~(found.rhat[:count] <= _RHAT))
    if len(apart):
        return Verdict(
            NOT_EQUILIBRATED,
            (
                f"chains disagree in the effect at excess loss {found.excess_loss[apart[0]]:.3g} (R-hat "
                f"{found.rhat[apart[0]]:.2f}): run longer, or raise the localization",
            ),
            count,
            frozen,
        )
    chance = float(found.random[:count].mean() / found.accuracy[:count].mean())
    if not chance < _CHANCE:
        return Verdict(
            NO_WINDOW, (f"random maps have {chance:.0%} of what a circuit could: take fewer directions",), count, frozen
        )
    twin = float(found.scaled_twin[0])
    if not twin < _DEAD:
        reason = f"the planted twin lives at the mildest level (F~ {twin:.2f}): lower the localization, or nbeta"
        return Verdict(NO_WINDOW, (reason,), count, frozen)
    reasons, values = [], []
    for level in range(count):
        where, room = f"at excess loss {found.excess_loss[level]:.3g}", found.room[level]
        ratio = found.disturbance[level].mean() / found.swap_disturbance[level].mean()
        ahead = found.scaled[level] - found.scaled_twin[level]
        # Ratios are tested as differences: those of noisy numbers of single chains have no mean.
        for excess, reason in (
            (
                found.effect[level] - found.random[level] - _ALIVE * room,
                f"its effect F~ is {found.scaled[level]:.2f}, not shown to be above {_ALIVE:g}",
            ),
            (
                found.effect[level] - found.twin[level] - _ABOVE * room,
                f"it is ahead of its twin by {ahead:.2f}, not shown to be above {_ABOVE:g}",
            ),
            (
                _DISTURBED * found.swap_disturbance[level] - found.disturbance[level],
                f"its disturbance is {ratio:.2f} of its swap disturbance, not shown to be below {_DISTURBED:g}",
            ),
        ):
            values.append(_p_value(excess))
            reasons.append(f"{where} {reason}")
    failed = ~_holm(np.array(values), 1 - confidence)
    why = [reason for reason, is_open in zip(reasons, failed, strict=True) if is_open]
    if np.isnan(found.dormancy):
        why.append("its patch changes nothing at the weights themselves, so that it has no dormancy share")
    elif not found.dormancy < _DORMANT:
        why.append(f"{found.dormancy:.0%} of its effect enters through units that do nothing on natural inputs")
    return Verdict(NOT_HELD if why else HELD, tuple(why), count, frozen)


@functools.cache
def operating_rates() -> dict[str, dict[str, Any]]:
    """Read how often known circuits (the sensitivity) and known illusions (1 less the specificity) were called held.

    By kind, and of all "circuits" and all "illusions": "num_networks", "held", its exact 95 % interval from "low" to "high",
    and the count of each word; measured by `benchmarks/operating_table.py`.

    >>> sorted(operating_rates()["circuits"])
    ['held', 'high', 'low', 'num_networks', 'verdicts']
    """
    return json.loads((Path(__file__).parent / "operating_table.json").read_text())


def _p_value(excess: Float[_Array, " chain"]) -> float:
    """One-sided p-value of a mean above 0, by Student's t; 0 or 1 if all chains say the same."""
    from scipy.stats import t

    count, spread = len(excess), excess.std(ddof=1)
    if not spread > 0:
        return float(not excess.mean() > 0)
    return float(t.sf(excess.mean() / (spread / np.sqrt(count)), count - 1))


def _holm(p_values: Float[_Array, " test"], level: float) -> _Array:
    """Tell which hypotheses are rejected, at a family-wise error rate."""
    order, count = np.argsort(p_values), len(p_values)
    passed = p_values[order] <= level / (count - np.arange(count))
    rejected = np.zeros(count, bool)
    rejected[order] = np.cumprod(passed).astype(bool)
    return rejected


def _check(found: Survival) -> None:
    shape = np.shape(found.effect)
    for name in ("effect", "twin", "frozen", "random", "disturbance", "swap_disturbance", "accuracy"):
        given = np.shape(getattr(found, name))
        if len(given) != 2 or given != shape or given[0] != len(found.excess_loss):
            raise InputError(
                f"{name} has shape {given}, but there are {len(found.excess_loss)} levels and effect has {shape}: give one "
                "number for each level and chain"
            )
        if not np.isfinite(getattr(found, name)).all():
            level, chain = np.argwhere(~np.isfinite(getattr(found, name)))[0]
            raise InputError(
                f"{name} is not finite at level {level} of chain {chain}: leave that chain out, or look at the probe"
            )
    if np.shape(found.rhat) != shape[:1] or not np.all(np.diff(found.excess_loss) > 0):
        raise InputError("excess_loss must rise, and rhat must have one number for each level")
    if shape[1] < _MIN_CHAINS:
        raise InputError(f"a verdict needs {_MIN_CHAINS} chains, its unit of replication, but there are {shape[1]}")


_ACCURACY, _DEAD, _ALIVE, _ABOVE, _DISTURBED, _DORMANT, _MIN_CHAINS = 0.9, 0.5, 0.8, 0.1, 0.25, 0.25, 4

_CHANCE = 0.75
"""Random maps of half of a layer have half of what a circuit could; less than a quarter of it is no room for a difference."""

_RHAT, _SPREAD = 2.0, 0.05
"""Chains agree if R-hat is at most that: then they have moved by more than half of how far they are apart, and how far that is
enters the tests. Or if the deviation of their means is at most half of the smallest margin."""

"""`Ladder`: draws at a ladder of temperatures from the base measure to nbeta, and what is read from them.

One set of draws gives the LLC at every scale, partition functions, and the base measure's mass of {L <= threshold}. Two
families of chains that never meet, one started at draws of the base and one at the trained weights, tell whether the ladder has
equilibrated: their difference is part of every error bar, and where it is too large the ladder says so. All readings share the
weights of draws, of either family and of both; hence one class, and its length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from slt_interp.bases import Base
from slt_interp.errors import InputError
from slt_interp.estimators.coefficient import (
    MAX_POLES,
    MIN_RUNGS,
    OF_CONSTANT_LOSS,
    LearningCoefficient,
    fit_coefficient,
)
from slt_interp.estimators.llc import DO_NOT_TRUST, OK, family_limit
from slt_interp.estimators.phases import TwoPhases, find_two_phases
from slt_interp.estimators.readings import LLCCurve, LogPartition, LogVolume, refuse_doubtful
from slt_interp.estimators.reference import NO_DESCENT, Descent
from slt_interp.estimators.reweighting import NUM_BLOCKS, Reweighting, block_rows, controlled, spread
from slt_interp.estimators.rungs import MIN_EXCHANGE
from slt_interp.estimators.volume_estimate import highest_losses
from slt_interp.samplers.diagnostics import std_error
from slt_interp.tree import Params


@dataclass(frozen=True)
class Ladder:
    """Draws of exp(-nbeta L) base(w) at rising nbeta; `print` it for the verdict.

    Attributes:
        nbetas: the rungs, the first 0.
        loss: of the draws, nats per example, (rung, chain, draw).
        mean_loss: averaged over the trajectory of each draw: the same expectation with less noise.
        squared_distance: |w - w*|^2 of the draws.
        virial: (w - w*) . grad U, averaged as `mean_loss` is, U being the potential; its mean is the dimension, whatever the
            loss. None where it is not: under a bounded base, at whose walls U ends, and with a step's discretization.
        is_from_base: for each chain, whether it started at draws of the base rather than at the weights.
        replica: which of a chain's replicas was at the rung; None if rungs do not swap.
        exchange: mean probability with which rungs r and r + 1 swap, or would.
        init_loss: L(w*), nats per example.
        rounding: standard deviation of the loss's rounding at draws of the coldest rung, nats per example.
        base: the base measure.
        dimension: number of weights.
        params: the weights of the draws, (rung, chain, draw, ...), if they were kept.
        num_lost: chains that became non-finite and are left out.
        gradients_per_chain: all gradients that a chain took.
        labels: of the draws, if `temper` was given any.
        step_bias: what discretization is predicted to add to the energy of each rung; None for Metropolis kernels: nothing.
        descent: where a descent from the weights toward the mode of the coldest rung ended.
    """

    nbetas: Float[np.ndarray, " rung"]
    loss: Float[np.ndarray, "rung chain draw"]
    mean_loss: Float[np.ndarray, "rung chain draw"]
    squared_distance: Float[np.ndarray, "rung chain draw"]
    virial: Float[np.ndarray, "rung chain draw"] | None
    is_from_base: Bool[np.ndarray, " chain"]
    replica: Int[np.ndarray, "rung chain draw"] | None
    exchange: Float[np.ndarray, " pair"]
    init_loss: float
    rounding: float
    base: Base
    dimension: int
    params: Params | None
    num_lost: int
    gradients_per_chain: float
    labels: Int[np.ndarray, "rung chain draw"] | None = None
    step_bias: Float[np.ndarray, " rung"] | None = None
    descent: Descent = NO_DESCENT

    def __str__(self) -> str:
        num_rungs, num_chains, num_draws = self.loss.shape
        head = (
            f"Ladder of {num_rungs} rungs up to nbeta {self.nbetas[-1]:.4g} ({num_chains} chains of {num_draws} draws"
            f"{'' if self.round_trips is None else f', {self.round_trips:.1f} round trips per chain'}): {self.status}"
        )
        return "\n- ".join([head, *filter(None, [self.two_phases]), *self.warnings])

    @cached_property
    def lowest_loss(self) -> float:
        """L*, which energies are counted from: `init_loss`, or if clearly lower the lowest of all draws and of a descent."""
        lowest = min(float(self.loss.min()), self.descent.loss)
        return lowest if lowest < self.init_loss - _CLEARLY * self.rounding else self.init_loss

    @property
    def status(self) -> str:
        """Say "ok", or "do not trust" if there are warnings."""
        return DO_NOT_TRUST if self.warnings else OK

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """Every reason for doubt, with the knob to turn."""
        found, drop = list(self.sampling_warnings), self.init_loss - self.lowest_loss
        if self.nbetas[-1] * drop > _MAX_DROP:
            found.append(
                f"a loss {drop:.2g} nats below that at the weights was found, {self.nbetas[-1] * drop:.2g} times 1 / nbeta at "
                "the top: the weights are no minimum; polish them (energies are counted from the lowest loss seen)"
            )
        if self.descent.unfinished > _MAX_DROP:
            found.append(
                "a descent from the weights was still going down when its steps were used up, by "
                f"{self.descent.unfinished:.2g} times 1 / nbeta at the top in the last quarter of them: energies are counted "
                "from too high a loss; polish the weights, or lower max_nbeta"
            )
        return tuple(found)

    @cached_property
    def sampling_warnings(self) -> tuple[str, ...]:
        """Every reason to doubt the draws themselves."""
        found = []
        if self.num_lost:
            found.append(f"{self.num_lost} chains became non-finite and are left out: narrow the base measure")
        worst = int(self.exchange.argmin())
        # Not a number where losses of both rungs are infinite.
        if not self.exchange[worst] >= MIN_EXCHANGE:
            found.append(
                f"rungs at nbeta {self.nbetas[worst]:.3g} and {self.nbetas[worst + 1]:.3g} swap with probability "
                f"{self.exchange[worst]:.2g} only, as at a first-order transition: narrow the base measure, or end below it"
            )
        if self._phases is not None and self._phases.changes < 1:
            found.append(
                f"there are two phases, between which chains hardly change near nbeta {self.nbetas[self._phases.rung]:.3g}: "
                "take more draws, or narrow the base measure"
            )
        gaps = self._family_gaps
        limits = np.clip(family_limit(len(self.is_from_base)) * gaps[1], *_GAPS)
        far = np.flatnonzero(~(np.abs(gaps[0]) <= limits))
        if len(far):
            found.append(
                f"chains from the base and from the weights disagree in log Z from nbeta {self.nbetas[far[0]]:.3g} on, by "
                f"up to {np.abs(gaps[0]).max():.2g} nats: take more draws, or a narrower base measure"
            )
        return tuple(found)

    @property
    def two_phases(self) -> str | None:
        """Where draws are of two phases, as at a first-order transition, in words; None if they are nowhere."""
        if self._phases is None:
            return None
        return (
            f"two phases, as at a first-order transition, near nbeta {self.nbetas[self._phases.rung]:.3g}: there nbeta L has a "
            f"variance of {self._phases.variance:.3g}, the LLC is {self._phases.llc:.3g}, and chains change phase "
            f"{self._phases.changes:.2g} times each"
        )

    @cached_property
    def round_trips(self) -> float | None:
        """Mean number of a chain's replicas' trips from the base to the top and back, per chain; None if rungs do not swap."""
        if self.replica is None:
            return None
        num_rungs, num_chains, _ = self.replica.shape
        trips = 0
        for c in range(num_chains):
            has_been_up = np.zeros(num_rungs, bool)
            for bottom, top in zip(self.replica[0, c], self.replica[-1, c], strict=True):
                trips += has_been_up[bottom]
                has_been_up[bottom] = False
                has_been_up[top] = True
        return float(trips / num_chains)

    def llc_curve(self) -> LLCCurve:
        """Read the LLC at every rung; standard errors include the difference between the families, and the loss's rounding."""
        nbetas = self.nbetas[1:, None, None]
        energy = nbetas * (self.mean_loss[1:] - self.lowest_loss)
        deviation = nbetas * (self.loss[1:] - self.loss[1:].mean(axis=(1, 2), keepdims=True))
        values = [(x.mean(axis=(1, 2)), np.array([self._error(rung) for rung in x])) for x in (energy, deviation**2)]
        (llc, std_error), (heat, heat_error) = values
        bias = self._biases[0][1:]
        # Where a step adds to an energy that is gamma distributed, it adds twice that to its variance.
        return LLCCurve(
            self.nbetas[1:],
            llc,
            np.hypot(std_error, np.maximum(self.nbetas[1:] * self.rounding, bias)),
            heat,
            np.hypot(heat_error, 2 * bias),
        )

    def log_partition(self) -> LogPartition:
        """Estimate log Z of every rung by MBAR; standard errors include the difference between the families."""
        log_z, error = self._pooled.log_partition()
        known = np.hypot(self._biases[1], self.nbetas * self.rounding)
        return LogPartition(self.nbetas, log_z, np.hypot(np.maximum(error, np.abs(self._family_gaps[0]) / 2), known))

    def learning_coefficient(self) -> LearningCoefficient:
        """Estimate the learning coefficient for each multiplicity from energies and log Z; see `fit_coefficient`.

        It is that of the base measure's whole support: the smallest of all minima there, at most the local one at the weights.
        Rungs so cold that the loss's rounding moves their energy by .01 nats, or that all their draws have one loss, are left
        out, and those at the cold end where the families' energies differ by more than chance. Errors are those of blocks of
        each chain's draws, ten or fewer where 160 of all chains suffice, and too small where chains remember longer. Under an
        unbounded base the virial, whose mean is known unless the loss jumps, is a control variate of every reading.

        Raises:
            InputError: for ladders of too few rungs, chains or draws.

        References:
            Mira, Solgi and Imparato (2013), Zero variance Markov chain Monte Carlo for Bayesian estimators, arXiv:1012.2983.
        """
        num_chains, num_draws = self.loss.shape[1:]
        if not np.any(self.mean_loss[1:] - self.lowest_loss):
            return replace(OF_CONSTANT_LOSS, warnings=self.warnings)
        last, notes = int(np.sum(self.nbetas[1:] * self.rounding <= _MAX_ROUNDING)), list(self.warnings)
        agrees = np.flatnonzero(self._energies_agree[: last + 1])
        if len(agrees) > MIN_RUNGS and agrees[-1] < last:
            last = int(agrees[-1])
            notes.append(
                f"energies of chains from the base and from the weights differ above nbeta {self.nbetas[last]:.3g}, "
                "which is left out: take more draws"
            )
        picked = np.unique(np.linspace(min(1, last), last, _NUM_READ).round().astype(int))
        # Where all draws have one loss there is nothing to weigh by.
        picked = picked[(picked > 0) & (np.ptp(self.mean_loss[picked], axis=(1, 2)) > 0)]
        num_blocks = min(NUM_BLOCKS, -(-_NUM_SAMPLES // num_chains))
        num_samples, num_readings = num_chains * num_blocks, 2 * len(picked) - 1
        if len(picked) < MIN_RUNGS or num_draws < NUM_BLOCKS or num_samples < num_readings + 4:
            raise InputError(
                f"a learning coefficient needs {MIN_RUNGS} rungs above the base, 4 chains and {NUM_BLOCKS} draws, but this "
                f"ladder has {len(picked)} that can be read, {num_chains} and {num_draws}: "
                "raise max_nbeta, num_chains or num_draws"
            )
        rows_of = partial(block_rows, num_blocks=num_blocks, families=[chains for _, chains in self._families])
        energies = rows_of(self.nbetas[picked, None, None] * (self.mean_loss[picked] - self.lowest_loss))
        of_chains, of_families = self._pooled.influences(num_blocks)[:, picked], -self._family_gaps[0][picked]
        log_z = np.concatenate([of_chains, self._pooled.free_energies[None, picked], of_families[None]])
        rows = np.concatenate([energies, np.diff(log_z, axis=1)], axis=1)
        if self.virial is not None:
            controls = rows_of(self.virial[picked] - self.dimension)
            known = np.maximum(spread(controls[:num_samples], num_chains), _TINY)
            scores = np.abs(controls[num_samples]) / known
            if scores.max() < family_limit(num_chains, deviations=4.0):
                rows = controlled(rows, controls)
            else:
                notes.append(
                    f"the virial is {scores.max():.2g} standard errors off its mean, the dimension, at nbeta "
                    f"{self.nbetas[picked[scores.argmax()]]:.3g}: the loss jumps somewhere, or chains are still on their way"
                )
        samples, readings, gap = rows[:num_samples], rows[-2], rows[-1]
        # The inverse of a covariance from few samples is too large, by a known factor (Hartlap et al. 2007).
        covariance = samples.T @ samples * num_samples / (num_samples - num_readings - 2)
        bias = np.concatenate([self._biases[0][picked], np.diff(self._biases[1][picked])])
        # The lowest loss is rounded, too; and laws are good to about a thousandth, of small readings to 1e-4 nats.
        rounding = self.rounding * np.concatenate([self.nbetas[picked], np.diff(self.nbetas[picked])])
        covariance += np.outer(gap, gap) / 4 + np.outer(bias, bias) + np.outer(rounding, rounding)
        # Where rungs do not overlap increments are known between bounds.
        covariance[len(picked) :, len(picked) :] += np.diag(np.diff(self._pooled.unknown[picked]) ** 2)
        found = fit_coefficient(
            np.log(self.nbetas[picked]),
            readings[: len(picked)],
            readings[len(picked) :],
            covariance + np.diag((_LAW_ERROR * np.maximum(np.abs(readings), 0.1)) ** 2),
            min(MAX_POLES, self.dimension),
        )
        return replace(found, warnings=(*found.warnings, *notes))

    def log_volume(self, thresholds: Sequence[float] | Float[np.ndarray, " threshold"]) -> LogVolume:
        """Estimate the log of the base's mass of {L <= L(w*) + threshold}; see `readings.refuse_doubtful` for what is refused.

        Args:
            thresholds: nats per example above the loss at the weights, positive and increasing.

        Raises:
            InputError: if thresholds are not positive and increasing, or hardly a draw lies below the smallest.
        """
        thresholds = self._checked(thresholds)
        masses, halves, saddle_points = [], [], []
        for level in highest_losses(thresholds, self.init_loss, self.loss):
            below = self.loss <= level
            masses.append(self._log_mass(below))
            halves.append(self._half_gap(below))
            saddle_points.append(self._pooled.saddle_point(level - self.lowest_loss))
        values, std_error, family_gap = np.array(masses).T
        return refuse_doubtful(
            thresholds,
            values,
            std_error,
            family_gap=family_gap,
            half_gap=np.array(halves),
            saddle_point=np.array(saddle_points),
            smallest_exchange=float(self.exchange.min()),
        )

    def log_volume_by_label(
        self, thresholds: Sequence[float] | Float[np.ndarray, " threshold"]
    ) -> dict[int, tuple[Float[np.ndarray, " threshold"], Float[np.ndarray, " threshold"]]]:
        """Split the mass of {L <= L(w*) + threshold} among the labels of the draws (volume per hypothesis).

        Args:
            thresholds: as for `log_volume`.

        Returns:
            For every label seen, log volumes and standard errors, nats; -inf and NaN where no draw with the label lies below
            the threshold, an infinite error where only one of the families has such draws, and NaN where `log_volume` refuses.

        Raises:
            InputError: if `temper` was given no labels, and as `log_volume`.
        """
        if self.labels is None:
            raise InputError("the draws have no labels: call temper(labels=...)")
        levels = highest_losses(self._checked(thresholds), self.init_loss, self.loss)
        is_refused, found = np.isnan(self.log_volume(thresholds).log_volume), {}
        for name in np.unique(self.labels):
            masses = np.array([self._log_mass((self.loss <= level) & (self.labels == name))[:2] for level in levels]).T
            masses[:, is_refused] = np.nan
            found[int(name)] = tuple(masses)
        return found

    def reaches(self, threshold: float) -> bool:
        """Whether enough of the coldest rung's draws lie below a threshold, nats above the loss at the weights."""
        coldest = self.loss[-1]
        return float(np.mean(coldest <= highest_losses(np.array([threshold]), self.init_loss, coldest))) >= _MIN_SHARE

    def draws(self, rung: int) -> Params:
        """Take the weights at one rung, (chain, draw, ...), as probes want them.

        Raises:
            InputError: if `temper` was not told to keep them.
        """
        if self.params is None:
            raise InputError("the weights of the draws were not kept: call temper with keep_params=True")
        return jax.tree.map(lambda x: x[rung], self.params)

    def _checked(self, thresholds: Sequence[float] | Float[np.ndarray, " threshold"]) -> Float[np.ndarray, " threshold"]:
        thresholds = np.atleast_1d(np.asarray(thresholds, np.float64))
        if not (np.all(thresholds > 0) and np.all(np.diff(thresholds) > 0)):
            raise InputError(f"thresholds must be positive and increasing, nats above the loss at params, but are {thresholds}")
        if not self.reaches(thresholds[0]):
            raise InputError(
                f"hardly a draw at nbeta {self.nbetas[-1]:.4g} lies below the threshold {thresholds[0]:.3g}: raise max_nbeta"
            )
        return thresholds

    @cached_property
    def _phases(self) -> TwoPhases | None:
        return find_two_phases(self.nbetas, self._losses, self.replica)

    @property
    def _losses(self) -> Float[np.ndarray, "rung chain draw"]:
        return self.loss - self.lowest_loss

    @cached_property
    def _biases(self) -> tuple[Float[np.ndarray, " rung"], Float[np.ndarray, " rung"]]:
        """Tell what discretization adds to energies, and to -log Z: its integral over log nbeta, by trapezoids."""
        if self.step_bias is None:
            return np.zeros(len(self.nbetas)), np.zeros(len(self.nbetas))
        steps = np.diff(np.log(self.nbetas[1:])) * (self.step_bias[1:-1] + self.step_bias[2:]) / 2
        # Up to the first rung the energy is in proportion to nbeta at most.
        return self.step_bias, np.concatenate([[0.0], np.cumsum([self.step_bias[1], *steps])])

    @cached_property
    def _pooled(self) -> Reweighting:
        return Reweighting(self.nbetas, self._losses)

    @cached_property
    def _families(self) -> list[tuple[Reweighting, np.ndarray]]:
        members = np.flatnonzero(self.is_from_base), np.flatnonzero(~self.is_from_base)
        return [(Reweighting(self.nbetas, self._losses[:, chains]), chains) for chains in members]

    @cached_property
    def _family_gaps(self) -> tuple[Float[np.ndarray, " rung"], Float[np.ndarray, " rung"]]:
        """Difference of log Z between the families at every rung, and its standard error."""
        (first, first_error), (second, second_error) = (family.log_partition() for family, _ in self._families)
        return first - second, np.hypot(first_error, second_error)

    @cached_property
    def _energies_agree(self) -> Bool[np.ndarray, " rung"]:
        """Tell where the families' energies differ by no more than chance, as at the base, where losses may be infinite."""
        agree = np.ones(len(self.nbetas), bool)
        first, second = (self.mean_loss[1:, chains].mean(axis=2) for _, chains in self._families)
        if min(first.shape[1], second.shape[1]) > 1:
            error = np.sqrt(sum(x.var(axis=1, ddof=1) / x.shape[1] for x in (first, second)))
            limit = family_limit(len(self.is_from_base))
            agree[1:] = np.abs(first.mean(axis=1) - second.mean(axis=1)) <= limit * error
        return agree

    def _error(self, series: Float[np.ndarray, "chain draw"]) -> float:
        first, second = (series[chains].mean() for _, chains in self._families)
        return max(std_error(series), abs(first - second) / 2)

    @cached_property
    def _halves(self) -> list[tuple[Reweighting, slice]]:
        middle = self.loss.shape[2] // 2
        parts = slice(0, middle), slice(middle, None)
        return [(Reweighting(self.nbetas, self._losses[:, :, part]), part) for part in parts]

    def _log_mass(self, inside: Bool[np.ndarray, "rung chain draw"]) -> tuple[float, float, float]:
        """Estimate the log mass of a set of draws, its standard error, and the difference between the families."""
        gap = _gap(*(family.log_mass(inside[:, members]) for family, members in self._families))
        error = max(self._pooled.log_mass_error(inside), gap / 2)
        # What energies are too large by, log Z at the coldest rung is too small by; a mass is between all of it and none.
        return self._pooled.log_mass(inside), float(np.hypot(error, self._biases[1][-1])), gap

    def _half_gap(self, inside: Bool[np.ndarray, "rung chain draw"]) -> float:
        return _gap(*(half.log_mass(inside[:, :, part]) for half, part in self._halves))


def _gap(first: float, second: float) -> float:
    """Subtract log masses; NaN where both are of nothing."""
    return abs(first - second) if first > -np.inf or second > -np.inf else np.nan


_MIN_SHARE = 0.05
"""Of the coldest rung's draws so many must lie below a threshold."""

_NUM_READ, _NUM_SAMPLES = 12, 160
"""A learning coefficient is read from at most so many rungs; the covariance of readings needs a few times as many samples."""

_LAW_ERROR = 1e-3
"""What laws for Z neglect, as a share of a reading."""

_TINY = 1e-12

_CLEARLY = 6.0
"""Standard deviations of rounding: of as many draws as a ladder has, none comes so far by chance."""

_MAX_ROUNDING = 0.01
_GAPS = 0.1, 2.0
"""Nats of log Z by which the families may always differ, and by which they never may, however uncertain each is."""

_MAX_DROP = 0.1

"""From losses at a ladder of temperatures to the base measure: weights that make draws of all rungs one sample.

Rung r has draws L_n of exp(-nbeta_r L) base(w) and a partition function Z_r = E_base exp(-nbeta_r L). The multistate Bennett
acceptance ratio (MBAR) finds the Z_r under which each rung's total weight, seen from the pooled draws, is the number of its
draws; for a single energy this is the weighted histogram method without bins. Errors come from influences (the effect of some
draws on the answer), summed for each chain, which is a ladder of its own, and for blocks of each chain's draws. Blocks are more
alike than they should be where chains remember long; chains are few, so that now and then they are alike by chance, and a run
that goes on until its error is small would end just then: the larger of the two errors counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from jaxtyping import Bool, Float, Int

_Array = np.ndarray


@dataclass(frozen=True)
class Reweighting:
    """Pooled draws of a ladder with their weights under the base measure.

    Attributes:
        nbetas: increasing, the first 0.
        losses: above any reference, (rung, chain, draw); +inf is allowed at nbeta 0.

    References:
        Shirts and Chodera (2008), Statistically optimal analysis of samples from multiple equilibrium states, arXiv:0801.1426.

    >>> losses = np.random.default_rng(0).chisquare(2, (3, 4, 500)) / 2 / np.array([1.0, 2.0, 4.0])[:, None, None]
    >>> log_z, error = Reweighting(np.array([0.0, 1.0, 3.0]), losses).log_partition()
    >>> bool(abs(log_z[2] + np.log(4.0)) < 4 * error[2])
    True
    """

    nbetas: Float[_Array, " rung"]
    losses: Float[_Array, "rung chain draw"]

    def log_partition(self) -> tuple[Float[_Array, " rung"], Float[_Array, " rung"]]:
        """Estimate log Z of every rung, 0 at nbeta 0, and its standard error."""
        return -self.free_energies, np.hypot(self._spread(self._influences), self.unknown)

    def log_mass(self, inside: Bool[_Array, "rung chain draw"]) -> float:
        """Estimate the log of the base measure's mass of a set of draws: -inf for a set without any."""
        log_weights = self._log_weights[inside]
        peak = log_weights.max(initial=-np.inf)
        return float(np.log(np.exp(log_weights - peak).sum()) + peak) if peak > -np.inf else -np.inf

    def log_mass_error(self, inside: Bool[_Array, "rung chain draw"]) -> float:
        """Estimate the standard error of `log_mass`: NaN for a set without draws."""
        log_total = self.log_mass(inside)
        if log_total == -np.inf:
            return np.nan
        selected = np.exp(np.where(inside, self._log_weights - log_total, -np.inf))
        # Weights fall with the partition functions: d log w_n / d f_r = -(share of rung r in draw n).
        share = selected.ravel() @ self._shares.T
        moved = selected.sum(axis=0, keepdims=True) - 1 / selected[0].size
        known = float(self._spread(block_sums(moved, self._num_blocks)[0] - self._influences @ share))
        return float(np.hypot(known, share @ self.unknown))

    def moments(self, nbeta: float) -> tuple[float, float, float]:
        """Estimate log Z, mean and variance of the loss at any nbeta within the ladder."""
        log_weights = (self._log_weights - _energy(nbeta, self.losses)).ravel()
        peak = log_weights.max()
        weights = np.exp(log_weights - peak)
        log_z = np.log(weights.sum()) + peak
        weights, losses = weights / weights.sum(), self.losses.ravel()
        present = weights > 0
        mean = float(weights[present] @ losses[present])
        return float(log_z), mean, float(weights[present] @ (losses[present] - mean) ** 2)

    def saddle_point(self, threshold: float) -> float:
        """Estimate the log mass of {L <= threshold} from energies alone, by inverting Z(s) / s at its saddle point.

        log V = log Z + N eps - log N - log(2 pi (Var + 1 / N^2)) / 2 at the N where E[L] + 1 / N = eps. Far above all losses
        that are finite it is their mass; it is NaN where the N is beyond the ladder.
        """
        from scipy.optimize import brentq

        def slope(log_nbeta: float) -> float:
            nbeta = np.exp(log_nbeta)
            return self.moments(nbeta)[1] + 1 / nbeta - threshold

        low, high = np.log(self.nbetas[1] / 1e3), np.log(self.nbetas[-1])
        if slope(low) < 0:
            return self.moments(float(np.exp(low)))[0]
        if slope(high) > 0:
            return np.nan
        nbeta = float(np.exp(np.asarray(brentq(slope, low, high, xtol=1e-3))))
        log_z, _, variance = self.moments(nbeta)
        return log_z + nbeta * threshold - np.log(nbeta) - 0.5 * np.log(2 * np.pi * (variance + nbeta**-2))

    @cached_property
    def free_energies(self) -> Float[_Array, " rung"]:
        """-log Z of every rung."""
        from scipy.optimize import minimize

        mean = np.where(np.isfinite(self.losses), self.losses, np.nan)
        low, high = np.nanmean(mean[1:-1], axis=(1, 2)), np.nanmean(mean[2:], axis=(1, 2))
        # The integral of the mean loss over nbeta, by trapezoids in log nbeta from the second rung on.
        ratio = np.diff(np.log(self.nbetas[1:]))
        steps = ratio * (self.nbetas[1:-1] * low + self.nbetas[2:] * high) / 2
        first = -_log_mean_exp(-_energy(self.nbetas[1], self.losses[0]))
        start = first + np.concatenate([[0.0], np.cumsum(steps)])
        count, total = self.losses[0].size, self.losses.size

        @lru_cache(maxsize=1)
        def seen_from(free: bytes) -> tuple[float, _Array, _Array]:
            """Sum log denominators, shares and their products over all draws, for the objective and its Hessian."""
            log_sums, sums, products = 0.0, np.zeros(len(start)), np.zeros((len(start), len(start)))
            # By pieces that fit into a processor's cache.
            for piece in np.array_split(self.losses.ravel(), -(-total // _PIECE)):
                log_terms = self._log_terms(np.frombuffer(free), piece)
                log_sum = _log_sum_exp(log_terms)
                shares = np.exp(log_terms[1:] - log_sum)
                log_sums, sums, products = log_sums + log_sum.sum(), sums + shares.sum(axis=1), products + shares @ shares.T
            return log_sums, sums, products

        def objective(free: _Array) -> tuple[float, _Array]:
            log_sums, sums, _ = seen_from(free.tobytes())
            return float(log_sums / total - free.sum() / len(self.nbetas)), sums / total - 1 / len(self.nbetas)

        def hessian(free: _Array) -> _Array:
            _, sums, products = seen_from(free.tobytes())
            # Where no draws of two rungs overlap it is 0: what is left there is the integral of the start.
            return (np.diag(sums) - products) / total + _RIDGE * np.eye(len(free))

        tolerance = 1e-3 / np.sqrt(count) / len(self.nbetas)
        found = minimize(objective, start, jac=True, hess=hessian, method="trust-exact", options={"gtol": tolerance})
        return np.concatenate([[0.0], found.x])

    def _log_terms(self, free: Float[_Array, " rung-1"], losses: Float[_Array, " n"]) -> Float[_Array, "rung n"]:
        """f_r - nbeta_r L_n for every rung and every loss."""
        full = np.concatenate([[0.0], free])
        return full[:, None] - np.stack([_energy(nbeta, losses) for nbeta in self.nbetas])

    @cached_property
    def _log_denominator(self) -> Float[_Array, " n"]:
        return _log_sum_exp(self._log_terms(self.free_energies[1:], self.losses.ravel()))

    @cached_property
    def _log_weights(self) -> Float[_Array, "rung chain draw"]:
        """Log weights under the base; all together they sum to 1."""
        return (-self._log_denominator - np.log(self.losses[0].size)).reshape(self.losses.shape)

    @cached_property
    def _shares(self) -> Float[_Array, "rung n"]:
        """Probability that a pooled draw with this loss comes from rung r."""
        return np.exp(self._log_terms(self.free_energies[1:], self.losses.ravel()) - self._log_denominator)

    @cached_property
    def unknown(self) -> Float[_Array, " rung"]:
        """Bound what is not known of -log Z where neighbors do not overlap, and it is the integral of the mean loss.

        The mean falls with nbeta: an integral between two rungs lies between rectangles. From a base with infinite losses it is
        no integral, and the first rung is placed where it overlaps.
        """
        common = np.sum(self._shares[:-1] * self._shares[1:], axis=1)
        rectangles = np.diff(self.nbetas) * np.stack([x.mean(axis=(1, 2)) for x in (self.losses[:-1], self.losses[1:])])
        farthest = np.abs(rectangles - np.diff(self.free_energies)).max(axis=0)
        is_unknown = (common < _FEWEST_COMMON) & np.isfinite(farthest)
        return np.concatenate([[0.0], np.cumsum(np.where(is_unknown, farthest, 0.0))])

    def influences(self, num_blocks: int) -> Float[_Array, "chain*block rung"]:
        """By how much the draws of each of `num_blocks` blocks of each chain move the free energies."""
        shares, num_rungs = self._shares, len(self.nbetas)
        excess = block_sums(shares.reshape(num_rungs, *self.losses.shape).sum(axis=1) - 1, num_blocks).T
        curvature = np.diag(shares.sum(axis=1)) - shares @ shares.T
        moved = np.linalg.lstsq(curvature[1:, 1:], -excess[:, 1:].T, rcond=None)[0].T
        return np.concatenate([np.zeros((len(moved), 1)), moved], axis=1)

    @cached_property
    def _influences(self) -> Float[_Array, "chain*block rung"]:
        return self.influences(self._num_blocks)

    @property
    def _num_blocks(self) -> int:
        return min(NUM_BLOCKS, self.losses.shape[2])

    def _spread(self, influences: Float[_Array, "chain*block *event"]) -> Float[_Array, "*event"]:
        return spread(influences, self.losses.shape[1])


def spread(influences: Float[_Array, "chain*block *event"], num_chains: int) -> Float[_Array, "*event"]:
    """Compute the standard error of a sum over blocks: the larger of what chains and blocks tell; NaN for one chain."""
    of_chains = influences.reshape(num_chains, -1, *influences.shape[1:]).sum(axis=1)
    if num_chains == 1:
        return np.full(influences.shape[1:], np.nan)
    return np.sqrt(np.maximum(*(len(x) / (len(x) - 1) * np.sum(x**2, axis=0) for x in (of_chains, influences))))


NUM_BLOCKS = 10
"""Blocks of a chain's draws, longer than chains remember, count as independent."""

_FEWEST_COMMON = 3.0
"""Sum over draws of the product of two neighbors' shares: about one over the variance of the difference of their log Z, but no
formula holds where it is smaller than this, and where it is 0 MBAR leaves the integral as it was.
"""

_PIECE = 4096
_RIDGE = 1e-9
"""Far below the curvature of rungs that swap, which is of order 1 / (number of rungs)."""


def block_sums(values: Float[_Array, "event chain draw"], num_blocks: int) -> Float[_Array, "event chain*block"]:
    """Sum over `num_blocks` successive parts of each chain, of as equal a length as can be."""
    edges = np.arange(num_blocks) * values.shape[2] // num_blocks
    return np.add.reduceat(values, edges, axis=2).reshape(len(values), -1)


def block_rows(
    values: Float[_Array, "event chain draw"], num_blocks: int, families: Sequence[Int[_Array, " member"]]
) -> Float[_Array, "chain*block+2 event"]:
    """Tell by how much each block of each chain moves the mean; then the mean; then by how much two families differ."""
    mean = values.mean(axis=(1, 2))
    moved = block_sums(values - mean[:, None, None], num_blocks).T / values[0].size
    first, second = (values[:, chains].mean(axis=(1, 2)) for chains in families)
    return np.concatenate([moved, mean[None], (first - second)[None]])


def controlled(rows: Float[_Array, "row reading"], controls: Float[_Array, "row rung"]) -> Float[_Array, "row reading"]:
    """Take out what controls, whose expectation is 0, explain of the scatter of readings (control variates).

    Args:
        rows: of `block_rows`, of a reading at each rung, and then of one between each and the next.
        controls: of `block_rows`, one at each rung: a reading is compared with its own.
    """
    rows, rungs = rows.copy(), np.arange(controls.shape[1])
    for j, own in enumerate([*rungs[:, None], *np.stack([rungs[:-1], rungs[1:]], axis=1)]):
        rows[:, j] -= controls[:, own] @ np.linalg.lstsq(controls[:-2, own], rows[:-2, j], rcond=None)[0]
    return rows


def _energy(nbeta: float, losses: _Array) -> _Array:
    return nbeta * losses if nbeta else np.zeros_like(losses)


def _log_sum_exp(terms: Float[_Array, "rung n"]) -> Float[_Array, " n"]:
    peak = terms.max(axis=0)
    return peak + np.log(np.exp(terms - peak).sum(axis=0))


def _log_mean_exp(values: _Array) -> float:
    peak = values.max()
    return float(peak + np.log(np.mean(np.exp(values - peak))))

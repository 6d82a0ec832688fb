"""Convergence diagnostics of scalar series with axes (chain, draw).

ESS and split R-hat are numpyro's; this file adds rank normalization, and guards the two cases they do not: series that never
vary, and ones too short to tell.
"""

import numpy as np
from jaxtyping import Float

Series = Float[np.ndarray, "chain draw"]

MIN_DRAWS = 4
"""Fewer draws per chain than this cannot be halved and compared."""


def effective_sample_size(series: Series) -> float:
    """Effective sample size over all chains (Vehtari et al. 2021, arXiv:1903.08008, before rank normalization).

    NaN if the series does not vary or is shorter than `MIN_DRAWS`.
    """
    series = np.asarray(series, dtype=np.float64)
    if series.shape[1] < MIN_DRAWS or np.ptp(series) == 0:
        return float("nan")
    from numpyro.diagnostics import effective_sample_size as ess

    return float(ess(series))


def bulk_ess(series: Series) -> float:
    """Effective sample size of the rank-normalized series over half chains: for the center (Vehtari et al. 2021, section 4).

    NaN if the series does not vary or its halves are shorter than `MIN_DRAWS`.
    """
    from scipy.special import ndtri
    from scipy.stats import rankdata

    halves = _halves(series)
    ranks = rankdata(halves).reshape(halves.shape)
    return effective_sample_size(ndtri((ranks - 3 / 8) / (halves.size + 1 / 4)))


def tail_ess(series: Series) -> float:
    """Effective sample size for the 5 % and 95 % quantiles, the smaller of the two (Vehtari et al. 2021, section 4).

    NaN if the series does not vary or its halves are shorter than `MIN_DRAWS`.
    """
    halves = _halves(series)
    if halves.size == 0:
        return float("nan")
    return min(effective_sample_size(halves <= np.quantile(halves, q)) for q in (0.05, 0.95))


def split_rhat(series: Series) -> float:
    """Potential scale reduction over half chains (Gelman et al., Bayesian Data Analysis, section 11.4).

    1 when nothing tells the chains apart; NaN if the series does not vary or is shorter than `MIN_DRAWS`.
    """
    series = np.asarray(series, dtype=np.float64)
    if series.shape[1] < MIN_DRAWS or np.ptp(series) == 0:
        return float("nan")
    from numpyro.diagnostics import split_gelman_rubin

    with np.errstate(divide="ignore"):
        return float(split_gelman_rubin(series))


def std_error(series: Series) -> float:
    """Monte Carlo standard error of the mean: the larger of its two estimates.

    One is the spread between chain means over sqrt(chains), the other sqrt(variance / ESS). Zero for a series that
    does not vary; NaN when one chain is too short to tell.
    """
    series = np.asarray(series, dtype=np.float64)
    if np.ptp(series) == 0:
        return 0.0
    candidates = [np.sqrt(series.var() / effective_sample_size(series))]
    if series.shape[0] > 1:
        candidates.append(series.mean(axis=1).std(ddof=1) / np.sqrt(series.shape[0]))
    return float(np.nanmax(candidates)) if not np.all(np.isnan(candidates)) else float("nan")


def drift(series: Series) -> tuple[float, float]:
    """Mean of the second half minus mean of the first, and its standard error.

    The chains are the replicates; with one chain the two halves' own errors are combined.
    """
    series = np.asarray(series, dtype=np.float64)
    half = series.shape[1] // 2
    if half == 0:
        return 0.0, float("nan")
    first, second = series[:, :half], series[:, -half:]
    change = second.mean(axis=1) - first.mean(axis=1)
    if series.shape[0] > 1:
        return float(change.mean()), float(change.std(ddof=1) / np.sqrt(len(change)))
    return float(change[0]), float(np.hypot(std_error(first), std_error(second)))


def _halves(series: Series) -> Series:
    """Cut every chain in two of equal length, leaving out a middle draw."""
    series = np.asarray(series, dtype=np.float64)
    half = series.shape[1] // 2
    return np.concatenate([series[:, :half], series[:, series.shape[1] - half :]])

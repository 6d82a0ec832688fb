"""Convergence diagnostics of scalar series with axes (chain, draw).

ESS and split R-hat are numpyro's; this file guards the two cases they do not: series that never vary, and ones too
short to tell.
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

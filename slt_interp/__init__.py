"""Singular learning theory and interpretability on real networks, in JAX.

One target, the tempered local posterior; one `sample`; many readings.
"""

from slt_interp.curvature.spectrum import Spectrum, estimate_spectrum
from slt_interp.data import FullBatch, Minibatches
from slt_interp.estimators.llc import LLCEstimate, estimate_llc, llc, mean_loss
from slt_interp.posterior import Gaussian, LocalPosterior
from slt_interp.probes.draws import over_draws
from slt_interp.samplers.chains import Draws, keep_params, sample
from slt_interp.samplers.sgld import SGLD

__all__ = [
    "SGLD",
    "Draws",
    "FullBatch",
    "Gaussian",
    "LLCEstimate",
    "LocalPosterior",
    "Minibatches",
    "Spectrum",
    "estimate_llc",
    "estimate_spectrum",
    "keep_params",
    "llc",
    "mean_loss",
    "over_draws",
    "sample",
]

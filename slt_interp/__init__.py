"""Singular learning theory and interpretability on real networks, in JAX.

One target, the tempered local posterior; one `sample`; many readings.
"""

from slt_interp import analytic
from slt_interp.bases import Ball, Box, FloatGrid, Gaussian
from slt_interp.curvature.operators import gauss_newton_product, hvp
from slt_interp.curvature.spectrum import Spectrum, estimate_spectrum, top_eigenpairs
from slt_interp.data import FullBatch, Minibatches
from slt_interp.estimators.estimate import estimate_llc
from slt_interp.estimators.information import Information, information, keep_example_losses, wbic
from slt_interp.estimators.ladder import Ladder
from slt_interp.estimators.llc import LLCEstimate, keep_energy, llc, mean_loss
from slt_interp.estimators.sweep import Sweep, calibration_sweep
from slt_interp.estimators.tempering import temper
from slt_interp.estimators.volume import behavioral_kl, estimate_volume
from slt_interp.estimators.volume_estimate import VolumeEstimate
from slt_interp.posterior import LocalPosterior
from slt_interp.probes.draws import over_draws
from slt_interp.samplers.chains import chain_mesh, sample
from slt_interp.samplers.draws import Draws, keep_params, read_draws
from slt_interp.samplers.hmc import HMC
from slt_interp.samplers.mala import MALA
from slt_interp.samplers.nuts import NUTS
from slt_interp.samplers.rmsprop_sgld import RMSPropSGLD
from slt_interp.samplers.sghmc import SGHMC
from slt_interp.samplers.sgld import SGLD
from slt_interp.samplers.sgnht import SGNHT

__all__ = [
    "HMC",
    "MALA",
    "NUTS",
    "SGHMC",
    "SGLD",
    "SGNHT",
    "Ball",
    "Box",
    "Draws",
    "FloatGrid",
    "FullBatch",
    "Gaussian",
    "Information",
    "LLCEstimate",
    "Ladder",
    "LocalPosterior",
    "Minibatches",
    "RMSPropSGLD",
    "Spectrum",
    "Sweep",
    "VolumeEstimate",
    "analytic",
    "behavioral_kl",
    "calibration_sweep",
    "chain_mesh",
    "estimate_llc",
    "estimate_spectrum",
    "estimate_volume",
    "gauss_newton_product",
    "hvp",
    "information",
    "keep_energy",
    "keep_example_losses",
    "keep_params",
    "llc",
    "mean_loss",
    "over_draws",
    "read_draws",
    "sample",
    "temper",
    "top_eigenpairs",
    "wbic",
]

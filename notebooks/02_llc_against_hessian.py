# %% [markdown]
# # The LLC against the Hessian
#
# If the loss were its second-order expansion, the LLC at $n\beta$ and localization $\gamma$ would be
# $\tfrac12 \operatorname{tr}[n\beta H (n\beta H + \gamma)^{-1}]$: half the number of eigenvalues above $\gamma / n\beta$,
# with soft edges. At a regular minimum that is right. At a singular one the directions in which the Hessian vanishes still
# cost loss, in higher order, and the Hessian does not know.

# %%
import os

import jax
import matplotlib.pyplot as plt
import numpy as np

import slt_interp as slt

key = jax.random.key(0)
# Tests run this notebook with fewer gradients.
budget = int(os.environ.get("MAX_GRADIENTS", "40000"))


def compare(problem, nbeta, localization=1.0):
    """Sample the LLC, and ask the Hessian."""
    spectrum = slt.estimate_spectrum(key, problem.loss_fn, problem.center, problem.data)
    estimate = slt.estimate_llc(
        key,
        problem.loss_fn,
        problem.center,
        problem.data,
        nbeta=nbeta,
        localization=localization,
        max_gradients=budget,
        progress=False,
    )
    print(problem.name)
    print(f"  sampled {estimate.llc:.2f} +- {estimate.std_error:.2f} ({estimate.status})")
    print(f"  Hessian {spectrum.llc(nbeta, localization)[0]:.2f}, eigenvalues above 1e-4: {spectrum.rank(1e-4):g}")
    print(f"  learning coefficient {problem.rlct:g}, half the number of weights {problem.dimension / 2:g}")


# %% [markdown]
# ## Two points of one fibre
#
# All deep linear networks with the same product have the same loss. At a *smooth* point of that set the Hessian's rank counts
# the directions that matter. At the *deepest* point, where all layers have the smallest rank, it counts too few; the exact
# values are Aoyagi's. At the smooth point a stronger localization keeps the chains from deeper points nearby.

# %%
for point, localization in (("smooth", 100.0), ("deepest", 1.0)):
    compare(slt.analytic.deep_linear(key, [5, 5, 5], rank=2, point=point), nbeta=1e5, localization=localization)

# %% [markdown]
# ## The gap depends on the scale
#
# $w_1^2 + w_2^4$ is curved along $w_1$ and flat to second order along $w_2$. At large $n\beta$ the Hessian predicts $1/2$; the
# exact LLC tends to $1/2 + 1/4$.

# %%
problem = slt.analytic.power_sum([1, 2])
spectrum = slt.estimate_spectrum(key, problem.loss_fn, problem.center, None)
nbetas = np.geomspace(1, 1e5, 30)
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.plot(nbetas, [problem.energy(nbeta, 1.0) for nbeta in nbetas], "k", label="exact")
axes.plot(nbetas, [spectrum.llc(nbeta, 1.0)[0] for nbeta in nbetas], "--", label="Hessian")
axes.axhline(problem.rlct, color="0.5", linestyle=":", label="learning coefficient")
axes.set(xscale="log", xlabel=r"$n\beta$", ylabel="LLC", title=r"$w_1^2 + w_2^4$")
axes.legend()
compare(problem, nbeta=1e3)

# %% [markdown]
# ## Modules
#
# Two modules whose inputs are uncorrelated have an equation each to satisfy; with equal inputs only the sum of their outputs
# counts. At the origin the Hessian is zero for every correlation: it sees neither.

# %%
for coupling in (0.0, 1.0):
    compare(slt.analytic.coupled_modules(coupling), nbeta=1e4)

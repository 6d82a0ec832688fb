# %% [markdown]
# # The volume of a basin
#
# $V(\epsilon)$ is the share of a base measure, here a Gaussian around the trained weights, that lies within $\epsilon$ nats of
# their loss. Four methods, which count different sets and fail in different ways.

# %%
import os

import jax
import matplotlib.pyplot as plt
import numpy as np

import slt_interp as slt

key = jax.random.key(0)
# Tests run this notebook with fewer draws.
is_small = "MAX_GRADIENTS" in os.environ
thresholds = np.geomspace(1e-3, 1.0, 7)
base = slt.Gaussian(0.0, 1.0)

# %% [markdown]
# ## Where the answer is known
#
# The crossing lines $(w_1 w_2)^2 \le \epsilon$ again. The ellipsoid of a vanishing Hessian is everything; straight rays from
# the center see all of this set, because it is star-shaped; tempering and subset simulation count any set.

# %%
problem = slt.analytic.monomial([1, 1])
exact = np.array([problem.log_volume(threshold) for threshold in thresholds])
methods = ("gaussian", "subset") if is_small else ("gaussian", "rays", "subset", "tempering")
found = {}
for method in methods:
    found[method] = slt.estimate_volume(
        key, problem.loss_fn, problem.center, None, thresholds, base=base, method=method, progress=False
    )
    print(f"{method}: {found[method].status}, off by {np.round(found[method].log_volume - exact, 2)} nats")

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.plot(thresholds, exact, "k", label="exact")
for method, volume in found.items():
    axes.errorbar(thresholds, volume.log_volume, 2 * volume.std_error, fmt="o--", markersize=4, label=method)
axes.set(xscale="log", xlabel=r"$\epsilon$ (nats)", ylabel=r"$\ln V(\epsilon)$ (nats)")
_ = axes.legend()

# %% [markdown]
# ## From the same draws: the LLC at every scale
#
# $\lambda$ is the slope of $\ln V$ in $\ln \epsilon$, and what a ladder of temperatures measures at each of its rungs.

# %%
draws = 40 if is_small else 400
ladder = slt.temper(key, problem.loss_fn, problem.center, None, base=base, max_nbeta=1e4, num_draws=draws, progress=False)
print(ladder)
print(ladder.learning_coefficient())

# %% [markdown]
# ## In bits
#
# Of the half-precision numbers within .5 of a weight, how many keep the loss $w^2 / 2$ below $\epsilon$? A `FloatGrid` counts
# configurations of floating-point weights; their logarithm is a description length.

# %%
grid = slt.FloatGrid("float16", 0.5)
counted = slt.estimate_volume(
    key, lambda w, batch: w[0] ** 2 / 2, jax.numpy.zeros(1), None, [1e-4, 1e-2], base=grid, method="subset", progress=False
)
print(np.round(counted.bits, 2), "bits")

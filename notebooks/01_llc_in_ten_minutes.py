# %% [markdown]
# # The local learning coefficient in ten minutes
#
# How degenerate is a minimum? Take a loss $L$ with a minimum at $w^*$, and ask how fast the volume of the weights with
# $L(w) - L(w^*) \le \epsilon$ shrinks: like $\epsilon^{\lambda}$, up to logarithms. $\lambda$ is the *learning coefficient*.
# At a minimum with a positive definite Hessian it is half the number of weights; at a singular one it is smaller.
#
# The estimate is an expectation under the tempered posterior around $w^*$,
# $p(w) \propto \exp(-n\beta\,(L(w) - L(w^*)) - \gamma |w - w^*|^2 / 2)$:
# $$\hat\lambda = n\beta\,\mathbb{E}[L(w) - L(w^*)].$$

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import slt_interp as slt

key = jax.random.key(0)
# Tests run this notebook with fewer gradients.
budget = int(os.environ.get("MAX_GRADIENTS", "100000"))

# %% [markdown]
# ## A regular minimum
#
# Four weights, all of them curved: $\lambda = 4 / 2$. Without data there is no $n$, so we give $n\beta$ ourselves.


# %%
def regular(w, batch):
    return 0.5 * jnp.sum(w**2)


settings = {"nbeta": 1000.0, "localization": 1.0, "max_gradients": budget, "progress": False}
print(slt.estimate_llc(key, regular, jnp.zeros(4), None, **settings))

# %% [markdown]
# ## A singular minimum
#
# $L = (w_1 w_2)^2$ is zero on two crossing lines. Its Hessian at the crossing is zero. The learning coefficient is $1/2$, with
# multiplicity 2; at finite $n\beta$ the expectation is lower, by an amount that we know exactly for this loss.

# %%
problem = slt.analytic.catalogue()["monomial w1^2 w2^2"]
estimate = slt.estimate_llc(key, problem.loss_fn, problem.center, problem.data, **settings)
print(estimate)
print(f"exact at this nbeta and localization: {problem.energy(1000.0, 1.0):.4f}; learning coefficient: {problem.rlct}")

# %% [markdown]
# ## How it depends on nbeta
#
# An LLC is a measurement at a scale: $1 / n\beta$ is the loss up to which the posterior looks. One ladder of temperatures gives
# all scales from the same draws, from the base measure ($n\beta = 0$) down to the finest.

# %%
draws = 400 if budget > 5000 else 40
ladder = slt.temper(
    key, problem.loss_fn, problem.center, None, base=slt.Gaussian(0.0, 1.0), max_nbeta=1e4, num_draws=draws, progress=False
)
curve = ladder.llc_curve()
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.errorbar(curve.nbetas, curve.llc, 2 * curve.std_error, fmt="o", label="sampled, two standard errors")
grid = np.geomspace(curve.nbetas[0], curve.nbetas[-1], 40)
axes.plot(grid, [problem.energy(nbeta, 1.0) for nbeta in grid], "k", label="exact")
axes.axhline(problem.rlct, color="0.5", linestyle=":", label="learning coefficient")
axes.set(xscale="log", xlabel=r"$n\beta$", ylabel="LLC", title=r"$(w_1 w_2)^2$ at the crossing")
axes.legend()
print(ladder.learning_coefficient())

# %% [markdown]
# ## When not to believe it
#
# `status` is one of "ok", "flat directions not equilibrated" and "do not trust"; every reason is a sentence that names the
# knob to turn. Here the weights are no minimum:

# %%
print(slt.estimate_llc(key, regular, jnp.ones(4), None, **settings))

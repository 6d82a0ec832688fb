# %% [markdown]
# # Is this circuit held?
#
# A search for a circuit always finds something. Here a network of your own is damaged as far as its loss allows, by draws of
# the tempered posterior, and what the search found is watched on the way: a circuit that the loss holds survives where an
# illusion that was planted beside it dies.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

from slt_interp.data import Counterfactuals, Minibatches
from slt_interp.degradation.naturalness import naturalness
from slt_interp.degradation.planted import plant
from slt_interp.degradation.survival import measure_survival
from slt_interp.models.mlp import MLP
from slt_interp.probes.alignment import fit_alignment
from slt_interp.probes.interchange import Alignment, InterchangeProbe
from slt_interp.tasks.causal import CausalModel, intervened
from slt_interp.training import train

key = jax.random.key(0)
# Gradients per chain and level; tests run this notebook with fewer.
budget = int(os.environ.get("MAX_GRADIENTS", "3000"))

# %% [markdown]
# ## A task, and what the network might compute
#
# The label says whether the sums of the first and of the last three inputs have different signs. A high-level model of it has
# one variable, the sign of the first sum; what follows from it may read the inputs. `swapped` takes the variable from a source
# of any value, `matched` from a source that has the base's: there nothing should change.


# %%
def first_sign(x):
    return x[:, :3].sum(axis=1) > 0


def answer(values, x):
    return (values[0] ^ (x[:, 3:].sum(axis=1) > 0)).astype(int)


model = CausalModel((first_sign,), answer)


def swapped(key, size) -> Counterfactuals:
    base, sources = jax.random.normal(key, (2 * size * 6,)).reshape(2, size, 6)
    return intervened(model, base, sources[:, None])


def matched(key, size) -> Counterfactuals:
    base, sources = jax.random.normal(key, (2 * size * 6,)).reshape(2, size, 6)
    is_same = first_sign(base) == first_sign(sources)
    return intervened(model, base, jnp.where(is_same[:, None], sources, -sources)[:, None])


def examples(key, size):
    x = jax.random.normal(key, (size * 6,)).reshape(size, 6)
    return {"inputs": x, "labels": answer((first_sign(x),), x)}


# %% [markdown]
# ## A network, and a search for the variable in its first hidden layer
#
# Labels are smoothed, so that logits stay moderate and the loss has a minimum.

# %%
network = MLP((6, 8, 8, 2))


def loss_fn(params, batch):
    targets = optax.smooth_labels(jax.nn.one_hot(batch["labels"], 2), 0.04)
    return optax.softmax_cross_entropy(network.apply(params, batch["inputs"]), targets).mean()


steps = 4000 if budget > 1000 else 400
optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))
batches = Minibatches(examples(key, 50_000), 512)
params = train(key, loss_fn, network.init(key), batches, optimizer, num_steps=steps, progress=False).params
fit = fit_alignment(key, network, params, "layer1", (2,), swapped, num_steps=steps // 4, num_restarts=4)
found = InterchangeProbe(network, "layer1", fit.alignment, swapped(key, 4096))(key, params)
print({name: round(float(value), 3) for name, value in found.items()}, "all restarts:", fit.restart_iia.round(3))

# %% [markdown]
# ## Does the loss hold it?
#
# `measure_survival` plants a twin of the candidate, an illusion of equal accuracy that nothing in the loss holds, chooses a
# localization at which the twin must die, and draws the network at two excess losses. On every draw both are refitted for a
# short while from where they were.

# %%
inputs = examples(jax.random.key(1), 256)["inputs"]
settings = {"num_burnin": budget // 24, "thinning": budget // 192, "num_draws": 16, "progress": False}


def judge(network, params, alignment):
    survival = measure_survival(key, network, params, "layer1", alignment, inputs, swapped, matched, **settings)
    print(f"localization {survival.localization:g}, dormancy share {survival.dormancy:.2f}")
    print(naturalness(survival))
    return survival


candidate = judge(network, params, fit.alignment)

# %% [markdown]
# ## And an illusion?
#
# The twin itself, put forward as a candidate: at the weights it cannot be told from the circuit.

# %%
planted = plant(network, params, "layer1", fit.alignment, 0)
for name, alignment in (("circuit", planted.genuine), ("illusion", planted.twin)):
    probe = InterchangeProbe(planted.network, "layer1", alignment, swapped(key, 4096))
    print(name, f"{float(probe(key, planted.params)['iia']):.3f}")
illusion = judge(planted.network, planted.params, Alignment(planted.twin.rotation, planted.twin.masks))

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
for ax, title, survival in zip(axes, ("found by the search", "planted"), (candidate, illusion), strict=True):
    for label, values in (("candidate", survival.scaled), ("its twin", survival.scaled_twin)):
        ax.plot(survival.excess_loss, values, "o-", label=label)
    ax.set(xscale="log", xlabel="excess loss (nats)", title=f"candidate: {title}", ylim=(-0.1, 1.1))
axes[0].set_ylabel("scaled effect after a refit")
axes[0].legend()

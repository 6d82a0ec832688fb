# %% [markdown]
# # Is this circuit held?
#
# A search for a circuit always finds something. Here a network is damaged as far as its loss allows, by draws of
# the tempered posterior, and what the search found is watched on the way: a circuit that the loss holds survives where an
# illusion that was planted beside it dies.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

from slt_interp.data import Counterfactuals
from slt_interp.degradation.naturalness import naturalness
from slt_interp.degradation.planted import plant
from slt_interp.degradation.survival import measure_survival
from slt_interp.models.mlp import MLP
from slt_interp.probes.interchange import Alignment, InterchangeProbe, block_masks
from slt_interp.probes.interchange_training import train_interchange
from slt_interp.tasks.causal import CausalModel, intervened

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


# %% [markdown]
# ## A network, and a claim about it
#
# So that we know what the verdict should be, the network is trained to have the variable in the first four units of its first
# hidden layer; with a network of your own, `fit_alignment` gives the claim. Labels are smoothed, so that logits stay moderate
# and the loss has a minimum.

# %%
network = MLP((6, 16, 8, 2))
claim = Alignment(jnp.eye(16), block_masks((4,), 16))
steps = 4000 if budget > 1000 else 400
start = network.init(key)
params = train_interchange(key, network, start, "layer1", claim, swapped, num_steps=steps, label_smoothing=0.04).params
probe = InterchangeProbe(network, "layer1", claim, swapped(key, 4096))
print({name: round(float(value), 3) for name, value in probe(key, params).items()})

# %% [markdown]
# ## Does the loss hold it?
#
# `measure_survival` plants a twin of the candidate, an illusion of equal accuracy that nothing in the loss holds, chooses a
# localization at which the twin must die, and draws the network at two excess losses. On every draw both are refitted for a
# short while from where they were.

# %%
inputs = jax.random.normal(jax.random.key(1), (256 * 6,)).reshape(256, 6)
settings = {"num_burnin": budget // 24, "thinning": budget // 192, "progress": False}
settings["num_draws"] = 16 if budget > 1000 else 4


def judge(network, params, alignment):
    survival = measure_survival(key, network, params, "layer1", alignment, inputs, swapped, matched, **settings)
    print(f"localization {survival.localization:g}, dormancy share {survival.dormancy:.2f}")
    print(naturalness(survival))
    return survival


candidate = judge(network, params, claim)

# %% [markdown]
# ## And an illusion?
#
# The twin itself, put forward as a candidate: at the weights it cannot be told from the circuit.

# %%
planted = plant(network, params, "layer1", claim, 0)
for name, alignment in (("circuit", planted.genuine), ("illusion", planted.twin)):
    probe = InterchangeProbe(planted.network, "layer1", alignment, swapped(key, 4096))
    print(name, f"{float(probe(key, planted.params)['iia']):.3f}")
illusion = judge(planted.network, planted.params, Alignment(planted.twin.rotation, planted.twin.masks))

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
for ax, title, survival in zip(axes, ("the circuit", "planted illusion"), (candidate, illusion), strict=True):
    for label, values in (("candidate", survival.scaled), ("its twin", survival.scaled_twin)):
        ax.plot(survival.excess_loss, values, "o-", label=label)
    ax.set(xscale="log", xlabel="excess loss (nats)", title=f"candidate: {title}", ylim=(-0.1, 1.1))
axes[0].set_ylabel("scaled effect after a refit")
axes[0].legend()

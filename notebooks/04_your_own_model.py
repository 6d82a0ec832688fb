# %% [markdown]
# # Your own model
#
# All that slt_interp wants is a pytree of floating arrays and a loss `(params, batch) -> scalar`, in nats per example. Here is
# how to get them from a plain pytree, flax nnx, flax linen and equinox.

# %%
import os

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import slt_interp as slt

key = jax.random.key(0)
# Tests run this notebook with fewer gradients.
budget = int(os.environ.get("MAX_GRADIENTS", "5000"))
x = jax.random.normal(key, (500, 4))
data = {"x": x, "y": jnp.tanh(x[:, :1])}


def minimum(loss_fn, params, steps=2000):
    """Train; an LLC is defined at a minimum."""
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss_fn)(params, data), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))((params, optimizer.init(params)))
    return params


def report(loss_fn, params):
    params = minimum(loss_fn, params)
    print(slt.estimate_llc(key, loss_fn, params, data, num_chains=8, max_gradients=budget, progress=False))


# %% [markdown]
# ## A plain pytree


# %%
def plain_loss(params, batch):
    return 0.5 * jnp.mean((jnp.tanh(batch["x"] @ params["w"]) @ params["v"] - batch["y"]) ** 2)


report(plain_loss, {"w": jax.random.normal(key, (4, 3)) / 2, "v": jax.random.normal(key, (3, 1)) / 2})


# %% [markdown]
# ## flax nnx
#
# `split` takes the weights out of a module, `merge` puts them back.


# %%
class Network(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.head = nnx.Linear(4, 3, rngs=rngs), nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.hidden(x)))


graph, weights = nnx.split(Network(nnx.Rngs(0)), nnx.Param)


def nnx_loss(params, batch):
    return 0.5 * jnp.mean((nnx.merge(graph, params)(batch["x"]) - batch["y"]) ** 2)


report(nnx_loss, nnx.to_pure_dict(weights))

# %% [markdown]
# ## flax linen
#
# The weights are already apart.

# %%
linen = nn.Sequential([nn.Dense(3), jnp.tanh, nn.Dense(1)])


def linen_loss(params, batch):
    return 0.5 * jnp.mean((linen.apply(params, batch["x"]) - batch["y"]) ** 2)


report(linen_loss, linen.init(key, x))

# %% [markdown]
# ## equinox
#
# `partition` separates arrays from everything else.

# %%
model = eqx.nn.MLP(4, 1, width_size=3, depth=1, activation=jnp.tanh, key=key)
arrays, static = eqx.partition(model, eqx.is_inexact_array)


def equinox_loss(params, batch):
    return 0.5 * jnp.mean((jax.vmap(eqx.combine(params, static))(batch["x"]) - batch["y"]) ** 2)


report(equinox_loss, arrays)

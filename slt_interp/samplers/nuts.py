"""The No-U-Turn sampler: numpyro's trees, as one more kernel."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key

from slt_interp.data import Batch
from slt_interp.posterior import LocalPosterior
from slt_interp.samplers.hamiltonian import MetropolisState, learn, start, trial
from slt_interp.samplers.kernel import Info, inspect
from slt_interp.tree import Params, Real, normal_like, register_dataclass


@partial(
    register_dataclass,
    data_fields=["target", "step_size", "target_acceptance"],
    meta_fields=["max_tree_depth"],
)
@dataclass(frozen=True)
class NUTS:
    """Sample by numpyro's No-U-Turn trees on the full batch: the gold standard, where its many gradients can be paid.

    Trajectories, turning criterion and choice of the next state are numpyro's, for any pytree of weights, masks and bounded
    bases included; step and metric adapt as for `HMC` (only their speed depends on that). A step takes up to
    2^max_tree_depth gradients, and chains that are vectorized together wait for the longest.

    Args:
        target: the distribution to sample.
        step_size: the leapfrog step, as for `HMC`. Warm-up starts from it.
        target_acceptance: in warm-up, of the points of a tree.
        max_tree_depth: doublings of a trajectory at most.

    References:
        Hoffman and Gelman (2014), The No-U-Turn sampler, arXiv:1111.4246.
        Phan, Pradhan and Jankowiak (2019), Composable effects for flexible and accelerated probabilistic programming in
        NumPyro, arXiv:1912.11554.

    >>> target = LocalPosterior(lambda w, batch: 0.5 * jnp.sum(w**2), jnp.zeros(2), nbeta=1.0, localization=1.0)
    >>> kernel = NUTS(target, step_size=0.5)
    >>> state = kernel.init(jax.random.key(0), jnp.zeros(2), None)
    >>> bool(kernel.step(jax.random.key(1), state, None)[1].num_gradients >= 3)
    True
    """

    target: LocalPosterior
    step_size: Real
    target_acceptance: Real = 0.8
    max_tree_depth: int = 10
    full_batch: ClassVar[bool] = True

    def init(self, key: Key[Array, ""], params: Params, batch: Batch) -> MetropolisState:
        """Start a chain at `params`, in float32 or better."""
        del key
        return start(self.target, params, batch, self.step_size)

    def adapt(self, key: Key[Array, ""], state: MetropolisState, batch: Batch) -> tuple[MetropolisState, Info]:
        """Make one transition, and learn step and metric from it."""
        squares = jax.tree.map(jnp.square, state.gradient)
        state, info = self.step(key, trial(self.target, state), batch)
        return learn(state, info.acceptance, self.target_acceptance, squares, jnp.array(True)), info

    def step(self, key: Key[Array, ""], state: MetropolisState, batch: Batch) -> tuple[MetropolisState, Info]:
        """Make one transition."""
        from numpyro.infer.hmc_util import build_tree, euclidean_kinetic_energy, velocity_verlet

        def potential(params: Params) -> Float[Array, ""]:
            held = self.target.hold(params, state.params)
            # The loss here is subtracted first: nbeta times a loss is too large a number for float32.
            return jnp.asarray(self.target.nbeta) * (self.target.loss(held, batch) - state.loss) + self.target.base.potential(
                held
            )

        momentum_key, tree_key = jax.random.split(key)
        noise = self.target.restrict(normal_like(momentum_key, state.params))
        momentum = jax.tree.map(lambda z, s: z / s, noise, state.scale)
        initialize, update = velocity_verlet(potential, euclidean_kinetic_energy)
        tree = build_tree(
            update,
            euclidean_kinetic_energy,
            initialize(state.params, momentum, self.target.base.potential(state.params), state.gradient),
            ravel_pytree(jax.tree.map(jnp.square, state.scale))[0],
            state.step_size,
            tree_key,
            max_tree_depth=self.max_tree_depth,
        )
        params = self.target.hold(tree.z_proposal, state.params)
        # numpyro keeps the potential only.
        loss, gradient = self.target.value_and_grad(params, batch)
        info = inspect(self.target, state.params, state.loss, state.gradient)
        info = info._replace(
            num_gradients=(tree.num_proposals + 1) * info.num_gradients, acceptance=tree.sum_accept_probs / tree.num_proposals
        )
        return state._replace(params=params, loss=loss, gradient=gradient), info

"""What every kernel promises, checked on every kernel."""

import functools
import itertools
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp import (
    HMC,
    MALA,
    NUTS,
    SGHMC,
    SGLD,
    SGNHT,
    Ball,
    Box,
    FullBatch,
    Gaussian,
    LocalPosterior,
    Minibatches,
    RMSPropSGLD,
    chain_mesh,
    keep_params,
    read_draws,
    sample,
)
from slt_interp.errors import InputError
from slt_interp.samplers.advance import advance
from slt_interp.samplers.diagnostics import std_error

DATA = {"x": jax.random.normal(jax.random.key(1), (60, 3)), "y": jax.random.normal(jax.random.key(2), (60,))}
PARAMS = {"layers": [(0.5 * jnp.ones((3, 2)), {"bias": jnp.zeros(2)})], "head": jnp.array([1.0, -0.0])}

KERNELS = {
    "SGLD": functools.partial(SGLD, step_size=1e-3),
    "SGLD, Leimkuhler-Matthews": functools.partial(SGLD, step_size=1e-3, leimkuhler_matthews=True),
    "RMSPropSGLD": functools.partial(RMSPropSGLD, step_size=1e-3),
    "SGHMC": functools.partial(SGHMC, step_size=1e-3),
    "SGNHT": functools.partial(SGNHT, step_size=1e-3),
    "MALA": functools.partial(MALA, step_size=1e-2),
    "HMC": functools.partial(HMC, step_size=5e-2, num_leapfrog=3),
    "NUTS": functools.partial(NUTS, step_size=5e-2, max_tree_depth=4),
}

every_kernel = pytest.mark.parametrize(
    "name",
    # numpyro's trees take the compiler long.
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("NUTS", "MALA", "SGLD, Leimkuhler-Matthews") else ())
        for name in KERNELS
    ],
)

# For what the loop around kernels does: one of each kind of state. What a kernel could get wrong there, its checkpoint, has a
# test on every kernel.
kinds_of_kernel = pytest.mark.parametrize("name", ["SGLD", "SGNHT", "NUTS"])


def loss_fn(params, batch):
    ((weight, rest),) = params["layers"]
    predicted = jnp.tanh(batch["x"] @ weight + rest["bias"]) @ params["head"]
    return jnp.mean((predicted - batch["y"]) ** 2)


def flat(params, batch):
    return 0.0 * jnp.sum(jax.tree.leaves(params)[0])


def build(name, loss_fn=loss_fn, params=PARAMS, nbeta=20.0, localization=2.0, mask=None):
    return KERNELS[name](LocalPosterior(loss_fn, params, nbeta, localization, mask))


def data_for(kernel):
    return FullBatch(DATA) if kernel.full_batch else Minibatches(DATA, 16)


def run(key, kernel, params=PARAMS, **settings):
    defaults = {"num_chains": 4, "num_draws": 12, "num_warmup": 6, "num_burnin": 5, "thinning": 2, "collect": keep_params}
    return sample(key, kernel, params, **({"batches": data_for(kernel), "progress": False} | defaults | settings))


def walk(kernel, params=PARAMS, num_steps=20):
    """Positions of one chain along its steps, (step, *event), without `sample` around them."""

    def go(kernel, batches):
        def step(state, key):
            return kernel.step(key, state, batches(key))[0], state.params

        state = kernel.init(jax.random.key(3), params, batches(jax.random.key(4)))
        return jax.lax.scan(step, state, jax.random.split(jax.random.key(0), num_steps))[1]

    return jax.jit(go)(kernel, data_for(kernel))


def leaves(draws):
    return jax.tree.leaves((draws.info, draws.collected, draws.state, draws.num_gradients))


def assert_same(left, right):
    for a, b in zip(leaves(left), leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


def assert_close(left, right):
    # Rounding, amplified by a few dozen steps of a stable chain.
    for a, b in zip(leaves(left), leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)


@jax.jit
def begin(kernel, key, batch):
    return kernel.init(key, PARAMS, batch)


@jax.jit
def adapt(kernel, key, state, batch):
    return kernel.adapt(key, state, batch)


@jax.jit
def step(kernel, key, state, batch):
    return kernel.step(key, state, batch)


def test_kernel_is_never_mistaken_for_another_with_the_same_fields():
    # With jax.tree_util.register_dataclass they compared equal, and a jitted function, once in a while, answered for SGNHT with
    # what it had compiled for SGHMC.
    target = LocalPosterior(loss_fn, PARAMS, 1.0, 1.0)
    structures = [jax.tree.structure(kind(target, 0.1, friction=1.0)) for kind in (SGHMC, SGNHT)]
    structures += [jax.tree.structure(base(0.0, 1.0)) for base in (Gaussian, Box, Ball)]
    structures += [jax.tree.structure(replace(target, localization=base(0.0, 1.0))) for base in (Gaussian, Box, Ball)]
    assert not any(a == b for a, b in itertools.combinations(structures, 2))


@every_kernel
def test_pytree_in_is_pytree_out_and_step_changes_nothing_that_adapts(key, name):
    kernel = build(name)
    batch = data_for(kernel)(key)
    state, info = adapt(kernel, key, begin(kernel, key, batch), batch)
    new, info = step(kernel, key, state, batch)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert jax.tree.structure(new.params) == jax.tree.structure(PARAMS)
    assert [x.dtype for x in jax.tree.leaves(new)] == [x.dtype for x in jax.tree.leaves(state)]
    assert all(x.shape == () for x in jax.tree.leaves(info))
    assert (info.acceptance is not None) == kernel.full_batch
    for adapting in {"second_moment", "step_size", "scale", "adaptation"} & set(state._fields):
        for a, b in zip(jax.tree.leaves(getattr(state, adapting)), jax.tree.leaves(getattr(new, adapting)), strict=True):
            np.testing.assert_array_equal(a, b)


@every_kernel
def test_kernels_stacked_over_nbeta_are_a_ladder(key, name):
    kernels = [build(name, nbeta=nbeta) for nbeta in (0.0, 5.0, 50.0)]
    batch = data_for(kernels[0])(key)
    stacked = jax.tree.map(lambda *x: jnp.stack([jnp.asarray(leaf) for leaf in x]), *kernels)
    states = jax.vmap(begin, (0, None, None))(stacked, key, batch)
    moved, info = jax.vmap(step, (0, None, 0, None))(stacked, key, states, batch)
    for i, kernel in enumerate(kernels):
        alone, its_info = step(kernel, key, begin(kernel, key, batch), batch)
        for a, b in zip(jax.tree.leaves((moved.params, info)), jax.tree.leaves((alone.params, its_info)), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@every_kernel
def test_chunks_interruptions_and_other_numbers_change_no_bit_and_compile_nothing(key, name, tmp_path):
    kernel = build(name)
    whole = run(key, kernel, chunk_size=4)
    before = advance._cache_size()
    assert_same(whole, run(key, kernel, chunk_size=4, checkpoint=tmp_path / "streamed"))
    # Cut short within warm-up, burn-in and draws, whatever the chunks were then.
    run(key, kernel, num_draws=6, chunk_size=4, checkpoint=tmp_path / "run")
    assert_same(whole, run(key, kernel, chunk_size=4, checkpoint=tmp_path / "run"))
    other = build(name, nbeta=3.0, localization=7.0)
    run(key, jax.tree.unflatten(jax.tree.structure(other), [0.9 * x for x in jax.tree.leaves(other)]), chunk_size=4)
    assert advance._cache_size() == before


@pytest.mark.slow
@kinds_of_kernel
def test_devices_and_blocks_change_rounding_only(key, name):
    kernel = build(name)
    mesh = chain_mesh(4)
    assert mesh.shape["chain"] == 4
    whole = run(key, kernel)
    assert_close(whole, run(key, kernel, mesh=mesh))
    assert_close(whole, run(key, kernel, block_size=1))
    assert_same(whole, run(key, kernel, chunk_size=5))


@every_kernel
def test_mask_leaves_the_rest_bit_identical(name):
    mask = {"layers": [(jnp.arange(6).reshape(3, 2) % 2 == 0, {"bias": False})], "head": False}
    path = walk(build(name, mask=mask))
    head = np.asarray(path["head"])
    assert head.tobytes() == np.broadcast_to(np.asarray(PARAMS["head"]), head.shape).tobytes(), "-0.0 included"
    weight = np.asarray(path["layers"][0][0]).reshape(-1, 6)
    np.testing.assert_array_equal(weight[:, 1::2], 0.5)
    assert (np.ptp(weight[:, ::2], axis=0) > 0).all(), "what is not masked moves"


@every_kernel
def test_model_in_bfloat16_is_sampled_in_float32(name):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    dtypes = []

    def seen(params, batch):
        dtypes.append(params["head"].dtype)
        return loss_fn(params, batch)

    path = walk(build(name, seen, params), params)
    assert path["head"].dtype == np.float32
    assert set(dtypes) == {jnp.dtype(jnp.bfloat16)}
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(path))


BOUNDED = {
    "Box": Box(-0.5, {"layers": [(1.5, {"bias": 1.0})], "head": jnp.array([2.0, 0.25])}),
    "Ball": Ball(PARAMS, 0.3),
    "ellipsoid": Ball(0.0, {"layers": [(2.0, {"bias": 1.0})], "head": jnp.array([3.0, 0.5])}),
}


@every_kernel
@pytest.mark.parametrize("base", ["Box", "ellipsoid"])
def test_chains_stay_inside_a_bounded_base(name, base):
    measure = BOUNDED[base]
    kernel = build(name, localization=measure)
    kernel = KERNELS[name](kernel.target, step_size=0.3)  # so large that walls are met at every other step
    path = walk(kernel)
    assert np.isfinite(jax.vmap(measure.potential)(path)).all()
    assert np.ptp(path["head"][:, 0]) > 0


@pytest.mark.slow
@every_kernel
@pytest.mark.parametrize("base", BOUNDED)
def test_without_the_loss_chains_are_uniform_in_a_bounded_base(key, name, base):
    """At nbeta = 0 reflections are exact at any step: compare with exact draws, coordinate by coordinate."""
    measure = BOUNDED[base]
    step_size = 0.02 if not build(name).full_batch else 0.1
    kernel = KERNELS[name](LocalPosterior(flat, PARAMS, 0.0, measure), step_size=step_size)
    draws = run(key, kernel, batches=FullBatch(DATA), num_chains=16, num_draws=250, num_warmup=0, num_burnin=400, thinning=10)
    assert np.isfinite(jax.vmap(jax.vmap(measure.potential))(draws.collected)).all()
    exact = jax.vmap(lambda key: measure.sample(key, PARAMS))(jax.random.split(key, 20_000))
    for found, wanted in zip(jax.tree.leaves(draws.collected), jax.tree.leaves(exact), strict=True):
        for power in (1, 2):
            ours = np.asarray(found, np.float64).reshape(16, 250, -1) ** power
            theirs = np.asarray(wanted, np.float64).reshape(20_000, -1) ** power
            for i in range(ours.shape[-1]):
                error = np.hypot(std_error(ours[..., i]), theirs[:, i].std() / np.sqrt(20_000))
                assert abs(ours[..., i].mean() - theirs[:, i].mean()) < 4 * error, (i, power)


def test_start_outside_a_bounded_base_is_refused(key):
    with pytest.raises(InputError, match="params lie outside the base measure, a Box"):
        run(key, build("SGLD", localization=Box(-0.1, 0.1)))


@every_kernel
def test_full_batch_kernels_refuse_minibatches(key, name):
    kernel = build(name)
    if kernel.full_batch:
        with pytest.raises(
            InputError, match=f"{type(kernel).__name__} needs the same data at every step, but was given Minibatches"
        ):
            run(key, kernel, batches=Minibatches(DATA, 16))


@every_kernel
def test_gradients_are_counted(key, name):
    calls = []

    def counting(params, batch):
        jax.debug.callback(lambda: calls.append(1))
        return loss_fn(params, batch)

    kernel = build(name, counting)
    batch = data_for(kernel)(key)
    state = jax.block_until_ready(begin(kernel, key, batch))
    jax.effects_barrier()
    calls.clear()
    info = step(kernel, key, state, batch)[1]
    jax.effects_barrier()
    assert float(info.num_gradients) == len(calls)


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
import jax
from tests.samplers.test_contract import build, run
run(jax.random.key(0), build(sys.argv[2]), num_draws=4000, chunk_size=20, checkpoint=sys.argv[3])
"""


@pytest.mark.slow
@kinds_of_kernel
def test_run_that_was_killed_goes_on_bit_for_bit(key, name, tmp_path):
    root = str(Path(__file__).parents[2])
    child = subprocess.Popen([sys.executable, "-c", CHILD, root, name, str(tmp_path)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    written = 0
    while written < 60:
        assert child.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
        # Readable while the run goes on.
        if (tmp_path / "draws" / "loss.npy").exists():
            written = min(x.shape[1] for x in read_draws(tmp_path).values())
    child.send_signal(signal.SIGKILL)
    child.wait()
    there = read_draws(tmp_path)
    assert 60 <= next(iter(there.values())).shape[1] < 4000
    settings = {"num_draws": 400 if name == "NUTS" else 1500}
    assert_same(run(key, build(name), **settings), run(key, build(name), checkpoint=tmp_path, **settings))

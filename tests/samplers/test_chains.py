"""`sample`: the same numbers whatever the host loop does."""

import dataclasses
import functools
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from slt_interp import (
    HMC,
    SGHMC,
    SGLD,
    SGNHT,
    Box,
    FullBatch,
    LocalPosterior,
    Minibatches,
    keep_params,
    llc,
    read_draws,
    sample,
)
from slt_interp.errors import InputError
from slt_interp.samplers.advance import advance
from slt_interp.samplers.chains import chain_mesh
from slt_interp.samplers.diagnostics import bulk_ess, std_error
from slt_interp.samplers.draws import keep_nothing, stability_warning
from slt_interp.storage import Checkpoints

DATA = {"x": jax.random.normal(jax.random.key(1), (60, 3)), "y": jax.random.normal(jax.random.key(2), (60,))}
PARAMS = {"bias": jnp.zeros(1), "kernel": jnp.ones((3, 1))}


def loss_fn(params, batch):
    return jnp.mean((batch["x"] @ params["kernel"] + params["bias"] - batch["y"][:, None]) ** 2)


def run(key, loss_fn=loss_fn, params=PARAMS, nbeta=20.0, batches=None, step_size=1e-3, **settings):
    batches = Minibatches(DATA, 16) if batches is None else batches
    kernel = SGLD(LocalPosterior(loss_fn, params, nbeta, 2.0), step_size)
    settings = {
        "num_chains": 4,
        "num_draws": 30,
        "num_burnin": 7,
        "thinning": 3,
        "collect": keep_params,
        "progress": False,
    } | settings
    return sample(key, kernel, params, batches, **settings)


def assert_same(left, right):
    for a, b in zip(jax.tree.leaves((left.info, left.collected)), jax.tree.leaves((right.info, right.collected)), strict=True):
        np.testing.assert_array_equal(a, b)


def assert_close(left, right):
    for a, b in zip(jax.tree.leaves((left.info, left.collected)), jax.tree.leaves((right.info, right.collected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, 7, 30, 100])
def test_chunk_size_changes_no_bit(key, chunk_size):
    assert_same(run(key), run(key, chunk_size=chunk_size))


def test_progress_bar_changes_no_bit(key, capsys):
    assert_same(run(key), run(key, progress=True))
    assert "sample" in capsys.readouterr().err


@pytest.mark.slow
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(key, tmp_path):
    whole = run(key)
    run(key, num_draws=11, chunk_size=4, checkpoint=tmp_path / "run")
    assert_same(whole, run(key, chunk_size=5, checkpoint=tmp_path / "run"))
    # A third call has nothing left to do, and still gives everything.
    assert_same(whole, run(key, checkpoint=tmp_path / "run"))


def test_run_that_goes_on_from_its_draws_equals_an_uninterrupted_one_bit_for_bit(key):
    whole, first = run(key), run(key, num_draws=12)
    resumed = run(key, previous=first)
    assert_same(resumed, whole)
    np.testing.assert_array_equal(resumed.num_gradients, whole.num_gradients)
    # What was handed over is still there.
    assert_same(run(key, previous=first, num_draws=12), first)
    # Burn-in alone is a start as well.
    assert_same(run(key, previous=run(key, num_draws=0)), whole)


def test_chains_start_where_a_run_without_steps_stands_and_are_resumed_from_there(key, tmp_path):
    ends = run(key, num_draws=4)
    start = dataclasses.replace(
        ends,
        info=jax.tree.map(lambda x: x[:, :0], ends.info),
        collected=jax.tree.map(lambda x: x[:, :0], ends.collected),
        num_burnin=0,
    )
    whole = run(key, previous=start)
    assert not np.array_equal(whole.loss, run(key).loss)
    run(key, previous=start, num_draws=11, chunk_size=4, checkpoint=tmp_path / "run")
    assert_same(whole, run(key, previous=start, checkpoint=tmp_path / "run"))
    with pytest.raises(InputError, match="another run"):
        run(key, checkpoint=tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_draws": 5}, "previous holds 12 draws of 4 chains"),
        ({"num_chains": 2}, "previous holds 12 draws of 4 chains"),
        ({"thinning": 2}, r"\(num_warmup, num_burnin, thinning\) = \(0, 7, 3\): give the same"),
        ({"step_size": 2e-3}, "draws of another kernel, or of another target"),
    ],
)
def test_draws_of_another_run_are_refused(key, settings, message):
    first = run(key, num_draws=12)
    with pytest.raises(InputError, match=message):
        run(key, previous=first, **settings)


def test_checkpoint_of_another_run_is_refused_and_kept(key, tmp_path):
    run(key, checkpoint=tmp_path / "run")
    with pytest.raises(InputError, match="another run"):
        run(jax.random.key(9), checkpoint=tmp_path / "run")
    for other in ({"batches": FullBatch(DATA)}, {"collect": keep_nothing}, {"loss_fn": walled}):
        with pytest.raises(InputError, match="another run"):
            run(key, **other, checkpoint=tmp_path / "run")
    with pytest.raises(InputError, match="already holds 30 draws"):
        run(key, num_draws=10, checkpoint=tmp_path / "run")
    assert_same(run(key), run(key, checkpoint=tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"block_size": 1}, {"block_size": 2}, {"block_size": 3}, {"block_size": 100}])
def test_block_size_changes_rounding_only(key, settings):
    assert_close(run(key, num_chains=6), run(key, num_chains=6, **settings))


@pytest.mark.slow
def test_chain_does_not_depend_on_the_number_of_chains(key):
    many, few = run(key, num_chains=8), run(key, num_chains=3)
    first = jax.tree.map(lambda x: x[:3], (many.info, many.collected))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves((few.info, few.collected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_chains_over_devices_agree_to_rounding(key):
    def scanning(params, batch):
        return jax.lax.scan(lambda total, x: (total + x, None), 0.0 * params["bias"][0], jnp.ones(3))[0] + loss_fn(
            params, batch
        )

    mesh = chain_mesh(8)
    assert mesh.shape["chain"] == 4
    assert_close(run(key, scanning, num_chains=8), run(key, scanning, num_chains=8, mesh=mesh))
    with pytest.raises(InputError, match="divides num_chains = 6"):
        run(key, num_chains=6, mesh=mesh)


def test_chains_draw_their_own_batches(key):
    losses = run(key, num_draws=1, num_burnin=0, thinning=1).loss[:, 0]
    assert len(np.unique(losses)) == 4


def test_info_belongs_to_the_collected_state(key):
    draws = run(key, batches=FullBatch(DATA), thinning=1)
    recomputed = jax.vmap(jax.vmap(lambda p: loss_fn(p, DATA)))(draws.collected)
    np.testing.assert_allclose(draws.loss, recomputed, rtol=1e-5)


@pytest.mark.slow
def test_loss_is_averaged_over_the_steps_of_a_draw(key):
    fine, coarse = run(key, thinning=1, num_draws=30), run(key, thinning=5, num_draws=6)
    np.testing.assert_allclose(fine.loss.reshape(4, 6, 5).mean(axis=2), coarse.loss, rtol=1e-5)
    np.testing.assert_array_equal(fine.collected["kernel"][:, 4::5], coarse.collected["kernel"])


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [3, 40, 1000])
def test_precision_stops_a_run_at_the_same_draw_whatever_the_chunks(key, chunk_size, tmp_path):
    settings = {"num_draws": 400, "num_burnin": 50, "batches": FullBatch(DATA), "thinning": 1}
    whole = run(key, **settings)
    precision = 1.001 * std_error(whole.loss[:, :200])
    reached = [n for n in range(40, 400, 40) if std_error(whole.loss[:, :n]) <= precision]
    early = run(key, **settings, precision=precision, check_every=40, chunk_size=chunk_size)
    assert early.loss.shape == (4, reached[0])
    np.testing.assert_array_equal(early.loss, whole.loss[:, : reached[0]])
    if chunk_size == 40:
        settings |= {"precision": precision, "check_every": 40, "checkpoint": tmp_path / "run"}
        run(key, **settings | {"num_draws": 60})
        again = run(key, **settings)
        assert_same(again, early)
        assert_same(run(key, **settings), early)


def test_collect_takes_arrays_as_arguments_and_compiles_once(key):
    def losses_on(data, state, info):
        del info
        return jax.vmap(lambda x, y: loss_fn(state.params, {"x": x[None], "y": y[None]}))(data["x"], data["y"])

    subset = jax.tree.map(lambda x: x[:7], DATA)
    draws = run(key, collect=jax.tree_util.Partial(losses_on, subset), thinning=1, batches=FullBatch(subset))
    assert draws.collected.shape == (4, 30, 7)
    np.testing.assert_allclose(draws.collected.mean(axis=2), draws.loss, rtol=1e-5)
    before = advance._cache_size()
    other = jax.tree.map(lambda x: -x[:7], DATA)
    again = run(key, collect=jax.tree_util.Partial(losses_on, other), thinning=1, batches=FullBatch(subset))
    assert advance._cache_size() == before
    assert not np.array_equal(draws.collected, again.collected)


FULL_DISK = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import jax
from tests.samplers.test_chains import PARAMS, run
# Every file may have 8,000 bytes: room for the states, and for 60 draws of the kernel's 96 bytes.
run(jax.random.key(0), num_draws=4, chunk_size=4, checkpoint=sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
try:
    run(jax.random.key(0), num_draws=200, chunk_size=4, checkpoint=sys.argv[2])
except OSError as error:
    print(error)
"""


@pytest.mark.slow
def test_full_disk_stops_the_run_with_what_is_there_intact(key, tmp_path):
    root = str(Path(__file__).parents[2])
    child = subprocess.run([sys.executable, "-c", FULL_DISK, root, str(tmp_path)], capture_output=True, text=True, check=True)
    safe = re.search(r"cannot write to .* the first (\d+) draws per chain are safe there; make room and repeat", child.stdout)
    assert safe, child.stdout + child.stderr
    there = read_draws(tmp_path)
    assert {x.shape[1] for x in there.values()} >= {int(safe[1])}
    whole = run(key, num_draws=200, chunk_size=4)
    np.testing.assert_array_equal(there["loss"], whole.loss[:, : there["loss"].shape[1]])
    assert_same(whole, run(key, num_draws=200, chunk_size=4, checkpoint=tmp_path))


MEMORY = """
import resource, sys
import jax, jax.numpy as jnp
import slt_interp as slt

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def loss_fn(w, batch):
    return 0.5 * jnp.mean(w**2)

def go(num_draws, thinning, chunk_size, size, checkpoint=None):
    w = jnp.zeros(size)
    kernel = slt.SGLD(slt.LocalPosterior(loss_fn, w, 1.0, 1.0), 0.1)
    collect = {"collect": slt.keep_params} if checkpoint else {}
    slt.sample(jax.random.key(0), kernel, w, slt.FullBatch(None), num_chains=2, num_draws=num_draws, thinning=thinning,
               chunk_size=chunk_size, progress=False, checkpoint=checkpoint, **collect)

if sys.argv[1] == "steps":
    go(1000, 1, 1000, 2)
    before = peak()
    go(1000, 1000, 1000, 2)      # a million steps, 1000 draws
    thinned = peak()
    go(200_000, 5, 1000, 2)      # a million steps, 200,000 draws of 8 scalars in 2 chains
    print(before, thinned, peak())
else:
    go(40, 1, 20, 200_000, sys.argv[2] + "/few")
    before = peak()
    go(800, 1, 20, 200_000, sys.argv[2] + "/many")
    print(before, peak())
"""


@pytest.mark.slow
def test_a_million_steps_take_memory_for_the_scalars_only():
    out = subprocess.run([sys.executable, "-c", MEMORY, "steps"], capture_output=True, text=True, check=True).stdout
    before, thinned, kept = map(float, out.split())
    assert thinned - before < 10, "MiB: constant but for the allocator's slack"
    scalars = 200_000 * 2 * (7 * 4 + 1) / 2**20
    assert kept - thinned < 1.1 * scalars + 10


@pytest.mark.slow
def test_streamed_weights_take_memory_for_two_chunks(tmp_path):
    out = subprocess.run(
        [sys.executable, "-c", MEMORY, "weights", str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout
    before, after = map(float, out.split())
    chunk = 20 * 2 * 200_000 * 4 / 2**20
    assert np.load(tmp_path / "many" / "draws" / "collected.npy", mmap_mode="r").nbytes / 2**20 == pytest.approx(40 * chunk)
    # The short run has had its two chunks already; the long one, of 40, may add the allocator's slack.
    assert after - before < 2 * chunk


@pytest.mark.parametrize(
    "build",
    [
        SGLD,
        *(
            pytest.param(kernel, marks=pytest.mark.slow)
            for kernel in (SGHMC, SGNHT, functools.partial(SGLD, leimkuhler_matthews=True))
        ),
    ],
)
def test_step_above_the_stability_limit_is_named_with_the_limit(key, build):
    """The largest curvature of the potential is 30 * 4 + 2 = 122: the limit is 4 / 122 = .0328."""
    curvatures = jnp.array([4.0, 1.0, 0.0])

    def quadratic(w, batch):
        return 0.5 * jnp.sum(curvatures * w**2) + (0.0 if batch is None else jnp.sum(batch["x"].mean(axis=0) * w))

    w = jnp.zeros(3)
    target = LocalPosterior(quadratic, w, 30.0, 2.0)
    settings = {"num_chains": 4, "num_draws": 50, "thinning": 10, "progress": False}
    for batches in (FullBatch(None), Minibatches(DATA, 8)):
        with pytest.raises(InputError, match=r"all 4 chains became non-finite: step_size 0.05 is above the limit") as caught:
            sample(key, build(target, 0.05), w, batches, **settings)
        limit = float(re.search(r"= ([\d.e-]+), as the chains' own", str(caught.value))[1])
        # Seen at 30 times the heat, w^2 = 90 / 122 along the stiffest direction: others have a share of 2 / 30 at most, and
        # gradient noise of variance 30^2 / 8 shifts c w + noise by a tenth, in the median of 4 chains by about .06.
        scatter = 0.0 if batches.data is None else 4 * 0.06
        assert (0.999 - scatter) * 4 / 122 <= limit < (1.1 + scatter) * 4 / 122
        stable = sample(key, build(target, 0.03), w, batches, **settings)
        assert stable.is_finite.all()
        assert stability_warning(build(target, 0.03), stable.stiffness, 500) is None


def test_hot_chain_that_never_overflows_is_named_too(key):
    curvatures, w = jnp.array([4.0, 1.0, 0.0]), jnp.zeros(3)
    saturating = LocalPosterior(lambda w, batch: jnp.sum(4 * (jnp.sqrt(1 + curvatures * w**2) - 1)), w, 30.0, 2.0)
    hot = sample(key, SGLD(saturating, 0.02), w, FullBatch(None), num_chains=4, num_draws=50, thinning=10, progress=False)
    assert hot.is_finite.all()
    assert any("above the limit of stability" in warning for warning in llc(hot, 0.0).warnings)


@pytest.mark.slow
def test_schedule_is_followed_step_by_step(key):
    schedule = optax.exponential_decay(1e-3, transition_steps=5, decay_rate=0.5)
    target = LocalPosterior(loss_fn, PARAMS, 20.0, 2.0)
    settings = {"num_chains": 2, "num_draws": 12, "collect": keep_params, "progress": False, "num_warmup": 2, "num_burnin": 1}
    draws = sample(key, SGLD(target, schedule), PARAMS, FullBatch(DATA), **settings)
    for t in (0, 4, 11):
        fixed = SGLD(target, float(schedule(3 + t)))
        before = jax.tree.map(lambda x, t=t: x[0, t], draws.collected)
        if t < 11:
            after = jax.tree.map(lambda x, t=t: x[0, t + 1], draws.collected)
            step_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, 0), 3 + t))[1]
            made = jax.jit(lambda kernel, w, key: kernel.step(key, kernel.init(key, w, None), DATA)[0].params)(
                fixed, before, step_key
            )
            np.testing.assert_allclose(made["kernel"], after["kernel"], rtol=1e-5)


def test_xarray_and_arviz_read_the_draws(key):
    draws = run(key, num_draws=50)
    dataset = draws.to_xarray()
    assert dataset["collected.kernel"].dims == ("chain", "draw", "collected.kernel_dim_0", "collected.kernel_dim_1")
    np.testing.assert_array_equal(dataset["loss"], draws.loss)
    assert dataset.attrs == {"num_warmup": 0, "num_burnin": 7, "thinning": 3}
    assert "acceptance" not in dataset
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # arviz announces its next version on import
        import arviz
    assert float(arviz.ess(dataset)["loss"]) == pytest.approx(bulk_ess(draws.loss), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("lasting", range(1, 11, 3))
def test_run_interrupted_in_warm_up_burn_in_or_draws_goes_on_bit_for_bit(key, tmp_path, monkeypatch, lasting):
    settings = {"num_warmup": 9, "num_burnin": 7, "num_draws": 12, "chunk_size": 4}
    save, saved = Checkpoints.save, []

    def save_until(self, *args):
        if len(saved) == lasting:
            raise KeyboardInterrupt
        save(self, *args)
        saved.append(args[0])

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_until)
        with pytest.raises(KeyboardInterrupt):
            run(key, **settings, checkpoint=tmp_path / "run")
    assert_same(run(key, **settings), run(key, **settings, checkpoint=tmp_path / "run"))


def test_draws_without_their_state_or_cut_short_are_refused_and_kept(key, tmp_path):
    run(key, checkpoint=tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "state")
    with pytest.raises(InputError, match="holds draws of a run whose state is gone"):
        run(key, checkpoint=tmp_path / "run")
    assert read_draws(tmp_path / "run")["loss"].shape == (4, 30)
    run(key, checkpoint=tmp_path / "other")
    file = tmp_path / "other" / "draws" / "loss.npy"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(InputError, match=r"loss\.npy is damaged"):
        run(key, checkpoint=tmp_path / "other")


def test_another_schedule_is_another_run_and_the_same_one_compiles_once(key, tmp_path):
    def go(schedule, **settings):
        kernel = SGLD(LocalPosterior(loss_fn, PARAMS, 20.0, 2.0), schedule)
        return sample(key, kernel, PARAMS, FullBatch(DATA), num_chains=2, num_draws=8, progress=False, **settings)

    schedule, other = (optax.exponential_decay(rate, 5, 0.5) for rate in (1e-3, 1e-4))
    go(schedule, checkpoint=tmp_path / "run")
    before = advance._cache_size()
    go(schedule)
    assert advance._cache_size() == before
    with pytest.raises(InputError, match="another run"):
        go(other, checkpoint=tmp_path / "run")


def test_precision_is_not_reached_by_chains_that_have_not_moved(key):
    constant = run(key, lambda params, batch: 0.0 * params["bias"][0], batches=FullBatch(None), precision=1e-9, check_every=1)
    assert constant.loss.shape == (4, 30)
    assert run(key, precision=1e9, check_every=1).loss.shape == (4, 8)


def test_stuck_metropolis_chain_in_a_box_is_not_called_ok(key):
    target = LocalPosterior(lambda w, batch: 0.5 * jnp.sum(w**2), jnp.zeros(3), 1e6, Box(-1.0, 1.0))
    draws = sample(key, HMC(target, 10.0), jnp.zeros(3), FullBatch(None), num_chains=4, num_draws=20, progress=False)
    estimate = llc(draws, 0.0)
    assert estimate.status == "do not trust"
    assert "of the moves are accepted" in estimate.warnings[0]
    assert "the virial check does not apply to a bounded base measure" in estimate.warnings


@pytest.mark.parametrize(
    ("build", "settings", "message"),
    [
        (HMC, {"num_leapfrog": 0}, "num_leapfrog of HMC must be above 0"),
        (HMC, {"target_acceptance": 1.0}, "target_acceptance of HMC must be above 0 and below 1, but is 1.0"),
        (SGHMC, {"friction": 0.0}, "friction of SGHMC must be above 0"),
    ],
)
def test_hyperparameter_out_of_range_is_refused(key, build, settings, message):
    kernel = build(LocalPosterior(loss_fn, PARAMS, 20.0, 2.0), 1e-3, **settings)
    with pytest.raises(InputError, match=message):
        sample(key, kernel, PARAMS, FullBatch(DATA), num_chains=1, num_draws=1, progress=False)


def test_other_nbeta_step_size_and_counts_compile_nothing(key):
    traces = []

    def counting(params, batch):
        traces.append(1)
        return loss_fn(params, batch)

    before = advance._cache_size()
    for nbeta in (1.0, 20.0, 50.0):
        run(key, counting, nbeta=nbeta)
        first = first if nbeta > 1 else len(traces)
    compiled = advance._cache_size()
    assert compiled == before + 1
    kernel = SGLD(LocalPosterior(counting, PARAMS, 3.0, 1.0), 2e-4)
    settings = {"num_chains": 4, "collect": keep_params, "progress": False, "chunk_size": 3}
    sample(key, kernel, PARAMS, Minibatches(DATA, 16), num_draws=8, num_burnin=50, thinning=2, **settings)
    assert (len(traces), advance._cache_size()) == (first, compiled)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):
        return self.dense(x)


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(1, name="dense")(x)


def squared_error(predict, params, batch):
    return jnp.mean((predict(params, batch["x"]) - batch["y"][:, None]) ** 2)


@pytest.mark.slow
def test_dict_nnx_and_linen_parameters_give_the_same_chain_bit_for_bit(key):
    graph, state = nnx.split(NnxModel(nnx.Rngs(0)), nnx.Param)
    plain = {"dense": nnx.to_pure_dict(state)["dense"]}
    linen_model = LinenModel()
    forms = {
        "dict": (lambda p, x: x @ p["dense"]["kernel"] + p["dense"]["bias"], plain),
        "nnx": (lambda p, x: nnx.merge(graph, p)(x), state),
        "linen": (lambda p, x: linen_model.apply(p, x), {"params": plain}),
    }
    runs = {name: run(key, functools.partial(squared_error, predict), params) for name, (predict, params) in forms.items()}
    assert_same(runs["dict"], runs["nnx"])
    assert_same(runs["dict"], runs["linen"])


@pytest.mark.slow
def test_equinox_parameters_give_the_same_law(key):
    params, static = eqx.partition(eqx.nn.Linear(3, 1, key=key), eqx.is_inexact_array)

    def predict(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    plain = {"kernel": params.weight.T, "bias": params.bias}
    settings = {"num_chains": 32, "num_draws": 200, "num_burnin": 400, "thinning": 10, "batches": FullBatch(DATA)}
    ours = run(key, functools.partial(squared_error, predict), params, **settings).loss
    dicts = run(jax.random.key(5), loss_fn, plain, **settings).loss
    error = np.hypot(std_error(ours), std_error(dicts))
    assert abs(ours.mean() - dicts.mean()) < 4 * error


def test_bf16_model_keeps_float32_positions(key):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    draws = run(key, params=params)
    assert draws.collected["kernel"].dtype == np.float32
    # Steps are far below bf16's spacing of 2^-8 at 1, and still add up.
    assert len(np.unique(draws.collected["kernel"][0, :, 0, 0])) == 30


def walled(params, batch):
    """Finite on one side of a wall that some of the chains cross."""
    return jnp.sum(jnp.where(params["kernel"] > 1.12, jnp.nan, 0.0)) + 0.5 * jnp.sum(params["kernel"] ** 2)


def test_non_finite_chain_is_marked_reported_and_left_out(key):
    draws = run(key, walled, num_chains=16, batches=FullBatch(None))
    assert 0 < draws.is_finite.sum() < 16, "the wall is meant to be crossed by some chains"
    estimate = llc(draws, 1.5)
    assert len(estimate.per_chain) == draws.is_finite.sum()
    np.testing.assert_allclose(estimate.llc, 20.0 * (draws.loss[draws.is_finite].astype(float) - 1.5).mean())
    assert estimate.status == "do not trust"
    assert f"{(~draws.is_finite).sum()} of 16 chains became non-finite" in estimate.warnings[0]


def test_no_finite_chain_is_an_error_that_names_the_step_size(key):
    kernel = SGLD(LocalPosterior(lambda p, b: jnp.sum(p["kernel"] ** 4), PARAMS, 1.0, 1.0), 10.0)
    with pytest.raises(InputError, match=r"all 4 chains became non-finite: step_size 10 is above the limit of stability, 4 / "):
        sample(key, kernel, PARAMS, FullBatch(None), num_chains=4, num_draws=100, progress=False)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"num_chains": 0}, InputError, "num_chains must be a whole number of at least 1, but is 0"),
        ({"num_chains": 2.0}, InputError, "num_chains must be a whole number of at least 1, but is 2.0"),
        ({"num_draws": -1}, InputError, "num_draws must be a whole number of at least 0"),
        ({"thinning": 0}, InputError, "thinning must be a whole number of at least 1"),
        ({"num_burnin": -1}, InputError, "num_burnin must be a whole number of at least 0"),
        ({"chunk_size": 0}, InputError, "chunk_size must be a whole number of at least 1"),
        ({"step_size": 0.0}, InputError, "step_size must be positive, but is 0.0"),
        ({"nbeta": -1.0}, InputError, "nbeta must be finite and not negative"),
        ({"batches": Minibatches(DATA, 61)}, InputError, "a batch of 61 examples"),
        ({"params": {"kernel": jnp.arange(3)}}, TypeError, r"center must be a pytree of floating arrays.*kernel.*int32"),
    ],
)
def test_bad_input_gets_one_clear_sentence(key, settings, kind, message):
    with pytest.raises(kind, match=message) as caught:
        run(key, **settings)
    assert "\n" not in str(caught.value)


def test_old_style_key_is_refused():
    with pytest.raises(TypeError, match=r"typed PRNG key, as jax\.random\.key\(0\)"):
        run(jax.random.PRNGKey(0))

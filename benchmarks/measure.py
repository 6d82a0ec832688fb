"""The measurements of `sampler_throughput.py`, one section per process: `python measure.py SECTION CORE...`.

A section reads its settings as JSON from standard input and writes what it found as the last line of standard output.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array
from workloads import WORKLOADS, Workload, small_mlp

from slt_interp import (
    HMC,
    MALA,
    NUTS,
    SGHMC,
    SGLD,
    SGNHT,
    FullBatch,
    LocalPosterior,
    RMSPropSGLD,
    chain_mesh,
    keep_params,
    sample,
)
from slt_interp.samplers.chains import choose_block_size
from slt_interp.samplers.draws import keep_nothing
from slt_interp.samplers.kernel import Kernel

NUTS_DEPTH = 4

# The leapfrog step is the square root of SGLD's epsilon.
KERNELS: dict[str, Callable[[LocalPosterior, float], Kernel]] = {
    "SGLD": SGLD,
    "SGLD-LM": partial(SGLD, leimkuhler_matthews=True),
    "RMSPropSGLD": RMSPropSGLD,
    "SGHMC": SGHMC,
    "SGNHT": SGNHT,
    "MALA": MALA,
    "HMC": lambda target, step_size: HMC(target, step_size**0.5),
    "NUTS": lambda target, step_size: NUTS(target, step_size**0.5, max_tree_depth=NUTS_DEPTH),
}

Run = Callable[[], tuple[float, float]]
"""Do some work, and return how much it was and how many seconds it took."""


def throughput(settings: dict[str, Any]) -> dict[str, Any]:
    """Measure gradients per second of bare loops, kernels and peers on every workload."""
    found = {}
    peer = _start_peer(settings["peer_python"]) if settings["peer_python"] else None
    for name in settings["workloads"]:
        workload = WORKLOADS[name]()
        found[name] = _compare(workload, settings, partial(_ask, peer, workload, name, settings) if peer else None)
    if peer is not None:
        peer.stdin.close()
        peer.wait()
    return found


def scaling(settings: dict[str, Any]) -> dict[str, Any]:
    """Measure SGLD on the 850-parameter network with more and more chains, until the device is full."""
    workload, found = small_mlp(), {}
    for data, batches in (("batch of 64", workload.minibatches()), ("full batch of 2048", FullBatch(workload.data))):
        kernel = SGLD(workload.target(), settings["step_size"])
        found[data] = {}
        for num_chains in settings["scaling_chains"]:
            run = partial(_run_sample, kernel, workload, batches, num_chains, settings["scaling_draws"])
            try:
                compile_seconds, rates = run()[1], [run() for _ in range(settings["repetitions"])]
            except jax.errors.JaxRuntimeError as error:
                found[data][str(num_chains)] = {"failed": str(error).splitlines()[0]}
                break
            found[data][str(num_chains)] = _summary(rates) | {"first_call_seconds": compile_seconds}
    return found


def second_call(settings: dict[str, Any]) -> dict[str, Any]:
    """Measure what another nbeta and step size cost, and whether the loss is traced again."""
    workload, traces = WORKLOADS["mlp"](), []

    def loss_fn(params: Any, batch: Any) -> Array:
        traces.append(1)
        return workload.loss_fn(params, batch)

    seconds, traced = [], []
    for nbeta, step_size in ((workload.nbeta, settings["step_size"]), (10.0, settings["step_size"] / 2), (20.0, 1e-5)):
        kernel = SGLD(LocalPosterior(loss_fn, workload.params, nbeta, 100.0), step_size)
        before = len(traces)
        seconds.append(_run_sample(kernel, workload, workload.minibatches(), workload.num_chains, 1)[1])
        # Checks trace the loss for its shape, outside the compiled program; a retrace would show as more of them.
        traced.append(len(traces) - before)
    return {"seconds": seconds, "times_loss_fn_was_called_by_python": traced}


def first_step(settings: dict[str, Any]) -> dict[str, Any]:
    """Measure a process from its imports to the end of its first step, with a persistent compilation cache."""
    start = time.perf_counter()
    workload = WORKLOADS[settings["workload"]]()
    ready = time.perf_counter()
    kernel = SGLD(workload.target(), settings["step_size"])
    _run_sample(kernel, workload, workload.minibatches(), workload.num_chains, 1)
    return {"data_and_weights_seconds": ready - start, "first_step_seconds": time.perf_counter() - ready}


def memory(settings: dict[str, Any]) -> dict[str, Any]:
    """Measure how much resident memory a long run adds, with and without weights kept."""
    workload = small_mlp()
    kernel = SGLD(workload.target(), settings["step_size"])
    num_draws = settings["memory_steps"] // settings["thinning"]
    chunk = -(-num_draws // 20)
    found = {}
    for name, collect in (("scalars", keep_nothing), ("weights", keep_params), ("weights on disk", keep_params)):
        with tempfile.TemporaryDirectory() as folder:
            run = partial(
                sample,
                jax.random.key(0),
                kernel,
                workload.params,
                workload.minibatches(),
                num_chains=1,
                thinning=settings["thinning"],
                chunk_size=chunk,
                collect=collect,
                progress=False,
            )
            on_disk = "disk" in name
            # One chunk of the long run, so that its program and buffers are there already.
            run(num_draws=chunk, checkpoint=Path(folder) / "first" if on_disk else None)
            before = _resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")
            start = time.perf_counter()
            draws = run(num_draws=num_draws, checkpoint=Path(folder) / "second" if on_disk else None)
            found[name] = {
                "steps": num_draws * settings["thinning"],
                "seconds": time.perf_counter() - start,
                "draws_bytes": sum(x.nbytes for x in jax.tree.leaves((draws.info, draws.collected))),
                "growth_bytes": _resident("VmRSS") - before,
                "peak_growth_bytes": _resident("VmHWM") - before,
            }
            del draws
    return found


def _compare(workload: Workload, settings: dict[str, Any], ask: Callable[[str, int], tuple[float, float]] | None) -> dict:
    mesh = chain_mesh(workload.num_chains) if settings["use_mesh"] else None
    bare, chains = _bare(workload, mesh), workload.num_chains
    flops = _flops(workload)
    compile_seconds = {"bare": bare(1)[1]}
    pilot = bare(3)
    gradients = max(2 * chains, int(pilot[0] / pilot[1] * settings["seconds"]))
    runs: dict[str, Run] = {"matmul": _matmul, "bare": partial(bare, -(-gradients // chains))}
    for name in settings["kernels"]:
        kernel = KERNELS[name](workload.target(), settings["step_size"])
        batches = workload.full_batch() if kernel.full_batch else workload.minibatches()
        per_step = {"HMC": 8, "NUTS": 2**NUTS_DEPTH - 1}.get(name, 1)
        num_draws = -(-gradients // (chains * per_step))
        runs[name] = partial(_run_sample, kernel, workload, batches, chains, num_draws, mesh)
        compile_seconds[name] = runs[name]()[1]
    if ask is not None:
        for name in ("torch", "devinterp"):
            pilot = ask(name, 10 * chains)
            runs[name] = partial(ask, name, max(2 * chains, int(pilot[0] / pilot[1] * settings["seconds"])))
    rates: dict[str, list] = {name: [] for name in runs}
    _matmul()
    for _ in range(settings["repetitions"]):
        for name, run in runs.items():
            rates[name].append(run())
    summaries = {name: _summary(pairs) for name, pairs in rates.items()}
    # Repetition by repetition, so that a slow moment of the machine hits both sides.
    cost = {name: _ratio(rates["bare"], pairs) for name, pairs in rates.items() if name not in ("matmul", "bare")}
    matmul = summaries.pop("matmul")
    for name in compile_seconds:
        work, seconds = rates[name][-1]
        compile_seconds[name] = max(0.0, compile_seconds[name] - (seconds if name != "bare" else chains * seconds / work))
    return {
        "num_parameters": sum(x.size for x in jax.tree.leaves(workload.params)),
        "num_examples": workload.num_examples,
        "batch_size": workload.batch_size,
        "num_chains": chains,
        "flops_per_gradient": flops,
        "devices": 1 if mesh is None else mesh.size,
        "matmul_gigaflops": {key: matmul[key] for key in ("median", "low", "high")},
        "gradients_per_second": summaries,
        "seconds_per_gradient_over_bare": cost,
        "share_of_matmul_rate": {k: v["median"] * flops / 1e9 / matmul["median"] for k, v in summaries.items()},
        "compile_seconds": compile_seconds,
    }


def _bare(workload: Workload, mesh: jax.sharding.Mesh | None) -> Callable[[int], tuple[float, float]]:
    """Make gradient descent with a tiny step: the same chains, keys, minibatches and blocks as `sample`, nothing else."""
    chains = workload.num_chains
    per_device = chains // (1 if mesh is None else mesh.size)
    batches = workload.minibatches()
    shapes = jax.eval_shape(batches, jax.random.key(0))
    block = choose_block_size(per_device, None, workload.target(), workload.params, shapes)

    def one_chain(batches: Any, params: Any, num_steps: Array, key: Array) -> Any:
        def one_step(t: Array, carry: Any) -> Any:
            params, total = carry
            batch_key, _ = jax.random.split(jax.random.fold_in(key, t))
            loss, gradient = jax.value_and_grad(workload.loss_fn)(params, batches(batch_key))
            return jax.tree.map(lambda w, g: w - 1e-6 * g, params, gradient), total + loss

        return jax.lax.fori_loop(0, num_steps, one_step, (params, jnp.zeros(())))

    def all_chains(keys: Array, shared: tuple) -> Any:
        return jax.lax.map(partial(one_chain, *shared), keys, batch_size=None if block == 1 else block)

    run = all_chains
    if mesh is not None:
        run = jax.shard_map(run, mesh=mesh, check_vma=False, in_specs=(P("chain"), P()), out_specs=P("chain"))
    run = jax.jit(run)
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(0)))(jnp.arange(chains))

    def timed(num_steps: int) -> tuple[float, float]:
        start = time.perf_counter()
        jax.block_until_ready(run(keys, (batches, workload.params, jnp.asarray(num_steps))))
        return chains * num_steps, time.perf_counter() - start

    return timed


def _run_sample(
    kernel: Kernel,
    workload: Workload,
    batches: Any,
    num_chains: int,
    num_draws: int,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[float, float]:
    """Time `sample` from call to return, in one chunk, as long as those of long runs; its draws are on the host by then."""
    start = time.perf_counter()
    draws = sample(
        jax.random.key(0),
        kernel,
        workload.params,
        batches,
        num_chains=num_chains,
        num_draws=num_draws,
        chunk_size=num_draws,
        mesh=mesh,
        progress=False,
    )
    seconds = time.perf_counter() - start
    if not draws.is_finite.all():
        raise RuntimeError(f"{type(kernel).__name__} diverged at step size {kernel.step_size}: give a smaller --step-size")
    return float(draws.num_gradients.sum()), seconds


def _matmul() -> tuple[float, float]:
    """Multiply float32 matrices of size 1024 for a while, in units of 1e9 operations."""
    x, count = jnp.ones((1024, 1024)), 5 if jax.default_backend() == "cpu" else 500
    start = time.perf_counter()
    jax.block_until_ready(_multiply(x, count))
    return count * 2 * 1024**3 / 1e9, time.perf_counter() - start


@jax.jit
def _multiply(x: Array, count: int) -> Array:
    return jax.lax.fori_loop(0, count, lambda _, y: x @ y / 1024, x)


def _flops(workload: Workload) -> float:
    """Ask XLA how many operations one gradient is."""
    batch = jax.eval_shape(workload.minibatches(), jax.random.key(0))
    analysis = jax.jit(jax.value_and_grad(workload.loss_fn)).lower(workload.params, batch).compile().cost_analysis()
    return float((analysis or {}).get("flops", float("nan")))


def _start_peer(python: str) -> subprocess.Popen:
    script = str(Path(__file__).with_name("peer.py"))
    return subprocess.Popen([python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sys.stderr, text=True)


def _ask(peer: subprocess.Popen, workload: Workload, name: str, settings: dict, rival: str, num_gradients: int) -> Any:
    request = {
        "workload": name,
        "rival": rival,
        "num_gradients": num_gradients,
        "num_chains": workload.num_chains,
        "batch_size": workload.batch_size,
        "nbeta": workload.nbeta,
        "step_size": settings["step_size"],
    }
    peer.stdin.write(json.dumps(request) + "\n")
    peer.stdin.flush()
    line = peer.stdout.readline()
    if not line:
        raise RuntimeError(f"{rival} ended without an answer on {name}: what it said is above")
    answer = json.loads(line)
    return answer["gradients"], answer["seconds"]


def _summary(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    rates = [work / seconds for work, seconds in pairs]
    return {"median": statistics.median(rates), "low": min(rates), "high": max(rates), "repetitions": rates}


def _ratio(bare: list[tuple[float, float]], rival: list[tuple[float, float]]) -> float:
    return statistics.median((seconds / work) / (s / w) for (w, s), (work, seconds) in zip(bare, rival, strict=True))


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(f"{field}:")))


SECTIONS = {
    "throughput": throughput,
    "scaling": scaling,
    "second_call": second_call,
    "first_step": first_step,
    "memory": memory,
}

if __name__ == "__main__":
    # Before JAX starts its threads, which then stay on these cores.
    os.sched_setaffinity(0, {int(core) for core in sys.argv[2:]})
    section = SECTIONS[sys.argv[1]]
    if cache := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    print(json.dumps(section(json.load(sys.stdin))))

"""How accurate the stochastic spectrum is where the whole one is known, and what leading eigenvalues of a large network cost.

    python benchmarks/curvature_scale.py {default | smoke} [--out DIR] [--help for every setting]

`spectra`: prescribed eigenvalues, default settings, the Gaussian LLC against its exact value at several localization / nbeta.
`network`: the leading eigenpairs of a tanh network's Hessian, all examples at once and in blocks, each in a process of its own:
eigenvalues, residuals, seconds and the resident memory that the computation added; beside them LOBPCG of JAX for a few pairs.
"""

import dataclasses
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental.sparse.linalg import lobpcg_standard

from slt_interp import estimate_spectrum, hvp, top_eigenpairs
from slt_interp.storage import RunDirectory, open_run
from slt_interp.tree import dimension


@dataclass(frozen=True)
class Config:
    """What is measured."""

    dimensions: tuple[int, ...] = (3000, 20_000)
    """Of the prescribed spectra."""
    ratios: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    """localization / nbeta over the largest eigenvalue."""
    widths: tuple[int, ...] = (64, 960, 960, 10)
    """Of the network."""
    num_examples: int = 2048
    num_pairs: int = 50
    block_sizes: tuple[int, ...] = (2048, 256)
    num_peer_pairs: int = 5
    """Of LOBPCG, which holds four vectors for each."""


SMOKE = Config(
    dimensions=(2500,), ratios=(1e-2,), widths=(4, 8, 2), num_examples=64, num_pairs=3, block_sizes=(64, 16), num_peer_pairs=2
)


def spectra(size: int) -> dict[str, np.ndarray]:
    """Prescribe eigenvalues: of low rank, over many decades, all alike."""
    found = {
        "rank 10, all equal": np.ones(10),
        "rank 100, all equal": np.ones(100),
        "rank 100 over four decades": np.geomspace(1e-3, 10.0, 100),
        "rank 1000 over six decades": np.geomspace(1e-6, 1.0, 1000),
        "power law, exponent 3/2": np.arange(1.0, size + 1) ** -1.5,
        "full rank over eight decades": np.geomspace(1e-8, 1.0, size),
        "identity": np.ones(size),
        "20 outliers and a bulk of half the dimension": np.r_[np.geomspace(1.0, 100.0, 20), np.linspace(1e-3, 2e-2, size // 2)],
    }
    return {name: np.r_[values, np.zeros(size - len(values))] for name, values in found.items()}


def main(config: Config, out: Path) -> RunDirectory:
    """Run both sections, and write what was found."""
    run = open_run(out, {"benchmark": "curvature_scale", "settings": dataclasses.asdict(config)})
    results: dict[str, Any] = {"spectra": [], "network": []}
    for size in config.dimensions:
        print(f"spectra in {size} dimensions", file=sys.stderr, flush=True)
        found, _ = run.stage(f"spectra {size}", lambda size=size: ({"rows": _measure_spectra(config, size)}, {}))
        results["spectra"] += found["rows"]
    for block_size in config.block_sizes:
        print(f"network, {block_size} examples at once", file=sys.stderr, flush=True)
        found, _ = run.stage(f"network {block_size}", lambda block_size=block_size: (_elsewhere(config, block_size), {}))
        results["network"].append(found)
    found, _ = run.stage("network LOBPCG", lambda: (_elsewhere(config, None), {}))
    results["network"].append(found)
    run.finish(results)
    return run


def table(results: dict[str, Any]) -> str:
    """Lay the results out for reading."""
    lines = ["d, spectrum: (estimate / exact - 1, its standard error) in percent at each localization / nbeta"]
    for row in results["spectra"]:
        cells = "  ".join(f"{ratio:g}: {100 * off:+.2f} ({100 * bar:.2f})" for ratio, off, bar in row["errors"])
        lines.append(f"{row['dimension']:6} {row['spectrum']:44} {cells}  {row['num_probes']} probes, {row['seconds']:.1f} s")
    for row in results["network"]:
        lines.append(
            f"{row['method']}, {row['block_size']} of {row['num_examples']} examples at once, d = {row['dimension']}: "
            f"{len(row['values'])} pairs from {row['values'][0]:.5g} to {row['values'][-1]:.5g}, largest residual "
            f"{max(row['residuals']):.2g}, {row['seconds']:.0f} s, {row['mebibytes']:.0f} MiB"
        )
    return "\n".join(lines)


def _quadratic(w: Any, batch: Any) -> Any:
    return 0.5 * jnp.sum(batch[0] * w**2)


def _measure_spectra(config: Config, size: int) -> list[dict[str, Any]]:
    rows = []
    for name, values in spectra(size).items():
        start = time.perf_counter()
        spectrum = estimate_spectrum(jax.random.key(0), _quadratic, jnp.zeros(size), jnp.asarray(values, jnp.float32)[None])
        seconds = time.perf_counter() - start
        errors = []
        for ratio in config.ratios:
            scale = ratio * values.max()
            exact = 0.5 * np.sum(values / (values + scale))
            estimate, std_error = spectrum.llc(1 / scale, 1.0)
            errors.append((ratio, estimate / exact - 1, std_error / exact))
        rows.append(
            {"dimension": size, "spectrum": name, "errors": errors, "num_probes": len(spectrum.weights), "seconds": seconds}
        )
    return rows


def _elsewhere(config: Config, block_size: int | None) -> dict[str, Any]:
    """Measure in a process of its own, so that its memory is."""
    asked = json.dumps({"config": dataclasses.asdict(config), "block_size": block_size})
    done = subprocess.run([sys.executable, __file__, "network"], input=asked, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measure_network(config: Config, block_size: int | None) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), len(config.widths) + 2)
    pairs = zip(keys, config.widths[:-1], config.widths[1:], strict=False)
    params = [jax.random.normal(key, (before, after)) / before**0.5 for key, before, after in pairs]
    inputs = jax.random.normal(keys[-1], (config.num_examples, config.widths[0]))

    def apply(params: Any, inputs: Any) -> Any:
        for weights in params[:-1]:
            inputs = jnp.tanh(inputs @ weights)
        return inputs @ params[-1]

    labels = jnp.argmax(
        apply([1.1 * w for w in params], inputs) + jax.random.gumbel(keys[-2], (config.num_examples, 1)), axis=1
    )

    def loss_fn(params: Any, batch: Any) -> Any:
        inputs, labels = batch
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(apply(params, inputs)), labels[:, None], 1))

    data = (inputs, labels)
    jax.block_until_ready(hvp(loss_fn, params, (inputs[:1], labels[:1]), params))
    before, start = _peak(), time.perf_counter()
    if block_size is None:
        flat, unravel = jax.flatten_util.ravel_pytree(params)

        def matmat(vectors: Any) -> Any:
            # LOBPCG takes a function and no arguments of it: without a barrier XLA computes at compile time what depends on
            # these alone, for minutes.
            fixed = jax.lax.optimization_barrier((params, data))
            products = jax.lax.map(lambda v: jax.flatten_util.ravel_pytree(hvp(loss_fn, *fixed, unravel(v)))[0], vectors.T)
            return products.T

        starts = jax.random.normal(keys[0], (flat.size, config.num_peer_pairs))
        # Its tolerance is relative to about 20 d times the eigenvalue: by default it stops at once where d is large.
        values, vectors, iterations = lobpcg_standard(matmat, starts, m=100, tol=_CONVERGED / (20 * flat.size))
        images = matmat(vectors)
        residuals, iterations = jnp.linalg.norm(images - vectors * values, axis=0), int(iterations)
    else:
        iterations = None
        values, _, residuals = top_eigenpairs(keys[0], loss_fn, params, data, config.num_pairs, block_size=block_size)
    return {
        "method": "LOBPCG" if block_size is None else "top_eigenpairs",
        "block_size": block_size or config.num_examples,
        "num_examples": config.num_examples,
        "dimension": dimension(params),
        "values": np.asarray(values).tolist(),
        "residuals": np.asarray(residuals).tolist(),
        "iterations": iterations,
        "seconds": time.perf_counter() - start,
        "mebibytes": _peak() - before,
    }


_CONVERGED = 1e-3
"""The relative residual that `top_eigenpairs` ends at, asked of its rival."""


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


@dataclass(frozen=True)
class _Arguments:
    config: tyro.conf.OmitArgPrefixes[Config]
    out: Path
    """Run directory. An unfinished one goes on after its last section."""


if __name__ == "__main__":
    if sys.argv[1:] == ["network"]:
        asked = json.load(sys.stdin)
        config = Config(**{name: tuple(x) if isinstance(x, list) else x for name, x in asked["config"].items()})
        print(json.dumps(_measure_network(config, asked["block_size"])))
        sys.exit()
    folder = Path("runs") / "curvature_scale"
    presets = {
        "default": ("Everything.", _Arguments(Config(), folder)),
        "smoke": ("See in a minute that it works.", _Arguments(SMOKE, folder)),
    }
    arguments = tyro.extras.overridable_config_cli(presets, description=__doc__)
    print(table(main(arguments.config, arguments.out).results))

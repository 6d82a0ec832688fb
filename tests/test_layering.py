"""A room imports only from its own package and from lower floors."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "slt_interp"

FLOORS = {
    "errors": 0,
    "noise": 0,
    "tree": 0,
    "data": 0,
    "taps": 0,
    "storage": 0,
    "bases": 1,
    "posterior": 1,
    "analytic": 1,
    "models": 1,
    "tasks": 1,
    "samplers": 2,
    "curvature": 2,
    "training": 2,
    "estimators": 3,
    "probes": 3,
    "degradation": 4,
    "studies": 5,
    "report": 5,
    "cli": 6,
    "__main__": 7,
    "__init__": 7,
}

# Within floor 0 everything may use the errors and the trees.
BELOW = {
    ("data", "errors"),
    ("data", "tree"),
    ("tree", "noise"),
    ("data", "noise"),
    ("posterior", "bases"),
    ("analytic", "bases"),
    ("analytic", "posterior"),
    ("storage", "errors"),
    ("taps", "tree"),
    ("report", "studies"),
}

ONLY_ABOVE_FLOOR_4 = {"matplotlib", "jinja2", "tyro", "platformdirs"}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "slt_interp" else [node.module]
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    here = room(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "slt_interp":
            there = parts[1]
            assert there == here or FLOORS[there] < FLOORS[here] or (here, there) in BELOW, f"{path} imports {name}"
        if parts[0] in ONLY_ABOVE_FLOOR_4:
            assert FLOORS[here] > 4, f"{path} imports {name}"


def test_core_rooms_know_no_models_or_tasks():
    for path in PACKAGE.rglob("*.py"):
        if room(path) in ("samplers", "curvature", "estimators", "probes"):
            assert not any(name.startswith(("slt_interp.models", "slt_interp.tasks")) for name in imports(path)), path


def test_importing_the_package_loads_nothing_heavy():
    heavy = ("flax", "optax", "numpyro", "orbax", "matplotlib", "scipy", "jinja2", "tyro", "matfree")
    code = f"import jax, sys, slt_interp; print([name for name in {heavy} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    before = subprocess.run(
        [sys.executable, "-c", f"import jax, sys; print([name for name in {heavy} if name in sys.modules])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert loaded == before


def test_importing_the_package_does_not_switch_the_compilation_cache_on():
    code = "import slt_interp, jax; print(jax.config.jax_compilation_cache_dir)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "None"

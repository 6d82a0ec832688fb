"""The notebooks run, and beside each lies the executed one with the same cells."""

import os
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

SCRIPTS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_executed_notebook_has_the_cells_of_its_script(script):
    cells = jupytext.read(script).cells
    executed = jupytext.read(script.with_suffix(".ipynb")).cells
    assert [cell.source for cell in executed] == [cell.source for cell in cells]
    for cell in executed:
        if cell.cell_type == "code":
            assert cell.execution_count is not None
            assert not any(output.output_type == "error" for output in cell.outputs)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_notebook_runs_without_a_warning(script, tmp_path):
    settings = {"MAX_GRADIENTS": "400", "MPLBACKEND": "agg", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", script],
        env=os.environ | settings,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr

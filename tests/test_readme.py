import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.slow
def test_notebook_example_runs_as_it_stands(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in example.splitlines() if line]) == 10
    exec(example, {})
    printed = capsys.readouterr().out
    assert re.search(
        r"LLC [\d.]+ \+- [\d.]+ at nbeta 144.8, localization 100 .*\nHessian: [\d.]+$", printed, re.DOTALL | re.MULTILINE
    )


def test_commands_named_in_the_readme_are_there():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)\b", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target

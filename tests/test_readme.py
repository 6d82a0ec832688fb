import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.slow
def test_notebook_examples_run_as_they_stand(capsys):
    first, second, third, probes, fourth = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in first.splitlines() if line]) == 10
    notebook = {}
    exec(first, notebook)
    expected = r"LLC [\d.]+ \+- [\d.]+ at nbeta 144.8, localization [\d.]+ .*\nHessian: [\d.]+$"
    assert re.search(expected, capsys.readouterr().out, re.DOTALL | re.MULTILINE)
    exec(second, notebook)
    assert re.search(r"LLC [\d.]+ \+- [\d.]+ at nbeta 100, localization 100", capsys.readouterr().out)
    exec(third, notebook)
    assert re.search(r"Ladder of \d+ rungs up to nbeta 1000 ", capsys.readouterr().out)
    exec(probes, notebook)
    assert notebook["effects"].shape == (4, 5, 6)
    capsys.readouterr()
    exec(fourth, notebook)
    assert "exact: 50.0" in capsys.readouterr().out


def test_commands_named_in_the_readme_are_there():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)\b", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target

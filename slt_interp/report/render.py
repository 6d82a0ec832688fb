"""From a run directory to one self-contained HTML file."""

import base64
import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from slt_interp.errors import InputError
from slt_interp.report import figures, hierarchical_equality, llc_vs_hessian, planted_illusion
from slt_interp.storage import RunDirectory, read_run

PAGES = {
    "hierarchical-equality": hierarchical_equality.page,
    "llc-vs-hessian": llc_vs_hessian.page,
    "planted-illusion": planted_illusion.page,
}


def render(path: Path) -> Path:
    """Write `report.html` from what a run directory holds, and nothing else.

    Returns:
        The file's path.

    Raises:
        InputError: if the directory is no finished run, or of a study that this version does not know.
    """
    run = read_run(path)
    name = run.config["study"]
    if name not in PAGES:
        raise InputError(f"{path} is a run of {name!r}, but reports are known for {', '.join(PAGES)}: update slt_interp")
    with mpl.rc_context(figures.STYLE):
        page = PAGES[name](run)
        images = [None if section.figure is None else _data_uri(section.figure) for section in page.sections]
    environment = Environment(loader=PackageLoader("slt_interp.report"), autoescape=True, undefined=StrictUndefined)
    html = environment.get_template("report.html").render(
        page=page,
        images=images,
        settings=run.config["settings"],
        environment=run.environment,
        command=command(run),
    )
    target = path / "report.html"
    target.write_text(html)
    return target


def command(run: RunDirectory) -> str:
    """Write the command line that makes this run again: the preset, and every setting that differs from it."""
    from slt_interp.studies import STUDIES

    config = run.config
    words = ["slt-interp", "run", config["study"], "--preset", config["preset"]]
    preset = STUDIES[config["study"]].presets[config["preset"]]
    for name, value in config["settings"].items():
        if _listed(getattr(preset, name)) != _listed(value):
            words += [f"--{name.replace('_', '-')}", *map(str, _listed(value))]
    return " ".join(words)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _data_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()

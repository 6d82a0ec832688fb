"""Copy finished runs of the studies here, as they are bundled: results, report, and one picture for the README.

python benchmarks/bundle_reports.py runs/hierarchical-equality runs/llc-vs-hessian runs/planted-illusion
"""

import shutil
import sys
from pathlib import Path

import matplotlib as mpl

from slt_interp.report import figures
from slt_interp.report.render import PAGES, render
from slt_interp.storage import read_run

REPORTS = Path(__file__).parent / "reports"

PICTURES = {
    "hierarchical-equality": "A circuit along every dial of damage",
    "llc-vs-hessian": "Deep linear networks",
    "planted-illusion": "What each dial tells apart",
}
"""The section whose figure stands for the report, by the start of its title."""


def bundle(path: Path) -> Path:
    """Bundle one finished run."""
    run = read_run(path)
    name = run.config["study"]
    target = REPORTS / name
    target.mkdir(parents=True, exist_ok=True)
    for file in (render(path), *(path / f"{kind}.json" for kind in ("config", "environment", "results"))):
        shutil.copy(file, target / file.name)
    with mpl.rc_context(figures.STYLE):
        section = next(s for s in PAGES[name](run).sections if s.title.startswith(PICTURES[name]))
        assert section.figure is not None, f"{section.title} has no figure"
        section.figure.savefig(target / "picture.png", dpi=120)
    return target


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(bundle(Path(argument)))

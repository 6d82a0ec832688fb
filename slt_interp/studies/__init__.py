"""End-to-end studies: a configuration in, a run directory out."""

from slt_interp.studies import hierarchical_equality, llc_vs_hessian, planted_illusion
from slt_interp.studies.study import PRESETS, Study, check_preset, run_study

STUDIES: dict[str, Study] = {
    study.name: study for study in (hierarchical_equality.STUDY, llc_vs_hessian.STUDY, planted_illusion.STUDY)
}

__all__ = ["PRESETS", "STUDIES", "Study", "check_preset", "run_study"]

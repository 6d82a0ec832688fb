import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slt_interp import calibration_sweep
from slt_interp.errors import InputError

CURVATURE = np.array([4.0, 1.0, 0.25])
GRID = {"step_sizes": [1e-3, 2e-2], "nbetas": [10.0, 100.0], "localizations": [1.0, 10.0]}


def quadratic(w, batch):
    return 0.5 * jnp.sum(CURVATURE * w**2)


@pytest.fixture(scope="module")
def sweep():
    counts = {"num_chains": 16, "num_draws": 500, "num_burnin": 3000, "thinning": 10}
    return calibration_sweep(jax.random.key(0), quadratic, jnp.zeros(3), None, **GRID, **counts)


def test_every_point_has_the_exact_discrete_time_mean_or_is_said_to_diverge(sweep):
    eps, nbeta, gamma = (x[..., None] for x in np.meshgrid(*(np.asarray(v) for v in GRID.values()), indexing="ij"))
    k = nbeta * CURVATURE
    s = k + gamma
    stable = np.all(eps * s < 4, axis=-1)
    exact = np.sum(k / (s * (1 - eps * s / 4)), axis=-1) / 2
    assert (~stable).sum() == 2
    assert (sweep.status[~stable] == "diverged").all()
    assert np.isnan(sweep.llc[~stable]).all()
    assert (np.abs(sweep.llc - exact)[stable] < 4 * sweep.std_error[stable]).all()
    assert (sweep.std_error[stable] < 0.1 * exact[stable]).all()


def test_figure_has_a_panel_for_each_localization_and_a_line_for_each_nbeta(sweep):
    from slt_interp.report.figures import calibration_sweep as plot

    figure = plot(sweep)
    assert [axes.get_title() for axes in figure.axes] == ["localization 1", "localization 10"]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["nbeta 10", "nbeta 100"]


def test_bad_grid_is_one_sentence(key):
    with pytest.raises(InputError, match=r"nbetas must be a list of positive numbers, but is \[0.0\]"):
        calibration_sweep(key, quadratic, jnp.zeros(3), None, **(GRID | {"nbetas": [0.0]}))

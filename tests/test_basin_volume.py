"""Volumes of a basin by two routes, on a loss whose volumes are known."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from slt_interp.bases import Gaussian
from slt_interp.studies.basin_volume import volume_by_two_routes

THRESHOLDS = np.array([0.1, 0.3, 1.0])
SETTINGS = {
    "base": Gaussian(0.0, 1.0),
    "subset": {"num_particles": 100, "num_seeds": 4},
    "tempering": {"num_chains": 4, "num_draws": 100},
    "progress": False,
}


def half_square(w, batch):
    return 0.5 * jnp.sum(w**2)


@pytest.mark.slow
def test_both_routes_are_exact_on_a_quadratic(key):
    found = volume_by_two_routes(key, half_square, jnp.zeros(4), None, THRESHOLDS, num_tempered=2, **SETTINGS)
    exact = stats.chi2(4).logcdf(2 * THRESHOLDS)
    for route, last in (("subset", 3), ("tempering", 2)):
        values, errors = (np.array(found[route][name]) for name in ("log_volume", "std_error"))
        assert len(values) == last
        assert np.all(np.abs(values - exact[-last:]) < 4 * errors)
        assert found[route]["status"] == "ok"


def test_a_route_that_cannot_be_gone_is_refused_with_its_reason(key):
    def nowhere(w, batch):
        return jnp.where(jnp.all(w == 0), jnp.inf, half_square(w, batch))

    found = volume_by_two_routes(key, nowhere, jnp.zeros(4), None, THRESHOLDS, num_tempered=0, **SETTINGS)
    assert found["tempering"] is None
    assert found["subset"]["status"] == "refused"
    assert np.isnan(found["subset"]["log_volume"]).all()
    assert "the loss is not finite at params" in found["subset"]["warnings"][0]

"""Settings that every test shares."""

import os

import jax
import pytest
import scipy.linalg.lapack  # noqa: F401  the BLAS that JAX calls, which limits are set on once it is loaded
import threadpoolctl

# It takes XLA half as long to compile without them, and programs run as fast; newer versions may not know the flag.
if jax.__version_info__ < (0, 11):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"

# Threads of BLAS spin while they wait, and two processes of tests share the cores.
threadpoolctl.threadpool_limits(1, user_api="blas")

# Chains over several devices are tested on forced CPU devices; it must be said before JAX is used.
jax.config.update("jax_num_cpu_devices", 4)


def pytest_configure(config):
    """Ask the compiler for less where it takes most of the time; where slow tests run, all is compiled as it is for users."""
    jax.config.update("jax_disable_most_optimizations", "not slow" in config.option.markexpr)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Keep compiled programs of the command line out of the user's cache, and share them among the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", autouse=True)
def _let_go_of_programs():
    """Drop compiled programs after every file: on a CPU each takes memory maps, of which a process has 65,530."""
    yield
    jax.clear_caches()


@pytest.fixture
def key():
    return jax.random.key(0)

"""Every test sees 8 CPU devices, strict shapes, and a compilation cache shared between runs."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = os.environ.get("SPEC_JAX_TEST_PLATFORM", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest

CACHE = pathlib.Path(__file__).parent.parent / ".cache" / "jax"

jax.config.update("jax_numpy_rank_promotion", "raise")
# On a GPU, float32 products are computed in TF32 by default, which tests of float32 equality are not about.
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_end_with_their_module():
    """Each compiled program keeps memory mapped, and Linux lets a process have 65,530 maps by default."""
    yield
    jax.clear_caches()

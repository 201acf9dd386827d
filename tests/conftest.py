"""Every test sees 8 CPU devices, strict shapes, quick compiles, and a compilation cache shared between runs."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = os.environ.get("SPEC_JAX_TEST_PLATFORM", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Most programs of tests run once, and LLVM's optimiser would take longer than it saves, here and in the processes that
# tests start. Modules whose programs run long have OPTIMISED = True.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import jax
import pytest

CACHE = pathlib.Path(__file__).parent.parent / ".cache" / "jax"

jax.config.update("jax_numpy_rank_promotion", "raise")
# On a GPU, float32 products are computed in TF32 by default, which tests of float32 equality are not about.
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_of_a_module(request: pytest.FixtureRequest):
    """Optimised where the module asks for it, and gone at its end.

    Each compiled program keeps memory mapped, and Linux lets a process have 65,530 maps by default.
    """
    jax.config.update("jax_disable_most_optimizations", not getattr(request.module, "OPTIMISED", False))
    yield
    jax.clear_caches()

"""Every test sees 8 CPU devices, strict shapes, quick compiles, and a compilation cache shared between runs."""

import gc
import os
import pathlib
import signal

os.environ["JAX_PLATFORMS"] = os.environ.get("SPEC_JAX_TEST_PLATFORM", "cpu")
# Most programs of tests run once, and what optimises them would take longer than it saves, here and in the processes
# that tests start. Modules whose programs run long have OPTIMISED = True: a level that compiles in half the time of the
# usual one, and runs a tenth longer. XLA's new emitters of fusions take more than twice as long to compile as the old
# ones, and cutting a program into pieces to compile side by side takes a tenth more time in all, as does keeping where
# in the source each operation is from.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_backend_optimization_level=1",
    ]
)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path(__file__).parent.parent / ".cache" / "jax")
# Small programs too: most of them several modules and both workers have in common.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import pytest

# As at a terminal, here and in the processes that tests start: what runs in the background may have them ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Tracing makes many objects and few cycles: looking for those as often as Python does takes a fourteenth of the time.
# They are looked for when programs are to go, among what was made since here.
gc.set_threshold(100_000, 20, 20)
gc.freeze()

jax.config.update("jax_numpy_rank_promotion", "raise")
# On a GPU, float32 products are computed in TF32 by default, which tests of float32 equality are not about.
jax.config.update("jax_default_matmul_precision", "highest")

# Of the memory that a process has mapped: Linux lets it have 65,530 by default.
MAPS = pathlib.Path("/proc/self/maps")
MANY_MAPS = 20_000


def forget_programs() -> None:
    """Of those that are part of a cycle of objects too, which JAX lets go and Python has yet to find."""
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True, scope="module")
def programs_of_a_module(request: pytest.FixtureRequest):
    """Optimised where the module asks for it, and gone at its end."""
    jax.config.update("jax_disable_most_optimizations", not getattr(request.module, "OPTIMISED", False))
    yield
    forget_programs()


@pytest.fixture(autouse=True)
def dtypes_of_a_test(request: pytest.FixtureRequest):
    """Mixed by nothing in the libraries; optax does, and flax's norm of bfloat16."""
    mixed = request.module.__name__.startswith("tests.experiments.") or request.node.get_closest_marker("mixed_dtypes")
    with jax.numpy_dtype_promotion("standard" if mixed else "strict"):
        yield


@pytest.fixture(autouse=True)
def programs_of_a_test():
    """Gone when there are many: every compiled program keeps memory mapped, and LLVM ends the process at the limit."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY_MAPS:
        forget_programs()

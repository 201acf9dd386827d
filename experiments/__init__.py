"""Training, generation and benchmarks built on `spec_jax` and `moe_jax`."""

from experiments.start import prepare_script

prepare_script()

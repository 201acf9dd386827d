"""Training, generation and benchmarks built on `spec_jax` and `moe_jax`."""

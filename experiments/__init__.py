"""Training, generation and benchmarks built on `spec_jax` and `moe_jax`."""

from experiments.huge_pages import restart_with_huge_pages

restart_with_huge_pages()

"""Mixture-of-experts layers in JAX."""

"""The dtype to compute in."""

import jax
import jax.numpy as jnp


def wide_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """float32, or a wider floating-point dtype itself. As `jnp.promote_types`, which may be told to promote nothing."""
    return dtype if jnp.finfo(dtype).bits > 32 else jnp.dtype(jnp.float32)


def at_least_float32(x: jax.Array) -> jax.Array:
    """In float32, or wider if it is."""
    return x.astype(wide_dtype(x.dtype))

"""Balancing without an auxiliary loss: a bias that steers the choice and never touches the gates.

Where `TopN(bias=True)` routes, after each step of the optimiser:

    moe.router_bias_e[...] = updated_router_bias(moe.router_bias_e[...], out.metrics.load_e)

(Under `jax.jit`, return the module: what changes in an argument is lost otherwise.)
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.checks import array, floating, number

# Loads this close to the mean, relative to it, are at the mean: float32 sums are no more exact.
ROUNDING = 1e-6


class RouterBias(nnx.Variable):
    """The selection bias of a router, (E,) float32. Not an `nnx.Param`: no gradient reaches it.

    An optimiser over `nnx.state(model, nnx.Param)` leaves it alone; one over everything may decay it.
    """


def updated_router_bias(bias_e: jax.Array, load_e: jax.Array, rate: float | jax.Array | np.ndarray = 1e-3) -> jax.Array:
    """The bias for the next step: overloaded experts down by `rate`, underloaded ones up, those at the mean left alone.

    Args:
      bias_e: (E,) float.
      load_e: (E,) each expert's share of the assignments of this step, before capacity (`Metrics.load_e`); over a
        mesh, of all devices.
      rate: step in units of the scores; an array, as of a schedule, is not checked.

    Returns:
      (E,) in the dtype of `bias_e`, a new array.

    Raises:
      ValueError: one is no array, the bias is not floating point, the shapes differ, or `rate` is no finite number of
        at least 0.

    Source: DeepSeek-V3 2412.19437 section 2.1.2; Wang et al. 2408.15664 algorithm 1.
    """
    array("bias_e", bias_e)
    array("load_e", load_e)
    floating("bias_e", bias_e.dtype)
    if not isinstance(rate, jax.Array | np.ndarray):
        number("rate", rate, 0)
    if load_e.shape != bias_e.shape:
        raise ValueError(f"load_e must be {bias_e.shape}, as bias_e is, got {load_e.shape}")
    mean = load_e.mean()
    missing_e = mean - load_e
    # Rounded, the mean of ten shares of a tenth is not a tenth.
    direction_e = jnp.where(jnp.abs(missing_e) > ROUNDING * mean, jnp.sign(missing_e), 0)
    return bias_e + (jnp.asarray(rate, direction_e.dtype) * direction_e).astype(bias_e.dtype)

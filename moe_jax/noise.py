"""The randomness of routing, drawn in one place for all tokens, so that it can be sharded like them."""

import jax
import jax.numpy as jnp
from flax import struct

from moe_jax.config import MoEConfig


@struct.dataclass
class RouterNoise:
    """Random numbers for one call, each None where it is not in use.

    Attributes:
      jitter_td: (T, D) in [1 - jitter, 1 + jitter), multiplies the hidden states.
      gumbel_te: (T, E) scaled Gumbel noise, added to the logits.
      uniform_ta: (T, A) in [0, 1), for the policy "random".
    """

    jitter_td: jax.Array | None = None
    gumbel_te: jax.Array | None = None
    uniform_ta: jax.Array | None = None


def draw_noise(key: jax.Array | None, config: MoEConfig, *, tokens: int, train: bool, dtype: jnp.dtype) -> RouterNoise:
    """Draws what the configuration asks for.

    Args:
      key: a key, or None where nothing random is asked for.
      config: of the layer.
      tokens: T, of all devices together.
      train: jitter and Gumbel noise are for training only. Static.
      dtype: of the numbers.

    Raises:
      ValueError: a key is needed and there is none.
    """
    jitter = config.input_jitter if train else 0.0
    gumbel = config.gumbel_noise if train else 0.0
    draws = config.router.draws(train=train)
    if not (jitter or gumbel or draws):
        return RouterNoise()
    if key is None:
        users = [("input_jitter", jitter), ("gumbel_noise", gumbel), ("the policy 'random'", draws)]
        needed = " and ".join(name for name, used in users if used)
        raise ValueError(f"key must be a PRNG key for {needed}, got None")
    jitter_key, gumbel_key, uniform_key = jax.random.split(key, 3)
    experts, choices = config.num_experts, config.router.num_choices(config.num_experts)
    low, high = 1 - jitter, 1 + jitter
    return RouterNoise(
        jitter_td=jax.random.uniform(jitter_key, (tokens, config.dim), dtype, low, high) if jitter else None,
        gumbel_te=gumbel * jax.random.gumbel(gumbel_key, (tokens, experts), dtype) if gumbel else None,
        uniform_ta=jax.random.uniform(uniform_key, (tokens, choices), dtype) if draws else None,
    )

"""The randomness of routing, drawn in one place for all tokens, so that it can be sharded like them.

A token's numbers depend on how many tokens are before it, padding left out: padding changes nobody's numbers.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

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


def draw_noise(
    key: jax.Array | None,
    config: MoEConfig,
    mask_t: jax.Array | None,
    *,
    tokens: int,
    train: bool,
    dtype: DTypeLike,
) -> RouterNoise:
    """Draws what the configuration asks for.

    Args:
      key: a key, or None where nothing random is asked for.
      config: of the layer.
      mask_t: (T,) bool, false for padding, or None where there is none.
      tokens: T, of all devices together.
      train: jitter and Gumbel noise are for training only. Static.
      dtype: of the numbers.

    Raises:
      ValueError: a key is needed and there is none, or it is something else.
    """
    jitter = config.input_jitter if train else 0.0
    gumbel = config.gumbel_noise if train else 0.0
    draws = config.router.draws(train=train)
    if not (jitter or gumbel or draws):
        return RouterNoise()
    if key is None:
        users = [("input_jitter", jitter), ("gumbel_noise", gumbel), ("the router", draws)]
        needed = " and ".join(name for name, used in users if used)
        raise ValueError(f"key must be a PRNG key for {needed}, got None")
    jitter_key, gumbel_key, uniform_key = jax.random.split(_checked_key(key), 3)
    used_t = jnp.ones(tokens, jnp.int32) if mask_t is None else mask_t.astype(jnp.int32)
    before_t = jnp.cumsum(used_t, dtype=jnp.int32) - used_t

    def drawn(key: jax.Array, draw: Callable[..., jax.Array], size: int) -> jax.Array:
        key_t = jax.vmap(jax.random.fold_in, (None, 0))(key, before_t)
        return jax.vmap(partial(draw, shape=(size,), dtype=dtype))(key_t)

    jittered = partial(jax.random.uniform, minval=1 - jitter, maxval=1 + jitter)
    experts, choices = config.num_experts, config.router.num_choices(config.num_experts)
    return RouterNoise(
        jitter_td=drawn(jitter_key, jittered, config.dim) if jitter else None,
        gumbel_te=gumbel * drawn(gumbel_key, jax.random.gumbel, experts) if gumbel else None,
        uniform_ta=drawn(uniform_key, jax.random.uniform, choices) if draws else None,
    )


def _checked_key(key: jax.Array) -> jax.Array:
    """The key, of `jax.random.key` or the raw numbers of `jax.random.PRNGKey`, as one of the generator that is needed.

    Those of the other generators are folded into one of "threefry2x32", word by word: under `vmap` they draw for all
    from the first key, so that a token's numbers would depend on the padding beside it.
    """
    refusal = ValueError(f"key must be one PRNG key, got {key.shape} {key.dtype}")
    if key.dtype == jnp.uint32:
        try:
            key = jax.random.wrap_key_data(jnp.asarray(key))
        except TypeError:
            raise refusal from None
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.ndim:
        raise refusal
    if str(jax.random.key_impl(key)) == "threefry2x32":
        return key
    folded = jax.random.key(0, impl="threefry2x32")
    for word in jax.random.key_data(key):
        folded = jax.random.fold_in(folded, word)
    return folded

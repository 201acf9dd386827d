"""What the host checks of a decoding request before anything is traced."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from spec_jax.drafters.base import Drafter, LanguageModel
from spec_jax.verification import Verification


def checked_prompt(
    prompt: ArrayLike, prompt_length: ArrayLike | None, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The prompt (B, P) and its lengths (B,), both int32 on the host.

    Raises:
      ValueError: a prompt that is empty, not of rank 2, not integer, or has a token outside the vocabulary within
        its length; lengths of another shape or type, or outside [1, P].
    """
    prompt_bp = np.asarray(prompt)
    if prompt_bp.ndim != 2 or not np.issubdtype(prompt_bp.dtype, np.integer):
        raise ValueError(f"prompt must be (B, T) integers, got {prompt_bp.shape} {prompt_bp.dtype}")
    batch, width = prompt_bp.shape
    if batch == 0 or width == 0:
        raise ValueError(f"prompt must have at least one row and one token, got shape {prompt_bp.shape}")
    length_b = np.full((batch,), width) if prompt_length is None else np.asarray(prompt_length)
    if length_b.shape != (batch,) or not np.issubdtype(length_b.dtype, np.integer):
        raise ValueError(f"prompt_length must be ({batch},) integers, got {length_b.shape} {length_b.dtype}")
    if length_b.min() < 1 or length_b.max() > width:
        raise ValueError(f"prompt_length must be in [1, {width}], got {length_b.min()} to {length_b.max()}")
    real_bp = np.arange(width) < length_b[:, None]
    outside_bp = real_bp & ((prompt_bp < 0) | (prompt_bp >= vocab_size))
    if outside_bp.any():
        row, position = np.argwhere(outside_bp)[0]
        raise ValueError(
            f"prompt must hold tokens in [0, {vocab_size}), got {prompt_bp[row, position]} at row {row}, "
            f"position {position}"
        )
    # The padding is nobody's token, but the models read it: it must be inside the vocabulary too.
    return np.where(real_bp, prompt_bp, 0).astype(np.int32), length_b.astype(np.int32)


def checked_drafter(target: LanguageModel, drafter: Drafter, verification: str, lenience: float) -> Verification:
    """The rule, after checking that it, the drafter and the target go together.

    Raises:
      ValueError: negative gamma, different vocabularies, an unknown rule, or lenience outside (0, 1] or with a rule
        that has none.
    """
    if isinstance(drafter.gamma, bool) or not isinstance(drafter.gamma, int | np.integer) or drafter.gamma < 0:
        raise ValueError(f"gamma must be an integer >= 0, got {drafter.gamma!r}")
    if drafter.vocab_size is not None and drafter.vocab_size != target.vocab_size:
        raise ValueError(
            f"drafter must have the target's vocabulary of {target.vocab_size} tokens, got {drafter.vocab_size}"
        )
    try:
        rule = Verification(verification)
    except ValueError:
        names = ", ".join(repr(str(name)) for name in Verification)
        raise ValueError(f"verification must be one of {names}, got {verification!r}") from None
    if not isinstance(lenience, float | int | np.number) or not 0 < lenience <= 1:
        raise ValueError(f"lenience must be in (0, 1], got {lenience!r}")
    if lenience != 1 and rule != Verification.REJECTION:
        raise ValueError(f"lenience must be 1 for verification {str(rule)!r}: only 'rejection' has it; got {lenience}")
    return rule


def checked_row_ids(row_ids: ArrayLike | None, batch: int) -> jax.Array:
    """(B,) uint32 row names.

    Raises:
      ValueError: another shape, not integers, or negative.
    """
    if row_ids is None:
        return jnp.arange(batch, dtype=jnp.uint32)
    ids_b = np.asarray(row_ids)
    integers = ids_b.shape == (batch,) and np.issubdtype(ids_b.dtype, np.integer)
    if not integers or ids_b.min() < 0 or ids_b.max() >= 2**32:
        raise ValueError(f"row_ids must be ({batch},) integers >= 0, got {ids_b.shape} {ids_b.dtype}: {ids_b}")
    return jnp.asarray(ids_b, jnp.uint32)


def checked_key(key: jax.Array) -> jax.Array:
    """The random key, as one of the generator that the noise needs.

    Keys of the other generators are turned into one of "threefry2x32": under `vmap` those draw for a whole batch from
    its first row's key, so that a row's noise would depend on the rows beside it.

    Raises:
      ValueError: not one key.
    """
    got = f"{key.shape} {key.dtype}" if hasattr(key, "shape") else repr(key)
    refusal = ValueError(f"key must be one key, as jax.random.key(seed) gives, got {got}")
    if getattr(key, "dtype", None) == jnp.uint32:
        try:
            key = jax.random.wrap_key_data(jnp.asarray(key))
        except TypeError:
            raise refusal from None
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape != ():
        raise refusal
    if str(jax.random.key_impl(key)) == "threefry2x32":
        return key
    return jax.random.wrap_key_data(jax.random.bits(key, (2,), jnp.uint32), impl="threefry2x32")


def checked_token(name: str, token: int, vocab_size: int) -> jax.Array:
    """() int32 token.

    Raises:
      ValueError: not an integer, or outside the vocabulary.
    """
    if isinstance(token, bool) or not isinstance(token, int | np.integer) or not 0 <= token < vocab_size:
        raise ValueError(f"{name} must be a token in [0, {vocab_size}), got {token}")
    return jnp.int32(token)


def bucket(length: int, step: int = 64) -> int:
    """The smallest multiple of `step` that holds `length`: sizes are rounded up so that programs are reused."""
    return -(-length // step) * step


def checked_size(cache_size: int | None, *, width: int, max_new_tokens: int, gamma: int) -> int:
    """Slots a row: prompt, output, and gamma + 1 of slack for a draft that runs past the end.

    Raises:
      ValueError: negative `max_new_tokens`, or a cache too small.
    """
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be an integer >= 0, got {max_new_tokens!r}")
    needed = width + int(max_new_tokens) + gamma + 1
    if cache_size is None:
        return bucket(needed)
    if cache_size < needed:
        raise ValueError(
            f"cache_size must be at least {needed} (prompt {width} + max_new_tokens {max_new_tokens} + "
            f"gamma {gamma} + 1), got {cache_size}"
        )
    return cache_size

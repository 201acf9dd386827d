"""What the host checks of a decoding request before anything is traced."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from numpy.typing import ArrayLike

from spec_jax.drafters.base import Drafter, LanguageModel
from spec_jax.sampling import Sampling
from spec_jax.scalars import is_integer, is_number
from spec_jax.verification import Verification


def checked_prompt(
    prompt: ArrayLike, prompt_length: ArrayLike | None, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The prompt (B, P) and its lengths (B,), both int32 on the host.

    Raises:
      ValueError: a prompt that is empty, not of rank 2, not integer, or has a token outside the vocabulary within
        its length; lengths of another shape or type, or outside [1, P].
    """
    prompt_bp = _array("prompt", prompt)
    if prompt_bp.ndim != 2 or not np.issubdtype(prompt_bp.dtype, np.integer):
        raise ValueError(f"prompt must be (B, P) integers, got {prompt_bp.shape} {prompt_bp.dtype}")
    batch, width = prompt_bp.shape
    if batch == 0 or width == 0:
        raise ValueError(f"prompt must have at least one row and one token, got shape {prompt_bp.shape}")
    length_b = np.full((batch,), width) if prompt_length is None else _array("prompt_length", prompt_length)
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


def check_drafter(target: LanguageModel, drafter: Drafter) -> None:
    """Checks that the drafter is one, and for this target.

    Raises:
      ValueError: it is no pytree of a `Drafter`, gamma no integer or negative, the vocabularies differ, or what its own
        check says.
    """
    if not isinstance(drafter, Drafter):
        raise ValueError(f"drafter must be a spec_jax.Drafter, such as SmallModel(draft), got {type(drafter).__name__}")
    if jax.tree_util.all_leaves([drafter]):
        raise ValueError(
            f"drafter must be a pytree, its class decorated by flax.struct.dataclass, got {type(drafter).__name__}"
        )
    if not is_integer(drafter.gamma) or drafter.gamma < 0:
        raise ValueError(f"gamma must be an integer >= 0, got {drafter.gamma!r}")
    drafter.check(target)
    if drafter.vocab_size is not None and drafter.vocab_size != target.vocab_size:
        raise ValueError(
            f"drafter must have the target's vocabulary of {target.vocab_size} tokens, got {drafter.vocab_size}"
        )


def checked_rule(verification: str, lenience: float = 1.0) -> Verification:
    """The rule of that name.

    Raises:
      ValueError: there is none, or lenience is outside (0, 1] or with a rule that has none.
    """
    try:
        rule = Verification(verification)
    except ValueError:
        names = ", ".join(repr(str(name)) for name in Verification)
        raise ValueError(f"verification must be one of {names}, got {verification!r}") from None
    _check_known("lenience", lenience)
    if isinstance(lenience, jax.Array | np.ndarray) and lenience.ndim == 0:
        lenience = lenience.item()
    # As a float32, which the smallest float64s are 0 in.
    if not is_number(lenience) or not 0 < np.float32(lenience) <= 1:
        raise ValueError(f"lenience must be in (0, 1], got {lenience!r}")
    if lenience != 1 and rule != Verification.REJECTION:
        raise ValueError(f"lenience must be 1 for verification {str(rule)!r}: only 'rejection' has it; got {lenience}")
    return rule


def checked_sampling(sampling: Any) -> Sampling:
    """The same with float32 scalars.

    Raises:
      ValueError: it is none, or has a value outside its range.
    """
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling must be a spec_jax.Sampling, got {sampling!r}")
    _check_known("top_k", sampling.top_k)
    return sampling.checked()


def check_not_traced(**arguments: Any) -> None:
    """Raises ValueError where an argument, or an array in it, is traced."""
    for name, value in arguments.items():
        if _is_traced(value):
            raise ValueError(f"{name} must be known on the host, where a stream's rounds go, got it traced")


def check_outside_traces(made: Any) -> None:
    """Raises ValueError where an array that was made just now is traced: of known arguments, then, in a trace."""
    if _is_traced(made):
        raise ValueError("stream must be called outside of jax.jit and its like, for its rounds go on the host")


def checked_row_ids(row_ids: ArrayLike | None, batch: int) -> jax.Array:
    """(B,) uint32 row names.

    Raises:
      ValueError: another shape, not integers, negative, or of more than 32 bits.
    """
    if row_ids is None:
        return jnp.arange(batch, dtype=jnp.uint32)
    ids_b = _array("row_ids", row_ids)
    integers = ids_b.shape == (batch,) and np.issubdtype(ids_b.dtype, np.integer)
    if not integers or ids_b.min() < 0 or ids_b.max() >= 2**32:
        raise ValueError(f"row_ids must be ({batch},) integers in [0, 2^32), got {ids_b.shape} {ids_b.dtype}: {ids_b}")
    return jnp.asarray(ids_b, jnp.uint32)


def checked_key(key: jax.Array) -> jax.Array:
    """The random key, as one of the generator that the noise needs.

    Those of the other generators are folded into one of "threefry2x32", word by word: under `vmap` they draw for a
    whole batch from its first key, so that a row's noise would depend on the rows beside it.

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
    folded = jax.random.key(0, impl="threefry2x32")
    for word in jax.random.key_data(key):
        folded = jax.random.fold_in(folded, word)
    return folded


def checked_token(name: str, token: int, vocab_size: int) -> jax.Array:
    """() int32 token.

    Raises:
      ValueError: not an integer, or outside the vocabulary.
    """
    _check_known(name, token)
    if not is_integer(token) or not 0 <= token < vocab_size:
        raise ValueError(f"{name} must be a token, a Python integer in [0, {vocab_size}), got {token!r}")
    return jnp.int32(token)


def checked_pad(pad_id: int) -> jax.Array:
    """() int32, any integer: it is output only, and −1 is as good as a token.

    Raises:
      ValueError: not an integer, or too large for int32.
    """
    _check_known("pad_id", pad_id)
    if not is_integer(pad_id) or not -(2**31) <= pad_id < 2**31:
        raise ValueError(f"pad_id must be a Python integer of 32 bits, got {pad_id!r}")
    return jnp.int32(pad_id)


def bucket(length: int, step: int = 64) -> int:
    """The smallest multiple of `step` that holds `length`: sizes are rounded up so that programs are reused."""
    # NumPy's small integers would overflow.
    return -(-int(length) // step) * step


def checked_size(cache_size: int | None, *, width: int, max_new_tokens: int, gamma: int) -> int:
    """Slots a row: prompt, output, and gamma + 1 of slack for a draft that runs past the end.

    Raises:
      ValueError: negative `max_new_tokens`, a cache too small, or more slots than an int32 counts.
    """
    _check_known("max_new_tokens", max_new_tokens)
    if not is_integer(max_new_tokens) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be a Python integer >= 0, got {max_new_tokens!r}")
    # An int8 of NumPy would not hold the sum.
    gamma = int(gamma)
    if cache_size is None:
        # A multiple of 8, as products on a GPU like their sizes; no larger, for attention reads every slot.
        size = bucket(width + bucket(int(max_new_tokens)) + gamma + 1, 8)
    else:
        needed = width + int(max_new_tokens) + gamma + 1
        if not is_integer(cache_size) or cache_size < needed:
            raise ValueError(
                f"cache_size must be at least {needed} (prompt {width} + max_new_tokens {max_new_tokens} + "
                f"gamma {gamma} + 1), got {cache_size!r}"
            )
        size = int(cache_size)
    if size >= 2**31:
        name, got = ("max_new_tokens", max_new_tokens) if cache_size is None else ("cache_size", cache_size)
        raise ValueError(f"{name} must leave a row with fewer than 2^31 slots, got {got}: {size} slots")
    return size


def _is_traced(value: Any) -> bool:
    """Whether anything in it is."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value))


def _check_known(name: str, value: Any) -> None:
    if _is_traced(value):
        raise ValueError(
            f"{name} must be known on the host: only weights, key, temperature, top_p and min_p may be traced, "
            f"got {value}"
        )


def _array(name: str, value: ArrayLike) -> np.ndarray:
    _check_known(name, value)
    try:
        return np.asarray(value)
    except (TypeError, ValueError) as error:  # Rows of different lengths; random keys.
        raise ValueError(f"{name} must be one rectangular array, padded where rows are shorter: {error}") from None

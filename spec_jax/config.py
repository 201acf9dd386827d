"""Sizes of a decoder."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from spec_jax.scalars import check_integer, is_integer, is_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of a decoder.

    Attributes:
      vocab_size: number of tokens (256 for bytes).
      dim: width of the residual stream.
      depth: number of blocks.
      heads: query heads.
      kv_heads: key-value heads, a divisor of `heads`; None is one per query head.
      dim_head: width of a head, even (rotary embeddings turn pairs).
      ff_mult: hidden width of the feed-forward as a multiple of `dim`.
      rotary_base: base of the rotary frequencies (RoFormer, 2104.09864).
      norm_epsilon: added to the mean square in every RMS norm.
      dtype: compute and cache dtype. Weights, norms' statistics and softmax are float32 whatever it is; logits are
        computed in it and returned as float32.
      early_exit_layer: blocks before the early exit, a branch with logits of its own; None is no exit.
      early_exit_extra_blocks: blocks that only the exit has, between the trunk and its head.
      detach_early_exit_hiddens: whether the exit's gradient stops at the trunk.
      early_exit_recycling: how many positions back, at most, is the trunk's last hidden state that the exit also sees
        in training; 0 is no recycling. Drafting has the newest one there is when a draft begins, up to gamma back.
    """

    vocab_size: int = 256
    dim: int = 512
    depth: int = 10
    heads: int = 8
    kv_heads: int | None = None
    dim_head: int = 64
    ff_mult: int = 4
    rotary_base: float = 10_000.0
    norm_epsilon: float = 2.0**-23
    dtype: Literal["float32", "bfloat16"] = "float32"
    early_exit_layer: int | None = None
    early_exit_extra_blocks: int = 0
    detach_early_exit_hiddens: bool = False
    early_exit_recycling: int = 0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "depth", "heads", "dim_head", "ff_mult", "num_kv_heads"):
            check_integer(name.removeprefix("num_"), getattr(self, name), 1)
        if not is_number(self.rotary_base) or not 0 < self.rotary_base < math.inf:
            raise ValueError(f"rotary_base must be a finite number above 0, got {self.rotary_base!r}")
        if not is_number(self.norm_epsilon) or not 0 < self.norm_epsilon < math.inf:
            raise ValueError(f"norm_epsilon must be a finite number above 0, got {self.norm_epsilon!r}")
        if self.dim_head % 2:
            raise ValueError(f"dim_head must be even for rotary embeddings, got {self.dim_head}")
        if self.heads % self.num_kv_heads:
            raise ValueError(f"kv_heads must divide heads = {self.heads}, got {self.kv_heads}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {self.dtype!r}")
        if (layer := self.early_exit_layer) is not None and (not is_integer(layer) or not 1 <= layer < self.depth):
            raise ValueError(f"early_exit_layer must be an integer in [1, depth = {self.depth}) or None, got {layer!r}")
        for name in ("early_exit_extra_blocks", "early_exit_recycling"):
            check_integer(name, getattr(self, name), 0)
        if self.early_exit_layer is None:
            for name in ("early_exit_extra_blocks", "detach_early_exit_hiddens", "early_exit_recycling"):
                if value := getattr(self, name):
                    raise ValueError(f"{name} must not be set without early_exit_layer, got {value}")
        if not isinstance(self.detach_early_exit_hiddens, bool):
            raise ValueError(f"detach_early_exit_hiddens must be a bool, got {self.detach_early_exit_hiddens!r}")
        for field in dataclasses.fields(self):
            # NumPy's small integers would overflow in products of sizes, and its float64 promotes what it meets.
            if is_number(value := getattr(self, field.name)):
                of_a_float = isinstance(field.default, float)
                object.__setattr__(self, field.name, float(value) if of_a_float else int(value))

    @property
    def num_kv_heads(self) -> int:
        """Key-value heads, with the default resolved."""
        return self.heads if self.kv_heads is None else self.kv_heads

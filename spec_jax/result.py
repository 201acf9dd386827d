"""What decoding returns: tokens, lengths and statistics per row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class DecodeStats:
    """Counts per row, over the rounds in which the row was not finished.

    A drafted token counts where the row's output could still take it: none after the end token, be it drafted and
    refused, and none beyond `max_new_tokens`.

    Attributes:
      rounds_b: (B,) int32, target forwards that added to the row (prefill not counted).
      refused_b: (B,) int32, rounds in which a drafted token was tested and refused: at most one a round.
      drafted_bj: (B, J) int32, rounds in which draft position j counted.
      accepted_bj: (B, J) int32, rounds in which the token at draft position j was kept.
    """

    rounds_b: jax.Array
    refused_b: jax.Array
    drafted_bj: jax.Array
    accepted_bj: jax.Array

    @classmethod
    def zeros(cls, batch: int, gamma: int) -> DecodeStats:
        """No round yet."""
        return cls(
            rounds_b=jnp.zeros((batch,), jnp.int32),
            refused_b=jnp.zeros((batch,), jnp.int32),
            drafted_bj=jnp.zeros((batch, gamma), jnp.int32),
            accepted_bj=jnp.zeros((batch, gamma), jnp.int32),
        )


@struct.dataclass
class DecodeResult:
    """Decoded rows. Out of `jax.vmap` every array has its axis in front, and rates are over all rows of all calls.

    Attributes:
      tokens: (B, max_new_tokens) int32, without the prompt, the end token included, `pad_id` after it.
      lengths: (B,) int32, tokens emitted: accepted, corrected and bonus, the end token included.
      stats: counts per row.
    """

    tokens: jax.Array
    lengths: jax.Array
    stats: DecodeStats

    @property
    def rounds(self) -> jax.Array:
        """(B,) int32, rounds of each row."""
        return self.stats.rounds_b

    @property
    def drafted(self) -> jax.Array:
        """(B,) int32, tokens drafted for each row."""
        return self.stats.drafted_bj.sum(axis=-1, dtype=jnp.int32)

    @property
    def accepted(self) -> jax.Array:
        """(B,) int32, drafted tokens kept in each row."""
        return self.stats.accepted_bj.sum(axis=-1, dtype=jnp.int32)

    @property
    def emitted(self) -> jax.Array:
        """(B,) int32, tokens emitted by each row: its length."""
        return self.lengths

    @property
    def acceptance_by_position(self) -> jax.Array:
        """(J,) float32, the fraction of drafts at each position that were kept, over all rows; NaN where none was."""
        rows = tuple(range(self.stats.drafted_bj.ndim - 1))
        return _ratio(self.stats.accepted_bj.sum(axis=rows), self.stats.drafted_bj.sum(axis=rows))

    @property
    def acceptance_rate(self) -> jax.Array:
        """() float32, kept over tested: the chance that a token is kept when all before it were.

        This is the α of Leviathan 2211.17192. NaN when nothing was drafted.
        """
        accepted = self.stats.accepted_bj.sum()
        return _ratio(accepted, accepted + self.stats.refused_b.sum())

    @property
    def mean_accepted_length(self) -> jax.Array:
        """() float32, drafted tokens kept per round, over all rows."""
        return _ratio(self.stats.accepted_bj.sum(), self.rounds.sum())

    @property
    def block_efficiency(self) -> jax.Array:
        """() float32, tokens emitted per round (target forward), over all rows (Sun 2310.15141)."""
        return _ratio(self.lengths.sum(), self.rounds.sum())


def _ratio(part: jax.Array, whole: jax.Array) -> jax.Array:
    """Of counts, in float32."""
    return part.astype(jnp.float32) / whole.astype(jnp.float32)

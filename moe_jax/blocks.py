"""Groups of rows cut into blocks, for loops over them on a CPU (see `moe_jax.block_loops`)."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Where groups differ, blocks are of several lengths, each so many steps, and each is code of its own, to be compiled. A
# step is an eighth of the mean group (with half of that nothing was faster), but within these bounds: products of fewer
# rows are no faster, and with steps of 32 for groups of 512 rows gradients took up to 3 % longer. The longest block has
# room for the mean group and a quarter, but hidden states of more than MOST_LENGTHS * LONGEST_STEP rows leave the
# processor's cache, and take memory for no speed.
FEWEST_LENGTHS, MOST_LENGTHS = 10, 20
SHORTEST_STEP, LONGEST_STEP = 8, 16


class Window(NamedTuple):
    """The rows of a block: `length` from `at` on, those of `inside_l` its own (None: all)."""

    at: jax.Array
    length: int
    inside_l: jax.Array | None

    @property
    def rows_l(self) -> jax.Array:
        """(L,) their numbers."""
        return self.at + jnp.arange(self.length, dtype=jnp.int32)

    def read(self, x: jax.Array) -> jax.Array:
        """(L, ...) what (S, ...) holds of them."""
        return jax.lax.dynamic_slice_in_dim(x, self.at, self.length)

    def own(self, new: jax.Array, other: jax.Array | int) -> jax.Array:
        """(L, ...) new values where rows are the block's own, others where they are not."""
        if self.inside_l is None:
            return new
        return jnp.where(self.inside_l.reshape((-1,) + (1,) * (new.ndim - 1)), new, other)

    def read_own(self, x: jax.Array) -> jax.Array:
        """(L, ...) the same, but zero where rows are not the block's own: of others a NaN must not come in."""
        return self.own(self.read(x), 0)

    def write(self, x: jax.Array, new: jax.Array) -> jax.Array:
        """(S, ...) with (L, ...) new values where rows are the block's own."""
        if self.inside_l is not None:
            new = self.own(new, self.read(x))
        return jax.lax.dynamic_update_slice_in_dim(x, new, self.at, axis=0)


class Place(NamedTuple):
    """Which group it is, its first row, and how many it has."""

    number: jax.Array
    start: jax.Array
    size: jax.Array


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How groups are cut: into as many of the longest blocks as fit, and before them one that takes the rest.

    Attributes:
      num_rows: S.
      lengths: that blocks have, ascending, none longer than S.
      exact: whether one length divides every group.
    """

    num_rows: int
    lengths: tuple[int, ...]
    exact: bool = False

    def each(
        self,
        place: Place,
        block: Callable[[Window, bool, Any], Any],
        carry: Any,
    ) -> Any:
        """`block(window, first, carry)` for the blocks of a group, one after the other.

        Args:
          place: the group's.
          block: gives the next carry. `first` is a static bool, true for the block that takes the rest, which is the
            first and may be the only one.
          carry: what the first block gets.
        """
        longest = self.lengths[-1]
        whole = jnp.maximum(place.size - 1, 0) // longest
        rest = place.size - whole * longest

        def first_block(i: jax.Array, carry: Any, length: int) -> Any:
            # `i` is 0, but XLA is not to know: it would compute what does not depend on it whether there is a block
            # or not.
            window = Window(jnp.minimum(place.start + i, self.num_rows - length), length, None)
            if not self.exact:
                row_l = window.rows_l
                window = window._replace(inside_l=(row_l >= place.start) & (row_l < place.start + rest))
            return block(window, True, carry)

        # Loops of one step or none: a conditional would copy what it carries.
        shorter = 0
        for length in self.lengths:
            there = ((rest > shorter) & (rest <= length)).astype(jnp.int32)
            carry = jax.lax.fori_loop(0, there, partial(first_block, length=length), carry)
            shorter = length

        def further_block(i: jax.Array, carry: Any) -> Any:
            return block(Window(place.start + rest + i * longest, longest, None), False, carry)

        return jax.lax.fori_loop(0, whole, further_block, carry)


def blocks_of_groups(num_groups: int, num_rows: int) -> Blocks:
    """For groups of any size among S rows: lengths close enough for few rows to be computed in vain."""
    mean = num_rows / num_groups
    step = min(math.ceil(mean / 8 / SHORTEST_STEP) * SHORTEST_STEP, LONGEST_STEP)
    num_lengths = min(max(math.ceil(1.25 * mean / step), FEWEST_LENGTHS), MOST_LENGTHS)
    return Blocks(num_rows, tuple(sorted({min(step * i, num_rows) for i in range(1, num_lengths + 1)})))


def blocks_of_equal_groups(num_groups: int, size: int) -> Blocks:
    """For groups of one size: as few blocks as may be, all of one length."""
    num_blocks = -(-size // (MOST_LENGTHS * LONGEST_STEP))
    length = -(-size // num_blocks)
    return Blocks(num_groups * size, (length,), exact=size % length == 0)

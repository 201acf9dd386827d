"""How rows meet the weights of their group (see `moe_jax.grouped`)."""

from typing import Protocol

import jax
import jax.numpy as jnp


class Grouping(Protocol):
    """How rows meet the weights of their group."""

    def product(self, rows: jax.Array, weights: jax.Array) -> jax.Array:
        """Each row times its group's matrix: (..., D) and ([E,] D, F) to (..., F)."""
        ...

    def each(self, vectors: jax.Array) -> jax.Array:
        """Each row's group's vector, of ([E,] F), to be added to the rows or multiplied with them."""
        ...


class OneGroup:
    """(L, ...) rows of a single group, whose weights have no axis of groups."""

    def product(self, rows: jax.Array, weights: jax.Array) -> jax.Array:
        """As in `Grouping`."""
        return rows @ weights

    def each(self, vectors: jax.Array) -> jax.Array:
        """As in `Grouping`."""
        return vectors[None]


class EqualGroups:
    """(S, ...) rows sorted by group, S / E each."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def product(self, rows: jax.Array, weights: jax.Array) -> jax.Array:
        """As in `Grouping`."""
        rows_ecd = rows.reshape(len(weights), -1, rows.shape[1])
        return self.batched_product(rows_ecd, weights).reshape(self.num_rows, -1)

    def batched_product(self, rows_ecd: jax.Array, weights_edf: jax.Array) -> jax.Array:
        """(E, C, F), the product of each group."""
        return jnp.matmul(rows_ecd, weights_edf)

    def each(self, vectors: jax.Array) -> jax.Array:
        """As in `Grouping`."""
        return jnp.repeat(vectors, self.num_rows // len(vectors), axis=0)


class ShortGroups(EqualGroups):
    """The same, each of few rows: a CPU multiplies faster with columns."""

    def batched_product(self, rows_ecd: jax.Array, weights_edf: jax.Array) -> jax.Array:
        """As in `EqualGroups`."""
        # If XLA saw that the columns are transposed rows, it would multiply with the rows.
        columns_edc = jax.lax.optimization_barrier(jnp.swapaxes(rows_ecd, 1, 2))
        return jnp.einsum("edc,edf->ecf", columns_edc, weights_edf)


class SortedGroups:
    """(S, ...) rows sorted by group, `sizes_e` each. What becomes of those beyond the last group is zero."""

    def __init__(self, sizes_e: jax.Array, num_rows: int) -> None:
        self.sizes_e = sizes_e
        self.group_s = jnp.repeat(jnp.arange(len(sizes_e)), sizes_e, total_repeat_length=num_rows)
        self.used_s1 = (jnp.arange(num_rows) < sizes_e.sum())[:, None]

    def product(self, rows: jax.Array, weights: jax.Array) -> jax.Array:
        """As in `Grouping`."""
        # Rows beyond the last group may come out as NaN, of the product and of its gradient: the second `where` stops
        # the one, the first stops the other. Multiplying by 0 would not.
        rows = jnp.where(self.used_s1, rows, 0)
        return jnp.where(self.used_s1, jax.lax.ragged_dot(rows, weights, self.sizes_e), 0)

    def each(self, vectors: jax.Array) -> jax.Array:
        """As in `Grouping`."""
        return jnp.where(self.used_s1, vectors.at[self.group_s].get(indices_are_sorted=True), 0)

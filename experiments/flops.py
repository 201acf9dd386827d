"""Floating-point operations of a program, as XLA counts them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def counted_flops(function: Callable[..., Any], *args: Any) -> float:
    """Operations of `function(*args)`; on a mesh under `jax.shard_map`, those of one device.

    Counted in the program for a GPU, which need not be there: for a CPU, products are in loops over experts, and XLA
    counts a loop once. Before compiling, where every product is still written out.

    Args:
      function: for `jax.jit`. A loop of its own counts once, and what counts for `ragged_dot` is up to XLA: mixtures
        of experts are counted with the dispatch `index`.
      *args: arrays or `jax.ShapeDtypeStruct`s.
    """
    lowered = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))
    counts: Any = lowered.cost_analysis()
    return float(counts["flops"])

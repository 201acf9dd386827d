"""A feed-forward of four groups, for tests."""

from collections.abc import Callable
from typing import Any

import jax

from moe_jax.experts import GEGLU, HiddenWeights, OutputWeights, gelu
from moe_jax.halves import Weights
from tests.moe.support import hidden_states

LAYERS = GEGLU(gelu)


def weights(dim: int = 5, hidden: int = 3) -> Weights:
    """Of four experts."""
    first_half = {"w_in": (dim, 2 * hidden), "b_in": (2 * hidden,)}
    shapes = first_half | {"mult_bias": (hidden,), "w_out": (hidden, dim), "b_out": (dim,)}
    made = {name: hidden_states(4, *shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    output = OutputWeights(made["mult_bias"], made["w_out"], made["b_out"])
    return Weights(HiddenWeights(made["w_in"], made["b_in"]), output)


def answers(
    call: Callable[..., jax.Array], rows: Any, bar: jax.Array, stacked: Weights | None = None
) -> tuple[Any, ...]:
    """Outputs, and the gradients of weights and rows."""
    outputs, pull = jax.vjp(call, stacked or weights(), rows)
    return outputs, *pull(bar)

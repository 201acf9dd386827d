"""Top-n with a differentiable relaxation of the choice: gradients reach experts that were not chosen."""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.routing import TopN


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoordinateDescent(TopN):
    """`TopN` whose gates are differentiable in the choice itself.

    Forward it is `TopN`: the same experts, the same gates with the router's confidence in them, the same thresholds.
    Backward, each gate's score is multiplied by a relaxed indicator of having been chosen, whose gradient reaches
    every logit of the token.

    Args:
      iterations: steps of coordinate descent.
      temperature: of the relaxation, in units of the scores; smaller is closer to the hard choice.
      ratio: the relaxation chooses `n * ratio` experts, a few more than are used.

    Raises:
      ValueError: an argument is out of range.

    Source: CoLT5 2303.09752 (ratio 9 / 8); Wright 1502.04759 (coordinate descent).
    """

    iterations: int = 20
    temperature: float = 0.1
    ratio: float = 9 / 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.ratio < 1:
            raise ValueError(f"ratio must be at least 1, got {self.ratio}")

    def weights(self, scores_te: jax.Array, selection_te: jax.Array) -> jax.Array:
        """(T, E) scores, times 1 in the forward pass and the relaxed indicator's gradient in the backward."""
        size = min(self.n * self.ratio, scores_te.shape[-1])
        chosen_te = relaxed_top_k(selection_te, size, iterations=self.iterations, temperature=self.temperature)
        return scores_te * (1 + (chosen_te - jax.lax.stop_gradient(chosen_te)))


def relaxed_top_k(scores_te: jax.Array, size: float, *, iterations: int, temperature: float) -> jax.Array:
    """(T, E) in [0, 1]: a soft indicator of the `size` largest scores, summing to about `size`.

    Block coordinate ascent on the dual of max <scores, y> + temperature * entropy(y) over 0 <= y <= 1, sum y = size.

    Args:
      scores_te: (T, E) float.
      size: how many to choose, not necessarily whole.
      iterations: updates of the two dual variables. Static.
      temperature: weight of the entropy, in units of the scores.

    Source: CoLT5 2303.09752; Wright 1502.04759.
    """

    def shift(cap_te: jax.Array) -> jax.Array:
        total_t1 = jax.nn.logsumexp((scores_te + cap_te) / temperature, axis=-1, keepdims=True)
        return temperature * (jnp.log(size) - total_t1)

    def update(cap_te: jax.Array, _: None) -> tuple[jax.Array, None]:
        return -jax.nn.relu(scores_te + shift(cap_te)), None

    cap_te, _ = jax.lax.scan(update, -scores_te, None, length=iterations - 1)
    return jnp.exp(jnp.minimum(scores_te + shift(cap_te), 0) / temperature)

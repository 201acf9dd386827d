"""Top-n with a differentiable relaxation of the choice: gradients reach experts that were not chosen."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from moe_jax.checks import array, floating, number, positive, whole
from moe_jax.routing import TopN


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoordinateDescent(TopN):
    """`TopN` whose gates are differentiable in the choice itself.

    Forward it is `TopN`: the same experts, the same gates with the router's confidence in them, the same thresholds.
    Backward, each gate's score is multiplied by a relaxed indicator of having been chosen, whose gradient reaches
    every logit of the token. The indicator knows no groups of experts: with `expert_groups_kept` below
    `expert_groups` it would relax another choice than the one made, and is refused.

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
        whole("iterations", self.iterations, 1)
        positive("temperature", self.temperature)
        number("ratio", self.ratio, 1)
        if self.expert_groups_kept < self.expert_groups:
            raise ValueError(
                "expert_groups_kept must be expert_groups for CoordinateDescent, "
                f"got {self.expert_groups_kept} of {self.expert_groups}"
            )

    def log_weights(self, log_scores_te: jax.Array, steered_te: jax.Array) -> jax.Array:
        """(T, E) logarithms of the scores; in gradients, of the scores times the relaxed indicator."""
        size = min(self.n * self.ratio, log_scores_te.shape[-1])
        indicator = partial(relaxed_top_k, size=size, iterations=self.iterations, temperature=self.temperature)
        return _chosen(indicator, log_scores_te, steered_te)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _chosen(indicator: Callable[[jax.Array], jax.Array], log_scores_te: jax.Array, steered_te: jax.Array) -> jax.Array:
    """The logarithms, with the derivative of that of the scores times the indicator where that is 1."""
    return log_scores_te


@_chosen.defjvp
def _chosen_jvp(
    indicator: Callable[[jax.Array], jax.Array],
    primals: tuple[jax.Array, jax.Array],
    tangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    log_scores_te, steered_te = primals
    _, indicator_dot = jax.jvp(indicator, (steered_te,), tangents[1:])
    return log_scores_te, tangents[0] + indicator_dot


def relaxed_top_k(scores_te: jax.Array, size: float, *, iterations: int, temperature: float) -> jax.Array:
    """(T, E) in [0, 1]: a soft indicator of the `size` largest scores; once it has converged, it sums to `size`.

    Block coordinate ascent on the dual of max <scores, y> + temperature * entropy(y) over 0 <= y <= 1, sum y = size.

    Args:
      scores_te: (T, E) float.
      size: how many to choose, not necessarily whole. Static.
      iterations: updates of the two dual variables. Static.
      temperature: weight of the entropy, in units of the scores. Static.

    Raises:
      ValueError: the scores are no (T, E) floating point, or an argument is out of range.

    Source: CoLT5 2303.09752; Wright 1502.04759.
    """
    array("scores_te", scores_te)
    floating("scores_te", scores_te.dtype)
    positive("temperature", temperature)
    whole("iterations", iterations, 1)
    positive("size", size)
    if scores_te.ndim != 2:
        raise ValueError(f"scores_te must be (T, E), got {scores_te.shape}")
    if size > scores_te.shape[1]:
        raise ValueError(f"size must be at most the {scores_te.shape[1]} scores, got {size}")
    # NumPy's numbers promote what they meet.
    size, temperature = float(size), float(temperature)

    def shift(cap_te: jax.Array) -> jax.Array:
        total_t1 = jax.nn.logsumexp((scores_te + cap_te) / temperature, axis=-1, keepdims=True)
        return temperature * (jnp.log(size) - total_t1)

    def update(cap_te: jax.Array, _: None) -> tuple[jax.Array, None]:
        return -jax.nn.relu(scores_te + shift(cap_te)), None

    cap_te, _ = jax.lax.scan(update, -scores_te, None, length=iterations - 1)
    return jnp.exp(jnp.minimum(scores_te + shift(cap_te), 0) / temperature)

"""Who goes where: router logits in, `Choice` (what the tokens ask for) and `Routing` (what they get) out.

Everything here is integers and at least float32, whatever the dtype of the hidden states. A router is a frozen
dataclass with a `choose` function; `moe_jax.slots.assign_slots` turns its `Choice` into a `Routing`, so that capacity,
groups, masks and slot orders work alike for every router.
"""

import abc
import dataclasses
import numbers
from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import struct

from moe_jax.checks import flag, one_of, whole, without_numpy
from moe_jax.dtypes import at_least_float32

Policy = Literal["all", "none", "threshold", "random"]
Score = Literal["softmax", "sigmoid"]
SlotOrder = Literal["token", "choice", "priority"]


@struct.dataclass
class Choice:
    """What the tokens ask for, before capacity.

    Attributes:
      expert_index_ta: (T, A) int32 in [0, E), which nothing checks, the candidates of each token, best first where some
        are better. No expert twice: there are slots for no more assignments than tokens, even without a capacity.
      gate_ta: (T, A) float, the weight of each candidate's output in the sum. Differentiable.
      wanted_ta: (T, A) bool, whether the candidate is asked for at all. A layer takes it as false for padding.
      priority_ta: (T, A) float, who is served first under slot order "priority": larger first.
      first_expert_t: (T,) int32, the favourite expert, which the balance loss counts.
      probs_te: (T, E) float, un-noised router probabilities, each row summing to 1. Differentiable.
    """

    expert_index_ta: jax.Array
    gate_ta: jax.Array
    wanted_ta: jax.Array
    priority_ta: jax.Array
    first_expert_t: jax.Array
    probs_te: jax.Array


@struct.dataclass
class Routing:
    """What the tokens get.

    Expert e has `num_groups * capacity` slots: group g's are `[g * capacity, (g + 1) * capacity)`, filled from the
    front without gaps.

    Attributes:
      expert_index_ta: (T, A) int32 in [0, E).
      gate_ta: (T, A) float. Zero where not kept, so that a sum over A needs no mask.
      keep_ta: (T, A) bool, asked for and within capacity.
      slot_ta: (T, A) int32 in [0, num_groups * capacity), the slot within the expert. Means nothing where not kept.
      count_eg: (E, G) int32, slots in use per expert and group.
      available_eg: (E, G) int32, slots that the capacity factor allows (at most `capacity`; fewer in a padded group).
      capacity: slots per expert and group. Static.
    """

    expert_index_ta: jax.Array
    gate_ta: jax.Array
    keep_ta: jax.Array
    slot_ta: jax.Array
    count_eg: jax.Array
    available_eg: jax.Array
    capacity: int = struct.field(pytree_node=False)


@struct.dataclass
class RouterInputs:
    """What a router chooses from.

    Attributes:
      logits_te: (T, E) float, un-noised: these weight the outputs and enter the losses.
      selection_logits_te: (T, E) float, with noise in training: these decide who is chosen.
      mask_t: (T,) bool, false for padding.
      uniform_ta: (T, A) float in [0, 1) for the policy "random", or None where it is not in use.
      bias_e: (E,) float added to the scores for choosing only, or None.
    """

    logits_te: jax.Array
    selection_logits_te: jax.Array
    mask_t: jax.Array
    uniform_ta: jax.Array | None = None
    bias_e: jax.Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Router(abc.ABC):
    """What `MoE` needs to know of a router; a new router is a subclass with its own `num_choices` and `choose`.

    It chooses for each token by itself: over a mesh every device chooses for its own tokens. What depends on the others
    is the layer's, by capacity and `slot_order`.
    """

    @property
    def slot_order(self) -> SlotOrder | None:
        """The only order in which this router may fill slots, or None for any."""
        return None

    @property
    def needs_capacity(self) -> bool:
        """Whether the capacity is part of the router, so that even a dropless dispatch respects it."""
        return False

    @property
    def selection_bias(self) -> bool:
        """Whether the layer holds a bias that steers the choice, for `RouterInputs.bias_e`."""
        return False

    @abc.abstractmethod
    def num_choices(self, num_experts: int) -> int:
        """A, the number of candidates per token."""

    def draws(self, *, train: bool) -> bool:
        """Whether `choose` needs `uniform_ta`."""
        return False

    def check(self, num_experts: int) -> None:  # noqa: B027 - not abstract: some serve any number
        """Raises ValueError when the router cannot serve this many experts."""

    @abc.abstractmethod
    def choose(self, inputs: RouterInputs, *, train: bool) -> Choice:
        """Candidates, gates and probabilities of every token."""


def chosen(router: Router, inputs: RouterInputs, *, train: bool) -> Choice:
    """What a router chooses, of which nothing is for padding.

    Raises:
      ValueError: it gives no `Choice`, or something of another shape than its `num_choices` says or of another kind.
    """
    choice = router.choose(inputs, train=train)
    if not isinstance(choice, Choice):
        raise ValueError(f"router must give a Choice, got a {type(choice).__name__}")
    tokens, num_experts = inputs.logits_te.shape
    by_choice = tokens, router.num_choices(num_experts)
    of_field = {
        "expert_index_ta": (by_choice, jnp.integer),
        "wanted_ta": (by_choice, jnp.bool_),
        "first_expert_t": ((tokens,), jnp.integer),
        "probs_te": ((tokens, num_experts), jnp.floating),
    }
    for field in dataclasses.fields(choice):
        value = getattr(choice, field.name)
        shape, kind = of_field.get(field.name, (by_choice, jnp.floating))
        if (got := getattr(value, "shape", type(value).__name__)) != shape:
            raise ValueError(f"router must give {field.name} {shape}, of T, num_choices or E, got {got}")
        if not jnp.issubdtype(value.dtype, kind):
            raise ValueError(f"router must give {field.name} of a dtype that is {kind.__name__}, got {value.dtype}")
    return dataclasses.replace(
        choice,
        expert_index_ta=choice.expert_index_ta.astype(jnp.int32),
        wanted_ta=choice.wanted_ta & inputs.mask_t[:, None],
        first_expert_t=choice.first_expert_t.astype(jnp.int32),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopN(Router):
    """Each token's n best experts: the first always, the others by a policy on their normalised gates.

    Args:
      n: candidates per token. With one candidate the gate is its score, as in Switch: normalised it would always be
        1, and the router would learn nothing.
      score: "softmax" over the experts, or "sigmoid" of each logit (DeepSeek-V3), normalised over the candidates.
      policy_train: for every rank after the first: "all" takes it, "none" does not, "threshold" takes it when
        gate >= threshold, "random" with probability min(1, gate / threshold).
      policy_eval: the same, in evaluation.
      threshold_train: in (0, 1], one for all ranks after the first or a tuple of n - 1.
      threshold_eval: the same, in evaluation.
      bias: whether the layer holds a bias for auxiliary-loss-free balancing (see `moe_jax.router_bias`).
      expert_groups: number of equal groups of neighbouring experts; 1 for no grouping.
      expert_groups_kept: how many groups a token may choose from, by the sum of each group's two best scores.

    Experts and their groups are ranked by logits, and gates are normalised in logarithms, so that neither ends where
    scores saturate or underflow. With a bias both are ranked by score plus bias, as that is defined: sigmoids of logits
    above 17 are equal there.

    Raises:
      ValueError: an argument is out of range.

    Source: Shazeer et al. 2018 (Mesh-TensorFlow `moe.py`, policies); ST-MoE 2202.08906 section 2;
      DeepSeek-V3 2412.19437 equations 12 to 16 (sigmoid, bias, groups).
    """

    n: int = 2
    score: Score = "softmax"
    policy_train: Policy = "random"
    policy_eval: Policy = "threshold"
    threshold_train: float | tuple[float, ...] = 0.2
    threshold_eval: float | tuple[float, ...] = 0.2
    bias: bool = False
    expert_groups: int = 1
    expert_groups_kept: int = 1

    def __post_init__(self) -> None:
        without_numpy(self)
        for name in ("n", "expert_groups", "expert_groups_kept"):
            whole(name, getattr(self, name), 1)
        flag("bias", self.bias)
        one_of("score", self.score, get_args(Score))
        for name in ("policy_train", "policy_eval"):
            one_of(name, getattr(self, name), get_args(Policy))
        for name in ("threshold_train", "threshold_eval"):
            _check_thresholds(name, getattr(self, name), self.n)
        if self.expert_groups_kept > self.expert_groups:
            raise ValueError(
                "expert_groups_kept must be at most expert_groups, "
                f"got {self.expert_groups_kept} of {self.expert_groups}"
            )

    @property
    def selection_bias(self) -> bool:
        """Whether the layer holds a bias that steers the choice."""
        return self.bias

    def num_choices(self, num_experts: int) -> int:
        """A, the number of candidates per token."""
        return self.n

    def draws(self, *, train: bool) -> bool:
        """Whether `choose` needs `uniform_ta`."""
        return self.n > 1 and self._policy(train) == "random"

    def check(self, num_experts: int) -> None:
        """Raises ValueError when n or the groups do not fit the number of experts."""
        if self.n > num_experts:
            raise ValueError(f"n must be at most num_experts ({num_experts}), got {self.n}")
        if num_experts % self.expert_groups:
            raise ValueError(f"expert_groups must divide num_experts ({num_experts}), got {self.expert_groups}")
        reachable = num_experts // self.expert_groups * self.expert_groups_kept
        if self.n > reachable:
            raise ValueError(f"n must be at most the {reachable} experts of the kept groups, got {self.n}")

    def choose(self, inputs: RouterInputs, *, train: bool) -> Choice:
        """Candidates, gates and probabilities of every token.

        Args:
          inputs: logits, mask, and the uniform numbers that "random" compares with.
          train: which policy and thresholds to use. Static.

        Returns:
          A `Choice` with A = n, best candidate first.
        """
        softmax = self.score == "softmax"
        log_score = jax.nn.log_softmax if softmax else jax.nn.log_sigmoid
        logits_te = at_least_float32(inputs.logits_te)
        log_scores_te = log_score(logits_te)
        selection_te = at_least_float32(inputs.selection_logits_te)
        steered_te = jnp.exp(log_score(selection_te))
        if inputs.bias_e is not None:
            selection_te = steered_te = steered_te + inputs.bias_e[None].astype(steered_te.dtype)
        worth = partial(_worth_of_groups, self.score) if inputs.bias_e is None else partial(jnp.sum, axis=-1)
        reachable_te = within_best_groups(selection_te, self.expert_groups, self.expert_groups_kept, worth)
        limited_te = jnp.where(reachable_te, selection_te, -jnp.inf)
        best_ta = jax.lax.top_k(jax.lax.stop_gradient(limited_te), self.n)[1]
        # XLA would see that a column of it is used, and on a CPU sort all experts, 30 times as long.
        expert_index_ta = jax.lax.optimization_barrier(best_ta)
        log_weight_ta = jnp.take_along_axis(self.log_weights(log_scores_te, steered_te), expert_index_ta, axis=1)
        share_ta = jax.nn.softmax(log_weight_ta)
        wanted_ta = wanted_ranks(share_ta, self._policy(train), self._thresholds(train), inputs.uniform_ta)
        top_t1 = jnp.take_along_axis(log_scores_te, expert_index_ta[:, :1], axis=1)
        return Choice(
            expert_index_ta=expert_index_ta,
            gate_ta=share_ta if self.n > 1 else jnp.exp(log_weight_ta),
            wanted_ta=wanted_ta & inputs.mask_t[:, None],
            priority_ta=jnp.broadcast_to(top_t1, share_ta.shape),
            first_expert_t=expert_index_ta[:, 0],
            probs_te=jax.nn.softmax(logits_te if softmax else log_scores_te),
        )

    def log_weights(self, log_scores_te: jax.Array, steered_te: jax.Array) -> jax.Array:
        """(T, E) logarithms of what becomes gates where it is chosen; a relaxation of the choice overrides this.

        Args:
          log_scores_te: logarithms of the un-noised scores.
          steered_te: scores whose largest are chosen.
        """
        return log_scores_te

    def _policy(self, train: bool) -> Policy:
        return self.policy_train if train else self.policy_eval

    def _thresholds(self, train: bool) -> tuple[float, ...]:
        threshold = self.threshold_train if train else self.threshold_eval
        return threshold if isinstance(threshold, tuple) else (threshold,) * (self.n - 1)


def wanted_ranks(
    share_ta: jax.Array, policy: Policy, thresholds: tuple[float, ...], uniform_ta: jax.Array | None
) -> jax.Array:
    """(T, A) bool: which candidates a token asks for. The first always.

    Args:
      share_ta: (T, A) gates normalised over the candidates.
      policy: what decides about the ranks after the first, with A - 1 thresholds.
      thresholds: one for each of them.
      uniform_ta: (T, A) in [0, 1); only "random" reads it, and only its columns after the first.

    Raises:
      ValueError: "random" has no numbers, or not as many.
    """
    first_t1 = jnp.ones_like(share_ta[:, :1], bool)
    later = share_ta[:, 1:]
    threshold_1a = jnp.asarray(thresholds, share_ta.dtype)[None]
    if policy == "all":
        wanted = jnp.ones_like(later, bool)
    elif policy == "none":
        wanted = jnp.zeros_like(later, bool)
    elif policy == "threshold":
        wanted = later >= threshold_1a
    elif not later.shape[1]:
        return first_t1
    elif uniform_ta is None or uniform_ta.shape != share_ta.shape:
        got = None if uniform_ta is None else uniform_ta.shape
        raise ValueError(f"uniform_ta must be {share_ta.shape} numbers for the policy 'random', got {got}")
    else:
        wanted = uniform_ta[:, 1:] < later / threshold_1a
    return jnp.concatenate([first_t1, wanted], axis=1)


def within_best_groups(
    ranking_te: jax.Array, groups: int, kept: int, worth: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """(T, E) bool: which experts are in a token's `kept` best groups.

    Args:
      ranking_te: what a token ranks experts by.
      groups: G.
      kept: of them.
      worth: from (T, G, 2), each group's two best, to (T, G), what it ranks groups by. Of (T, G, 1) where a group has
        one expert.

    Source: DeepSeek-V3 2412.19437 section 2.1.2, node-limited routing. There a group is worth its n / kept best: two
      in the published model (8 / 4), here always.
    """
    tokens, experts = ranking_te.shape
    if kept == groups:
        return jnp.ones((tokens, experts), bool)
    ranking_tgm = ranking_te.reshape(tokens, groups, experts // groups)
    best_tgm = jax.lax.top_k(ranking_tgm, min(2, experts // groups))[0]
    kept_tk = jax.lax.top_k(worth(best_tgm), kept)[1]
    kept_tg = (kept_tk[:, :, None] == jnp.arange(groups, dtype=kept_tk.dtype)[None, None]).any(1)
    return jnp.repeat(kept_tg, experts // groups, axis=1)


def _worth_of_groups(score: Score, best_tgm: jax.Array) -> jax.Array:
    """(T, G): grows with the sum of the best scores, and where these saturate or underflow too.

    Args:
      score: static.
      best_tgm: the best logits of each group.
    """
    if score == "softmax":
        return jax.nn.logsumexp(best_tgm, axis=-1)
    # The logit of the scores' mean: exact where they are nearly 0 and where they are nearly 1.
    return jax.nn.logsumexp(jax.nn.log_sigmoid(best_tgm), axis=-1) - jax.nn.logsumexp(
        jax.nn.log_sigmoid(-best_tgm), axis=-1
    )


def _check_thresholds(name: str, threshold: float | tuple[float, ...], n: int) -> None:
    if not isinstance(threshold, tuple | numbers.Real):
        raise ValueError(f"{name} must be a number or a tuple, got {threshold!r}")
    if isinstance(threshold, tuple) and len(threshold) != n - 1:
        raise ValueError(f"{name} must have {n - 1} entries, one for each choice after the first, got {len(threshold)}")
    for value in threshold if isinstance(threshold, tuple) else (threshold,):
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 < value <= 1:
            raise ValueError(f"{name} must be in (0, 1], got {value!r}")

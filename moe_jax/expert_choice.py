"""Experts choose tokens instead of tokens experts."""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.dtypes import at_least_float32
from moe_jax.routing import Choice, Router, RouterInputs, SlotOrder


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertChoice(Router):
    """Every expert takes the tokens of each group that want it most, as many as its capacity allows.

    Every expert is a candidate of every token (A = E), asked for with its probability as priority and gate; the
    capacity of `assign_slots` in order of priority is then the choice. A token may be taken by any number of
    experts, or none. Not causal: later tokens compete with earlier ones. Rank r of the metrics is expert r, what it did
    not take counts as dropped, and `load_e` is always uniform, since every token is asked for. Experts being balanced
    by construction, the balance loss is not needed: it still counts favourites, and `balance_coef=0` leaves it out.

    Source: Zhou et al. 2202.09368 equations 1 and 2, with the layer's capacity factor as theirs.
    """

    @property
    def slot_order(self) -> SlotOrder | None:
        """By priority: the best tokens of each expert."""
        return "priority"

    @property
    def needs_capacity(self) -> bool:
        """Without a capacity every expert would take every token."""
        return True

    def num_choices(self, num_experts: int) -> int:
        """A = E."""
        return num_experts

    def choose(self, inputs: RouterInputs, *, train: bool) -> Choice:
        """Every expert as a candidate of every token; `train` changes nothing."""
        tokens, experts = inputs.logits_te.shape
        probs_te = jax.nn.softmax(at_least_float32(inputs.logits_te))
        # In logarithms: the same order, and no ties where probabilities round to 0 or 1.
        selection_te = jax.nn.log_softmax(at_least_float32(inputs.selection_logits_te))
        expert_index_te = jnp.broadcast_to(jnp.arange(experts, dtype=jnp.int32)[None], (tokens, experts))
        return Choice(
            expert_index_ta=expert_index_te,
            gate_ta=probs_te,
            wanted_ta=jnp.broadcast_to(inputs.mask_t[:, None], (tokens, experts)),
            priority_ta=selection_te,
            first_expert_t=jnp.argmax(selection_te, axis=-1).astype(jnp.int32),
            probs_te=probs_te,
        )

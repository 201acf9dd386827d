"""Everything about a layer that is not a weight."""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from moe_jax.checks import flag, floating, function, instance, number, one_of, positive, two_axes, whole, without_numpy
from moe_jax.dispatch import DISPATCHES, Dispatch
from moe_jax.experts import Activation, Init, gelu
from moe_jax.routing import Router, SlotOrder, TopN
from moe_jax.slots import SLOT_ORDERS, check_group_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Configuration of a mixture-of-experts layer. Frozen and hashable; checked when it is made.

    Args:
      dim: D, width of the hidden states.
      num_experts: E.
      router: who chooses whom: `TopN`, `CoordinateDescent`, `ExpertChoice`, or your own.
      capacity_factor_train: floor(group tokens * factor / E) slots per expert, however many experts a token asks
        for: if each asks for two, 1.25 drops 37.5 % at least. None for no limit.
      capacity_factor_eval: the same, in evaluation.
      min_capacity: lower bound on the slots per expert (never more than there are tokens in the group).
      group_size: tokens that share a capacity: "batch", "sequence" or a number. A capacity is that of the tokens there
        are: with more padding in a group, the others have fewer slots.
      slot_order: who gets the slots: "token", "choice" or "priority"; see `assign_slots`. "token" is causal in groups
        of one sequence ("sequence", or a number that divides it, where there is no padding). It drops at the end of
        groups: to train a model that need not be causal in what it drops, "choice" keeps first choices. A router may
        have an order of its own, as `ExpertChoice` has.
      dispatch: "dense", "index" or "ragged". "ragged" is dropless: it ignores the capacity, unless the router is
        defined by it. "index" without a capacity is dropless too, but reserves a slot per token and expert. "dense" is
        there to check the others against: it multiplies by zeros, so that one token's NaN reaches all.
      dispatch_eval: the same, in evaluation; None is the same as in training. A decoder that trains with a capacity
        and decodes with "ragged" gives each token what it gives it alone.
      straight_through: whether dispatching passes a gradient to the gates, as st-moe-pytorch does.
      gumbel_noise: scale of the Gumbel noise on the logits that choose, in training.
      input_jitter: the logits that choose are computed from hidden states times uniform(1 - jitter, 1 + jitter), in
        training.
      balance_coef: weight of the balance loss; 0 where a router's bias is to balance alone.
      router_z_coef: weight of the router z-loss.
      hidden_mult: F is int(dim * hidden_mult * 2 / 3), as many weights as a plain feed-forward of that multiple.
      hidden: F itself, if not by that rule.
      num_shared_experts: experts that every token passes through besides those it is routed to, with gate 1.
      bias: whether the experts' products have biases.
      mult_bias: whether the experts have the multiplicative bias after the gate.
      activation: of the experts' gates. A function without weights, which closes over nothing to be differentiated
        and whose derivative at 0 is finite: places without a token hold zeros.
      init: initial weights, "paper" (truncated normal of variance 0.1 / in) or "original" (as in st-moe-pytorch).
      recompute: whether the backward pass computes the routed experts' hidden states again. Of each row of an expert,
        2F numbers less are kept from the forward to the backward pass, for a product more. Where a CPU keeps them in
        the place of a gradient (see `moe_jax.block_loops`), that saves no memory.
      param_dtype: dtype of the weights. What is computed has that of the input, but for the routing.
      data_axis: name of the mesh axis that tokens are split over, where the layer is on a mesh that has it.
      expert_axis: name of the mesh axis that experts, and the tokens of each part of the data, are split over.

    Raises:
      ValueError: an argument is out of range or of an unknown name.
    """

    dim: int
    num_experts: int = 16
    router: Router = dataclasses.field(default_factory=TopN)
    capacity_factor_train: float | None = 1.25
    capacity_factor_eval: float | None = 2.0
    min_capacity: int = 4
    group_size: int | str = "sequence"
    slot_order: SlotOrder = "token"
    dispatch: Dispatch = "index"
    dispatch_eval: Dispatch | None = None
    straight_through: bool = False
    gumbel_noise: float = 0.0
    input_jitter: float = 0.0
    balance_coef: float = 1e-2
    router_z_coef: float = 1e-3
    hidden_mult: float = 4.0
    hidden: int | None = None
    num_shared_experts: int = 0
    bias: bool = True
    mult_bias: bool = True
    activation: Activation = gelu
    init: Init = "paper"
    recompute: bool = False
    param_dtype: DTypeLike = jnp.float32
    data_axis: str = "data"
    expert_axis: str = "expert"

    def __post_init__(self) -> None:
        without_numpy(self)
        for name in ("dim", "num_experts"):
            whole(name, getattr(self, name), 1)
        for name in ("min_capacity", "num_shared_experts"):
            whole(name, getattr(self, name), 0)
        for name in ("gumbel_noise", "balance_coef", "router_z_coef"):
            number(name, getattr(self, name), 0)
        for name in ("straight_through", "bias", "mult_bias", "recompute"):
            flag(name, getattr(self, name))
        positive("hidden_mult", self.hidden_mult)
        if self.hidden is not None:
            whole("hidden", self.hidden, 1)
        elif not 1 <= self.dim * self.hidden_mult * 2 / 3 < 2**31:
            raise ValueError(f"hidden_mult must give hidden states in [1, 2^31) wide, got {self.hidden_mult}")
        instance("router", self.router, Router)
        function("activation", self.activation)
        floating("param_dtype", self.param_dtype)
        two_axes(self.data_axis, self.expert_axis)
        one_of("slot_order", self.slot_order, SLOT_ORDERS)
        one_of("dispatch", self.dispatch, DISPATCHES)
        one_of("dispatch_eval", self.dispatch_in(train=False), DISPATCHES)
        one_of("init", self.init, ("paper", "original"))
        check_group_size(self.group_size)
        # A type, its dtype and its name are equal in NumPy but not in hash, or not at all.
        object.__setattr__(self, "param_dtype", jnp.dtype(self.param_dtype))
        number("input_jitter", self.input_jitter, 0)
        if self.input_jitter >= 1:
            raise ValueError(f"input_jitter must be below 1, got {self.input_jitter}")
        for name in ("capacity_factor_train", "capacity_factor_eval"):
            factor = getattr(self, name)
            if factor is None and self.router.needs_capacity:
                raise ValueError(f"{name} must be a number for {type(self.router).__name__}, got None")
            if factor is not None:
                positive(name, factor, otherwise=", or None")
        self.router.check(self.num_experts)

    @property
    def expert_hidden(self) -> int:
        """F, the hidden width of an expert."""
        return int(self.dim * self.hidden_mult * 2 / 3) if self.hidden is None else self.hidden

    def dispatch_in(self, *, train: bool) -> Dispatch:
        """The dispatch in force."""
        return self.dispatch if train or self.dispatch_eval is None else self.dispatch_eval

    def capacity_factor(self, *, train: bool) -> float | None:
        """The factor in force, None where nothing is dropped."""
        if self.dispatch_in(train=train) == "ragged" and not self.router.needs_capacity:
            return None
        return self.capacity_factor_train if train else self.capacity_factor_eval

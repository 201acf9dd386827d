"""Weights from the PyTorch package st-moe-pytorch."""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax.checks import flag, instance, renamed
from moe_jax.config import MoEConfig
from moe_jax.coordinate_descent import CoordinateDescent
from moe_jax.dispatch import Dispatch
from moe_jax.experts import Experts, FeedForward
from moe_jax.layer import MoE, SparseMoEBlock
from moe_jax.routing import SlotOrder, TopN

StateDict = Mapping[str, Any]

# Configuration here, so not read.
THRESHOLDS = re.compile(r"(moe\.)?gate\.threshold_(train|eval)")
# What arguments of ours are called there.
THEIR_NAMES = {
    "n": "gating_top_n",
    "hidden_mult": "expert_hidden_mult",
    "balance_coef": "balance_loss_coef",
    "router_z_coef": "router_z_loss_coef",
    "straight_through": "straight_through_dispatch_tensor",
}


def config_from_torch(
    *,
    dim: int,
    num_experts: int = 16,
    expert_hidden_mult: float = 4,
    threshold_train: float | tuple[float, ...] = 0.2,
    threshold_eval: float | tuple[float, ...] = 0.2,
    capacity_factor_train: float = 1.25,
    capacity_factor_eval: float = 2.0,
    gating_top_n: int = 2,
    balance_loss_coef: float = 1e-2,
    router_z_loss_coef: float = 1e-3,
    straight_through_dispatch_tensor: bool = True,
    differentiable_topk: bool = False,
    slot_order: SlotOrder = "choice",
    dispatch: Dispatch = "index",
    recompute: bool = False,
) -> MoEConfig:
    """The configuration that an st-moe-pytorch `MoE` with these arguments corresponds to.

    Args are those of the original's that change what it computes, with its defaults, and three of ours: `slot_order`
    (the original's is "choice"), `dispatch` and `recompute`. `gating_top_n` may be 1 (see `TopN`). Unlike the original,
    evaluation is deterministic, and `differentiable_topk` keeps the router's gates. The balance loss is another one
    wherever a batch drops, for it counts assignments before capacity, not what is left of them, and wherever a batch
    has several sequences, for it multiplies shares of the whole batch, where the original has the mean over sequences.
    A capacity that is whole but for rounding, as 100 * 1.15 / 5, is whole here and one less there. Both raw losses are
    returned in evaluation too, where the original has zeros.

    Raises:
      ValueError: an argument is out of range.
    """
    flag("differentiable_topk", differentiable_topk)
    router = CoordinateDescent if differentiable_topk else TopN
    try:
        return MoEConfig(
            dim=dim,
            num_experts=num_experts,
            router=router(n=gating_top_n, threshold_train=threshold_train, threshold_eval=threshold_eval),
            capacity_factor_train=capacity_factor_train,
            capacity_factor_eval=capacity_factor_eval,
            slot_order=slot_order,
            dispatch=dispatch,
            recompute=recompute,
            straight_through=straight_through_dispatch_tensor,
            balance_coef=balance_loss_coef,
            router_z_coef=router_z_loss_coef,
            hidden_mult=expert_hidden_mult,
            init="original",
        )
    except ValueError as error:
        raise renamed(error, THEIR_NAMES) from error


def moe_from_torch(state_dict: StateDict, **args: Any) -> MoE:
    """An `MoE` with the weights of an st-moe-pytorch `MoE`.

    Args:
      state_dict: its state dict, of arrays or of CPU tensors that NumPy has the dtype of (of bfloat16: `.float()`
        first); weights become float32. Thresholds in it are not read: they are configuration.
      **args: of `config_from_torch`: the original's constructor arguments.

    Raises:
      ValueError: a weight is missing, left over, of the wrong shape or not floating point.
    """
    moe = MoE(config_from_torch(**args), rngs=nnx.Rngs(0))
    weights = _Weights(state_dict)
    _load_moe(moe, weights, "")
    weights.check_all_used()
    return moe


def block_from_torch(
    state_dict: StateDict, *, add_ff_before: bool = False, add_ff_after: bool = True, **args: Any
) -> SparseMoEBlock:
    """A `SparseMoEBlock` with the weights of an st-moe-pytorch `SparseMoEBlock`.

    Args:
      state_dict: its state dict, as in `moe_from_torch`.
      add_ff_before: as in the original's constructor.
      add_ff_after: as in the original's constructor.
      **args: of `config_from_torch`: the constructor arguments of the original's `MoE`.

    Raises:
      ValueError: a weight is missing, left over, of the wrong shape or not floating point, or there are feed-forwards
        and the experts are not of their width (`expert_hidden_mult` 4).
    """
    rngs = nnx.Rngs(0)
    moe = MoE(config_from_torch(**args), rngs=rngs)
    # The original's block gives its feed-forwards the default multiple, whatever the experts have.
    if moe.config.hidden_mult != 4 and (add_ff_before or add_ff_after):
        raise ValueError(f"expert_hidden_mult must be 4 in a block, got {moe.config.hidden_mult}")
    block = SparseMoEBlock(moe, add_ff_before=add_ff_before, add_ff_after=add_ff_after, rngs=rngs)
    weights = _Weights(state_dict)
    _load_moe(moe, weights, "moe.")
    weights.into(block.norm_moe.scale_d, "moe_prenorm.gamma")
    for name, norm, ff in (
        ("ff_before", block.norm_before, block.ff_before),
        ("ff_after", block.norm_after, block.ff_after),
    ):
        if norm is not None and ff is not None:
            weights.into(norm.scale_d, f"{name}.net.0.gamma")
            _load_feed_forward(ff, weights, f"{name}.net.", first=1)
    weights.check_all_used()
    return block


def _as_numpy(name: str, value: Any) -> np.ndarray:
    """A weight as an array; of tensors PyTorch refuses some, and does not say which."""
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be a CPU tensor or array of a dtype of NumPy's: {error}") from error


class _Weights:
    """A state dict that remembers what was taken from it."""

    def __init__(self, state_dict: StateDict) -> None:
        instance("state_dict", state_dict, Mapping)
        self.arrays = {str(name): _as_numpy(str(name), array) for name, array in state_dict.items()}
        self.left = {name for name in self.arrays if not THRESHOLDS.fullmatch(name)}

    def take(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            raise ValueError(f"state_dict must have {name!r}, got {', '.join(sorted(self.arrays))}")
        self.left.discard(name)
        return self.arrays[name]

    def into(self, param: nnx.Param | None, *names: str, stacked: bool = False) -> None:
        """Copies the named arrays, matrices transposed to (in, out), into a parameter."""
        if param is None:
            raise ValueError(f"{names[0]} has no parameter to go to")
        shape = param.shape[:0:-1] if stacked else param.shape[::-1]
        arrays = [self.take(name) for name in names]
        for name, array in zip(names, arrays):
            if array.shape != shape:
                raise ValueError(f"{name} must be {shape}, got {array.shape}")
            if not jnp.issubdtype(array.dtype, jnp.floating):
                raise ValueError(f"{name} must be floating point, got {array.dtype}")
        param[...] = jnp.asarray(np.stack([a.T for a in arrays]) if stacked else arrays[0].T, param.dtype)

    def check_all_used(self) -> None:
        if self.left:
            raise ValueError(f"state_dict must fit the arguments, got left over: {', '.join(sorted(self.left))}")


def _load_moe(moe: MoE, weights: _Weights, prefix: str) -> None:
    weights.into(moe.router_de, f"{prefix}gate.to_gates.weight")
    experts: Experts = moe.experts

    def names(suffix: str) -> list[str]:
        return [f"{prefix}experts.experts.{e}.net.{suffix}" for e in range(moe.config.num_experts)]

    weights.into(experts.w_in_edf, *names("0.weight"), stacked=True)
    weights.into(experts.b_in_ef, *names("0.bias"), stacked=True)
    weights.into(experts.mult_bias_ef, *names("1.mult_bias"), stacked=True)
    weights.into(experts.w_out_efd, *names("2.weight"), stacked=True)
    weights.into(experts.b_out_ed, *names("2.bias"), stacked=True)


def _load_feed_forward(ff: FeedForward, weights: _Weights, prefix: str, *, first: int) -> None:
    weights.into(ff.w_in_df, f"{prefix}{first}.weight")
    weights.into(ff.b_in_f, f"{prefix}{first}.bias")
    weights.into(ff.mult_bias_f, f"{prefix}{first + 1}.mult_bias")
    weights.into(ff.w_out_fd, f"{prefix}{first + 2}.weight")
    weights.into(ff.b_out_d, f"{prefix}{first + 2}.bias")

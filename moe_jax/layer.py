"""The layers: `MoE`, and `SparseMoEBlock` around it."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from moe_jax.checks import array, flag, floating, floating_array, instance, whole
from moe_jax.config import MoEConfig
from moe_jax.dispatch import ExpertFunctions, mixture
from moe_jax.dtypes import at_least_float32, wide_dtype
from moe_jax.experts import Experts, FeedForward, initial_weights
from moe_jax.losses import Metrics, RouterTotals, balance_loss, metrics, router_totals, router_z_loss
from moe_jax.noise import RouterNoise, draw_noise
from moe_jax.parallel import mix_over_mesh, placement, with_auto_axes
from moe_jax.router_bias import RouterBias
from moe_jax.routing import Choice, RouterInputs, Routing, chosen
from moe_jax.slots import TokenGroups, assign_slots, token_groups


@struct.dataclass
class MoEOutput:
    """What a layer returns.

    Attributes:
      outputs: the shape and dtype of the input; zero at padding (of `MoE`; a block passes its residual).
      total_aux_loss: (), the two weighted losses together. Add it to the training loss. Zero in evaluation.
      balance_loss: (), raw: 1 when uniform, E when collapsed. Also in evaluation.
      router_z_loss: (), raw. Also in evaluation.
      metrics: see `Metrics`.
      weighted_balance_loss: (), `balance_coef` times the raw one. Zero in evaluation.
      weighted_router_z_loss: (), `router_z_coef` times the raw one. Zero in evaluation.
    """

    outputs: jax.Array
    total_aux_loss: jax.Array
    balance_loss: jax.Array
    router_z_loss: jax.Array
    metrics: Metrics
    weighted_balance_loss: jax.Array
    weighted_router_z_loss: jax.Array


class MoE(nnx.Module):
    """A mixture of experts.

    Weights: `router_de` (D, E), `experts`, `shared` (a feed-forward as wide as all shared experts together, or None)
    and `router_bias_e` (E,) where the router has one. Can be differentiated once, in reverse (`jax.grad`, `jax.vjp`).

    Args:
      config: see `MoEConfig`.
      rngs: for the initial weights; not kept.
      mesh: devices to compute on, with axes of the names in the configuration (see `moe_jax.parallel`). Without one,
        the mesh of `jax.set_mesh` is used if it has these axes, and one device otherwise. One with Explicit axes must
        be that of `jax.set_mesh`, here too. The mesh changes no result.
        Where axes of the one set are Explicit, outputs are split as the input is, all else is on every device, and
        what `jax.vmap` maps must not be split over the layer's axes.

    Raises:
      ValueError: the mesh has neither of the axes, or Explicit ones and is not in force, or an argument is of another
        kind.
    """

    def __init__(self, config: MoEConfig, *, rngs: nnx.Rngs, mesh: Mesh | None = None) -> None:
        instance("config", config, MoEConfig)
        self.config = config
        self.mesh = mesh
        placement(config, mesh)
        instance("rngs", rngs, nnx.Rngs)
        options = _feed_forward_options(config)
        shape = (config.dim, config.num_experts)
        self.router_de = nnx.Param(_initial_router(rngs.params(), shape, config))
        self.experts = Experts(
            config.num_experts, config.dim, config.expert_hidden, rngs=rngs, recompute=config.recompute, **options
        )
        shared_hidden = config.num_shared_experts * config.expert_hidden
        self.shared = FeedForward(config.dim, shared_hidden, rngs=rngs, **options) if shared_hidden else None
        biased = config.router.selection_bias
        self.router_bias_e = RouterBias(jnp.zeros(config.num_experts, jnp.float32)) if biased else None

    def __call__(
        self, x: jax.Array, *, train: bool, key: jax.Array | None = None, mask: jax.Array | None = None
    ) -> MoEOutput:
        """Routes every token to its experts and sums what they make of it.

        Args:
          x: (B, N, D) sequences, or (T, D) for one sequence, in 16 bits or more. Routing is at least float32.
          train: whether noise, training policies and training capacity apply. Static.
          key: a PRNG key, where the configuration asks for randomness. Padding changes no other token's numbers.
          mask: (B, N) or (T,) bool, false for padding: not routed, without capacity, loss, metric or output.

        Raises:
          ValueError: a shape or dtype does not fit, `train` is no bool, the key is missing, or arrays are split over
            Explicit axes of a mesh that is not in force.
        """
        check_call(self.config, x, key, mask, train=train)
        x = jnp.asarray(x)
        return with_auto_axes(partial(MoE._routed, train=train), _places(x), self, x, key, mask)

    def _routed(self, x: jax.Array, key: jax.Array | None, mask: jax.Array | None, *, train: bool) -> MoEOutput:
        x_td = x.reshape(-1, x.shape[-1])
        mask_t = None if mask is None else mask.reshape(-1)
        if mask_t is not None:
            x_td = jnp.where(mask_t[:, None], x_td, 0)
        dtype = wide_dtype(x.dtype)
        noise = draw_noise(key, self.config, mask_t, tokens=x_td.shape[0], train=train, dtype=dtype)
        where = placement(self.config, self.mesh)
        if where is None:
            everyone_t = jnp.ones(x_td.shape[0], bool) if mask_t is None else mask_t
            route = partial(self.route, sequence_length=x.shape[-2], train=train)
            outputs_td, totals = self.mix(x_td, everyone_t, noise, route=route, experts=self.experts, train=train)
        else:
            outputs_td, totals = mix_over_mesh(
                where, self, x_td, mask_t, noise, sequence_length=x.shape[-2], train=train
            )
        balance, router_z = balance_loss(totals), router_z_loss(totals)

        def weighted(loss: jax.Array, coef: float) -> jax.Array:
            # A loss that is not finite times 0 would not be 0.
            return loss * coef if train and coef else jnp.zeros_like(loss)

        weighted_balance = weighted(balance, self.config.balance_coef)
        weighted_router_z = weighted(router_z, self.config.router_z_coef)
        return MoEOutput(
            outputs=outputs_td.reshape(x.shape),
            total_aux_loss=weighted_balance + weighted_router_z,
            balance_loss=balance,
            router_z_loss=router_z,
            metrics=metrics(totals),
            weighted_balance_loss=weighted_balance,
            weighted_router_z_loss=weighted_router_z,
        )

    def mix(
        self,
        x_td: jax.Array,
        mask_t: jax.Array,
        noise: RouterNoise,
        *,
        route: Callable[[RouterInputs], tuple[Choice, Routing]],
        experts: ExpertFunctions,
        train: bool,
    ) -> tuple[jax.Array, RouterTotals]:
        """Routes the tokens at hand, on one device.

        Args:
          x_td: (T, D), zero at padding.
          mask_t: (T,) bool.
          noise: for these tokens.
          route: what they ask for, and what they get.
          experts: where they go.
          train: static.

        Returns:
          (T, D) outputs, zero at padding, and the totals of these tokens.
        """
        inputs = router_inputs(self, x_td, mask_t, noise)
        choice, routing = route(inputs)
        outputs_td = mixture(
            x_td,
            routing,
            experts,
            dispatch=self.config.dispatch_in(train=train),
            straight_through=self.config.straight_through,
        )
        if self.shared is not None:
            shared_td = jnp.where(mask_t[:, None], self.shared(x_td), 0)
            outputs_td = outputs_td + shared_td.astype(outputs_td.dtype)
        return outputs_td.astype(x_td.dtype), router_totals(inputs.logits_te, choice, routing, mask_t)

    def route(self, inputs: RouterInputs, *, sequence_length: int, train: bool) -> tuple[Choice, Routing]:
        """What the tokens ask for, and what they get, where they are all tokens there are."""
        choice = chosen(self.config.router, inputs, train=train)
        groups = token_groups(inputs.mask_t, sequence_length, self.config.group_size)
        return choice, self.assign(choice, groups, train=train)

    def assign(self, choice: Choice, groups: TokenGroups, *, train: bool) -> Routing:
        """What the tokens of some groups get."""
        config = self.config
        return assign_slots(
            choice,
            groups,
            num_experts=config.num_experts,
            capacity_factor=config.capacity_factor(train=train),
            min_capacity=config.min_capacity,
            slot_order=config.router.slot_order or config.slot_order,
        )


class RMSNorm(nnx.Module):
    """Hidden states over their root mean square, times a learned scale `scale_d` (D,). At least float32 inside.

    As in st-moe-pytorch, times the square root of D over their norm, which counts as 1e-12 where it is less.

    Args:
      dim: D.
      param_dtype: of the scale.

    Raises:
      ValueError: `dim` is no integer above 0, or `param_dtype` not floating point.
    """

    def __init__(self, dim: int, *, param_dtype: DTypeLike = jnp.float32) -> None:
        whole("dim", dim, 1)
        floating("param_dtype", param_dtype)
        self.scale_d = nnx.Param(jnp.ones(dim, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., D) to (..., D).

        Raises:
          ValueError: `x` is of another width, or not floating point.
        """
        x = floating_array("x", x)
        if x.shape[-1:] != self.scale_d.shape:
            raise ValueError(f"x must be (..., {len(self.scale_d)}), got {x.shape}")
        wide = at_least_float32(x)
        squares = jnp.square(wide).sum(-1, keepdims=True)
        normal = wide * (jax.lax.rsqrt(jnp.maximum(squares, 1e-24)) * x.shape[-1] ** 0.5)
        scale = self.scale_d[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return (normal * scale.astype(normal.dtype)).astype(x.dtype)


class SparseMoEBlock(nnx.Module):
    """A residual mixture of experts on normed input, with residual feed-forwards before and after if wanted.

    Args:
      moe: the mixture; the feed-forwards take their width and options from its configuration.
      add_ff_before: whether a normed feed-forward comes first.
      add_ff_after: whether one comes last.
      rngs: for the initial weights of the feed-forwards; not kept. Not needed without feed-forwards.

    Raises:
      ValueError: `rngs` is missing or something else, `moe` no `MoE`, or a flag no bool.

    Source: ST-MoE 2202.08906 appendix C (dense feed-forwards before or after a sparse layer).
    """

    def __init__(
        self,
        moe: MoE,
        *,
        add_ff_before: bool = False,
        add_ff_after: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        instance("moe", moe, MoE)
        flag("add_ff_before", add_ff_before)
        flag("add_ff_after", add_ff_after)
        config = moe.config
        if rngs is not None:
            instance("rngs", rngs, nnx.Rngs)
        if rngs is None and (add_ff_before or add_ff_after):
            raise ValueError("rngs must be nnx.Rngs when a feed-forward is added, got None")

        def feed_forward(wanted: bool) -> FeedForward | None:
            if rngs is None or not wanted:
                return None
            return FeedForward(config.dim, config.expert_hidden, rngs=rngs, **_feed_forward_options(config))

        def norm(wanted: bool) -> RMSNorm | None:
            return RMSNorm(config.dim, param_dtype=config.param_dtype) if wanted else None

        self.norm_before, self.ff_before = norm(add_ff_before), feed_forward(add_ff_before)
        self.norm_moe, self.moe = RMSNorm(config.dim, param_dtype=config.param_dtype), moe
        self.norm_after, self.ff_after = norm(add_ff_after), feed_forward(add_ff_after)

    def __call__(
        self, x: jax.Array, *, train: bool, key: jax.Array | None = None, mask: jax.Array | None = None
    ) -> MoEOutput:
        """As `MoE.__call__`, with residuals: padding keeps its own."""
        check_call(self.moe.config, x, key, mask, train=train)
        x = jnp.asarray(x)
        return with_auto_axes(partial(SparseMoEBlock._residual, train=train), _places(x), self, x, key, mask)

    def _residual(self, x: jax.Array, key: jax.Array | None, mask: jax.Array | None, *, train: bool) -> MoEOutput:
        def unpadded(x: jax.Array) -> jax.Array:
            return x if mask is None else jnp.where(mask[..., None], x, 0)

        def fed(feed_forward: FeedForward, norm: RMSNorm, x: jax.Array) -> jax.Array:
            # Whatever padding holds, it reaches no gradient of the weights, and a bias does not reach it.
            return x + unpadded(feed_forward(norm(unpadded(x))))

        if self.norm_before is not None and self.ff_before is not None:
            x = fed(self.ff_before, self.norm_before, x)
        out = self.moe(self.norm_moe(unpadded(x)), train=train, key=key, mask=mask)
        x = x + out.outputs
        if self.norm_after is not None and self.ff_after is not None:
            x = fed(self.ff_after, self.norm_after, x)
        return dataclasses.replace(out, outputs=x)


def router_inputs(moe: MoE, x_td: jax.Array, mask_t: jax.Array, noise: RouterNoise) -> RouterInputs:
    """Logits for weighting and for choosing, at least float32 and at full precision on every backend.

    Args:
      moe: whose router.
      x_td: (T, D), zero at padding.
      mask_t: (T,) bool.
      noise: from `draw_noise`, for these tokens.
    """
    x_td = at_least_float32(x_td)
    router_de = moe.router_de[...].astype(x_td.dtype)

    def logits(x_td: jax.Array) -> jax.Array:
        return jnp.matmul(x_td, router_de, precision=jax.lax.Precision.HIGHEST)

    logits_te = logits(x_td)
    selection_te = logits_te if noise.jitter_td is None else logits(x_td * noise.jitter_td)
    if noise.gumbel_te is not None:
        selection_te = selection_te + noise.gumbel_te
    bias_e = None if moe.router_bias_e is None else jax.lax.stop_gradient(moe.router_bias_e[...])
    return RouterInputs(
        logits_te=logits_te,
        selection_logits_te=selection_te,
        mask_t=mask_t,
        uniform_ta=noise.uniform_ta,
        bias_e=bias_e,
    )


def check_call(config: MoEConfig, x: jax.Array, key: jax.Array | None, mask: jax.Array | None, *, train: bool) -> None:
    """Raises ValueError when an argument does not fit the layer. What a key is of is looked at where one is used."""
    flag("train", train)
    array("x", x)
    if key is not None and not isinstance(key, jax.Array | np.ndarray):
        raise ValueError(f"key must be one PRNG key, got a {type(key).__name__}")
    if mask is not None:
        array("mask", mask)
    got = f"{x.shape} {x.dtype}"
    if x.ndim not in (2, 3) or x.shape[-1] != config.dim or 0 in x.shape:
        raise ValueError(f"x must be (B, N, {config.dim}) or (T, {config.dim}) and not empty, got {got}")
    floating("x", x.dtype)
    if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != jnp.bool_):
        raise ValueError(f"mask must be {x.shape[:-1]} bool, got {mask.shape} {mask.dtype}")


def _places(x: jax.Array) -> MoEOutput:
    """How what a layer makes of `x` is split over Explicit axes: outputs as `x` is, all else not."""
    places: dict[str, Any] = {field.name: P() for field in dataclasses.fields(MoEOutput)}
    places["outputs"] = P(*jax.typeof(x).sharding.spec.partitions)
    return MoEOutput(**places)


def _feed_forward_options(config: MoEConfig) -> dict[str, Any]:
    """What experts and dense feed-forwards of a layer have in common."""
    names = ("bias", "mult_bias", "activation", "init", "param_dtype")
    return {name: getattr(config, name) for name in names}


def _initial_router(key: jax.Array, shape: tuple[int, int], config: MoEConfig) -> jax.Array:
    if config.init == "paper":
        return initial_weights(key, shape, init="paper", dtype=config.param_dtype)
    # The original's router is a plain torch.nn.Linear: uniform in +-1 / sqrt(in).
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, config.param_dtype, -bound, bound)

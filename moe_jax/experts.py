"""The experts: stacked GEGLU feed-forwards, and the same feed-forward alone."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from moe_jax.checks import array, flag, floating, floating_array, function, instance, one_of, whole
from moe_jax.dtypes import at_least_float32
from moe_jax.grouped import by_group
from moe_jax.grouping import Grouping, OneGroup
from moe_jax.halves import Weights
from moe_jax.layout import Sent, scaled

Init = Literal["paper", "original"]
Activation = Callable[[jax.Array], jax.Array]


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, by erf as in PyTorch, in float32 at least.

    `jax.nn.gelu(x, approximate=False)` goes by erfc, which keeps the last digits of values that are nearly zero; on a
    CPU a layer and its gradient take a twentieth longer with it.
    """
    exact = at_least_float32(x)
    return (exact * _normal_cdf(exact)).astype(x.dtype)


@jax.custom_jvp
def _normal_cdf(x: jax.Array) -> jax.Array:
    """The normal distribution function. Its derivative is ours: JAX 0.12 cannot take erf's in a `jax.shard_map`."""
    return 0.5 * (1 + jax.lax.erf(x * 0.5**0.5))


@_normal_cdf.defjvp
def _normal_cdf_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (x_dot,) = primals, tangents
    return _normal_cdf(x), jnp.exp(-0.5 * jnp.square(x)) * (2 * math.pi) ** -0.5 * x_dot


class HiddenWeights(NamedTuple):
    """Of the first half: (D, 2F) and (2F,), or with an axis of experts in front."""

    w_in: jax.Array
    b_in: jax.Array | None


class OutputWeights(NamedTuple):
    """Of the second half: (F,), (F, D) and (D,), or with an axis of experts in front."""

    mult_bias: jax.Array | None
    w_out: jax.Array
    b_out: jax.Array | None


@dataclasses.dataclass(frozen=True)
class GEGLU:
    """The two halves of a feed-forward, of one expert or of several (see `moe_jax.halves.TwoLayers`)."""

    activation: Activation

    def hidden(self, grouping: Grouping, weights: HiddenWeights, rows: jax.Array) -> jax.Array:
        """(S, D) to (S, 2F), values then gates."""
        hidden = grouping.product(rows, weights.w_in)
        return hidden if weights.b_in is None else hidden + grouping.each(weights.b_in)

    def output(
        self, grouping: Grouping, weights: OutputWeights, hidden: jax.Array, gate_s: jax.Array | None
    ) -> jax.Array:
        """(S, 2F) to (S, D), each row times its gate if there are gates."""
        values, gates = jnp.split(hidden, 2, axis=-1)
        gated = values * self.activation(gates)
        if weights.mult_bias is not None:
            gated = gated * grouping.each(weights.mult_bias)
        # Before the product, of which the gradient with respect to the gate needs nothing then.
        outputs = grouping.product(scaled(gated, gate_s), weights.w_out)
        return outputs if weights.b_out is None else outputs + scaled(grouping.each(weights.b_out), gate_s)


def weights_by_half(
    dtype: jnp.dtype,
    w_in: nnx.Param,
    b_in: nnx.Param | None,
    mult_bias: nnx.Param | None,
    w_out: nnx.Param,
    b_out: nnx.Param | None,
) -> Weights:
    """Parameters by half, in the dtype to compute in."""

    def cast(param: nnx.Param | None) -> jax.Array | None:
        return None if param is None else param[...].astype(dtype)

    return Weights(
        hidden=HiddenWeights(w_in[...].astype(dtype), cast(b_in)),
        output=OutputWeights(cast(mult_bias), w_out[...].astype(dtype), cast(b_out)),
    )


class FeedForward(nnx.Module):
    """A GEGLU feed-forward: (..., D) to (..., D).

    Weights: `w_in_df` (D, 2F), values then gates; `b_in_f` (2F,); `mult_bias_f` (F,); `w_out_fd` (F, D); `b_out_d`
    (D,). Computes in the dtype of its input.

    Args:
      dim: D.
      hidden: F.
      rngs: for the initial weights; not kept.
      bias: whether the two products have a bias.
      mult_bias: whether the gated hidden state is multiplied by a vector (initially ones).
      activation: of the gates. A function without weights, which closes over nothing to be differentiated and whose
        derivative at 0 is finite: places without a row hold zeros.
      init: see `initial_weights`.
      param_dtype: dtype of the weights.

    Raises:
      ValueError: a width is no integer above 0, the activation no function, another argument of another kind, or an
        input not as wide as the weights or not floating point.

    Source: Shazeer 2002.05202 (GEGLU); ST-MoE 2202.08906 appendix C (multiplicative bias after the gate).
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        rngs: nnx.Rngs,
        bias: bool = True,
        mult_bias: bool = True,
        activation: Activation = gelu,
        init: Init = "paper",
        param_dtype: DTypeLike = jnp.float32,
    ) -> None:
        stacked = Experts(
            1,
            dim,
            hidden,
            rngs=rngs,
            bias=bias,
            mult_bias=mult_bias,
            activation=activation,
            init=init,
            param_dtype=param_dtype,
        )
        self.activation = activation
        self.w_in_df = nnx.Param(stacked.w_in_edf[0])
        self.b_in_f = None if stacked.b_in_ef is None else nnx.Param(stacked.b_in_ef[0])
        self.mult_bias_f = None if stacked.mult_bias_ef is None else nnx.Param(stacked.mult_bias_ef[0])
        self.w_out_fd = nnx.Param(stacked.w_out_efd[0])
        self.b_out_d = None if stacked.b_out_ed is None else nnx.Param(stacked.b_out_ed[0])

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., D) to (..., D)."""
        x = floating_array("x", x)
        if x.shape[-1:] != (dim := self.w_in_df.shape[0],):
            raise ValueError(f"x must be (..., {dim}), got {x.shape}")
        weights = weights_by_half(x.dtype, self.w_in_df, self.b_in_f, self.mult_bias_f, self.w_out_fd, self.b_out_d)
        layers, one = GEGLU(self.activation), OneGroup()
        hidden_tf = layers.hidden(one, weights.hidden, x.reshape(-1, x.shape[-1]))
        return layers.output(one, weights.output, hidden_tf, None).reshape(x.shape)


class Experts(nnx.Module):
    """E feed-forwards with stacked weights: `w_in_edf` (E, D, 2F) and so on, as in `FeedForward`.

    Args:
      num_experts: E.
      dim: D.
      hidden: F.
      rngs: for the initial weights; not kept.
      bias: as in `FeedForward`.
      mult_bias: as in `FeedForward`.
      activation: as in `FeedForward`.
      init: as in `FeedForward`.
      recompute: whether gradients compute the hidden states again, and none are kept for them.
      param_dtype: as in `FeedForward`.

    Raises:
      ValueError: a size is no integer above 0, the activation no function, another argument of another kind, or an
        input of other experts, another width or not floating point.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden: int,
        *,
        rngs: nnx.Rngs,
        bias: bool = True,
        mult_bias: bool = True,
        activation: Activation = gelu,
        init: Init = "paper",
        recompute: bool = False,
        param_dtype: DTypeLike = jnp.float32,
    ) -> None:
        for name, size in (("num_experts", num_experts), ("dim", dim), ("hidden", hidden)):
            whole(name, size, 1)
        instance("rngs", rngs, nnx.Rngs)
        function("activation", activation)
        for name, value in (("bias", bias), ("mult_bias", mult_bias), ("recompute", recompute)):
            flag(name, value)
        floating("param_dtype", param_dtype)
        weights = partial(initial_weights, init=init, dtype=param_dtype)
        biases = partial(initial_biases, init=init, dtype=param_dtype)
        self.activation = activation
        self.recompute = recompute
        self.w_in_edf = nnx.Param(weights(rngs.params(), (num_experts, dim, 2 * hidden)))
        self.b_in_ef = nnx.Param(biases(rngs.params(), (num_experts, 2 * hidden))) if bias else None
        self.mult_bias_ef = nnx.Param(jnp.ones((num_experts, hidden), param_dtype)) if mult_bias else None
        self.w_out_efd = nnx.Param(weights(rngs.params(), (num_experts, hidden, dim)))
        self.b_out_ed = nnx.Param(biases(rngs.params(), (num_experts, dim))) if bias else None

    def batched(self, x_ecd: jax.Array) -> jax.Array:
        """Every expert on its own C rows: (E, C, D) to (E, C, D)."""
        x_ecd = floating_array("x_ecd", x_ecd)
        experts, dim, _ = self.w_in_edf.shape
        if x_ecd.ndim != 3 or x_ecd.shape[::2] != (experts, dim):
            raise ValueError(f"x_ecd must be ({experts}, C, {dim}), got {x_ecd.shape}")
        return self._by_group(x_ecd.reshape(-1, x_ecd.shape[2]), None).reshape(x_ecd.shape)

    def grouped(self, x_sd: jax.Array, sizes_e: jax.Array) -> jax.Array:
        """Rows sorted by expert, `sizes_e` each: (S, D) to (S, D). Rows beyond the last expert's are undefined."""
        x_sd = floating_array("x_sd", x_sd)
        array("sizes_e", sizes_e)
        experts, dim, _ = self.w_in_edf.shape
        if x_sd.ndim != 2 or x_sd.shape[1] != dim:
            raise ValueError(f"x_sd must be (S, {dim}), got {x_sd.shape}")
        if sizes_e.shape != (experts,) or not jnp.issubdtype(sizes_e.dtype, jnp.integer):
            raise ValueError(f"sizes_e must be ({experts},) integers, got {sizes_e.shape} {sizes_e.dtype}")
        return self._by_group(x_sd, sizes_e.astype(jnp.int32))

    def mixed(self, x_td: jax.Array, sent: Sent, sizes: jax.Array | int) -> jax.Array:
        """Each token's sum over its rows (see `moe_jax.dispatch.ExpertFunctions`)."""
        experts, dim, _ = self.w_in_edf.shape
        sizes_e = None if isinstance(sizes, int) else sizes
        routed = len(sent.gate_s) // sizes if isinstance(sizes, int) else len(sizes)
        if routed != experts:
            raise ValueError(f"experts must be the {routed} of the routing, got {experts}")
        if x_td.shape[1] != dim:
            raise ValueError(f"x_td must be (T, {dim}), got {x_td.shape}")
        return self._by_group(x_td, sizes_e, sent)

    def _by_group(self, x: jax.Array, sizes_e: jax.Array | None, sent: Sent | None = None) -> jax.Array:
        weights = weights_by_half(
            x.dtype, self.w_in_edf, self.b_in_ef, self.mult_bias_ef, self.w_out_efd, self.b_out_ed
        )
        return by_group(GEGLU(self.activation), weights, x, sizes_e, sent=sent, recompute=self.recompute)


def initial_weights(key: jax.Array, shape: tuple[int, ...], *, init: Init, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """(..., in, out) initial weights.

    "paper": truncated normal of variance 0.1 / in (Switch 2101.03961 section 2.4, ST-MoE). "original": what
    st-moe-pytorch does, uniform in +-1 / sqrt(out).
    """
    one_of("init", init, get_args(Init))
    if init == "original":
        bound = shape[-1] ** -0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)
    batch_axis = tuple(range(len(shape) - 2))
    return nnx.initializers.variance_scaling(0.1, "fan_in", "truncated_normal", batch_axis=batch_axis)(
        key, shape, dtype
    )


def initial_biases(key: jax.Array, shape: tuple[int, ...], *, init: Init, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """(..., out) initial biases: zero ("paper"), or uniform in +-1 / sqrt(out) ("original")."""
    one_of("init", init, get_args(Init))
    if init == "paper":
        return jnp.zeros(shape, dtype)
    bound = shape[-1] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)

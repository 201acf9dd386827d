"""The experts: stacked GEGLU feed-forwards, and the same feed-forward alone."""

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.grouped import batched_product, group_rows, grouped_product
from moe_jax.routing import one_of

Init = Literal["paper", "original"]
Activation = Callable[[jax.Array], jax.Array]


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU (erf, not tanh)."""
    return jax.nn.gelu(x, approximate=False)


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
      activation: of the gates.
      init: see `initial_weights`.
      param_dtype: dtype of the weights.

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
        param_dtype: jnp.dtype | type = jnp.float32,
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
        x_td = x.reshape(-1, x.shape[-1])

        def per_row(param: nnx.Param | None) -> jax.Array | None:
            return None if param is None else param[...].astype(x.dtype)[None]

        hidden_tf = add(x_td @ self.w_in_df[...].astype(x.dtype), per_row(self.b_in_f))
        hidden_tf = geglu(hidden_tf, self.activation, per_row(self.mult_bias_f))
        return add(hidden_tf @ self.w_out_fd[...].astype(x.dtype), per_row(self.b_out_d)).reshape(x.shape)


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
      param_dtype: as in `FeedForward`.
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
        param_dtype: jnp.dtype | type = jnp.float32,
    ) -> None:
        weights = partial(initial_weights, init=init, dtype=param_dtype)
        biases = partial(initial_biases, init=init, dtype=param_dtype)
        self.activation = activation
        self.w_in_edf = nnx.Param(weights(rngs.params(), (num_experts, dim, 2 * hidden)))
        self.b_in_ef = nnx.Param(biases(rngs.params(), (num_experts, 2 * hidden))) if bias else None
        self.mult_bias_ef = nnx.Param(jnp.ones((num_experts, hidden), param_dtype)) if mult_bias else None
        self.w_out_efd = nnx.Param(weights(rngs.params(), (num_experts, hidden, dim)))
        self.b_out_ed = nnx.Param(biases(rngs.params(), (num_experts, dim))) if bias else None

    def batched(self, x_ecd: jax.Array) -> jax.Array:
        """Every expert on its own C rows: (E, C, D) to (E, C, D)."""

        def per_row(param: nnx.Param | None) -> jax.Array | None:
            return None if param is None else param[...].astype(x_ecd.dtype)[:, None]

        hidden_ecf = add(batched_product(x_ecd, self.w_in_edf[...].astype(x_ecd.dtype)), per_row(self.b_in_ef))
        hidden_ecf = geglu(hidden_ecf, self.activation, per_row(self.mult_bias_ef))
        return add(batched_product(hidden_ecf, self.w_out_efd[...].astype(x_ecd.dtype)), per_row(self.b_out_ed))

    def grouped(self, x_sd: jax.Array, sizes_e: jax.Array) -> jax.Array:
        """Rows sorted by expert, `sizes_e` each: (S, D) to (S, D). Rows beyond the last expert's are zero."""
        rows = x_sd.shape[0]
        used_s1 = (jnp.arange(rows) < sizes_e.sum())[:, None]

        def per_row(param: nnx.Param | None) -> jax.Array | None:
            return None if param is None else group_rows(param[...].astype(x_sd.dtype), sizes_e, rows)

        def product(rows_sd: jax.Array, weights: nnx.Param, bias: nnx.Param | None) -> jax.Array:
            weights_edf = weights[...].astype(x_sd.dtype)
            # Rows beyond the last group may come out as NaN, of the product and of its gradient: the second `where`
            # stops the one, the first stops the other. Multiplying by 0 would not.
            rows_sd = jnp.where(used_s1, rows_sd, 0)
            return jnp.where(used_s1, add(grouped_product(rows_sd, weights_edf, sizes_e), per_row(bias)), 0)

        hidden_sf = product(x_sd, self.w_in_edf, self.b_in_ef)
        hidden_sf = geglu(hidden_sf, self.activation, per_row(self.mult_bias_ef))
        return product(hidden_sf, self.w_out_efd, self.b_out_ed)


def geglu(hidden: jax.Array, activation: Activation, mult_bias: jax.Array | None) -> jax.Array:
    """(..., 2F) values and gates to (..., F), times the multiplicative bias."""
    values, gates = jnp.split(hidden, 2, axis=-1)
    gated = values * activation(gates)
    return gated if mult_bias is None else gated * mult_bias


def add(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    """`x + bias`, or `x` where there is no bias."""
    return x if bias is None else x + bias


def initial_weights(
    key: jax.Array, shape: tuple[int, ...], *, init: Init, dtype: jnp.dtype | type = jnp.float32
) -> jax.Array:
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


def initial_biases(
    key: jax.Array, shape: tuple[int, ...], *, init: Init, dtype: jnp.dtype | type = jnp.float32
) -> jax.Array:
    """(..., out) initial biases: zero ("paper"), or uniform in +-1 / sqrt(out) ("original")."""
    one_of("init", init, get_args(Init))
    if init == "paper":
        return jnp.zeros(shape, dtype)
    bound = shape[-1] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)

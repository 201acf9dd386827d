"""Small layers, inputs and parity cases that several tests share."""

import json
import pathlib
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

import moe_jax
from moe_jax import (
    Choice,
    CoordinateDescent,
    ExpertChoice,
    MoE,
    MoEConfig,
    MoEOutput,
    RouterInputs,
    SparseMoEBlock,
    TopN,
)

DATA = pathlib.Path(__file__).parent.parent / "data"
ALL = TopN(policy_train="all", policy_eval="all")
ROUTERS = {
    "top_n": ALL,
    "three_with_thresholds": TopN(n=3, policy_train="threshold", threshold_train=(0.3, 0.2)),
    "sigmoid": TopN(score="sigmoid", policy_train="all", bias=True),
    "grouped": TopN(policy_train="all", expert_groups=2, expert_groups_kept=1),
    "coordinate_descent": CoordinateDescent(policy_train="all"),
    "expert_choice": ExpertChoice(),
}


# Compiled as a whole: one operation after the other is slower, even once.
assign_slots = jax.jit(
    moe_jax.assign_slots, static_argnames=("num_experts", "capacity_factor", "min_capacity", "slot_order")
)


def config(**options: Any) -> MoEConfig:
    """A layer of 4 experts on 8 dimensions that asks for no randomness unless `options` do."""
    return MoEConfig(**({"dim": 8, "num_experts": 4, "hidden": 10, "router": ALL, "init": "original"} | options))


@cache
def initial_layer(config: MoEConfig, seed: int = 0) -> MoE:
    return jax.jit(lambda: MoE(config, rngs=nnx.Rngs(seed)))()


def layer(**options: Any) -> MoE:
    """A layer of one's own, to change at will."""
    return jax.tree.map(lambda leaf: leaf, initial_layer(config(**options)))


@partial(jax.jit, static_argnames="train")
def apply(
    moe: MoE | SparseMoEBlock,
    x: jax.Array,
    *,
    train: bool = True,
    key: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> MoEOutput:
    """One call of a layer, compiled: faster than one operation after the other, even once."""
    return moe(x, train=train, key=key, mask=mask)


def outputs_and_gradients(
    moe: MoE, x: jax.Array, mask: jax.Array | None = None, **options: Any
) -> tuple[MoEOutput, MoE, jax.Array]:
    """Gradients of a loss that looks at real tokens only."""

    def loss(moe: MoE, x: jax.Array) -> tuple[jax.Array, MoEOutput]:
        out = moe(x, train=True, mask=mask, **options)
        return jnp.sum(out.outputs**2).astype(out.total_aux_loss.dtype) + out.total_aux_loss, out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(moe, x)
    return out, *gradients


def hidden_states(*shape: int, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def choice(
    expert_index: ArrayLike | list[list[int]],
    *,
    wanted: ArrayLike | list[list[bool]] | None = None,
    priority: ArrayLike | list[list[float]] | None = None,
    gate: ArrayLike | list[list[float]] | None = None,
) -> Choice:
    """A hand-written choice among 4 experts, with gates of 1 unless given."""
    index_ta = jnp.asarray(expert_index, jnp.int32)
    ones_ta = jnp.ones(index_ta.shape)
    return Choice(
        expert_index_ta=index_ta,
        gate_ta=ones_ta if gate is None else jnp.asarray(gate),
        wanted_ta=ones_ta.astype(bool) if wanted is None else jnp.asarray(wanted),
        priority_ta=ones_ta if priority is None else jnp.asarray(priority),
        first_expert_t=index_ta[:, 0],
        probs_te=jnp.full((index_ta.shape[0], 4), 0.25),
    )


def parity_case(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The description and the arrays of a case in tests/data, computed with st-moe-pytorch 0.1.8."""
    arrays = np.load(DATA / f"{name}.npz")
    return json.loads((DATA / f"{name}.json").read_text()), {key: arrays[key] for key in arrays}


def with_prefix(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key[len(prefix) :]: array for key, array in arrays.items() if key.startswith(prefix)}


def assert_trees_close(got: Any, wanted: Any, *, relative: float) -> None:
    """Every leaf within `relative` of the wanted leaf's largest entry."""
    got, wanted = jax.tree.leaves_with_path(got), jax.tree.leaves_with_path(wanted)
    assert [path for path, _ in got] == [path for path, _ in wanted]
    for (path, leaf), (_, target) in zip(got, wanted):
        scale = float(np.abs(target).max())
        np.testing.assert_allclose(
            leaf, target, rtol=0, atol=relative * max(scale, 1e-6), err_msg=jax.tree_util.keystr(path)
        )


def inputs_of(probs: list[list[float]], **fields: jax.Array) -> RouterInputs:
    """Logits whose softmax is `probs`."""
    logits_te = jnp.log(jnp.asarray(probs))
    given = {"selection_logits_te": logits_te, "mask_t": jnp.ones(logits_te.shape[0], bool)}
    return RouterInputs(logits_te=logits_te, **(given | fields))


# Token 0 prefers experts 2, 0, 1, 3; token 1 prefers 1, 3, 0, 2.
PROBS = [[0.3, 0.15, 0.5, 0.05], [0.1, 0.6, 0.05, 0.25]]
# The same with noise.
NOISED = [[0.45, 0.4, 0.1, 0.05], [0.6, 0.1, 0.05, 0.25]]

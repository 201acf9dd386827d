"""Every strategy that needs a transformer for its target, on one tiny random target of each kind."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spec_jax import (
    Decoder,
    DecoderConfig,
    Drafter,
    EarlyExit,
    LayerSkip,
    ModelWithProphet,
    NGram,
    Prophet,
)
from spec_jax.drafters.base import Choose, Sequence
from tests.spec.transformers import random_weights, transformer

NAMES = ("early exit", "early exit with blocks", "layer skip", "prophet", "n-gram")


@dataclasses.dataclass(frozen=True)
class Strategy:
    """A target and what drafts for it."""

    target: Any
    drafter: Drafter


@functools.cache
def strategy(name: str, config: DecoderConfig, gamma: int) -> Strategy:
    """A strategy by name, its target of this size (one layer more than the exit is at) with random weights."""
    if name == "early exit":
        target = near_exit(transformer(0, dataclasses.replace(config, early_exit_layer=1)))
        return Strategy(target, EarlyExit(gamma=gamma))
    if name == "early exit with blocks":
        changed = dataclasses.replace(config, early_exit_layer=1, early_exit_extra_blocks=1, early_exit_recycling=gamma)
        return Strategy(near_exit(transformer(0, changed)), EarlyExit(gamma=gamma))
    if name == "layer skip":
        return Strategy(near_exit(transformer(0, config)), LayerSkip((1,), (1,), gamma=gamma))
    if name == "prophet":
        pair = random_pair(config, head_scale=1.5)  # Flatter laws are more alike: a draft now and then kept.
        return Strategy(pair.target, Prophet(pair, gamma=gamma))
    if name == "n-gram":
        return Strategy(transformer(0, config), NGram(max_ngram=2, min_ngram=1, gamma=gamma))
    raise ValueError(f"name must be a strategy's, got {name!r}")


def near_exit(target: Decoder) -> Decoder:
    """With sublayers behind the first block that do little and an exit head equal to the head: a draft often kept."""

    named = [(jax.tree_util.keystr(path), weight) for path, weight in jax.tree_util.tree_leaves_with_path(target)]

    def changed(path: tuple, weight: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        late = ".blocks[1]" in name or ".early_exit.blocks" in name or ".recycle" in name
        if ".early_exit.head" in name:
            return dict(named)[name.replace(".early_exit", "")]
        return 0.3 * weight if late and any(part in name for part in (".to_out", ".down", ".project")) else weight

    return jax.tree_util.tree_map_with_path(changed, target)


def random_pair(config: DecoderConfig, *, head_scale: float = 4.0, **options: Any) -> ModelWithProphet:
    """A target and a prophet of half its width, with random weights."""
    small = dataclasses.replace(config, dim=config.dim // 2, depth=1)
    options = {"num_leading_start_tokens": 2, "prophet_train_length": 6} | options

    def make() -> ModelWithProphet:
        rngs = nnx.Rngs(0)
        return ModelWithProphet(Decoder(config, rngs=rngs), Decoder(small, rngs=rngs), rngs=rngs, **options)

    return random_weights(0, nnx.eval_shape(make), head_scale=head_scale)


def drafting_what_is_there(sequence: Sequence) -> Choose:
    """So that rows are known beforehand: `choose` gives the next token of each, and the logits where a law belongs."""

    def choose(logits_bv: jax.Array, offset: int | jax.Array) -> tuple[jax.Array, jax.Array]:
        return sequence.window(sequence.length_b + offset, 1)[:, 0], logits_bv

    return choose


def all_logits(target: Any, rows: list[tuple[int, ...]]) -> dict[tuple[int, ...], np.ndarray]:
    """(V,) logits after each whole row, from one uncached forward."""
    width = max(map(len, rows))
    tokens_bt = np.zeros((len(rows), width), np.int32)
    for index, row in enumerate(rows):
        tokens_bt[index, : len(row)] = row
    logits_btv = np.asarray(jax.jit(lambda target, tokens: target(tokens).logits)(target, jnp.asarray(tokens_bt)))
    return {row: logits_btv[index, len(row) - 1] for index, row in enumerate(rows)}

"""Negative controls of test_law: rules broken on purpose, one thing at a time, must fail the same test.

One program a rule holds all of the broken variants, and a traced number says which one runs; the right rule, drawn by
the same program, passes.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spec_jax import Sampling, SmallModel, loop, verification
from spec_jax.noise import Purpose
from spec_jax.verification import Draft, Verdict
from tests.spec.law_cells import (
    DRAFT,
    FILTERS,
    GAMMA,
    SEQUENCES,
    TARGET,
    VOCAB,
    Cell,
    decode_prompts,
    p_values,
    tally,
)

OPTIMISED = True

BATCH = 4


class Broken(enum.IntEnum):
    """What is wrong."""

    NOTHING = 0
    ALWAYS_ACCEPT = 1
    OTHER_DRAFT_PROBS = 2
    UNFILTERED_DRAFT_PROBS = 3
    CORRECTION_FROM_TARGET = 4
    RESIDUAL_NOT_NORMALISED = 5
    NOISE_OF_POSITION = 6


def broken_rule(broken: jax.Array, rule, draft: Draft, target_log_probs_btv, uniform_bj, gumbel_bv, **others):
    """Accepts everything, or is told the draft's distribution at another temperature than it was sampled from."""
    told_bjv = jax.nn.log_softmax(0.5 * draft.log_probs_bjv, axis=-1)
    told_bjv = jnp.where(broken == Broken.OTHER_DRAFT_PROBS, told_bjv, draft.log_probs_bjv)
    told = dataclasses.replace(draft, log_probs_bjv=told_bjv)
    verdict = rule(told, target_log_probs_btv, uniform_bj, gumbel_bv, **others)
    everything = Verdict(draft.count_b, verification.draw(target_log_probs_btv[:, -1], gumbel_bv))
    return jax.tree.map(lambda x, y: jnp.where(broken == Broken.ALWAYS_ACCEPT, x, y), everything, verdict)


def broken_chooser(broken: jax.Array, chooser, *arguments):
    """Samples under the filters and tells the rule the distribution without them."""
    choose = chooser(*arguments)

    def wrong_choose(logits_bv: jax.Array, offset: int | jax.Array) -> tuple[jax.Array, jax.Array]:
        token_b, log_probs_bv = choose(logits_bv, offset)
        unfiltered_bv = jax.nn.log_softmax(logits_bv, axis=-1)
        return token_b, jnp.where(broken == Broken.UNFILTERED_DRAFT_PROBS, unfiltered_bv, log_probs_bv)

    return wrong_choose


def broken_residual(broken: jax.Array, residual, target_bv, draft_bv, fallback_bv, gumbel_bv):
    """Does not subtract; or takes max(p − q, 0) for probabilities as it is, the last token getting what lacks to 1."""
    subtracted_bv = jnp.where(broken == Broken.CORRECTION_FROM_TARGET, 0.0, draft_bv)
    right_b = residual(target_bv, subtracted_bv, fallback_bv, gumbel_bv)
    uniform_b1 = jnp.exp(-jnp.exp(-gumbel_bv[:, :1]))
    below_bv = jnp.cumsum(jnp.maximum(target_bv - draft_bv, 0), axis=1) <= uniform_b1
    unnormalised_b = jnp.minimum(below_bv.sum(1), VOCAB - 1).astype(jnp.int32)
    return jnp.where(broken == Broken.RESIDUAL_NOT_NORMALISED, unnormalised_b, right_b)


def broken_noise(broken: jax.Array, noise, key, purpose, row_ids_b, round_start_b, shape, sampler):
    """Keys draft and acceptance by position and not by round: a redrafted position sees the old round's numbers."""
    right = noise(key, purpose, row_ids_b, round_start_b, shape, sampler)
    if purpose == Purpose.RESIDUAL:
        return right
    by_position = jnp.stack(
        [noise(key, purpose, row_ids_b, round_start_b + offset, shape[1:], sampler) for offset in range(shape[0])],
        axis=1,
    )
    return jnp.where(broken == Broken.NOISE_OF_POSITION, by_position, right)


@functools.cache
def broken_program(rule: str):
    """(broken, keys) → what 200,000 sequences of the top-k cell gave."""
    sampling = Sampling(**dataclasses.asdict(FILTERS["top_k"])).checked()
    drafter = SmallModel(DRAFT, gamma=GAMMA)

    @jax.jit
    def program(broken: jax.Array, keys: jax.Array):
        patches = [
            mock.patch.object(loop, rule, functools.partial(broken_rule, broken, getattr(loop, rule))),
            mock.patch.object(loop, "_chooser", functools.partial(broken_chooser, broken, loop._chooser)),
            mock.patch.object(loop, "round_noise", functools.partial(broken_noise, broken, loop.round_noise)),
            mock.patch.object(
                verification, "_draw_residual", functools.partial(broken_residual, broken, verification._draw_residual)
            ),
        ]

        def one_key(key: jax.Array):
            return decode_prompts(TARGET, drafter, key, rule, sampling, -1, batch=BATCH)

        with patches[0], patches[1], patches[2], patches[3]:
            return jax.vmap(one_key)(keys)

    return program


def draw_broken(rule: str, broken: Broken) -> Cell:
    keys = jax.random.split(jax.random.key(2310), SEQUENCES // BATCH)
    return tally(broken_program(rule)(np.int32(broken), keys))


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_the_right_rule_passes(rule: str, record_property):
    p_value, _ = p_values(draw_broken(rule, Broken.NOTHING), FILTERS["top_k"], None)
    record_property("p_value", p_value)
    assert p_value > 0.001


@pytest.mark.parametrize("broken", list(Broken)[1:])
@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_a_broken_rule_fails(rule: str, broken: Broken, record_property):
    """Noise keyed by position harms block alone: rejection decides on a position before anything behind it."""
    p_value, _ = p_values(draw_broken(rule, broken), FILTERS["top_k"], None)
    record_property("p_value", p_value)
    if rule == "rejection" and broken == Broken.NOISE_OF_POSITION:
        assert p_value > 0.001
    else:
        assert p_value < 1e-6

"""The lookup against a plain reference, and what a round without a match costs."""

from __future__ import annotations

import dataclasses
import re
import types
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.core import Tracer

from spec_jax import NGram, Sampling, decoding, loop, speculative_decoding
from spec_jax.drafters.base import Sequence
from spec_jax.drafters.ngram import lookup
from spec_jax.verification import Draft
from tests.spec.toys import TokenCache, Toy, ToyOutput, deterministic_toy, random_toy
from tests.spec.transformers import transformer

compiled_lookup = jax.jit(lookup, static_argnames=("gamma", "min_ngram", "max_ngram"))


def reference(row: list[int], gamma: int, min_ngram: int, max_ngram: int) -> list[int] | None:
    """What follows the latest occurrence of the longest n-gram, copied token by token."""
    for n in range(max_ngram, min_ngram - 1, -1):
        for end in range(len(row) - 2, n - 2, -1):
            if len(row) > n and row[end - n + 1 : end + 1] == row[len(row) - n :]:
                copied = list(row)
                for offset in range(gamma):
                    copied.append(copied[end + 1 + offset])
                return copied[len(row) :]
    return None


@hypothesis.settings(deadline=None, max_examples=200)
@hypothesis.given(
    rows=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=10), min_size=3, max_size=3),
    sizes=st.sampled_from([(1, 1), (1, 3), (2, 3), (3, 3)]),
)
def test_equals_the_reference(rows: list[list[int]], sizes: tuple[int, int]):
    """What lies behind a row's length is never looked at."""
    tokens_bs = np.full((3, 14), 1, np.int32)
    for index, row in enumerate(rows):
        tokens_bs[index, : len(row)] = row
    sequence = Sequence(jnp.asarray(tokens_bs), jnp.array([len(row) for row in rows]))
    tokens_bj, found_b = compiled_lookup(sequence, gamma=4, min_ngram=sizes[0], max_ngram=sizes[1])
    for index, row in enumerate(rows):
        expected = reference(row, 4, *sizes)
        assert bool(found_b[index]) == (expected is not None)
        if expected is not None:
            assert tokens_bj[index].tolist() == expected


def test_by_hand():
    """a b c a b: the longest match is a b, and c a b c follows, then a again."""
    sequence = Sequence(jnp.array([[0, 1, 2, 0, 1, 9, 9]]), jnp.array([5]))
    tokens_bj, found_b = lookup(sequence, gamma=5, min_ngram=1, max_ngram=3)
    assert found_b.tolist() == [True]
    assert tokens_bj.tolist() == [[2, 0, 1, 2, 0]]


def test_periodic_text_is_accepted_whole():
    """A target that counts 0 1 2 3 0 1 …: after the first period every draft is right."""
    result = speculative_decoding(
        deterministic_toy([1, 2, 3, 0]), NGram(gamma=7), [[0]], max_new_tokens=101, key=jax.random.key(0)
    )
    # Length 6 (0 1 2 3 0 1) is the first with a match of two: 5 rounds of one token, then 12 of 8.
    assert result.tokens[0].tolist() == [(offset + 1) % 4 for offset in range(101)]
    assert result.rounds.tolist() == [5 + 12]
    assert float(result.acceptance_rate) == 1


def test_a_round_without_a_match_is_one_plain_step():
    """Under the branch that no match takes, the target reads one position; run without jit, to see which is taken."""
    target = random_toy(0, 4)
    widths = []

    class Spy:
        vocab_size = target.vocab_size
        init_cache = staticmethod(target.init_cache)

        def __call__(self, tokens_bt: jax.Array, cache=None):
            if not isinstance(tokens_bt, Tracer):  # Asked for the shapes of its output only.
                widths.append(tokens_bt.shape[1])
            return target(tokens_bt, cache)

    drafter, spy = NGram(gamma=6), Spy()
    for row, read in (([0, 1, 2, 3], 1), ([0, 1, 0, 1], 7)):
        sequence = Sequence(jnp.array([row + [0] * 12]), jnp.array([4]))
        proposal = drafter.propose(spy, sequence, target.init_cache(1, 16), (), lambda *_: None)  # pyright: ignore
        assert int(proposal.draft.count_b[0]) == (6 if read == 7 else 0)
        with jax.disable_jit():
            widths.clear()
            window_bt = jnp.concatenate((sequence.last_b1, proposal.draft.tokens_bj), axis=1)
            scored = drafter.score(spy, proposal, window_bt)  # pyright: ignore
        assert widths == [read]
        assert scored.logits.shape == (1, 7, 4)


def test_no_round_copies_the_cache():
    """What `lax.cond` returns is copied on a CPU: a third of a plain step at any useful size."""
    target, drafter = transformer(0), NGram(gamma=3)
    prepared = decoding._prepare(
        target, drafter, [[1, 2, 3]], None, 40, jax.random.key(0), Sampling(), None, 0, "rejection", 1.0, None, None
    )
    state = decoding.compiled_start(
        target, drafter, prepared.prompt_bp, prepared.prompt_length_b, prepared.request, size=prepared.size
    )
    program = decoding.compiled_round.lower(target, drafter, state, prepared.request).compile().as_text() or ""
    shape = re.escape("f32[" + ",".join(map(str, state.target_cache.keys[0].shape)) + "]")
    assert re.search(shape, program)
    assert not re.search(shape + r"\S* copy\(", program)


def test_rows_without_a_match_draft_nothing():
    """Beside a row that drafts, and they are as right as alone; nothing they did not draft is counted."""
    counting = deterministic_toy([1, 2, 3, 0])
    result = speculative_decoding(
        counting, NGram(max_ngram=2, min_ngram=2, gamma=3), [[0, 1, 2, 3, 0, 1], [2, 0, 0, 0, 0, 0]],
        prompt_length=[6, 1], max_new_tokens=4, key=jax.random.key(0),
    )  # fmt: skip
    assert result.tokens.tolist() == [[2, 3, 0, 1], [3, 0, 1, 2]]
    assert result.rounds.tolist() == [1, 4]
    assert result.drafted.tolist() == [3, 0]
    assert result.accepted.tolist() == [3, 0]


@pytest.mark.parametrize("gamma", [0, 1])
def test_smallest_gammas(gamma: int):
    result = speculative_decoding(
        deterministic_toy([1, 0]), NGram(gamma=gamma), [[0]], max_new_tokens=9, key=jax.random.key(0)
    )
    assert result.tokens[0].tolist() == [1, 0, 1, 0, 1, 0, 1, 0, 1]


def test_sizes_of_numpy():
    """int8 would be promoted by what it meets."""
    kinds: Any = int, np.int8
    drafters = [NGram(gamma=3, min_ngram=kind(1), max_ngram=kind(2)) for kind in kinds]
    of_python, of_numpy = (
        speculative_decoding(deterministic_toy([1, 0]), drafter, [[0, 1]], max_new_tokens=9, key=jax.random.key(0))
        for drafter in drafters
    )
    assert of_numpy.tokens.tolist() == of_python.tokens.tolist()
    assert of_numpy.accepted.tolist() == of_python.accepted.tolist() != [0]


def test_what_the_target_shows_of_itself_may_be_anything():
    """An array without an axis of tokens, say."""

    @struct.dataclass
    class Summing(Toy):
        def __call__(self, tokens_bt: jax.Array, cache: TokenCache | None = None) -> ToyOutput:
            output = super().__call__(tokens_bt, cache)
            return dataclasses.replace(output, hidden=output.logits.sum())

    target = random_toy(0, 4)
    outputs = [
        speculative_decoding(model, NGram(), [[0, 1, 0, 1]], max_new_tokens=20, key=jax.random.key(0)).tokens.tolist()
        for model in (target, Summing(target.table))
    ]
    assert outputs[0] == outputs[1]


def test_an_output_of_any_class():
    """What it is made of is taken out of it in the program."""

    @struct.dataclass
    class Plainly(Toy):
        def __call__(self, tokens_bt: jax.Array, cache: TokenCache | None = None) -> Any:
            output = super().__call__(tokens_bt, cache)
            return types.SimpleNamespace(logits=output.logits, hidden=output.hidden, cache=output.cache)

    target = random_toy(0, 4)
    outputs = [
        speculative_decoding(model, NGram(), [[0, 1, 0, 1]], max_new_tokens=20, key=jax.random.key(0)).tokens.tolist()
        for model in (target, Plainly(target.table))
    ]
    assert outputs[0] == outputs[1]


def test_finished_rows_draft_nothing():
    """Else a finished row that repeats itself would have the others scored over a whole window, round after round."""
    draft = Draft(jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 3, 4)), jnp.array([3, 2]))
    assert loop._usable(draft, jnp.array([True, False])).count_b.tolist() == [0, 2]

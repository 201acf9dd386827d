"""What is counted: a hand-worked example, the rounds of `stream` counted again, and what must always hold."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from spec_jax import DecodeResult, NGram, Sampling, SmallModel, base_decoding, speculative_decoding, stream
from spec_jax.result import DecodeStats
from tests.spec.toys import TokenCache, Toy, deterministic_toy, random_toy
from tests.spec.transformers import ragged_prompts

# The draft knows 0 → 1 → 2 and then says 1, where the target says 0.
TARGET, DRAFT = deterministic_toy([1, 2, 0, 3]), deterministic_toy([1, 2, 1, 0])
RULES = ["rejection", "block", "coupled"]


def worked(rule: str, draft: Toy, prompt: list[int], **others: Any) -> DecodeResult:
    """Eight tokens behind one-token prompts by drafts of three."""
    return speculative_decoding(
        TARGET,
        SmallModel(draft, gamma=3),
        np.array(prompt)[:, None],
        max_new_tokens=8,
        key=jax.random.key(0),
        pad_id=9,
        verification=rule,
        **others,
    )


@pytest.mark.parametrize("rule", RULES)
def test_hand_worked(rule: str):
    """8 tokens: [1 2 | 0], [1 2 | 0], [1 2]: the last one's third draft has no room and does not count."""
    result = worked(rule, DRAFT, [0])
    assert result.tokens.tolist() == [[1, 2, 0, 1, 2, 0, 1, 2]]
    assert result.emitted.tolist() == result.lengths.tolist() == [8]
    assert result.rounds.tolist() == [3]
    assert result.stats.drafted_bj.tolist() == [[3, 3, 2]]
    assert result.stats.accepted_bj.tolist() == [[3, 3, 0]]
    assert result.stats.refused_b.tolist() == [2]
    assert (result.drafted.tolist(), result.accepted.tolist()) == ([8], [6])
    assert result.acceptance_by_position.tolist() == [1, 1, 0]
    assert float(result.acceptance_rate) == 6 / 8
    assert float(result.mean_accepted_length) == 2
    assert float(result.block_efficiency) == pytest.approx(8 / 3)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("prompt", "draft", "eos_id", "emitted", "drafted", "accepted", "refused"),
    [
        (0, DRAFT, 2, 2, [1, 1, 0], [1, 1, 0], 0),  # [1 2]: ends inside the draft, the third is behind the end
        (0, DRAFT, 0, 3, [1, 1, 1], [1, 1, 0], 1),  # [1 2 | 0]: the correction is the end
        (1, DRAFT, 0, 2, [1, 1, 0], [1, 0, 0], 1),  # [2 | 0]: the same, the third is behind the end
        (0, TARGET, 1, 1, [1, 0, 0], [1, 0, 0], 0),  # [1]
        (0, TARGET, 0, 3, [1, 1, 1], [1, 1, 1], 0),  # [1 2 0]: the last drafted token is the end
        (3, TARGET, 3, 1, [1, 0, 0], [1, 0, 0], 0),
    ],
)
def test_nothing_is_counted_after_the_end(rule, prompt, draft, eos_id, emitted, drafted, accepted, refused):
    """The same row alone, and among seven that go on for longer or end elsewhere."""
    for row, result in (
        (0, worked(rule, draft, [prompt], eos_id=eos_id)),
        (5, worked(rule, draft, [3, 1, 2, 0, 1, prompt, 2, 3], eos_id=eos_id)),
    ):
        assert result.lengths.tolist()[row] == emitted
        assert result.rounds.tolist()[row] == 1
        assert result.stats.drafted_bj.tolist()[row] == drafted
        assert result.stats.accepted_bj.tolist()[row] == accepted
        assert result.stats.refused_b.tolist()[row] == refused


@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_counted_behind_a_refused_end(rule: str):
    """[2 | 0] of the draft [2 1 ·], where 1 is the end, then [1]: what stands at · could not have been kept."""
    result = worked(rule, DRAFT, [1], eos_id=1)
    assert result.tokens.tolist() == [[2, 0, 1, 9, 9, 9, 9, 9]]
    assert result.stats.drafted_bj.tolist() == [[2, 1, 0]]
    assert result.stats.accepted_bj.tolist() == [[2, 0, 0]]
    assert result.stats.refused_b.tolist() == [1]


@pytest.mark.parametrize("rule", RULES)
def test_a_bonus_is_emitted_and_counted_in_no_draft(rule: str):
    """[1 2 0 | 1], [2 0 1 | 2]: two rounds of three accepted and a bonus. A bonus that is the end counts the same."""
    for eos_id in (None, 3):
        result = worked(rule, TARGET, [0], eos_id=eos_id)
        assert result.tokens.tolist() == [[1, 2, 0, 1, 2, 0, 1, 2]]
        assert (result.rounds.tolist(), result.emitted.tolist()) == ([2], [8])
        assert result.stats.drafted_bj.tolist() == result.stats.accepted_bj.tolist() == [[2, 2, 2]]
    chain = deterministic_toy([1, 2, 3, 0])
    result = speculative_decoding(
        chain,
        SmallModel(chain, gamma=3),
        np.zeros((1, 1), int),
        max_new_tokens=8,
        key=jax.random.key(0),
        eos_id=0,
        pad_id=9,
        verification=rule,
    )
    assert result.tokens.tolist() == [[1, 2, 3, 0, 9, 9, 9, 9]]
    assert (result.rounds.tolist(), result.emitted.tolist()) == ([1], [4])
    assert result.stats.drafted_bj.tolist() == result.stats.accepted_bj.tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("rule", RULES)
def test_a_finished_row_waits_without_being_counted(rule: str):
    """Rows behind 0 end in their first round; rows behind 3 run on for eight, each refused at once, and count alone."""
    result = worked(rule, DRAFT, [0, 3] * 4, eos_id=1)
    assert result.tokens.tolist() == [[1] + [9] * 7, [3] * 8] * 4
    assert result.rounds.tolist() == [1, 8] * 4
    # They draft [0 1 ·]: what stands at · is behind a drafted end.
    assert result.stats.drafted_bj.tolist() == [[1, 0, 0], [8, 7, 0]] * 4
    assert result.stats.refused_b.tolist() == [0, 8] * 4


PROMPTS, LENGTHS = ragged_prompts(6, 8, 6, 4)
ROW_IDS = 5 * np.arange(len(PROMPTS)) + 3
RANDOM: dict[str, Any] = {
    "prompt": PROMPTS,
    "max_new_tokens": 20,
    "prompt_length": LENGTHS,
    "eos_id": 2,
    "pad_id": 9,
    "sampling": Sampling(temperature=1.2),
}
MODELS = random_toy(6, 4, zeros=0.1), random_toy(7, 4, zeros=0.1)
DRAFTER = SmallModel(MODELS[1], gamma=3)


@pytest.mark.parametrize("eos_id", [None, 2])
@pytest.mark.parametrize("rule", RULES)
def test_stream_is_the_same_decoding(rule: str, eos_id: int | None):
    """Its rounds put together are the one call's tokens, and its marks, counted by hand, the statistics."""
    arguments = {**RANDOM, "eos_id": eos_id, "verification": rule, "row_ids": ROW_IDS}
    arguments["lenience"] = 0.5 if rule == "rejection" else 1.0
    for seed in range(4):
        whole = speculative_decoding(MODELS[0], DRAFTER, key=jax.random.key(seed), **arguments)
        rounds = list(stream(MODELS[0], DRAFTER, key=jax.random.key(seed), **arguments))
        assert len(rounds) == int(whole.rounds.max())
        for row in range(len(PROMPTS)):
            pieces = [piece.row(row) for piece in rounds if piece.count_b[row] > 0]
            tokens = [token for piece, _ in pieces for token in piece]
            assert tokens == np.asarray(whole.tokens)[row, : whole.lengths[row]].tolist()
            assert len(pieces) == whole.rounds[row]
            marks = np.array([(*marks, *[False] * (4 - len(marks))) for _, marks in pieces])[:, :3]
            assert marks.sum(0).tolist() == whole.stats.accepted_bj[row].tolist()
            assert marks.sum() == whole.accepted[row]
            for piece, drafted in pieces[:-1]:  # Only a row's last round may be cut.
                assert sum(drafted) == len(piece) - 1
                assert not drafted[-1]
            assert len(pieces[-1][0]) - sum(pieces[-1][1]) in (0, 1)


def test_stream_of_plain_decoding():
    arguments = {**RANDOM, "row_ids": ROW_IDS}
    whole = base_decoding(MODELS[0], key=jax.random.key(1), **arguments)
    rounds = list(stream(MODELS[0], None, key=jax.random.key(1), **arguments))
    for row in range(len(PROMPTS)):
        tokens = [token for piece in rounds for token in piece.row(row)[0]]
        assert tokens == np.asarray(whole.tokens)[row, : whole.lengths[row]].tolist()
        assert not any(mark for piece in rounds for mark in piece.row(row)[1])


@pytest.mark.parametrize("eos_id", [None, 2])
@pytest.mark.parametrize("rule", RULES)
def test_what_always_holds(rule: str, eos_id: int | None):
    for seed in range(8):
        result = speculative_decoding(
            MODELS[0], DRAFTER, key=jax.random.key(seed), **{**RANDOM, "eos_id": eos_id, "verification": rule}
        )
        stats = jax.tree.map(np.asarray, result.stats)
        tokens, lengths = np.asarray(result.tokens), np.asarray(result.lengths)
        # A round emits what it accepted and one more, but for the last, which the end may cut down to the accepted.
        cut_b = stats.accepted_bj.sum(1) + stats.rounds_b - lengths
        assert set(cut_b.tolist()) <= {0, 1}
        assert (stats.accepted_bj <= stats.drafted_bj).all()
        assert (stats.drafted_bj <= stats.rounds_b[:, None]).all()
        assert (np.diff(stats.accepted_bj, axis=1) <= 0).all()
        assert (np.diff(stats.drafted_bj, axis=1) <= 0).all()
        assert (stats.refused_b <= stats.rounds_b).all()
        np.testing.assert_array_equal(result.emitted, lengths)
        for row, length in enumerate(lengths):
            assert (tokens[row, length:] == 9).all()
            assert eos_id not in tokens[row, : length - 1]
            assert length == 20 or tokens[row, length - 1] == eos_id
            assert 1 <= length <= 20


def test_rates_are_over_all_rows_together():
    """Not means of the rows' own rates: a row of many rounds counts more, and one without a draft is no NaN."""
    stats = DecodeStats(
        rounds_b=jnp.array([4, 1]),
        refused_b=jnp.array([1, 0]),
        drafted_bj=jnp.array([[4, 4], [1, 0]]),
        accepted_bj=jnp.array([[3, 2], [1, 0]]),
    )
    result = DecodeResult(tokens=jnp.zeros((2, 9), jnp.int32), lengths=jnp.array([9, 2]), stats=stats)
    np.testing.assert_allclose(result.acceptance_by_position, [4 / 5, 2 / 4])
    np.testing.assert_allclose(result.acceptance_rate, 6 / 7, rtol=1e-6)
    np.testing.assert_allclose(result.mean_accepted_length, 6 / 5, rtol=1e-6)
    np.testing.assert_allclose(result.block_efficiency, 11 / 5, rtol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_dtypes_under_x64(rule: str):
    with jax.enable_x64(True):
        result = worked(rule, DRAFT, [0, 1])
        counts = result.stats, result.tokens, result.rounds, result.drafted, result.accepted
        rates = result.acceptance_by_position, result.acceptance_rate, result.block_efficiency
        assert {x.dtype for x in jax.tree.leaves(counts)} == {jnp.dtype(jnp.int32)}
        assert {x.dtype for x in (*rates, result.mean_accepted_length)} == {jnp.dtype(jnp.float32)}


@pytest.mark.mixed_dtypes
def test_lengths_of_a_models_own_dtype_under_x64():
    """Target and draft begin with int64, the loop goes on with int32."""

    @struct.dataclass
    class Wide(Toy):
        def init_cache(self, batch: int, size: int) -> TokenCache:
            return TokenCache(jnp.ones((batch, size), jnp.int32), jnp.zeros(batch, int))

    call: dict[str, Any] = {"max_new_tokens": 8, "key": jax.random.key(0), "verification": "coupled"}
    wanted = speculative_decoding(TARGET, SmallModel(DRAFT, gamma=2), [[0, 1]], **call)
    with jax.enable_x64(True):
        target, draft = Wide(TARGET.table), Wide(DRAFT.table)
        assert target.init_cache(1, 1).length_b.dtype == jnp.int64
        result = speculative_decoding(target, SmallModel(draft, gamma=2), [[0, 1]], **call)
    assert result.tokens.tolist() == wanted.tokens.tolist()


@pytest.mark.parametrize("rule", RULES)
def test_nothing_drafted_under_x64(rule: str):
    with jax.enable_x64(True):
        result = speculative_decoding(
            TARGET, NGram(gamma=0), [[0]], max_new_tokens=3, key=jax.random.key(0), verification=rule
        )
    assert result.lengths.tolist() == [3]
    assert result.drafted.tolist() == [0]


def test_rates_of_calls_under_vmap_are_over_all_their_rows():
    """Three calls of two rows, gamma 2."""
    rng = np.random.default_rng(0)
    drafted_nbj = rng.integers(5, 9, (3, 2, 2))
    accepted_nbj = drafted_nbj - rng.integers(0, 5, (3, 2, 2))
    counts_nb = jnp.ones((3, 2), jnp.int32)
    stats = DecodeStats(counts_nb, counts_nb, jnp.asarray(drafted_nbj), jnp.asarray(accepted_nbj))
    result = DecodeResult(tokens=jnp.zeros((3, 2, 9), jnp.int32), lengths=counts_nb, stats=stats)
    assert result.drafted.tolist() == [[sum(row) for row in call] for call in drafted_nbj.tolist()]
    assert result.accepted.tolist() == [[sum(row) for row in call] for call in accepted_nbj.tolist()]
    expected_j = [accepted_nbj[..., j].sum() / drafted_nbj[..., j].sum() for j in range(2)]
    np.testing.assert_allclose(result.acceptance_by_position, expected_j, rtol=1e-6)


def test_rates_of_nothing_are_not_numbers():
    shared: dict[str, Any] = {"key": jax.random.key(0), "max_new_tokens": 1}
    assert np.isnan(base_decoding(TARGET, [[1]], **shared).acceptance_rate)
    by_position = speculative_decoding(TARGET, SmallModel(DRAFT, gamma=3), [[1]], **shared).acceptance_by_position
    assert np.isnan(np.asarray(by_position)[1:]).all()


def test_lenience_refuses_less():
    """Next to nothing with a lenience of next to nothing."""
    target, draft = random_toy(0, 4), random_toy(1, 4)

    def refused(lenience: float) -> int:
        return int(
            speculative_decoding(
                target,
                SmallModel(draft, gamma=3),
                [[1, 2, 3], [0, 3, 1]],
                max_new_tokens=40,
                key=jax.random.key(0),
                lenience=lenience,
            ).stats.refused_b.sum()
        )

    assert refused(1.0) > 0 == refused(1e-9)

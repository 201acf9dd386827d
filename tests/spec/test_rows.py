"""A row's tokens depend on the key, its own id and its own prompt, and on no other row."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spec_jax import DecodeResult, Sampling, SmallModel, base_decoding, speculative_decoding
from spec_jax.noise import Purpose, position_gumbel, round_noise
from tests.spec.toys import random_toy
from tests.spec.transformers import compare, near, ragged_prompts, transformer

# Tables are looked up, not computed, so that the shape of the batch cannot change a bit of the laws.
TARGET, DRAFT = random_toy(2, 4, zeros=0.1), random_toy(3, 4, zeros=0.1)
BATCH = 8
PROMPTS, LENGTHS = ragged_prompts(1, BATCH, 6, 4)
IDS = np.array([7, 0, 4_000_000_000, 12, 3, 1, 500, 2])
RULES = ["plain", "rejection", "block", "coupled"]


def decode(
    rule: str,
    rows: np.ndarray,
    row_ids: np.ndarray | None,
    implementation: str | None = None,
    eos_id: int | None = 2,
) -> DecodeResult:
    arguments: dict[str, Any] = {
        "max_new_tokens": 20,
        "key": jax.random.key(9, impl=implementation),
        "prompt_length": LENGTHS[rows],
        "sampling": Sampling(temperature=1.2),
        "eos_id": eos_id,
        "pad_id": 9,
        "row_ids": row_ids,
    }
    if rule == "plain":
        return base_decoding(TARGET, PROMPTS[rows], **arguments)
    drafter = SmallModel(DRAFT, gamma=3)
    return speculative_decoding(TARGET, drafter, PROMPTS[rows], verification=rule, **arguments)


def assert_rows_equal(result: DecodeResult, expected: DecodeResult, rows: np.ndarray) -> None:
    """Tokens, lengths and every statistic."""
    for got, want in zip(jax.tree.leaves(result), jax.tree.leaves(expected)):
        np.testing.assert_array_equal(got, np.asarray(want)[rows])


@pytest.mark.parametrize("rule", RULES)
def test_reordered(rule: str):
    everyone = decode(rule, np.arange(BATCH), IDS)
    rows = np.random.default_rng(0).permutation(BATCH)
    assert (rows != np.arange(BATCH)).sum() >= 6
    assert_rows_equal(decode(rule, rows, IDS[rows]), everyone, rows)


@pytest.mark.parametrize("rule", RULES)
def test_alone(rule: str):
    """Each row by itself, the others removed; the default ids are 0…B−1."""
    everyone, default = decode(rule, np.arange(BATCH), IDS), decode(rule, np.arange(BATCH), None)
    for row in range(BATCH):
        rows = np.array([row])
        assert_rows_equal(decode(rule, rows, IDS[rows]), everyone, rows)
        assert_rows_equal(decode(rule, rows, rows), default, rows)


@pytest.mark.parametrize("rule", RULES)
def test_other_prompts_beside_it(rule: str):
    """Half of the rows are replaced by a repetition of row 0 under other ids."""
    everyone = decode(rule, np.arange(BATCH), IDS)
    rows, ids = np.where(np.arange(BATCH) % 2, np.arange(BATCH), 0), np.where(np.arange(BATCH) % 2, IDS, IDS + 10)
    kept = np.arange(1, BATCH, 2)
    beside = decode(rule, rows, ids)
    assert_rows_equal(jax.tree.map(lambda x: x[kept], beside), everyone, kept)


@pytest.mark.parametrize("rule", RULES)
def test_ids_matter(rule: str):
    """One prompt under eight ids gives different rows, and under eight equal ids the same row eight times."""
    rows = np.full(BATCH, 4)
    # Rows that may end with their first token could be equal by chance.
    different, same = (decode(rule, rows, ids, eos_id=None) for ids in (IDS, np.full(BATCH, 5)))
    assert len({tuple(row) for row in np.asarray(different.tokens).tolist()}) == BATCH
    assert len({tuple(row) for row in np.asarray(same.tokens).tolist()}) == 1


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_keys_of_other_generators(implementation: str):
    """Under `vmap` these generators draw for the whole batch from the first row's key. It must not come to that: a row
    would depend on the others and, once the first row is finished, draw the same noise in each round.
    """
    rows = np.arange(BATCH)
    plain, coupled = (decode(rule, rows, IDS, implementation) for rule in ("plain", "coupled"))
    np.testing.assert_array_equal(coupled.tokens, plain.tokens)
    assert_rows_equal(decode("plain", rows[5:6], IDS[5:6], implementation), plain, rows[5:6])

    # Nor where the caller does it.
    target = transformer(0)

    def tokens(key: jax.Array) -> jax.Array:
        return base_decoding(target, [[1]], max_new_tokens=8, key=key).tokens[0]

    keys = jax.random.split(jax.random.key(3, impl=implementation), 3)
    at_once = jax.jit(jax.vmap(tokens))(keys)
    np.testing.assert_array_equal(at_once, [tokens(key) for key in keys])
    assert len({tuple(row) for row in np.asarray(at_once).tolist()}) == 3


@pytest.mark.slow
def test_transformer_rows_reordered():
    """The same for a transformer and coupled decoding, where only near ties may differ: 64 rows backwards."""
    target, drafter = transformer(0), SmallModel(near(0, 0.05), gamma=5)
    prompts, lengths = ragged_prompts(0, 64, 12)
    key = jax.random.key(1)

    def run(rows: np.ndarray) -> DecodeResult:
        return speculative_decoding(
            target,
            drafter,
            prompts[rows],
            max_new_tokens=32,
            key=key,
            prompt_length=lengths[rows],
            verification="coupled",
            row_ids=rows,
        )

    everyone = run(np.arange(64))
    backwards = jax.tree.map(lambda x: x[::-1], run(np.arange(64)[::-1]))
    assert compare(target, prompts, lengths, Sampling(), key, backwards, everyone).diverged == 0


@pytest.mark.slow
def test_transformer_rows_alone():
    """Plain decoding of 8 rows one by one, against 64 together."""
    target = transformer(0)
    prompts, lengths = ragged_prompts(0, 64, 12)

    def run(rows: np.ndarray) -> DecodeResult:
        return base_decoding(
            target,
            prompts[rows],
            max_new_tokens=32,
            key=jax.random.key(1),
            prompt_length=lengths[rows],
            row_ids=rows,
        )

    everyone = run(np.arange(64))
    for row in range(0, 64, 8):
        np.testing.assert_array_equal(run(np.array([row])).tokens[0], everyone.tokens[row])


def test_no_rows_places_and_purposes_share_their_noise():
    """Were two of the three added up, a row would see the noise of its neighbour, a place or a purpose further."""
    key, places = jax.random.key(0), np.array(list(itertools.product(range(4), range(1, 5))))
    row_n, start_n = jnp.asarray(places[:, 0], jnp.uint32), jnp.asarray(places[:, 1])

    def bits(key: jax.Array, shape: tuple[int, ...], _: Any) -> jax.Array:
        return jax.random.bits(key, shape)

    streams_pn = np.stack([round_noise(key, purpose, row_n, start_n, (), bits) for purpose in Purpose])
    assert len(np.unique(streams_pn)) == streams_pn.size
    positions = position_gumbel(key, row_n[::4], jnp.broadcast_to(jnp.arange(1, 5)[None], (4, 4)), 1)
    assert len(np.unique(positions)) == positions.size


def test_keys_of_the_old_style_are_the_new_ones():
    """All of the key counts: the first half of those of small seeds is 0."""
    keys = jax.random.PRNGKey(7), jax.random.key(7), jax.random.PRNGKey(8)
    tokens = [base_decoding(random_toy(0, 4), [[1]], max_new_tokens=20, key=key).tokens.tolist() for key in keys]
    assert tokens[0] == tokens[1] != tokens[2]


def drawn(key: jax.Array, row_ids: list[int]) -> set[tuple[int, ...]]:
    """What rows that are alike but for their numbers become."""
    prompt = [[1]] * len(row_ids)
    tokens = base_decoding(random_toy(0, 4), prompt, max_new_tokens=20, key=key, row_ids=row_ids).tokens
    return {tuple(row) for row in tokens.tolist()}


def test_all_bits_of_a_rows_number_count():
    assert len(drawn(jax.random.key(0), [1, 65537, 1 + 2**31])) == 3


def test_all_words_of_a_key_count():
    """Of a generator with four of them."""
    words = np.vstack((np.zeros(4), np.eye(4))).astype(np.uint32)
    keys = [jax.random.wrap_key_data(jnp.asarray(one), impl="rbg") for one in words]
    assert len(set.union(*(drawn(key, [0]) for key in keys))) == 5

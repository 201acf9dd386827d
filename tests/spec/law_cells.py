"""Drawing many outputs of tabular models and comparing them with the enumerated law: what the law tests share."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from spec_jax import Decoder, DecodeResult, Drafter, Sampling, SmallModel, Verification, loop, speculative_decoding
from spec_jax.drafters.base import LanguageModel
from tests.spec.reference import Filters, Fit, fit, histogram, sequence_law
from tests.spec.strategies import all_logits
from tests.spec.toys import next_logits, random_toy

VOCAB, GAMMA, NEW_TOKENS, SEQUENCES = 3, 2, 4, 200_000
# Both have tokens of probability 0, and not the same ones.
TARGET, DRAFT = random_toy(0, VOCAB, zeros=0.15), random_toy(1, VOCAB, zeros=0.15)
PROMPT_WIDTH = 5
PROMPTS = np.random.default_rng(5).integers(0, VOCAB, (16, PROMPT_WIDTH))
PROMPT_LENGTHS = np.arange(16) * 3 % PROMPT_WIDTH + 1
CACHE_SIZE = PROMPT_WIDTH + NEW_TOKENS + GAMMA + 1
FILTERS = {
    "greedy": Filters(temperature=0.0),
    "temperature": Filters(temperature=0.7),
    "top_k": Filters(temperature=1.3, top_k=2),
    "top_p": Filters(temperature=1.4, top_p=0.75),
    "min_p": Filters(temperature=0.8, min_p=0.3),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """What was drawn: how often each row gave each output, and how many drafted tokens a round kept."""

    counts_bo: np.ndarray
    accepted_per_round: float
    standard_error: float


@functools.cache
def draw_cell(rule: str, batch: int, filters: Filters, eos_id: int | None, lenience: float = 1.0) -> Cell:
    """200,000 sequences by the public function: `batch` ragged prompts under each of 200,000 / batch keys."""

    def one_key(key: jax.Array) -> DecodeResult:
        return speculative_decoding(
            TARGET,
            SmallModel(DRAFT, gamma=GAMMA),
            PROMPTS[:batch],
            max_new_tokens=NEW_TOKENS,
            key=key,
            prompt_length=PROMPT_LENGTHS[:batch],
            sampling=Sampling(**dataclasses.asdict(filters)),
            eos_id=eos_id,
            pad_id=VOCAB,
            verification=rule,
            lenience=lenience,
            cache_size=CACHE_SIZE,
        )

    seed = zlib.crc32(f"second {rule} {batch} {filters} {eos_id}".encode())
    return tally(jax.vmap(one_key)(jax.random.split(jax.random.key(seed), SEQUENCES // batch)))


def decode_prompts(
    target: LanguageModel,
    drafter: Drafter,
    key: jax.Array,
    rule: str,
    sampling: Sampling,
    eos_id: int | jax.Array,
    *,
    batch: int,
) -> DecodeResult:
    """`batch` ragged prompts, beginning again behind the last one. The public function makes room for longer ones."""
    asked = dataclasses.replace(
        loop.Request.of_batch(
            batch, key=key, max_new_tokens=NEW_TOKENS, sampling=sampling, verification=Verification(rule)
        ),
        eos_id=jnp.asarray(eos_id, jnp.int32),
        pad_id=jnp.int32(VOCAB),
    )
    return loop.decode(
        target,
        drafter,
        jnp.asarray(np.resize(PROMPTS, (batch, PROMPT_WIDTH)), jnp.int32),
        jnp.asarray(np.resize(PROMPT_LENGTHS, batch), jnp.int32),
        asked,
        size=CACHE_SIZE,
        width=NEW_TOKENS,
    )


def tally(result: DecodeResult) -> Cell:
    """The cell of a result with a leading axis of keys."""
    outputs_nbt = np.asarray(result.tokens)
    counts_bo = np.stack([histogram(outputs_nbt[:, row], VOCAB) for row in range(outputs_nbt.shape[1])])
    accepted_n = np.asarray(result.stats.accepted_bj).sum((1, 2))
    rounds_n = np.asarray(result.stats.rounds_b).sum(1)
    mean = accepted_n.sum() / rounds_n.sum()
    error = np.std(accepted_n - mean * rounds_n) / rounds_n.mean() / len(rounds_n) ** 0.5
    return Cell(counts_bo, float(mean), float(error))


def logits_after_prompts(target: Decoder) -> dict[tuple[int, ...], np.ndarray]:
    """The logits of a transformer after each prompt and each output shorter than the whole."""
    outputs = [output for n in range(NEW_TOKENS) for output in itertools.product(range(VOCAB), repeat=n)]
    return all_logits(target, [prompt(row) + output for row in range(len(PROMPTS)) for output in outputs])


def prompt(row: int) -> tuple[int, ...]:
    """One of the prompts, without its padding."""
    return tuple(PROMPTS[row, : PROMPT_LENGTHS[row]].tolist())


def law_behind(
    logits_after: Callable[[tuple[int, ...]], np.ndarray], row: int, filters: Filters, eos_id: int | None
) -> np.ndarray:
    """The law of the output behind one of the prompts, of a model with these logits."""
    return sequence_law(logits_after, prompt(row), filters, new_tokens=NEW_TOKENS, eos_id=eos_id)


def prompt_law(row: int, filters: Filters, eos_id: int | None) -> np.ndarray:
    """The law of the tabular target's output behind one of the prompts."""
    return law_behind(functools.partial(next_logits, np.asarray(TARGET.table)), row, filters, eos_id)


def p_values(cell: Cell, filters: Filters, eos_id: int | None) -> tuple[float, float]:
    """Each row against the law of its own prompt: p of all rows together, and of the worst row times their number."""
    rows = [fit(counts_o, prompt_law(row, filters, eos_id)) for row, counts_o in enumerate(cell.counts_bo)]
    return sum(rows, Fit(0.0, 0)).p_value, min(row.p_value for row in rows) * len(rows)

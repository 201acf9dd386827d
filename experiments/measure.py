"""How fast decoding is, and what theory says it should be. Times are wall-clock seconds on the default device."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import spec_jax
from experiments.stage_costs import StageLoops
from spec_jax.drafters.plain import Plain

PLAIN = "plain"
# What a key is folded with to measure.
MEASURING = 2**31


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """One way to decode, measured beside plain decoding.

    Attributes:
      name: of the strategy, `plain` included.
      gamma: tokens drafted a round.
      batch: rows decoded at once.
      milliseconds_min: per token of a row, the fastest repeat.
      milliseconds_median: the same, the median repeat.
      acceptance_rate: chance that a drafted token is kept when all before it in its round were.
      acceptance_by_position: chance that the token at each draft position is kept.
      tokens_per_round: emitted tokens per forward of the target.
      draft_cost: time to draft one token, in forwards of the target over one token.
      scoring_cost: time to score gamma + 1 tokens, in the same unit.
      drafting_rate: fraction of a row's rounds in which it drafted anything.
      speedup: median over the repeats of plain time per token over this one's, each of the same repeat.
      speedup_of_minima: the same ratio of the fastest repeats.
      predicted_speedup: what Leviathan's formula gives for this acceptance and these costs.
    """

    name: str
    gamma: int
    batch: int
    milliseconds_min: float
    milliseconds_median: float
    acceptance_rate: float | None
    acceptance_by_position: list[float]
    tokens_per_round: float
    draft_cost: float
    scoring_cost: float
    drafting_rate: float
    speedup: float
    speedup_of_minima: float
    predicted_speedup: float


def alternate(
    calls: Mapping[str, Callable[[int], Any]], *, repeats: int, following: bool = False
) -> tuple[dict[str, list[float]], dict[str, list[Any]]]:
    """Times calls in turn, so that what disturbs the machine for a while disturbs them all.

    Args:
      calls: what to time, each called with the number of the repeat.
      repeats: timed calls of each, after one that compiles and warms up.
      following: whether each timed call directly follows an untimed one of the same, as in a training loop. Of calls
        that need gigabytes, the system takes some back while the others run, and the next one waits for it.

    Returns:
      Seconds and results of every repeat, by name.
    """
    # XLA compiles a program on one thread, so a core each shortens the wait.
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        for warm_up in [pool.submit(call, 0) for call in calls.values()]:
            jax.block_until_ready(warm_up.result())
    finally:
        # An interrupt waits for what has begun, but not for the rest.
        pool.shutdown(cancel_futures=True)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    results: dict[str, list[Any]] = {name: [] for name in calls}
    for repeat in range(repeats):
        for name, call in calls.items():
            if following:
                jax.block_until_ready(call(repeat))
            start = time.perf_counter()
            results[name].append(jax.block_until_ready(call(repeat)))
            seconds[name].append(time.perf_counter() - start)
    return seconds, results


def leviathan_speedup(
    acceptance: float,
    gamma: int,
    *,
    draft_cost: float,
    scoring_cost: float = 1.0,
    drafting_rate: float = 1.0,
    batch: int = 1,
) -> float:
    """The speed-up expected of gamma drafted tokens a round (2211.17192, theorem 3.8).

    (1 − α^(γ+1)) / ((1 − α)(γ·c + s)), with the scoring cost s that the paper takes as 1. It assumes that every
    drafted token is kept with the same chance α, whatever came before. A row that drafts in a fraction of its rounds
    gets one token in the others; a round in which no row drafts costs one plain step, rows being taken as independent.

    Args:
      acceptance: α in [0, 1].
      gamma: γ, tokens drafted a round.
      draft_cost: c, the time to draft a token in forwards of the target over one token.
      scoring_cost: s, the time to score γ + 1 tokens in the same unit.
      drafting_rate: fraction of its rounds in which a row drafts anything.
      batch: rows decoded at once.
    """
    tokens = float(sum(acceptance**kept for kept in range(gamma + 1)))
    idle, all_idle = 1 - drafting_rate, (1 - drafting_rate) ** batch
    return (drafting_rate * tokens + idle) / (gamma * draft_cost + (1 - all_idle) * scoring_cost + all_idle)


def measure_decoding(
    target: Any,
    drafters: Mapping[str, spec_jax.Drafter],
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    sampling: spec_jax.Sampling,
    verification: str = "rejection",
    seed: int = 0,
    costs: Mapping[str, tuple[float, float]] | None = None,
) -> list[Measurement]:
    """Measures plain decoding and every drafter on the same prompts.

    Args:
      target: the model.
      drafters: by name.
      prompts: (B, P) tokens of each repeat.
      max_new_tokens: tokens a row.
      sampling: of target and drafters.
      verification: the rule.
      seed: of the noise.
      costs: what `measure_costs` gave for these drafters; measured here when None.

    Returns:
      One measurement for plain decoding, then one for each drafter.
    """
    shared = {"max_new_tokens": max_new_tokens, "sampling": sampling}
    # Apart from those that drew the weights of a run with this seed, which are split from its key.
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), MEASURING), len(prompts))
    calls: dict[str, Callable[[int], Any]] = {
        PLAIN: lambda repeat: spec_jax.base_decoding(target, prompts[repeat], key=keys[repeat], **shared)
    }
    for name, drafter in drafters.items():
        calls[name] = lambda repeat, drafter=drafter: spec_jax.speculative_decoding(
            target, drafter, prompts[repeat], key=keys[repeat], verification=verification, **shared
        )
    seconds, results = alternate(calls, repeats=len(prompts))
    everyone: dict[str, spec_jax.Drafter] = {PLAIN: Plain(), **drafters}
    if costs is None:
        costs = measure_costs(target, drafters, prompts[0], max_new_tokens=max_new_tokens, sampling=sampling)
    return [
        _measurement(name, drafter, seconds[name], seconds[PLAIN], results[name], costs[name])
        for name, drafter in everyone.items()
    ]


def measure_costs(
    target: Any,
    drafters: Mapping[str, spec_jax.Drafter],
    prompt: np.ndarray,
    *,
    max_new_tokens: int,
    sampling: spec_jax.Sampling,
    repeats: int = 5,
) -> dict[str, tuple[float, float]]:
    """What drafting a token and scoring a draft cost, in forwards of the target over one token.

    Returns:
      (draft cost, scoring cost) by name; (0, 1) for plain decoding, by definition.
    """
    calls: dict[str, Callable[[int], Any]] = {}
    for name, drafter in {PLAIN: Plain(), **drafters}.items():
        stages = StageLoops.create(target, drafter, prompt, max_new_tokens=max_new_tokens, sampling=sampling)
        calls[f"score {name}"] = lambda _, stages=stages: stages.score()
        if drafter.gamma:
            calls[f"draft {name}"] = lambda _, stages=stages: stages.draft()
    seconds, _ = alternate(calls, repeats=repeats)
    step = min(seconds[f"score {PLAIN}"])
    costs = {PLAIN: (0.0, 1.0)}
    for name, drafter in drafters.items():
        draft = min(seconds[f"draft {name}"]) / drafter.gamma if drafter.gamma else 0.0
        costs[name] = (draft / step, min(seconds[f"score {name}"]) / step)
    return costs


def _measurement(
    name: str,
    drafter: spec_jax.Drafter,
    seconds: Sequence[float],
    plain_seconds: Sequence[float],
    results: Sequence[spec_jax.DecodeResult],
    cost: tuple[float, float],
) -> Measurement:
    pooled = jax.tree.map(lambda *parts: jnp.concatenate(parts), *results)
    milliseconds = np.asarray(seconds) * 1e3 / results[0].tokens.shape[1]
    drafting_rate, rate = 0.0, None
    if drafter.gamma:
        drafting_rate = float(pooled.stats.drafted_bj[:, 0].sum() / pooled.rounds.sum())
        rate = float(pooled.acceptance_rate) if drafting_rate else None
    draft_cost, scoring_cost = cost
    return Measurement(
        name=name,
        gamma=drafter.gamma,
        batch=results[0].tokens.shape[0],
        milliseconds_min=float(milliseconds.min()),
        milliseconds_median=float(np.median(milliseconds)),
        acceptance_rate=rate,
        acceptance_by_position=[float(x) for x in pooled.acceptance_by_position if np.isfinite(x)],
        tokens_per_round=float(pooled.block_efficiency),
        draft_cost=draft_cost,
        scoring_cost=scoring_cost,
        drafting_rate=drafting_rate,
        speedup=float(np.median(np.asarray(plain_seconds) / np.asarray(seconds))),
        speedup_of_minima=min(plain_seconds) / min(seconds),
        predicted_speedup=leviathan_speedup(
            rate or 0.0,
            drafter.gamma,
            draft_cost=draft_cost,
            scoring_cost=scoring_cost,
            drafting_rate=drafting_rate,
            batch=results[0].tokens.shape[0],
        ),
    )

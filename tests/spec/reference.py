"""Plain NumPy references: the filters in Hugging Face's order, the exact law of an output, the chi-squared test."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import scipy.stats


@dataclasses.dataclass(frozen=True)
class Filters:
    """The numbers of a `spec_jax.Sampling`."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0


def filtered_probs(logits: np.ndarray, filters: Filters) -> np.ndarray:
    """(V,) float64, one filter after the other, each on what the last one left; ties with the last kept are kept."""
    if filters.temperature == 0:
        return np.eye(len(logits))[np.argmax(logits)]
    scores = (logits.astype(np.float64) - logits.max()) / filters.temperature
    if filters.top_k is not None:
        kth_largest = np.sort(scores)[::-1][min(filters.top_k, len(scores)) - 1]
        scores = np.where(scores < kth_largest, -np.inf, scores)
    if filters.top_p < 1:
        descending = np.sort(scores)[::-1]
        mass, last_kept = 0.0, descending[0]
        for score, prob in zip(descending, softmax(descending)):
            if mass >= filters.top_p:
                break
            mass, last_kept = mass + prob, score
        scores = np.where(scores < last_kept, -np.inf, scores)
    probs = softmax(scores)
    return softmax(np.where(probs < filters.min_p * probs.max(), -np.inf, scores))


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def sequence_law(
    logits_after: Callable[[tuple[int, ...]], np.ndarray],
    prompt: tuple[int, ...],
    filters: Filters,
    *,
    new_tokens: int,
    eos_id: int | None,
) -> np.ndarray:
    """((V + 1)^N,) the probability of every padded output of N tokens, V standing for the padding after the end.

    `logits_after` gives the (V,) logits after a whole row.
    """
    vocab_size = len(logits_after(prompt))
    law = np.zeros((vocab_size + 1,) * new_tokens)
    frontier = [((), 1.0)]
    while frontier:
        output, prob = frontier.pop()
        if len(output) == new_tokens or (output and output[-1] == eos_id):
            law[output + (vocab_size,) * (new_tokens - len(output))] += prob
            continue
        next_probs = filtered_probs(logits_after(prompt + output), filters)
        frontier += [((*output, token), prob * p) for token, p in enumerate(next_probs) if p > 0]
    return law.ravel()


def histogram(outputs_nt: np.ndarray, vocab_size: int) -> np.ndarray:
    """((V + 1)^N,) how often each padded output came, in the order of `sequence_law`."""
    powers = (vocab_size + 1) ** np.arange(outputs_nt.shape[1])[::-1]
    return np.bincount(outputs_nt @ powers, minlength=(vocab_size + 1) ** outputs_nt.shape[1])


@dataclasses.dataclass(frozen=True)
class Fit:
    """A chi-squared statistic and its degrees of freedom; those of independent samples add up."""

    statistic: float
    freedom: int

    def __add__(self, other: Fit) -> Fit:
        return Fit(self.statistic + other.statistic, self.freedom + other.freedom)

    @property
    def p_value(self) -> float:
        """1 for a law with a single outcome that always came, 0 where something impossible came."""
        if self.freedom == 0:
            return 0.0 if self.statistic > 0 else 1.0
        return float(scipy.stats.chi2.sf(self.statistic, self.freedom))


def fit(observed: np.ndarray, law: np.ndarray) -> Fit:
    """Chi-squared of counts against a law; outcomes expected less than 5 times are pooled.

    An outcome of probability 0 that came even once makes the statistic infinite: it must never come.
    """
    if abs(law.sum() - 1) > 1e-9:
        raise ValueError(f"law must sum to 1, got {law.sum()}")
    if (observed[law == 0] > 0).any():
        return Fit(np.inf, 1)
    expected = observed.sum() * law
    rare = expected < 5
    expected = np.append(expected[~rare], expected[rare].sum())
    counts = np.append(observed[~rare], observed[rare].sum())
    if 0 < expected[-1] < 5 and len(expected) > 1:  # The pool itself is rare: it joins the least frequent outcome.
        least = np.argmin(expected[:-1])
        expected[least], counts[least] = expected[least] + expected[-1], counts[least] + counts[-1]
        expected, counts = expected[:-1], counts[:-1]
    kept = expected > 0
    expected, counts = expected[kept], counts[kept]
    return Fit(float(((counts - expected) ** 2 / expected).sum()), len(expected) - 1)

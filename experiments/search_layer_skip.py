"""Looks for the sublayers that a target can skip while it drafts for itself (Draft & Verify, Zhang 2309.08168).

    python -m experiments.search_layer_skip --checkpoint runs/demo

Greedy, on validation text: from the whole model on, each step leaves out the sublayer whose absence costs the least
acceptance, until one is left. Of all sets on the way and all gammas, the one counts whose predicted speed-up is the
highest. The paper searches the same space by Bayesian optimisation. Needs no training; the set is written beside the
checkpoint, where `experiments.generate --drafter layer-skip` finds it.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shlex
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import spec_jax
from experiments.checks import at_least
from experiments.command_line import given_config
from experiments.data import load_text, validation_batches
from experiments.expert_decoder import weights_read
from experiments.generate import load_run
from experiments.measure import leviathan_speedup
from experiments.output import LAYER_SKIP_FILE, make_folder, print_with_paths, write_whole
from experiments.runtime import exit_with, use_compilation_cache
from spec_jax.layers import rotary_angles


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How to search.

    Attributes:
      checkpoint: output folder of a training run.
      data: text to search on, as in training; None is the run's.
      batches: validation batches that the acceptance is measured on.
      batch_size: sequences of each.
      sequence_length: tokens of each sequence.
      max_gamma: longest draft considered.
      scoring_cost: what scoring a draft costs in plain steps; 1.8 on two cores of a CPU, near 1 on a GPU.
    """

    checkpoint: pathlib.Path
    data: str | None = None
    batches: int = 2
    batch_size: int = 8
    sequence_length: int = 128
    max_gamma: int = 8
    scoring_cost: float = 1.8

    def __post_init__(self) -> None:
        at_least(1, self, "batches", "batch_size", "sequence_length", "max_gamma", "scoring_cost")


@dataclasses.dataclass(frozen=True)
class Found:
    """A set of skipped sublayers.

    Attributes:
      skip_attention: layers whose attention is left out.
      skip_feed_forward: layers whose feed-forward is left out.
      acceptance: chance that a drafted token is kept, at temperature 1.
      draft_cost: weights read to draft a token, as a fraction of all that a plain step reads.
      gamma: the best number of tokens to draft.
      speedup: predicted for it.
    """

    skip_attention: tuple[int, ...]
    skip_feed_forward: tuple[int, ...]
    acceptance: float
    draft_cost: float
    gamma: int
    speedup: float


@jax.jit
def acceptance(target: spec_jax.Decoder, tokens_bt: jax.Array, keep_l2: jax.Array) -> jax.Array:
    """() float32, the mean over positions of Σ_x min(p(x), q(x)), the draft being thinned at every position.

    Lower than what drafting meets: there only the positions of the round itself are thinned, and all before them have
    the whole model's keys and values. It serves to rank sets in one forward each.

    Args:
      target: the model.
      tokens_bt: (B, T).
      keep_l2: (L, 2) booleans, whether each layer's attention and feed-forward take part in the draft.
    """
    position_bt = jnp.broadcast_to(jnp.arange(tokens_bt.shape[1])[None, :], tokens_bt.shape)
    rotary = rotary_angles(position_bt, target.config)
    hidden_btd = target.embed(tokens_bt)
    for layer, block in enumerate(target.blocks):
        attended_btd, _ = block.attend(hidden_btd, position_bt, rotary, None)
        hidden_btd = jnp.where(keep_l2[layer, 0], attended_btd, hidden_btd)
        hidden_btd = jnp.where(keep_l2[layer, 1], hidden_btd + block.feed_forward(hidden_btd), hidden_btd)
    draft_probs_btv = jax.nn.softmax(target.head(hidden_btd), axis=-1)
    target_probs_btv = jax.nn.softmax(target(tokens_bt).logits, axis=-1)
    return jnp.minimum(draft_probs_btv, target_probs_btv).sum(-1).mean()


def search(
    target: spec_jax.Decoder, batches: Sequence[np.ndarray], *, max_gamma: int, scoring_cost: float
) -> list[Found]:
    """The sets on the greedy way, from the whole model to a single sublayer.

    Args:
      target: the model.
      batches: (B, T) tokens each.
      max_gamma: longest draft considered.
      scoring_cost: what scoring a draft costs in plain steps.
    """
    depth = target.config.depth
    sizes_l2 = np.array([[weights_read(block.attention), weights_read(block.feed_forward)] for block in target.blocks])
    head = weights_read(target.head)

    def rate(keep_l2: np.ndarray) -> float:
        return float(np.mean([acceptance(target, tokens_bt, keep_l2) for tokens_bt in batches]))

    keep_l2, way = np.ones((depth, 2), bool), []
    for _ in track(range(2 * depth - 1), description="sublayers left out"):
        candidates = []
        for layer, kind in np.argwhere(keep_l2):
            without_l2 = keep_l2.copy()
            without_l2[layer, kind] = False
            candidates.append((rate(without_l2), layer, kind))
        best, layer, kind = max(candidates)
        keep_l2[layer, kind] = False
        cost = float(((sizes_l2 * keep_l2).sum() + head) / (sizes_l2.sum() + head))
        way.append(_found(keep_l2, best, cost, max_gamma, scoring_cost))
    return way


def _found(keep_l2: np.ndarray, rate: float, cost: float, max_gamma: int, scoring_cost: float) -> Found:
    speedups = {
        gamma: leviathan_speedup(rate, gamma, draft_cost=cost, scoring_cost=scoring_cost)
        for gamma in range(1, max_gamma + 1)
    }
    gamma = max(speedups, key=lambda gamma: speedups[gamma])
    attention, feed_forward = (tuple(np.flatnonzero(~keep_l2[:, kind]).tolist()) for kind in (0, 1))
    return Found(attention, feed_forward, rate, cost, gamma, speedups[gamma])


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line and searches."""
    config = given_config("search_layer_skip", SearchConfig, arguments, __doc__)
    console = Console()
    use_compilation_cache()
    run = load_run(config.checkpoint)
    text = load_text(run.configuration["data"] if config.data is None else config.data)
    text.check(config.sequence_length)
    batches = list(
        validation_batches(
            text.validation,
            batch_size=config.batch_size,
            sequence_length=config.sequence_length,
            max_batches=config.batches,
        )
    )
    make_folder(run.folder, argument="checkpoint")
    way = search(run.target, batches, max_gamma=config.max_gamma, scoring_cost=config.scoring_cost)
    best = max(way, key=lambda found: found.speedup)
    table = Table("attention skipped", "feed-forward skipped", "accepted", "c", "γ", "predicted", "")
    for found in way:
        table.add_row(
            *(" ".join(map(str, layers)) for layers in (found.skip_attention, found.skip_feed_forward)),
            f"{found.acceptance:.1%}", f"{found.draft_cost:.2f}", str(found.gamma), f"{found.speedup:.2f} ×",
            "← best" if found is best else "", style="bold" if found is best else "",
        )  # fmt: skip
    console.print(table)
    if best.speedup < 1:
        console.print("No set is predicted to be faster than plain decoding.")
    path = run.folder / LAYER_SKIP_FILE
    write_whole(
        path, json.dumps({"best": dataclasses.asdict(best), "way": [dataclasses.asdict(f) for f in way]}, indent=2)
    )
    generate = f"python -m experiments.generate --checkpoint {shlex.quote(str(config.checkpoint))}"
    print_with_paths(console, f"written to {path}; {generate} --drafter layer-skip --prompt TEXT")
    return 0


if __name__ == "__main__":
    exit_with(main)

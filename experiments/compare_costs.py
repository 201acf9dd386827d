"""What a round costs under each strategy, in plain steps: at equal acceptance the cheaper round is the faster decoding.

    python -m experiments.compare_costs

Small draft, early exit and prophet have the same width and depth here, and random weights: costs do not depend on them.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console

import spec_jax
from experiments.checks import at_least, different
from experiments.command_line import given_config
from experiments.measure import measure_costs
from experiments.output import make_folder_of, print_with_paths
from experiments.report import machine, narrow_table
from experiments.runtime import exit_with


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostConfig:
    """Sizes.

    Attributes:
      dim: width of all models.
      depth: blocks of the target.
      draft_depth: blocks of the small draft and the prophet, and before the exit.
      gammas: tokens drafted a round.
      prompt_length: bytes of the prompt.
      max_new_tokens: bytes that the caches have room for.
      repeats: timed calls of each stage.
      output: where the JSON goes.
    """

    dim: int = 384
    depth: int = 6
    draft_depth: int = 1
    gammas: tuple[int, ...] = (1, 2, 3, 5, 8)
    prompt_length: int = 64
    max_new_tokens: int = 192
    repeats: int = 9
    output: pathlib.Path = pathlib.Path("runs/costs.json")

    def __post_init__(self) -> None:
        at_least(1, self, "gammas", "prompt_length", "max_new_tokens", "repeats")
        different(self, "gammas")
        if not 1 <= self.draft_depth < self.depth:
            raise ValueError(f"draft_depth must be in [1, depth = {self.depth}), got {self.draft_depth}")


def round_costs(config: CostConfig) -> list[dict[str, Any]]:
    """Drafting and scoring cost of every strategy and gamma."""
    sizes = spec_jax.DecoderConfig(dim=config.dim, depth=config.depth, early_exit_layer=config.draft_depth)
    small = dataclasses.replace(sizes, depth=config.draft_depth, early_exit_layer=None)
    rngs = nnx.Rngs(0)
    target, draft = spec_jax.Decoder(sizes, rngs=rngs), spec_jax.Decoder(small, rngs=rngs)
    pair = spec_jax.ModelWithProphet(target, draft, num_leading_start_tokens=2, rngs=rngs)
    prompt = np.random.default_rng(0).integers(0, 256, (1, config.prompt_length)).astype(np.int32)
    rows = []
    for gamma in config.gammas:
        drafters = {
            "small draft": spec_jax.SmallModel(draft, gamma=gamma),
            "early exit": spec_jax.EarlyExit(gamma=gamma),
            "prophet": spec_jax.Prophet(pair, gamma=gamma),
            "n-gram": spec_jax.NGram(gamma=gamma),
        }
        costs = measure_costs(
            target,
            drafters,
            prompt,
            max_new_tokens=config.max_new_tokens,
            sampling=spec_jax.Sampling(),
            repeats=config.repeats,
        )
        for name in drafters:
            drafting, scoring = costs[name]
            rows.append({"strategy": name, "gamma": gamma, "draft_cost": drafting, "scoring_cost": scoring})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line, measures, prints and writes."""
    config = given_config("compare_costs", CostConfig, arguments, __doc__)
    console = Console()
    make_folder_of(config.output)
    with console.status(f"timing on {jax.devices()[0].device_kind}"):
        rows = round_costs(config)
    names = list(dict.fromkeys(row["strategy"] for row in rows))
    table = narrow_table("a round in plain steps: γ·c + s (c, s)")
    for column in ("γ", *names):
        table.add_column(column)
    for gamma in config.gammas:
        cells = []
        for row in (row for row in rows if row["gamma"] == gamma):
            drafting, scoring = row["draft_cost"], row["scoring_cost"]
            cells.append(f"{gamma * drafting + scoring:.2f} ({drafting:.2f}, {scoring:.2f})")
        table.add_row(str(gamma), *cells)
    console.print(table)
    content = {"machine": machine(), "config": dataclasses.asdict(config) | {"output": None}, "rows": rows}
    config.output.write_text(json.dumps(content, indent=2) + "\n")
    print_with_paths(console, f"written to {config.output}")
    return 0


if __name__ == "__main__":
    exit_with(main)

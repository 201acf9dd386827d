"""Streams text from a training run's checkpoint, in colours that show what was drafted.

python -m experiments.generate --checkpoint runs/demo --prompt "def main("
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
from rich.console import Console

import spec_jax
from experiments import train_draft, train_early_exit, train_moe, train_prophet
from experiments.checkpoints import open_run, run_folder
from experiments.checks import at_least, check_seed
from experiments.command_line import given_config
from experiments.decoding_run import Strategy
from experiments.output import LAYER_SKIP_FILE
from experiments.runtime import exit_with, use_compilation_cache
from experiments.samples import LEGEND, print_stream
from experiments.train_state import Models

DrafterName = Literal["trained", "ngram", "layer-skip", "none"]
GAMMA = 5
# By kind of run: the models that a configuration read from a checkpoint describes, weights not filled in; and how to
# decode with them.
KINDS: dict[str, tuple[Callable[[dict[str, Any]], Models], Strategy]] = {
    kind.KIND: (kind.models_of, kind.STRATEGY) for kind in (train_draft, train_early_exit, train_prophet, train_moe)
}


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A training run's models.

    Attributes:
      folder: its output folder.
      configuration: what it was trained with.
      models: by name.
      strategy: how the run decodes.
    """

    folder: pathlib.Path
    configuration: dict[str, Any]
    models: Models
    strategy: Strategy

    @property
    def target(self) -> Any:
        """The model whose text is wanted."""
        return self.models["target"]

    def drafter(self, name: str, gamma: int | None = None) -> spec_jax.Drafter | None:
        """What drafts, by name; None decodes plainly.

        Args:
          name: see `GenerateConfig.drafter`.
          gamma: tokens drafted a round; None is what the search found best, for 'layer-skip', and else `GAMMA`.

        Raises:
          ValueError: another name, or layers were not searched yet or their file is damaged, for 'layer-skip'.
        """
        _check_drafter(name)
        if name == "ngram":
            return spec_jax.NGram(gamma=GAMMA if gamma is None else gamma)
        if name == "layer-skip":
            path = self.folder / LAYER_SKIP_FILE
            try:
                best = json.loads(path.read_text())["best"]
                skipped = tuple(best["skip_attention"]), tuple(best["skip_feed_forward"])
                return spec_jax.LayerSkip(*skipped, gamma=best["gamma"] if gamma is None else gamma)
            except (OSError, ValueError, KeyError, TypeError):
                damaged = ", which is damaged" if path.exists() else ""
                raise ValueError(
                    f"drafter 'layer-skip' needs {path}{damaged}: run python -m experiments.search_layer_skip "
                    f"--checkpoint {self.folder}"
                ) from None
        return self.strategy.drafter(self.models, GAMMA if gamma is None else gamma) if name == "trained" else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """What to generate.

    Attributes:
      checkpoint: output folder of a training run.
      prompt: the text to continue.
      step: of the checkpoint; None is the newest.
      max_new_tokens: bytes to generate.
      temperature: 0 is greedy.
      top_k: keep so many of the most probable bytes.
      top_p: keep the most probable bytes of this mass.
      min_p: keep bytes at least so many times as probable as the most probable one.
      drafter: what drafts: 'trained', whatever the run trained for it; 'ngram', the row's own past; 'layer-skip', the
        target without the layers that `experiments.search_layer_skip` found; or 'none'.
      gamma: tokens drafted a round; None is what the search found best, for 'layer-skip', and 5 otherwise.
      verification: the rule that accepts drafted tokens; all are exact.
      plain: the same as `drafter` 'none'.
      seed: of the noise.
    """

    checkpoint: pathlib.Path
    prompt: str
    step: int | None = None
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    drafter: DrafterName = "trained"
    gamma: int | None = None
    verification: Literal["rejection", "block", "coupled"] = "rejection"
    plain: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("prompt must have at least one byte, got ''")
        _check_drafter(self.drafter)
        if self.plain and self.drafter not in ("trained", "none"):
            raise ValueError(f"drafter must not be given with plain, got {self.drafter!r}")
        at_least(0, self, "max_new_tokens", "gamma")
        check_seed(self.seed)
        self.sampling.check()

    @property
    def sampling(self) -> spec_jax.Sampling:
        """Temperature and filters."""
        return spec_jax.Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)


def _check_drafter(drafter: str) -> None:
    if drafter not in (names := get_args(DrafterName)):
        raise ValueError(f"drafter must be one of {', '.join(names)}, got {drafter!r}")


def load_run(run: str | pathlib.Path, step: int | None = None) -> LoadedRun:
    """The models of a training run.

    Args:
      run: its output folder.
      step: of the checkpoint; None is the newest.

    Raises:
      ValueError: there is no such checkpoint, or it is damaged.
    """
    run = pathlib.Path(run)
    with open_run(run) as checkpoints:
        step = checkpoints.require_latest() if step is None else step
        configuration = checkpoints.configuration(step)
        if (kind := configuration.get("kind")) not in KINDS:
            raise ValueError(f"checkpoint must be of one of the runs {', '.join(KINDS)}, got {kind!r}")
        models_of, strategy = KINDS[kind]
        shapes = jax.eval_shape(lambda: models_of(configuration))
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
        models = checkpoints.restore(step, {"models": template})["models"]
        return LoadedRun(run_folder(run), configuration, models, strategy)


def generate(config: GenerateConfig, console: Console) -> int:
    """Prints the prompt and its continuation, round by round; returns the exit code."""
    use_compilation_cache()
    run = load_run(config.checkpoint, config.step)
    drafter = run.drafter("none" if config.plain else config.drafter, config.gamma)
    start = time.perf_counter()
    tokens, rounds = print_stream(
        console,
        run.target,
        drafter,
        list(os.fsencode(config.prompt)),
        max_new_tokens=config.max_new_tokens,
        key=jax.random.key(config.seed),
        sampling=config.sampling,
        verification=config.verification if drafter is not None else "rejection",
    )
    seconds = time.perf_counter() - start
    rate = f"{tokens} bytes in {rounds} rounds, {seconds:.1f} s with compilation"
    console.print(*(() if drafter is None else (LEGEND, "·")), rate, highlight=False, soft_wrap=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line and generates."""
    return generate(given_config("generate", GenerateConfig, arguments, __doc__), Console())


if __name__ == "__main__":
    exit_with(main)

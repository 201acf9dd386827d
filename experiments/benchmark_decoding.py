"""How fast decoding is against what the machine allows, what the formula predicts, and PyTorch.

    python -m experiments.benchmark_decoding --output runs/benchmark_decoding.json

Every ratio is of two things timed in turn in this one process. PyTorch's part needs the `bench` extra.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

import spec_jax
from experiments import torch_reference
from experiments.checks import at_least, different, not_installed
from experiments.command_line import given_config
from experiments.measure import alternate, leviathan_speedup, measure_costs
from experiments.output import make_folder_of, print_with_paths
from experiments.report import machine
from experiments.runtime import exit_with
from spec_jax import checks, decoding, loop
from spec_jax.drafters.plain import Plain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the benchmark; the defaults are the project's stated figures.

    Attributes:
      dim: width of target and draft.
      depth: blocks of the target.
      draft_depth: blocks of the draft.
      dtype: compute dtype of both.
      prompt_length: bytes of each prompt.
      max_new_tokens: bytes decoded.
      batches: batch sizes of plain decoding.
      gamma: tokens drafted a round.
      repeats: timed calls of each way.
      with_torch: compare with PyTorch, in float32; None means where all of it is installed and this is a CPU.
      output: where the JSON goes.
    """

    dim: int = 512
    depth: int = 10
    draft_depth: int = 2
    dtype: Literal["float32", "bfloat16"] = "float32"
    prompt_length: int = 128
    max_new_tokens: int = 384
    batches: tuple[int, ...] = (1, 4)
    gamma: int = 5
    repeats: int = 5
    with_torch: bool | None = None
    output: pathlib.Path = pathlib.Path("runs/benchmark_decoding.json")

    def __post_init__(self) -> None:
        at_least(
            1, self, "dim", "depth", "draft_depth", "prompt_length", "max_new_tokens", "batches", "gamma", "repeats"
        )
        different(self, "batches")
        if not self.with_torch:
            return
        if self.dtype != "float32":
            raise ValueError(f"dtype must be float32 to compare with PyTorch, got {self.dtype}")
        if missing := not_installed(*torch_reference.MODULES):
            raise ValueError(f"with_torch needs {', '.join(missing)}, not installed: pip install -e '.[bench]'")


# The original's defaults: temperature 1, the 10 % most probable tokens.
SAMPLING = spec_jax.Sampling(temperature=1.0, top_k=0.9)


def main(config: Config) -> dict[str, Any]:
    """Runs all parts, prints them and writes the JSON."""
    make_folder_of(config.output)
    console = Console()
    with_torch = config.with_torch
    if with_torch is None:
        missing = not_installed(*torch_reference.MODULES)
        with_torch = not missing and config.dtype == "float32" and jax.default_backend() == "cpu"
    target, draft = (
        spec_jax.Decoder(
            spec_jax.DecoderConfig(dim=config.dim, depth=depth, dtype=config.dtype),
            rngs=nnx.Rngs(seed),
        )
        for seed, depth in enumerate((config.depth, config.draft_depth))
    )
    report: dict[str, Any] = {"machine": machine(), "config": dataclasses.asdict(config) | {"output": None}}
    if with_torch:
        report["versions"] = torch_reference.versions()
    report["plain"] = []
    for batch in config.batches:
        console.print(f"measuring plain decoding, batch {batch}", highlight=False)
        report["plain"].append(_plain(config, target, batch, with_torch))
    console.print(f"measuring speculative decoding, gamma {config.gamma}", highlight=False)
    report["speculative"] = _speculative(config, target, draft, with_torch)
    _print(console, report)
    config.output.write_text(json.dumps(report, indent=2) + "\n")
    print_with_paths(console, f"written to {config.output}")
    return report


def memory_read(gigabytes: float = 0.5) -> tuple[Callable[[int], Any], int]:
    """A sum over an array far larger than the device's caches, and the bytes it reads."""
    numbers = jnp.ones((int(gigabytes * 2**30 / 4),), jnp.float32)
    total = jax.jit(jnp.sum)
    return lambda _: total(numbers), numbers.nbytes


def _prompt(config: Config, batch: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (batch, config.prompt_length)).astype(np.int32)


def _plain(config: Config, target: Any, batch: int, with_torch: bool) -> dict[str, Any]:
    """Plain decoding against the memory rate and against PyTorch."""
    shared: dict[str, Any]
    # First, because it times the first compile.
    memory = _memory(config, target, Plain(), batch)
    prompt, shared = _prompt(config, batch), {"max_new_tokens": config.max_new_tokens}
    calls: dict[str, Callable[[int], Any]] = {
        "spec_jax": lambda repeat: spec_jax.base_decoding(
            target, prompt, key=jax.random.key(repeat), sampling=SAMPLING, **shared
        )
    }
    if with_torch:
        original = torch_reference.original_decoder(target)
        calls["original"] = torch_reference.original_plain(original, prompt, **shared)
        calls["torch static cache"] = torch_reference.static_cache_plain(target, prompt, **shared)
    # In turn with the rest: a shared machine's memory is at times a third faster than at others.
    calls["memory"], read_bytes = memory_read()
    seconds, _ = alternate(calls, repeats=config.repeats)
    rates = read_bytes / np.asarray(seconds.pop("memory"))
    floor = (memory["weights_bytes"] + memory["cache_bytes"]) / rates.max()
    row = _times(seconds, config.max_new_tokens)
    return row | {
        "batch": batch,
        "memory_gigabytes_per_second": rates.max() / 1e9,
        "floor_milliseconds": floor * 1e3,
        "times_floor": row["milliseconds_min"]["spec_jax"] / (floor * 1e3),
        "memory": memory,
    }


def _speculative(config: Config, target: Any, draft: Any, with_torch: bool) -> dict[str, Any]:
    """Speculative decoding at batch 1 against plain decoding, the formula and the original."""
    shared: dict[str, Any]
    prompt, shared = _prompt(config, 1), {"max_new_tokens": config.max_new_tokens}
    drafter = spec_jax.SmallModel(draft, gamma=config.gamma)
    memory = _memory(config, target, drafter, 1)
    calls: dict[str, Callable[[int], Any]] = {
        "plain": lambda repeat: spec_jax.base_decoding(
            target, prompt, key=jax.random.key(repeat), sampling=SAMPLING, **shared
        ),
        "spec_jax": lambda repeat: spec_jax.speculative_decoding(
            target, drafter, prompt, key=jax.random.key(repeat), sampling=SAMPLING, **shared
        ),
    }
    if with_torch:
        models = torch_reference.original_decoder(target), torch_reference.original_decoder(draft)
        calls["original"] = torch_reference.original_speculative(*models, prompt, gamma=config.gamma, **shared)
    rounds = [int(calls["spec_jax"](repeat).rounds[0]) for repeat in range(config.repeats)]
    models_only = _models_only(config, target, drafter, prompt)
    calls["models only"] = lambda repeat: models_only(rounds[repeat])
    seconds, results = alternate(calls, repeats=config.repeats)

    rates = [float(result.acceptance_rate) for result in results["spec_jax"]]
    # Repeat by repeat: the same rounds with and without everything outside the models.
    outside = 1 - np.asarray(seconds.pop("models only")) / np.asarray(seconds["spec_jax"])
    draft_cost, scoring_cost = measure_costs(
        target, {"draft": drafter}, prompt, max_new_tokens=config.max_new_tokens, sampling=SAMPLING
    )["draft"]
    speedup = float(np.median(np.asarray(seconds["plain"]) / np.asarray(seconds["spec_jax"])))
    predicted = leviathan_speedup(float(np.mean(rates)), config.gamma, draft_cost=draft_cost, scoring_cost=scoring_cost)
    row = _times(seconds, config.max_new_tokens) | {
        "gamma": config.gamma,
        "acceptance_rate": float(np.mean(rates)),
        "mean_accepted_length": float(np.mean([float(r.mean_accepted_length) for r in results["spec_jax"]])),
        "draft_cost": draft_cost,
        "scoring_cost": scoring_cost,
        "speedup": speedup,
        "predicted_speedup": predicted,
        "speedup_over_predicted": speedup / predicted,
        "overhead_outside_models": float(np.median(outside)),
        "overhead_outside_models_by_repeat": outside.tolist(),
        "memory": memory,
    }
    if with_torch:
        row["original_mean_accepted_length"] = float(np.mean([accepted for _, accepted in results["original"]]))
    return row


def _models_only(config: Config, target: Any, drafter: spec_jax.SmallModel, prompt: np.ndarray) -> Callable[[int], Any]:
    """Nothing but the forwards of a speculative decode at its cache sizes: prefill, then so many rounds."""
    width = checks.bucket(prompt.shape[1])
    size = checks.checked_size(None, width=width, max_new_tokens=config.max_new_tokens, gamma=config.gamma)
    # Half the output on average: masked slots cost what live ones do, so the exact length does not matter.
    length_b = jnp.full((prompt.shape[0],), prompt.shape[1] + config.max_new_tokens // 2, jnp.int32)

    @jax.jit
    def run(target: Any, draft: Any, prompt_bp: jax.Array, rounds: jax.Array) -> Any:
        def once(_: jax.Array, carry: Any) -> Any:
            tokens_bt, target_cache, draft_cache = carry
            output = draft(tokens_bt[:, :2], draft_cache.with_length(length_b))
            for _offset in range(1, config.gamma):
                # The cheapest token that depends on the logits: no forward can start before the one before it.
                output = draft((output.logits[:, -1:, 0] > 0).astype(jnp.int32), output.cache)
            last_b1 = (output.logits[:, -1:, 0] > 0).astype(jnp.int32)
            window_bt = jnp.concatenate((last_b1, tokens_bt[:, 1:]), axis=1)
            scored = target(window_bt, target_cache.with_length(length_b))
            return (scored.logits[:, :, 0] > 0).astype(jnp.int32), scored.cache, output.cache

        caches = (model(prompt_bp, model.init_cache(*prompt_bp.shape)).cache.resized(size) for model in (target, draft))
        tokens_bt = jnp.zeros((prompt_bp.shape[0], config.gamma + 1), jnp.int32)
        return jax.lax.fori_loop(0, rounds, once, (tokens_bt, *caches))[0]

    prompt_bp = jnp.pad(jnp.asarray(prompt), ((0, 0), (0, width - prompt.shape[1])))
    return lambda rounds: run(target, drafter.draft, prompt_bp, jnp.int32(rounds))


def _memory(config: Config, target: Any, drafter: Any, batch: int) -> dict[str, float]:
    """Bytes of the compiled decoding program, and of the weights and caches it cannot do without."""
    prompt = _prompt(config, batch)
    padded = checks.bucket(prompt.shape[1])
    size = checks.checked_size(None, width=padded, max_new_tokens=config.max_new_tokens, gamma=drafter.gamma)
    request = loop.Request.of_batch(
        batch,
        key=jax.random.key(0),
        max_new_tokens=config.max_new_tokens,
        sampling=SAMPLING,
        verification=spec_jax.Verification.REJECTION if drafter.gamma else spec_jax.Verification.COUPLED,
    )
    length_b = np.full((batch,), prompt.shape[1], np.int32)
    start = time.perf_counter()
    compiled = decoding.compiled_decode.lower(
        target, drafter, prompt, length_b, request, size=size, width=checks.bucket(config.max_new_tokens)
    ).compile()
    compile_seconds = time.perf_counter() - start
    used: Any = compiled.memory_analysis()
    models = [target] + ([drafter.draft] if drafter.gamma else [])
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(models))
    caches = sum(leaf.nbytes for model in models for leaf in jax.tree.leaves(model.init_cache(batch, size)))
    peak = used.argument_size_in_bytes + used.temp_size_in_bytes + used.output_size_in_bytes
    return {
        "weights_bytes": weights,
        "cache_bytes": caches,
        "peak_bytes": peak,
        "compile_seconds": compile_seconds,
        "peak_over_weights_and_caches": peak / (weights + caches),
    }


def _times(seconds: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    """Milliseconds per token by name, and each way's time over ours, repeat by repeat."""
    ours = np.asarray(seconds["spec_jax"])
    return {
        "milliseconds_min": {name: min(times) * 1e3 / tokens for name, times in seconds.items()},
        "milliseconds_median": {name: float(np.median(times)) * 1e3 / tokens for name, times in seconds.items()},
        "times_ours_median": {name: float(np.median(np.asarray(times) / ours)) for name, times in seconds.items()},
        "times_ours_of_minima": {name: min(times) / min(ours) for name, times in seconds.items()},
    }


def _print(console: Console, report: dict[str, Any]) -> None:
    console.print(report["machine"])
    table = Table("decoding", "batch", "ms/token min", "median", "time / ours (median)")
    rows = [("plain", row["batch"], row) for row in report["plain"]] + [("speculative", 1, report["speculative"])]
    for kind, batch, row in rows:
        for name, best in row["milliseconds_min"].items():
            cells = best, row["milliseconds_median"][name], row["times_ours_median"][name]
            table.add_row(f"{kind}: {name}", str(batch), *(f"{cell:.2f}" for cell in cells))
    console.print(table)
    for row in report["plain"]:
        console.print(
            f"batch {row['batch']}: {row['times_floor']:.2f} × the time to read weights and cache once "
            f"({row['floor_milliseconds']:.2f} ms at {row['memory_gigabytes_per_second']:.1f} GB/s); "
            f"{_memory_line(row['memory'])}"
        )
    row = report["speculative"]
    console.print(
        f"speculative, gamma {row['gamma']}: speed-up {row['speedup']:.2f}, the formula says "
        f"{row['predicted_speedup']:.2f} (acceptance {row['acceptance_rate']:.3f}, draft cost "
        f"{row['draft_cost']:.3f}, scoring cost {row['scoring_cost']:.2f}): {row['speedup_over_predicted']:.2f} of it; "
        f"outside the models {row['overhead_outside_models']:.1%}; {_memory_line(row['memory'])}"
    )


def _memory_line(memory: dict[str, float]) -> str:
    return (
        f"peak memory {memory['peak_over_weights_and_caches']:.2f} × weights and caches; "
        f"compiled in {memory['compile_seconds']:.1f} s"
    )


def run() -> int:
    """Reads the command line and measures."""
    main(given_config("benchmark_decoding", Config, None, __doc__))
    return 0


if __name__ == "__main__":
    exit_with(run)

"""How fast a mixture of experts is against PyTorch's, against a dense layer, and as sequences and experts grow.

    python -m experiments.benchmark_moe --sections dense sequence experts
    python -m experiments.benchmark_moe --mesh 1x1 1x2 1x4 1x8 2x4 8x1     # data x expert, on forced devices of a CPU

Every ratio is of things timed in turn in this one process. Sections `original` and `mixtral` need the `bench` extra. A
section's results replace those of an earlier run in the same file; the other sections' stay.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from rich.console import Console

import moe_jax
from experiments import mesh_costs, moe_programs, moe_reference
from experiments.checks import at_least, different, not_installed
from experiments.command_line import given_config
from experiments.measure import alternate
from experiments.moe_tables import described, print_meshes, print_section
from experiments.output import make_folder_of, print_with_paths, write_whole
from experiments.peak_memory import check_measurable, peak_memory
from experiments.report import machine
from experiments.runtime import exit_with

Section = Literal["original", "mixtral", "dense", "sequence", "experts"]
Shape = tuple[int, int]
OURS = "moe_jax"
RECOMPUTING = "moe_jax, recompute"
# Whether a call is a forward and backward in training, or a forward in evaluation.
MODES = {"forward": False, "forward + backward": True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the benchmark; the defaults are the project's stated figures.

    Attributes:
      sections: what to measure; with `mesh`, that alone.
      mesh: meshes, each DATAxEXPERT, whose programs are compiled and read: what each device sends, computes, keeps.
      dim: width of the hidden states.
      num_experts: experts, where their number is not what varies. Two of them are active per token.
      shapes: (batch, sequence) of the comparison with the original.
      shape: (batch, sequence) of the comparisons with Mixtral and the dense layer.
      lengths: of one sequence.
      growing_experts: numbers of experts at the same tokens, the first being the base of the ratios.
      growing_experts_shapes: (batch, sequence) of those tokens.
      mixtral_experts: numbers of experts to compare with Mixtral at.
      mixtral_hidden: hidden width of those experts.
      memory: measure the peak memory of the comparison with the original, each call in a process of its own.
      repeats: calls of each that are timed, and as many more whose memory is measured.
      output: where the JSON goes.
    """

    sections: tuple[Section, ...] = ("original", "mixtral", "dense", "sequence", "experts")
    mesh: tuple[str, ...] = ()
    dim: int = 512
    num_experts: int = 16
    shapes: tuple[Shape, ...] = ((4, 1024), (1, 4096), (1, 16384))
    shape: Shape = (4, 1024)
    lengths: tuple[int, ...] = (256, 1024, 4096, 16384)
    growing_experts: tuple[int, ...] = (4, 16, 64, 128)
    growing_experts_shapes: tuple[Shape, ...] = ((4, 1024), (1, 16384))
    mixtral_experts: tuple[int, ...] = (4, 16, 64)
    mixtral_hidden: int = 1368
    memory: bool = True
    repeats: int = 5
    output: pathlib.Path = pathlib.Path("runs/benchmark_moe.json")

    def __post_init__(self) -> None:
        # Two experts are active.
        at_least(2, self, "num_experts", "growing_experts", "mixtral_experts")
        at_least(1, self, "dim", "shapes", "shape", "lengths", "growing_experts_shapes", "mixtral_hidden", "repeats")
        if not self.sections and not self.mesh:
            raise ValueError("sections must name at least one, got none")
        for text in self.mesh:
            mesh_costs.parsed_mesh(text)
        if len(set(self.lengths)) < 2:
            raise ValueError(f"lengths must be two different ones at least, got {self.lengths}")
        different(self, "sections", "mesh", "shapes", "lengths")
        different(self, "growing_experts", "growing_experts_shapes", "mixtral_experts")


Row = dict[str, Any]
WITH_TORCH = ("original", "mixtral")


def main(config: Config) -> dict[str, Any]:
    """Measures the sections asked for, says what is done, prints each at its end, and writes them into the JSON."""
    make_folder_of(config.output)
    measure: dict[str, Callable[[Config], Iterable[Row]]] = {
        "original": against_original,
        "mixtral": against_mixtral,
        "dense": against_dense,
        "sequence": over_sequence,
        "experts": over_experts,
        "mesh": over_meshes,
    }
    sections = ("mesh",) if config.mesh else config.sections
    report = _earlier_report(config.output)
    missing = not_installed(*moe_reference.MODULES)
    if missing and any(section in WITH_TORCH for section in sections):
        raise ValueError(
            f"sections {' and '.join(WITH_TORCH)} need torch, transformers and st-moe-pytorch, not installed are "
            f"{', '.join(missing)}: pip install -e '.[bench]', or choose --sections dense sequence experts"
        )
    if config.memory and "original" in sections:
        check_measurable()
    console = Console()
    for section in sections:
        console.print(f"measuring {section}", highlight=False)
        rows = []
        for row in measure[section](config):
            rows.append(row)
            console.print(f"{section}: {', '.join(described(row))} done", highlight=False, soft_wrap=True)
        (print_meshes if section == "mesh" else partial(print_section, section))(rows)
        report[section] = {
            "machine": machine(),
            "versions": moe_reference.versions() if section in WITH_TORCH else {},
            "config": dataclasses.asdict(config) | {"output": None},
            "rows": rows,
        }
        write_whole(config.output, json.dumps(report, indent=2) + "\n")
    print_with_paths(console, f"written to {config.output}")
    return report


def _earlier_report(output: pathlib.Path) -> dict[str, Any]:
    """What earlier calls have measured, to be added to.

    Raises:
      ValueError: the file holds something else.
    """
    if not output.exists():
        return {}
    try:
        report = json.loads(output.read_text())
    except ValueError:
        report = None
    if not isinstance(report, dict):
        raise ValueError(f"output must hold a report of this benchmark or not exist, got {output}")
    return report


def against_original(config: Config) -> Iterable[Row]:
    """The original and `moe_jax`, twice, with the original's weights, slot order and dispatch gradient."""
    for shape in config.shapes:
        original = moe_reference.original_moe(config.dim, config.num_experts)
        moe, recomputing = (
            moe_programs.like_original(original, config.dim, config.num_experts, recompute=recompute)
            for recompute in (False, True)
        )
        x = moe_programs.hidden_states(shape, config.dim)
        for mode, backward in MODES.items():
            out = moe_programs.routed(moe, x, train=backward)
            kept = {
                OURS: _kept(out.metrics, x),
                "st-moe-pytorch": moe_reference.assignments_kept(original, np.asarray(x), train=backward),
            }
            agreement = _agreement(out.outputs, moe_reference.outputs(original, np.asarray(x), train=backward))
            _check_kept(kept, agreement["tokens_routed_apart"])
            calls = {
                OURS: moe_programs.timed_call(moe, x, backward=backward),
                "st-moe-pytorch": moe_reference.timed_call(original, np.asarray(x), backward=backward),
                RECOMPUTING: moe_programs.timed_call(recomputing, x, backward=backward),
            }
            row = {
                **_timed(calls, config.repeats, shape=shape, mode=mode),
                "assignments": 2 * shape[0] * shape[1],
                "kept": kept,
                **agreement,
            }
            if config.memory:
                resident = sum(leaf.nbytes for leaf in jax.tree.leaves((moe, x)))
                makers = {
                    OURS: moe_programs.our_call,
                    "st-moe-pytorch": moe_reference.original_call,
                    RECOMPUTING: partial(moe_programs.our_call, recompute=True),
                }
                row |= _memory(makers, config.repeats, resident, config.dim, config.num_experts, shape, backward)
            yield row


def against_mixtral(config: Config) -> Iterable[Row]:
    """Dropless dispatch and Hugging Face's grouped products, with the same weights and no auxiliary loss."""
    x = moe_programs.hidden_states(config.shape, config.dim)
    for num_experts in config.mixtral_experts:
        block = moe_reference.mixtral_block(config.dim, config.mixtral_hidden, num_experts)
        moe = moe_programs.like_mixtral(moe_reference.weights(block))
        for mode, backward in MODES.items():
            calls = {
                OURS: moe_programs.timed_call(moe, x, backward=backward),
                "mixtral": moe_reference.timed_call(block, np.asarray(x), backward=backward),
            }
            out = moe_programs.routed(moe, x, train=backward)
            yield {
                **_timed(calls, config.repeats, shape=config.shape, mode=mode, experts=num_experts),
                **_agreement(out.outputs, moe_reference.outputs(block, np.asarray(x), train=backward)),
            }


def against_dense(config: Config) -> Iterable[Row]:
    """One dense GEGLU twice as wide as an expert, and two experts per token with as many slots as assignments.

    The products are of the same size; `index` leaves out what experts are asked for above the mean.
    """
    dense = moe_jax.FeedForward(
        config.dim, 2 * moe_jax.MoEConfig(dim=config.dim).expert_hidden, rngs=nnx.Rngs(0), init="original"
    )
    x = moe_programs.hidden_states(config.shape, config.dim)
    for mode, backward in MODES.items():
        calls = {"dense": moe_programs.timed_call(dense, x, backward=backward)}
        for dispatch in ("index", "ragged"):
            moe = moe_programs.initial_layer(moe_programs.roomy_config(config.dim, config.num_experts, dispatch))
            calls[dispatch] = moe_programs.timed_call(moe, x, backward=backward)
        yield _timed(calls, config.repeats, base="dense", shape=config.shape, mode=mode)


def over_sequence(config: Config) -> Iterable[Row]:
    """One sequence, ever longer: how time and the program's working memory grow."""
    for dispatch in ("index", "ragged"):
        moe = moe_programs.initial_layer(moe_programs.roomy_config(config.dim, config.num_experts, dispatch))
        for mode, backward in MODES.items():
            inputs = {str(length): moe_programs.hidden_states((1, length), config.dim) for length in config.lengths}
            programs = {name: moe_programs.compiled(moe, x, backward=backward) for name, x in inputs.items()}
            calls = {
                name: moe_programs.timed_call(moe, inputs[name], backward=backward, program=program)
                for name, program in programs.items()
            }
            row = _timed(calls, config.repeats, base=str(config.lengths[0]), dispatch=dispatch, mode=mode)
            scratch = {name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()}
            yield row | {
                "time_exponent": _exponent(row["milliseconds_min"]),
                "scratch_bytes": scratch,
                "memory_exponent": _exponent(scratch),
            }


def over_experts(config: Config) -> Iterable[Row]:
    """The same tokens on ever more experts, two of them active per token: what the experts' number costs.

    Of two calls in succession the second is timed: the gradients of 128 experts are a gigabyte.
    """
    for shape in config.growing_experts_shapes:
        x = moe_programs.hidden_states(shape, config.dim)
        for dispatch in ("index", "ragged"):
            layers = {
                str(number): moe_programs.initial_layer(moe_programs.roomy_config(config.dim, number, dispatch))
                for number in config.growing_experts
            }
            for mode, backward in MODES.items():
                calls = {name: moe_programs.timed_call(moe, x, backward=backward) for name, moe in layers.items()}
                base = str(config.growing_experts[0])
                yield _timed(
                    calls, config.repeats, base=base, following=True, shape=shape, dispatch=dispatch, mode=mode
                )


def over_meshes(config: Config) -> Iterable[Row]:
    """A sequence of `shape` on each device of every mesh: compiled, not run."""
    meshes = [mesh_costs.parsed_mesh(text) for text in config.mesh]
    needed = max(data * expert for data, expert in meshes)
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", needed)
    if needed > jax.device_count():
        raise ValueError(f"mesh must fit the {jax.device_count()} devices, got {' '.join(config.mesh)}")
    return mesh_costs.over_meshes(meshes, dim=config.dim, num_experts=config.num_experts, length=config.shape[1])


def _check_kept(kept: Mapping[str, int], apart: int) -> None:
    """Raises RuntimeError where the numbers of assignments kept differ by more than tokens routed apart explain."""
    if max(kept.values()) - min(kept.values()) > apart:
        raise RuntimeError(f"as many assignments must be kept for times to be compared, got {kept}")


def _kept(metrics: moe_jax.Metrics, x: jax.Array) -> int:
    return round(float((metrics.wanted_a * (1 - metrics.dropped_a)).sum()) * x.shape[0] * x.shape[1])


def _agreement(ours: jax.Array, theirs: np.ndarray) -> Row:
    """How far apart (B, N, D) outputs are, and the tokens left out of that: where two experts' scores are equal but for
    rounding, each side may choose another one.

    Raises:
      RuntimeError: a difference is not a number, or more than one token in a thousand differs by more than rounding.
    """
    of_token_bn = np.abs(np.asarray(ours) - theirs).max(-1)
    alike_bn = of_token_bn < 1e-3
    apart = int(np.sum(~alike_bn))
    if 1000 * apart > alike_bn.size or np.isnan(of_token_bn).any():
        raise RuntimeError(
            "outputs must agree for their times to be compared, got a difference of "
            f"{of_token_bn.max():.1e}, and more than 1e-3 at {apart} of {alike_bn.size} tokens"
        )
    return {"largest_difference": float(of_token_bn[alike_bn].max()), "tokens_routed_apart": apart}


def _timed(
    calls: Mapping[str, Callable[[int], Any]],
    repeats: int,
    *,
    base: str = OURS,
    following: bool = False,
    **what: Any,
) -> Row:
    """Milliseconds by name, and each time over that of `base`, repeat by repeat and by the fastest repeats."""
    seconds, _ = alternate(calls, repeats=repeats, following=following)
    times = {name: np.asarray(values) * 1e3 for name, values in seconds.items()}
    fastest = {name: float(values.min()) for name, values in times.items()}
    return {
        **what,
        "base": base,
        "milliseconds_min": fastest,
        "milliseconds_median": {name: float(np.median(values)) for name, values in times.items()},
        "over_base_median": {name: float(np.median(values / times[base])) for name, values in times.items()},
        "over_base_of_minima": _over(fastest, base),
    }


def _memory(makers: Mapping[str, Callable[..., Callable[[int], Any]]], repeats: int, resident: int, *args: Any) -> Row:
    """Bytes by name, what is there before a call included, and their medians over that of ours.

    Each call is measured in turn with the others, in a new process each time: what PyTorch's allocator keeps differs
    from process to process.
    """
    peaks = [{name: resident + peak_memory(make, *args) for name, make in makers.items()} for _ in range(repeats)]
    medians = {name: float(np.median([peak[name] for peak in peaks])) for name in makers}
    return {
        "peak_bytes_min": {name: min(peak[name] for peak in peaks) for name in makers},
        "peak_bytes_median": medians,
        "memory_over_ours": _over(medians, OURS),
    }


def _over(values: Mapping[str, float], base: str) -> dict[str, float]:
    return {name: value / values[base] for name, value in values.items()}


def _exponent(by_length: Mapping[str, float]) -> float:
    """Slope of the logarithms: 1 is linear."""
    lengths = [float(length) for length in by_length]
    return float(np.polyfit(np.log(lengths), np.log(list(by_length.values())), 1)[0])


def run() -> int:
    """Reads the command line and measures."""
    main(given_config("benchmark_moe", Config, None, __doc__))
    return 0


if __name__ == "__main__":
    exit_with(run)

"""What `experiments.benchmark_moe` has measured, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.report import narrow_table

Row = Mapping[str, Any]


def described(row: Row) -> list[str]:
    """What a row is of, in words."""
    return [*(f"{key} {row[key]}" for key in ("mesh", "shape", "experts", "dispatch") if key in row), row["mode"]]


def print_section(section: str, rows: Sequence[Row]) -> None:
    """Times of each call, and their ratio to the row's base; below them what else is known."""
    names = list(rows[0]["milliseconds_min"])
    title = f"{section}: fastest (median) milliseconds, median ratio to {rows[0]['base']}"
    table = narrow_table(title, leading=1)
    for column in ("what", *names):
        table.add_column(column)
    notes = []
    for row in rows:
        what = described(row)
        best, median, ratio = (row[key] for key in ("milliseconds_min", "milliseconds_median", "over_base_median"))
        cells = (f"{_digits(best[name])} ({_digits(median[name])})\n{ratio[name]:.2f} ×" for name in names)
        table.add_row("\n".join(what), *cells)
        if also := _also(row):
            notes.append(f"{', '.join(what)}: {also}")
    console = Console()
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)


def print_meshes(rows: Sequence[Row]) -> None:
    """What each device of a mesh sends, computes and keeps."""
    table = Table(
        title="each device, with a sequence of its own, counted in the program",
        caption="moves: all-to-alls; buffers: their bytes in capacity buffers; beside: gradients and counts summed; "
        "held: arguments.",
    )
    for column in ("mesh", "mode", "moves", "MB", "buffers", "MB beside", "GFLOP", "MB held"):
        table.add_column(column)
    for row in rows:
        buffers = row["all_to_all_bytes"] / row["buffer_bytes"] if row["buffer_bytes"] else 0.0
        beside = f"{row['other_bytes'] / 1e6:.3f}"
        sizes = (f"{row[name] / scale:.2f}" for name, scale in (("flops", 1e9), ("argument_bytes", 1e6)))
        exchange = str(row["all_to_alls"]), f"{row['all_to_all_bytes'] / 1e6:.2f}", f"{buffers:.2f}"
        table.add_row(row["mesh"], row["mode"], *exchange, beside, *sizes)
    Console().print(table)


def _digits(milliseconds: float) -> str:
    """Three or more."""
    return f"{milliseconds:.1f}" if milliseconds < 100 else f"{milliseconds:.0f}"


def _also(row: Row) -> str:
    """What is known of a row besides its times, in words."""
    words = []
    if "kept" in row:
        kept = " and ".join(f"{number} ({name})" for name, number in row["kept"].items())
        words.append(f"{kept} of {row['assignments']} assignments kept")
    if "largest_difference" in row:
        words.append(f"outputs differ by {row['largest_difference']:.1e} at most")
        if row["tokens_routed_apart"]:
            words[-1] += f" but at {row['tokens_routed_apart']} tokens"
    if "memory_over_ours" in row:
        words += [
            f"{name}: {ratio:.2f} × the memory"
            for name, ratio in row["memory_over_ours"].items()
            if name != row["base"]
        ]
    if "time_exponent" in row:
        words.append(f"exponent of time {row['time_exponent']:.2f}, of memory {row['memory_exponent']:.2f}")
    return "; ".join(words)

"""The comparison of strategies: what it measures, cells that are kept, a table and panels by hand, and the whole."""

import dataclasses
import io
import json
import math
import pathlib
import re
import types
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import spec_jax
from experiments import compare_strategies, train_draft, train_early_exit, train_prophet
from experiments.compare_strategies import PROSE, CompareConfig, Row, kept_cell, panels, print_rows, prompts_of
from experiments.search_layer_skip import Found
from tests.experiments.runs import tiny_config
from tests.experiments.strategies import early_exit_config, prophet_config
from tests.experiments.test_report import measurement


def row(strategy: str, gamma: int, speedup: float, *, temperature: float = 1.0, **changes: Any) -> Row:
    return Row(strategy, "code", temperature, measurement(f"γ = {gamma}", gamma, speedup, **changes))


ROWS = [
    row("n-gram", 1, 1.5),
    row("n-gram", 2, 2.5, acceptance_by_position=[0.5, 0.25]),
    row("n-gram", 1, 3.5, batch=4),
    row("n-gram", 2, 0.5, batch=4, acceptance_by_position=[0.1, 0.05]),
]


def test_a_row_is_what_its_json_says():
    for one in ROWS:
        assert Row.from_json(one.as_json()) == one


def test_a_cell_is_measured_again_only_where_another_would_be(tmp_path: pathlib.Path):
    """Cells of other batches and of another folder are the same; of another length, gamma or weights they are not."""
    config, measured = CompareConfig(), []
    weights = {"a": np.ones(2), "b": np.ones(2)}

    def cell(config: CompareConfig, weights: dict[str, np.ndarray] = weights) -> list[Row]:
        def measure() -> list[Row]:
            measured.append(config)
            return ROWS

        return kept_cell(tmp_path / "cells" / "n-gram_1.json", config, weights, measure)

    for same in (config, config, dataclasses.replace(config, batches=(1,), output=pathlib.Path("elsewhere"))):
        assert cell(same) == ROWS
    assert measured == [config]
    for other in (dataclasses.replace(config, generate_length=8), dataclasses.replace(config, gammas=(1, 2))):
        assert cell(other) == ROWS
        assert measured[-1] == other
    cell(config)
    assert cell(config, {"a": np.ones(2), "b": np.array([1.0, 2.0])}) == ROWS
    assert measured[3:] == [config, config]
    # One that is damaged is none.
    for content in ("", "[]", "{}"):
        (tmp_path / "cells" / "n-gram_1.json").write_text(content)
        assert [cell(config), cell(config)] == [ROWS, ROWS]
    assert measured[5:] == [config] * 3


def test_an_interrupt_while_measuring_says_what_is_kept(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupted(*_: Any) -> list[Row]:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_strategies, "train_all", lambda *_: None)
    monkeypatch.setattr(compare_strategies, "load_run", lambda _: types.SimpleNamespace(target=None))
    monkeypatch.setattr(compare_strategies, "measure_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare_strategies.main(["--output", str(tmp_path)])
    assert "Stopped; go on with the same command" in capsys.readouterr().out


def table(rows: list[Row]) -> str:
    console = Console(file=io.StringIO(), width=80)
    print_rows(console, rows)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_shows_the_best_gamma_of_each_place():
    shown = table([*ROWS, row("n-gram", 5, 0.25, temperature=0.0, acceptance_rate=None)])
    _, _, cells = shown.partition("─\n")
    assert [re.split(r"\s{2,}", line.strip()) for line in cells.splitlines()] == [
        ["1", "0", "code", "0.25, γ 5"],
        ["0.38,"],
        ["1", "1", "code", "2.50, γ 2"],
        ["2.62, 62%"],
        ["4", "1", "code", "3.50, γ 1"],
        ["3.62, 62%"],
    ]


def test_the_table_of_all_strategies_fits_80_columns():
    names = "small draft", "early exit", "prophet", "n-gram", "layer skip"
    rows = [row(name, 8, 2.0, acceptance_rate=1.0) for name in names]
    shown = table([dataclasses.replace(one, text="prose") for one in rows])
    assert all(name in shown for name in names)
    assert shown.count("2.00, γ 8") == shown.count(", 100%") == 5


def test_the_panels_by_hand():
    """Acceptance of the longest drafts at the smallest batch; the formula dashed; a panel for each batch."""
    ((acceptance, first, second),) = panels(ROWS)
    assert acceptance.lines == {"n-gram": [(1, 0.5), (2, 0.25)]}
    assert (first.title, first.level) == ("code, temperature 1, batch 1", 1)
    assert (first.lines, first.formula) == ({"n-gram": [(1, 1.5), (2, 2.5)]}, {"n-gram": [(1, 1.625), (2, 2.625)]})
    assert second.title == "code, temperature 1, batch 4"
    assert (second.lines, second.formula) == ({"n-gram": [(1, 3.5), (2, 0.5)]}, {"n-gram": [(1, 3.625), (2, 0.625)]})


def test_the_hundredth_at_the_far_end_is_neither_prose_nor_code():
    """Of 200 pieces, two rulers and two pieces of letters only are left out, and the next ones are taken."""
    pieces = [b"a" * index + b"#" * (200 - index) for index in range(1, 199)]
    split = np.frombuffer(b"".join([b"#" * 200, *pieces, b"a" * 200]), np.uint8)
    shares = {kind: PROSE[prompts_of(split, kind, count=3, length=200)].mean(1) * 200 for kind in ("code", "prose")}
    np.testing.assert_allclose(shares["code"], [2, 3, 4])
    np.testing.assert_allclose(shares["prose"], [195, 196, 197])


def test_every_temperature_is_measured_at_its_own(monkeypatch: pytest.MonkeyPatch):
    seen = []

    def spy(*_: Any, sampling: spec_jax.Sampling, max_new_tokens: int, **__: Any) -> Any:
        seen.append((float(sampling.temperature), max_new_tokens))
        return [measurement("γ = 1", 1, 1.0)]

    monkeypatch.setattr(compare_strategies, "measure_decoding", spy)
    monkeypatch.setattr(compare_strategies, "measure_costs", lambda *_, **__: {})
    config = CompareConfig(gammas=(1,), generate_length=9, temperatures=(0.0, 1.0))
    prompts = {"code": np.zeros((3, 1, 4), np.int32)}

    def drafter(gamma: int) -> spec_jax.NGram:
        return spec_jax.NGram(gamma=gamma)

    compare_strategies.measure_cell(config, "n-gram", None, drafter, prompts, Console(quiet=True))
    assert seen == [(0.0, 9), (1.0, 9)]


def test_every_strategy_meets_its_own_target_on_test_text(monkeypatch: pytest.MonkeyPatch):
    """The layers to skip are searched on validation text; drafts without training go with the small draft's target."""
    splits = {name: np.full(9999, value, np.uint8) for value, name in enumerate(("train", "validation", "test"))}
    cells, searched = {}, []

    def search(target: str, text: np.ndarray) -> Found:
        searched.append((target, np.unique(text).tolist()))
        return Found((0,), (), 0.5, 0.5, 1, 2.0)

    def keep(path: pathlib.Path, _: Any, models: Any, measure: Any) -> list[Row]:
        cells[path.stem] = models, measure
        return []

    monkeypatch.setattr(compare_strategies, "load_text", lambda _: types.SimpleNamespace(**splits))
    monkeypatch.setattr(compare_strategies, "kept_cell", keep)
    monkeypatch.setattr(compare_strategies, "searched_layers", search)
    trained = compare_strategies.TRAINED
    runs: Any = {name: types.SimpleNamespace(target=f"{name}'s", models=f"models of {name}") for name in trained}
    shared: Any = types.SimpleNamespace(data="", prompt_length=8)
    compare_strategies.measure_all(CompareConfig(batches=(2,), repeats=3), shared, runs, Console(quiet=True))
    assert len(cells) == len(trained) + 2
    for name in (*trained, "n-gram", "layer skip"):
        models, measure = cells[f"{name.replace(' ', '_')}_2"]
        of = name if name in trained else "small draft"
        assert models == (f"models of {name}" if name in trained else "small draft's")
        _, strategy, target, _, prompts, _ = measure.args
        assert (strategy, target) == (name, f"{of}'s")
        assert [(text, array.shape, np.unique(array).tolist()) for text, array in prompts.items()] == [
            (text, (3, 2, 8), [2]) for text in ("code", "prose")
        ]
    assert cells["layer_skip_2"][1].args[3](3).gamma == 3
    assert searched == [("small draft's", [1])]


def test_repetitive_text_is_sixteen_bytes_of_the_test_text(monkeypatch: pytest.MonkeyPatch):
    text = types.SimpleNamespace(train=np.zeros(9999, np.uint8), test=np.arange(9999).astype(np.uint8))
    given = []

    def spy(_: Any, __: Any, prompts: Any, **___: Any) -> list[Any]:
        given.append(prompts)
        return []

    monkeypatch.setattr(compare_strategies, "load_text", lambda _: text)
    monkeypatch.setattr(compare_strategies, "measure_decoding", spy)
    shared: Any = types.SimpleNamespace(data="", prompt_length=40)
    compare_strategies.ngram_extremes(CompareConfig(), shared, None, Console(quiet=True))
    repetitive, _ = given
    for (row,) in repetitive:
        assert row.shape == (40,)
        np.testing.assert_array_equal(row[16:], row[:24])
        np.testing.assert_array_equal(np.diff(row[:16].astype(int)) % 256, 1)


def test_prose_and_code_are_told_apart():
    code, prose = b"x[i] = {(a+b)*c};\n#%$@ 01234_56789|==>>", b"the quick brown fox jumps over the lazy dog, and"
    split = np.frombuffer((code * 40 + prose * 40) * 20, np.uint8)
    for kind, share in (("code", 0.5), ("prose", 0.95)):
        rows = compare_strategies.prompts_of(split, kind, count=6, length=32)
        assert rows.shape == (6, 32)
        found = compare_strategies.PROSE[rows].mean(axis=1)
        assert ((found < share) if kind == "code" else (found > share)).all()


@pytest.mark.slow
def test_all_strategies_are_compared(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """From training to table, JSON and figure; a second start trains, searches and measures nothing again."""
    changes: dict[str, Any] = {"prompt_length": 16, "steps": 2, "checkpoint_every": 2}
    for module, config in (
        (train_draft, tiny_config(tmp_path, **changes)),
        (train_early_exit, early_exit_config(tmp_path, **changes)),
        (train_prophet, prophet_config(tmp_path, **changes)),
    ):
        monkeypatch.setitem(module.PRESETS, "cpu", ("tiny", config))
    output = tmp_path / "strategies"
    arguments = ["--output", str(output), "--gammas", "1", "2", "--batches", "2", "--repeats", "1"]
    arguments += ["--generate-length", "8", "--temperatures", "1"]
    assert compare_strategies.main(arguments) == 0
    rows = json.loads((output / "strategies.json").read_text())["rows"]
    places = {(row["strategy"], row["text"], row["batch"], row["gamma"]) for row in rows}
    names = ("small draft", "early exit", "prophet", "n-gram", "layer skip")
    assert places >= {(n, text, 2, g) for n in names for text in ("code", "prose") for g in (1, 2)}
    assert {row["text"] for row in rows} == {"code", "prose", "repetitive", "noise"}
    chosen = {row["text"]: row["temperature"] for row in rows if row["text"] in ("repetitive", "noise")}
    assert chosen == {"repetitive": 0.0, "noise": 5.0}
    assert (output / "strategies.png").read_bytes().startswith(b"\x89PNG")
    for again in ("measure_decoding", "measure_costs", "searched_layers"):
        monkeypatch.delattr(compare_strategies, again)
    (output / "strategies.png").unlink()
    trained = (output / "prophet" / "metrics.jsonl").stat().st_mtime_ns
    assert compare_strategies.main(arguments) == 0
    assert (output / "prophet" / "metrics.jsonl").stat().st_mtime_ns == trained
    assert json.loads((output / "strategies.json").read_text())["rows"] == rows
    assert (output / "strategies.png").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: compare_strategies.CompareConfig(gammas=(0, 1)), "gammas must be at least 1, got"),
        (lambda: compare_strategies.CompareConfig(gammas=(2, 3, 2)), "gammas must be different ones, got 2 3 2"),
        (lambda: compare_strategies.CompareConfig(batches=(1, 1)), "batches must be different ones, got 1 1"),
        (lambda: compare_strategies.CompareConfig(temperatures=(1, 1.0)), "temperatures must be different ones, got"),
        (lambda: compare_strategies.CompareConfig(temperatures=(math.nan,)), "temperatures must be at least 0, got"),
        (lambda: compare_strategies.CompareConfig(temperatures=(1.0, math.inf)), "temperatures must be finite, got"),
        (lambda: compare_strategies.main(["--batches", "5000"]), "repeats · batches must be at most .*, got 15000"),
        (lambda: compare_strategies.CompareConfig(preset="gpu"), "preset must be one of cpu, enwik8, got 'gpu'"),
        (lambda: compare_strategies.CompareConfig(gammas=()), "gammas must have at least one value"),
    ],
)
def test_bad_input(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()

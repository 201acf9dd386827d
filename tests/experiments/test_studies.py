"""Runs that are parts of a study: started again, they go on, or begin anew, or are done."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from experiments import compare_experts, compare_prophet_training, compare_strategies, runtime, session, train_draft
from experiments.data import Text
from experiments.output import CONFIGURATION, write_configuration
from experiments.session import finish
from tests.experiments.runs import steps_kept, tiny_config, train


def test_a_study_deletes_only_what_it_began(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """A run without a checkpoint begins anew; somebody else's files are left alone."""
    config = tiny_config(tmp_path, steps=4)

    def start() -> int:
        return finish(config, train_draft.task(config), Console(quiet=True))

    mine = config.output / "checkpoints" / "mine"
    mine.mkdir(parents=True)
    with pytest.raises(ValueError, match=r"output must be a folder without a run, got .*, which holds checkpoints"):
        start()
    assert mine.is_dir()
    mine.rmdir()
    (config.output / "checkpoints").rmdir()

    def dies(*_) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(session, "_train", dies)
        with pytest.raises(KeyboardInterrupt):
            start()
        (config.output / "report.json").write_text("of the first start")
        with pytest.raises(KeyboardInterrupt):
            start()
        assert not (config.output / "report.json").exists()
    (config.output / "report.json").write_text("of the second start")
    other = dataclasses.replace(config, seed=1)
    with pytest.raises(ValueError, match=r"output must hold this run or none, got .* with seed: expected 1, got 0"):
        finish(other, train_draft.task(other), Console(quiet=True))
    assert start() == 0
    assert not (config.output / "report.json").exists()
    assert steps_kept(config) == [4]


def test_a_study_goes_on_with_its_own_run_and_not_past_its_end(tmp_path, monkeypatch: pytest.MonkeyPatch):
    config = tiny_config(tmp_path, steps=4)
    train(config)
    started = []
    monkeypatch.setattr(session, "run", lambda config, *_, **words: started.append((config, words)) or 0)

    def start(**changes: Any) -> int:
        changed = dataclasses.replace(config, **changes)
        return finish(changed, train_draft.task(changed), Console(quiet=True))

    assert start() == 0
    with pytest.raises(ValueError, match=r"output must hold this run or none, got .* with seed: expected 1, got 0"):
        start(seed=1)
    assert not started
    found = session.newest(config.output)
    assert found is not None
    monkeypatch.setattr(session, "newest", lambda _: (2, found[1]))
    assert start() == 0
    monkeypatch.setattr(session, "newest", lambda _: None)
    assert start() == 0
    words = {"go_on": "the same command"}
    assert started == [(dataclasses.replace(config, **{how: True}), words) for how in ("resume", "overwrite")]


def train_experts(output: pathlib.Path) -> None:
    compare_experts.run_all(compare_experts.CompareConfig(output=output), Console(quiet=True))


def train_strategies(output: pathlib.Path) -> None:
    compare_strategies.train_all(compare_strategies.CompareConfig(output=output), Console(quiet=True))


def train_prophets(output: pathlib.Path) -> None:
    config = compare_prophet_training.CompareConfig(output=output, seeds=2)
    compare_prophet_training.curves_of(config, Console(quiet=True))


@pytest.mark.parametrize(
    ("train_all", "last"),
    [
        (train_experts, f"{compare_experts.CompareConfig().variants[-1]}_0"),
        (train_strategies, "prophet"),
        (train_prophets, f"{[*compare_prophet_training.WAYS][-1].replace(', ', '_').replace(' ', '_')}_1"),
    ],
)
def test_a_study_looks_at_every_folder_before_it_trains(
    train_all: Callable[[pathlib.Path], None], last: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    """Another run is in the place of the one that it would train last."""
    text = np.frombuffer(b"some text " * 500, np.uint8)
    short = Text(name="text", description="", train=text, validation=text, test=text)
    monkeypatch.setattr(session, "load_text", lambda _: short)
    trained: list[str] = []
    monkeypatch.setattr(session, "run", lambda config, *_, **__: trained.append(config.output.name) or 1)
    with pytest.raises(SystemExit):
        train_all(tmp_path)
    assert len(trained) == 1
    (tmp_path / last).mkdir()
    write_configuration(tmp_path / last, {"kind": "another"})
    message = rf"output must hold this run or none, got \S*/{last} with .*kind: expected 'train_\w+', got 'another'"
    with pytest.raises(ValueError, match=message):
        train_all(tmp_path)
    (tmp_path / last / CONFIGURATION).rename(tmp_path / last / "report.json")
    with pytest.raises(ValueError, match=rf"output must be a folder without a run, got \S*/{last}, which holds report"):
        train_all(tmp_path)
    (tmp_path / last / "report.json").unlink()
    (tmp_path / last).rmdir()
    (tmp_path / last).write_text("")
    with pytest.raises(ValueError, match=rf"output must be a folder, got the file \S*/{last}"):
        train_all(tmp_path)
    assert len(trained) == 1


def test_a_study_ends_as_its_run_did(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(session, "_progress", lambda *_: None)
    monkeypatch.setattr(session, "finish", lambda *_: 143)
    runs: Any = [(None, None)]
    with pytest.raises(SystemExit) as ended:
        list(session.finish_each(runs, Console(quiet=True)))
    assert ended.value.code == 143


def test_a_study_is_of_one_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(ValueError, match="processes must be 1 for a study of several runs, got 2"):
        runtime.require_one_process()

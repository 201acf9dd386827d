import io
import os
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from experiments import check_resume


@pytest.mark.slow
def test_three_killed_runs_end_like_an_undisturbed_one(tmp_path, monkeypatch):
    """On one device each, whose steps take a fraction of those on eight that share two cores."""
    flags = os.environ["XLA_FLAGS"].split()
    monkeypatch.setenv("XLA_FLAGS", " ".join(flag for flag in flags if "device_count" not in flag))
    config = check_resume.CheckConfig(runs=3, kills=2, steps=30, seed=1)
    console = Console(file=io.StringIO(), width=120)
    assert check_resume.check(config, tmp_path, console) == 0, console.file
    with pytest.raises(ValueError, match="must end with step 31, got 30"):
        check_resume.final_leaves(check_resume.tiny_config(tmp_path / "undisturbed", 31))


@pytest.mark.parametrize("last", [1.0, 2.0])
def test_another_end_is_told(last: float, tmp_path, monkeypatch: pytest.MonkeyPatch):
    ends = iter([[np.ones(2)], [np.ones(2)], [np.array([1.0, last])]])
    monkeypatch.setattr(check_resume.subprocess, "run", lambda *_, **__: None)
    monkeypatch.setattr(check_resume, "disturbed_run", lambda *_, **__: [5, 9])
    monkeypatch.setattr(check_resume, "final_leaves", lambda _: next(ends))
    console = Console(file=io.StringIO(), width=120)
    assert check_resume.check(check_resume.CheckConfig(runs=2), tmp_path, console) == (last != 1)
    assert isinstance(console.file, io.StringIO)
    assert ("DIFFERENT" in console.file.getvalue()) == (last != 1)


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "run0").mkdir()
    with pytest.raises(ValueError, match="folder must be empty or not exist, got "):
        check_resume.main(["--folder", str(tmp_path)])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="folder must be a folder that can be written, got "):
        check_resume.main(["--folder", str(tmp_path / "file" / "folder")])


def test_no_run_outlives_an_interrupted_check(tmp_path, monkeypatch: pytest.MonkeyPatch):
    runs = []

    def interrupted(process: subprocess.Popen[bytes], *_: Any) -> None:
        runs.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(check_resume, "command", lambda _: [sys.executable, "-c", "import time; time.sleep(600)"])
    monkeypatch.setattr(check_resume, "_kill_somewhere", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check_resume.disturbed_run(check_resume.tiny_config(tmp_path / "run", 9), kills=1, dice=random.Random(0))
    assert [process.returncode for process in runs] == [-9]

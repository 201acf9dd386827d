import io
import os

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


def test_bad_input():
    with pytest.raises(ValueError, match="runs must be at least 1, got 0"):
        check_resume.CheckConfig(runs=0)


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "run0").mkdir()
    with pytest.raises(ValueError, match="folder must be empty or not exist, got "):
        check_resume.main(["--folder", str(tmp_path)])

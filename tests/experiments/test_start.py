"""Scripts start with huge pages, unless told otherwise, end quietly at Ctrl-C, print on any terminal, keep programs."""

import os
import subprocess
import sys
from typing import Any

import jax
import pytest

from experiments.runtime import use_compilation_cache
from experiments.start import VARIABLE


def seen_by_a_child(*arguments: str, given: str | None) -> str:
    """What the variable is in a process that one with these arguments starts."""
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    environment |= {} if given is None else {VARIABLE: given}
    show = "import os, sys; print(os.environ.get(sys.argv[1]), sys.argv[2:])"
    command = [sys.executable, *arguments, sys.executable, "-c", show, VARIABLE, "one argument", "another"]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


SCRIPT = "-m", "experiments.launch", "--processes", "1", "--"
NO_SCRIPT = "-c", "import experiments, subprocess, sys; subprocess.run(sys.argv[1:], check=True)"


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux only")
@pytest.mark.parametrize(
    ("arguments", "given", "seen"),
    [
        (SCRIPT, None, "glibc.malloc.hugetlb=1"),
        (("-u", *SCRIPT), None, "glibc.malloc.hugetlb=1"),
        (SCRIPT, "", ""),
        (SCRIPT, "glibc.malloc.check=0", "glibc.malloc.check=0"),
        (NO_SCRIPT, None, "None"),
    ],
)
def test_huge_pages(arguments: tuple[str, ...], given: str | None, seen: str):
    assert seen_by_a_child(*arguments, given=given) == f"{seen} ['one argument', 'another']\n"


IMPORTED_BY_A_SCRIPT = (
    "import gc, signal, sys, time\n"
    "signal.signal(signal.SIGINT, signal.{})\n"
    "sys.argv[0] = '-m'\n"
    "import experiments\n"
    "assert signal.getsignal(signal.SIGINT) is signal.{}\n"
)


def run(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, VARIABLE: "", **variables}
    # With which nothing is left to be written at the end.
    environment.pop("PYTHONUNBUFFERED", None)
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=90)


def test_an_interrupt_is_neither_shown_nor_lost():
    """While a script imports it ends the process; later it is raised, from where Python would drop it, too."""
    program = IMPORTED_BY_A_SCRIPT.format("default_int_handler", "SIG_DFL") + (
        "from experiments.runtime import exit_with\n"
        "def main():\n"
        "    def collected(*_):\n"
        "        if not came: came.append(signal.raise_signal(signal.SIGINT))\n"
        "    came = []\n"
        "    gc.callbacks.append(collected)\n"
        "    gc.collect()\n"
        "    print('went on')\n"
        "    try: time.sleep(100)\n"
        "    finally: print('left in order')\n"
        "exit_with(main)\n"
    )
    done = run(program)
    assert (done.returncode, done.stdout, done.stderr) == (130, "went on\nleft in order\n", "")


def test_an_interrupt_that_is_ignored_stays_ignored():
    done = run(IMPORTED_BY_A_SCRIPT.format("SIG_IGN", "SIG_IGN") + "signal.raise_signal(signal.SIGINT)\nprint('on')\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "on\n", "")


def test_a_letter_that_a_terminal_lacks_costs_no_result():
    program = (
        "from rich.console import Console\n"
        "from experiments.runtime import exit_with\n"
        "def main():\n"
        "    Console().print('γ 5')\n"
        "    print('×', 2)\n"
        "    return 0\n"
        "exit_with(main)\n"
    )
    done = run(program, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (0, "? 5\n? 2\n", "")


@pytest.mark.parametrize("given", [None, "/given"])
def test_compiled_programs_are_kept_in_the_users_cache(given: str | None, tmp_path, monkeypatch):
    monkeypatch.setenv("SPEC_JAX_CACHE", str(tmp_path))
    config: Any = jax.config
    before = config.jax_compilation_cache_dir
    config.update("jax_compilation_cache_dir", given)
    try:
        use_compilation_cache()
        assert config.jax_compilation_cache_dir == (given or str(tmp_path / "jax"))
    finally:
        config.update("jax_compilation_cache_dir", before)

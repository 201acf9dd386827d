import os
import re
import signal
import subprocess
import sys

import pytest

from experiments import launch as launcher
from experiments.config import RunConfig
from experiments.launch import LaunchConfig, _wait, environments
from experiments.runtime import start_processes


def launch(*command, processes=2, devices=3, **options):
    size = ["--processes", str(processes), "--devices-per-process", str(devices)]
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.launch", *size, "--", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def python(program):
    return sys.executable, "-uc", f"import os, signal, sys, time; index = int(os.environ['JAX_PROCESS_ID']); {program}"


def test_every_process_is_told_of_the_others():
    found = environments(
        LaunchConfig(processes=3, devices_per_process=4),
        {
            "XLA_FLAGS": "--xla_a=b --xla_force_host_platform_device_count=8",
            "JAX_PLATFORMS": "cuda",
            "JAX_NUM_PROCESSES": "2",
            "PATH": "here",
        },
    )
    assert [environment.pop("JAX_PROCESS_ID") for environment in found] == ["0", "1", "2"]
    assert found[0] == found[1] == found[2]
    assert re.fullmatch(r"localhost:\d+", found[0].pop("JAX_COORDINATOR_ADDRESS"))
    assert found[0] == {
        "JAX_NUM_PROCESSES": "3",
        "JAX_PLATFORMS": "cpu",
        "PATH": "here",
        "XLA_FLAGS": "--xla_a=b --xla_force_host_platform_device_count=4",
    }


def test_a_signal_that_ends_process_0_is_named():
    """Its own lines are shown already; what it ended with they do not say."""
    process = launch(*python("pass\nif index == 0: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(3)"))
    output, error = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGKILL
    assert output == ""
    assert error.startswith("process 0 ended first, exit code 137\na training run goes on from its last checkpoint, ")


def test_process_0_is_shown():
    outputs = launch(*python("print('I am', index)")).communicate(timeout=300)
    assert outputs == ("I am 0\n", "")


@pytest.mark.parametrize(
    ("end", "code", "hint"),
    [
        ("sys.exit(3)", 3, ""),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            128 + signal.SIGKILL,
            "a training run goes on from its last checkpoint, if it has one, with --resume\n",
        ),
    ],
)
def test_the_first_to_fail_is_shown_and_gives_the_exit_code(end, code, hint, tmp_path):
    program = (
        "print('I am', index)\nended = sys.argv[1] + '/ended'"
        f"\nif index == 2:\n open(ended, 'w')\n {end}"
        "\nwhile not os.path.exists(ended): time.sleep(0.01)"
        "\ntime.sleep(2)\nsys.exit(7 if index == 1 else 0)"
    )
    process = launch(*python(program), str(tmp_path), processes=3)
    output, error = process.communicate(timeout=300)
    assert process.returncode == code
    assert output == "I am 0\n"
    assert error == f"process 2 ended first, exit code {code}:\n  I am 2\n{hint}"


def test_the_last_lines_of_many_are_shown():
    """Of both streams, and whatever bytes they are."""
    program = "[print('line', n) for n in range(50)]\nif index == 1: os.write(2, b'caf\\xe9'); sys.exit(3)"
    _, error = launch(*python(program)).communicate(timeout=300)
    lines = [*(f"  line {n}" for n in range(11, 50)), "  caf\ufffd"]
    assert error.splitlines() == ["process 1 ended first, exit code 3:", *lines]


@pytest.mark.parametrize(("code", "shown"), [(2, ""), (3, ""), (1, "process 1 ended first, exit code 1:\n  lost 0\n")])
def test_what_process_0_has_said_is_not_hidden_by_those_that_lost_it(code, shown, monkeypatch, capfd):
    """Unless it was an error of another kind: one of those that end together has brought the others down."""
    monkeypatch.setattr(launcher, "_wait", lambda processes: [process for process in processes if process.wait()])
    program = f"\nif index: print('lost 0')\nsys.exit(1 if index else {code})"
    assert launcher.launch(LaunchConfig(processes=2), python(program)) == code
    assert capfd.readouterr() == ("", shown)


def test_those_that_do_not_notice_are_not_waited_for(monkeypatch):
    """The first to fail is returned, though another runs on."""
    monkeypatch.setattr("experiments.launch.GRACE_SECONDS", 0.2)
    processes = [
        subprocess.Popen([sys.executable, "-c", program]) for program in ("import time; time.sleep(60)", "exit(3)")
    ]
    try:
        assert _wait(processes) == processes[1:]
        assert processes[0].poll() is None
    finally:
        processes[0].kill()
        processes[0].wait()


def test_what_a_process_leaves_behind_ends_with_it():
    """Its child has the terminal, which would stay open."""
    program = "import subprocess; subprocess.Popen(['sleep', '60']) if index == 0 else sys.exit(3)"
    process = launch(*python(program))
    output, _ = process.communicate(timeout=50)
    assert (process.returncode, output) == (3, "")


def test_signals_are_the_callers_again():
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    assert launcher.launch(LaunchConfig(processes=1), ["true"]) == 0
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_reach_every_process_once(number, tmp_path):
    """The launcher leads a process group of its own, as under a terminal, and the whole group gets the signal."""
    program = (
        "\ndef note(name): open(sys.argv[1] + '/' + name + str(index), 'a').write('x')"
        "\ndef both(name):\n while sum(f.startswith(name) for f in os.listdir(sys.argv[1])) < 2: time.sleep(0.01)"
        f"\nsignal.signal({int(number)}, lambda *_: note('signal'))\nnote('ready')\nboth('ready')\nprint('ready')"
        "\nboth('signal')\ntime.sleep(0.5)\nsys.exit(5)"
    )
    process = launch(*python(program), str(tmp_path), start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, number)
    assert process.wait(timeout=300) == 5
    process.communicate()
    assert [(tmp_path / f"signal{index}").read_text() for index in range(2)] == ["x", "x"]


def test_a_signal_that_is_ignored_reaches_no_process():
    """As `nohup` has it for the end of a terminal."""
    program = (
        "signal.signal(signal.SIGHUP, lambda *_: sys.exit(4)); os.kill(os.getppid(), signal.SIGHUP); time.sleep(0.5)"
    )
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = launch(*python(program), processes=1)
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert (process.communicate(timeout=50), process.returncode) == (("", ""), 0)


def test_a_signal_reaches_processes_that_are_just_being_started(monkeypatch, capfd):
    """What ended as it was told to is not shown as a failure."""
    start = launcher._start

    def interrupted(*arguments):
        process = start(*arguments)
        if arguments[1]["JAX_PROCESS_ID"] == "0":
            signal.raise_signal(signal.SIGTERM)
        return process

    monkeypatch.setattr(launcher, "_start", interrupted)
    assert launcher.launch(LaunchConfig(processes=2), ["sleep", "5"]) == 128 + signal.SIGTERM
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "0", "--", "true"], "processes must be at least 1, got 0"),
        (["--processes", "2"], "command must follow behind --, got none"),
        (["python", "-m", "experiments.train_draft"], "command must follow behind --, got none"),
        (["--", "no-such-program"], "command must be a program and its arguments, got no-such-program: No such file"),
    ],
)
def test_bad_input(arguments, message):
    command = [sys.executable, "-m", "experiments.launch", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert message in done.stderr


def test_environment_that_is_no_number(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES must be an integer, got 'two'"):
        start_processes(RunConfig())

"""What a script called as `python -m experiments.name` does before it imports anything that takes time."""

import os
import signal
import sys

VARIABLE = "GLIBC_TUNABLES"


def prepare_script() -> None:
    """Asks for huge pages and ends quietly at Ctrl-C; does nothing where the package is merely imported."""
    # Python has this in place of the script's path until it has found the script, and so while it imports the package.
    if sys.argv[:1] == ["-m"]:
        restart_with_huge_pages()
        end_at_interrupt()


def restart_with_huge_pages() -> None:
    """Starts the script again with memory in large pages, where nobody has chosen otherwise, on Linux.

    A training step on a CPU allocates its buffers anew, and the kernel hands them out in pages of 4 KiB at the first
    touch of each: up to a third of a step's time. glibc asks for pages of 2 MiB where a variable says so, which it
    reads when a process starts.
    """
    if sys.platform == "linux" and VARIABLE not in os.environ:
        os.environ[VARIABLE] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def answered(*numbers: signal.Signals) -> list[signal.Signals]:
    """Those that a script answers: one ignored where it started, as `nohup` and `&` in a script have it, stays so."""
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def end_at_interrupt() -> None:
    """Lets SIGINT end the process, until `runtime.exit_with` has it raise KeyboardInterrupt.

    That would be shown with a page of imports, or be lost in a function that JAX has called at garbage collections.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

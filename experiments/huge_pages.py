"""Memory in large pages, for scripts on Linux.

A training step on a CPU allocates its buffers anew, and the kernel hands them out in pages of 4 KiB at the first touch
of each: up to a third of a step's time. glibc asks for pages of 2 MiB where a variable says so, which it reads when a
process starts.
"""

import os
import sys

VARIABLE = "GLIBC_TUNABLES"


def restart_with_huge_pages() -> None:
    """Starts a script that was called as `python -m experiments.name` again, with the variable set.

    Does nothing where the variable is set already, to whatever value, and where the package is merely imported. To be
    called before anything is computed.
    """
    # Python has this in place of the script's path until it has found the script, and so while it imports the package.
    called_as_script = sys.argv[:1] == ["-m"]
    if called_as_script and sys.platform == "linux" and VARIABLE not in os.environ:
        os.environ[VARIABLE] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

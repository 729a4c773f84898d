"""Lets a program use huge pages of memory, which makes steps on a CPU faster."""

import contextlib
import os
import sys
from pathlib import Path

VARIABLE, VALUE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"


def use_huge_pages() -> None:
    """Starts this process again, with huge pages, where Linux gives them only to programs that ask for them.

    On a CPU, XLA allocates memory for each step and frees it again, and the system fills all pages with zeros before it
    gives them out. With pages of 4 KiB, that is up to a third of the time of a step. Whether the C library asks for
    pages of 2 MiB is decided by its environment when a process starts. Nothing that is computed depends on it. A user
    who has set GLIBC_TUNABLES, also to nothing, has chosen otherwise.
    """
    if VARIABLE in os.environ or sys.platform != "linux":
        return
    with contextlib.suppress(OSError):
        if "[madvise]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
            command = [sys.executable, *sys.orig_argv[1:]]
            os.execve(sys.executable, command, {**os.environ, VARIABLE: VALUE})


def uses_huge_pages() -> bool:
    """Returns whether `use_huge_pages` has started this process."""
    return os.environ.get(VARIABLE) == VALUE

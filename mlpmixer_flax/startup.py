"""Makes the programs faster: freed memory is kept for reuse, and compiled programs are kept on disk.

It changes the process and its JAX, so that it is for programs only. Nothing that is computed depends on it.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
from filelock import FileLock, Timeout

from mlpmixer_flax import UserError
from mlpmixer_flax.remote import cache_dir

_MAX_CACHE_BYTES = 4 * 1024**3  # of compiled programs; those that were used least recently are removed first
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # from glibc's malloc.h


def make_faster() -> None:
    """Keeps freed memory, and compiled programs, unless the user's environment says otherwise."""
    keep_memory()
    with contextlib.suppress(UserError, OSError):  # without a place for files, the program is slower
        keep_compiled()


def keep_memory() -> None:
    """Makes the C library keep memory that is freed, where it is glibc, until the process ends.

    On a CPU, XLA allocates memory for each step and frees it again. By default large pieces then go back to the
    system, which fills new ones with zeros, page by page: up to half of the time of a step. The library keeps them
    if all threads share its main heap. Threads that compile then wait for each other: a first start takes longer,
    by three seconds for the digits.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if _may_keep_memory() else None
    if mallopt:  # other C libraries than glibc lack it
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _may_keep_memory() -> bool:
    """Returns whether the user leaves it to this module how memory is allocated."""
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    return sys.platform == "linux" and not chosen and os.environ.get("MLPMIXER_KEEP_MEMORY") != "0"


def keep_compiled() -> None:
    """Makes JAX keep compiled programs in a folder of the cache, and take them from there.

    The user can switch this off by JAX_ENABLE_COMPILATION_CACHE=0, or choose another folder by
    JAX_COMPILATION_CACHE_DIR. Programs for a CPU are machine code for exactly this CPU, so each kind of CPU has its
    folder: a home directory may be that of many machines.

    Raises:
      UserError: there is no home directory.
      OSError: the folder cannot be created or read.
    """
    # Whatever is wrong with a file of the cache, JAX compiles the program instead.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or _compiled_folder():
        return
    folder = cache_dir() / "compiled" / _kind_of_cpu()
    folder.mkdir(parents=True, exist_ok=True)
    _remove_incomplete(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _MAX_CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def describe() -> str:
    """Returns what is kept, as a line for the user; "" if nothing is."""
    kept = ["freed memory"] * _may_keep_memory() + ["compiled programs"] * bool(_compiled_folder())
    how = "docs/performance.md says how to switch it off"
    return f"kept for speed: {' and '.join(kept)}; {how}" if kept else ""


def _compiled_folder() -> str:
    """Returns where JAX keeps compiled programs; "" if it doesn't."""
    options: Any = jax.config  # these are not declared, so that a type checker doesn't know them
    return (options.jax_enable_compilation_cache and options.jax_compilation_cache_dir) or ""


def _kind_of_cpu() -> str:
    """Returns a name for all CPUs with the same instructions."""
    words = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text()
        words += re.findall(r"^(?:model name|flags|Features)\s*:.*", text.partition("\n\n")[0], re.MULTILINE)
    return f"{platform.machine()}-{hashlib.sha256(' '.join(words).encode()).hexdigest()[:12]}"


def _remove_incomplete(folder: Path) -> None:
    """Removes what a process was writing when it was killed.

    JAX writes a program as NAME-cache, and NAME-atime after it. It would not write to the folder any more while the
    second file is missing.
    """
    with (
        contextlib.suppress(Timeout),
        FileLock(folder / ".lockfile", timeout=5),
    ):  # the lock that JAX takes to write
        for file in folder.glob("*-cache"):
            if not file.with_name(file.name.removesuffix("-cache") + "-atime").exists():
                file.unlink(missing_ok=True)

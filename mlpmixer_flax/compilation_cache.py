"""Keeps the programs that JAX has compiled on disk, so that the next run starts sooner."""

import contextlib
import hashlib
import os
import platform
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from filelock import FileLock, Timeout
from jax.experimental.compilation_cache import compilation_cache

from mlpmixer_flax.remote import cache_dir

_MAX_CACHE_BYTES = 4 * 1024**3  # what was used least recently is removed first


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
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or compiled_folder():
        return
    folder = cache_dir() / "compiled" / _kind_of_cpu()
    folder.mkdir(parents=True, exist_ok=True)
    _remove_incomplete(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _MAX_CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def compiled_folder() -> str:
    """Returns the folder in which JAX keeps compiled programs; "" if it keeps none."""
    options: Any = jax.config  # these are not declared, so that a type checker doesn't know them
    return (options.jax_enable_compilation_cache and options.jax_compilation_cache_dir) or ""


@contextlib.contextmanager
def compiled_anew() -> Iterator[None]:
    """Within it, JAX compiles all programs itself: none is taken from the folder, or kept there."""
    options: Any = jax.config
    before = options.jax_enable_compilation_cache

    def use(kept: bool) -> None:
        jax.config.update("jax_enable_compilation_cache", kept)
        compilation_cache.reset_cache()  # JAX looks at the option only before it first compiles

    use(False)
    try:
        yield
    finally:
        use(before)


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
    # The lock is the one that JAX takes to write.
    with contextlib.suppress(Timeout), FileLock(folder / ".lockfile", timeout=5):
        for file in folder.glob("*-cache"):
            if not file.with_name(file.name.removesuffix("-cache") + "-atime").exists():
                file.unlink(missing_ok=True)

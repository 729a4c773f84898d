"""Says what helps against faults of the environment: what needs less memory, what of a run is saved, why no GPU is used."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlpmixer_flax import UserError
from mlpmixer_flax.faults import explain, is_memory
from mlpmixer_flax.remote import shown
from mlpmixer_flax.rundir import saved_steps

_FILES_OF_GPUS = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")  # the last is that of WSL 2


@contextlib.contextmanager
def advising(workdir: Path) -> Iterator[None]:
    """Adds notes to an exception of the `with` block, if the environment is at fault; programs print them."""
    try:
        yield
    except Exception as error:
        if explain(error) is None:
            raise
        for note in (_about_memory(error), _saved(error, workdir)):
            if note and note not in getattr(error, "__notes__", []):  # an inner block may have added it
                error.add_note(note)
        raise


def _about_memory(error: Exception) -> str:
    if not is_memory(error):
        return ""
    if not isinstance(error, RuntimeError):  # of the host
        return "images need less with a lower cache_bytes and fewer num_workers"
    return (
        "training needs less with a higher accumulation_steps than now, then with model.remat=true or "
        "model.dtype=bfloat16, then with a lower batch_size: docs/recipes.md#out-of-memory"
    )


def _saved(error: Exception, workdir: Path) -> str:
    with contextlib.suppress(OSError, UserError):
        if not isinstance(error, FileNotFoundError) and (steps := saved_steps(workdir)):
            return (
                f"the checkpoints up to step {steps[-1]} are whole, and the same command with --workdir={shown(workdir)} "
                "continues from there"
            )
    return ""


def why_cpu(files: Sequence[str] = _FILES_OF_GPUS) -> str:
    """Returns a line about why a run uses the CPU, although nobody chose it; `files` exist if there is a GPU."""
    if any(map(os.path.exists, files)):
        return (
            "this machine has an NVIDIA GPU, but JAX cannot use it, and may have said why above:\n"
            "  update the driver, or install jax[cuda13], or jax[cuda12] for an older driver; using the CPU"
        )
    return "no GPU found, using the CPU"

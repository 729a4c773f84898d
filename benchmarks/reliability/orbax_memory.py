"""Finds the memory of Python that stays behind with each checkpoint, in TensorStore and Orbax without our code.

    python benchmarks/reliability/orbax_memory.py                  # two minutes

A piece is what `sys.getallocatedblocks` counts. Which line has asked for the memory that stays behind is told by
`tracemalloc`. Results: docs/reliability.md
"""

import argparse
import gc
import shutil
import sys
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

COUNT = 100
ARRAYS = {
    "numpy": {f"{number}": np.ones((32, 32), np.float32) for number in range(COUNT)},
    "JAX": {f"{number}": jnp.ones((32, 32), jnp.float32) for number in range(COUNT)},
}


def look_twice(once: Callable[[], object], look: Callable[[], Any], count: int) -> list[Any]:
    """Returns what `look` finds after a function was called `count` times to warm up, and after as many calls more."""
    found = []
    for _ in range(2):
        for _ in range(count):
            once()
        gc.collect()
        found.append(look())
    return found


def left_behind(name: str, once: Callable[[], object], count: int) -> None:
    """Prints how many pieces of memory stay behind each time that a function is called."""
    before, after = look_twice(once, sys.getallocatedblocks, count)
    print(f"{name}: {(after - before) / count:.1f} pieces each", flush=True)


def lines_at_fault(name: str, once: Callable[[], object], count: int) -> None:
    """Prints how many KiB stay behind each time that a function is called, and which lines asked for most of it."""
    tracemalloc.start()
    before, after = look_twice(once, tracemalloc.take_snapshot, count)
    tracemalloc.stop()
    lines = sorted(after.compare_to(before, "lineno"), key=lambda line: -line.size_diff)
    total = sum(line.size_diff for line in lines)
    print(f"{name}: {total / 1024 / count:.1f} KiB each, of it")
    for line in lines[:3]:
        place = line.traceback[0]
        print(
            f"  {line.size_diff / 1024 / count:.1f} KiB: {Path(place.filename).name}, line {place.lineno}",
            flush=True,
        )


def save_and_remove(checkpointer: ocp.Checkpointer, folder: Path, args) -> None:
    checkpointer.save(folder / "checkpoint", args=args)
    shutil.rmtree(folder / "checkpoint")


def main() -> None:
    argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    spec = ts.KvStore.Spec({"driver": "file", "path": "/tmp/"})
    left_behind("TensorStore: KvStore.Spec(...).to_json()", spec.to_json, 1000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, ocdbt in (("numpy", True), ("numpy", False), ("JAX", True)):
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)) as checkpointer:

                def save(checkpointer=checkpointer, kind=kind) -> None:
                    save_and_remove(checkpointer, folder, ocp.args.PyTreeSave(ARRAYS[kind]))

                name = f"Orbax: a save of {COUNT} {kind} arrays, use_ocdbt={ocdbt}"
                left_behind(name, save, 30)
                lines_at_fault(name, save, 30)
    left_behind(
        "TensorStore: experimental_collect_matching_metrics",
        lambda: ts.experimental_collect_matching_metrics("/tensorstore/kvstore/"),
        1000,
    )


if __name__ == "__main__":
    main()

"""Counts the pieces of memory of Python that stay behind in TensorStore and Orbax, without our code.

    python benchmarks/reliability/orbax_memory.py                  # a minute

A piece is what `sys.getallocatedblocks` counts. Results: docs/reliability.md
"""

import gc
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

STATE = {f"{number}": np.ones((32, 32), np.float32) for number in range(100)}


def left_behind(name: str, once: Callable[[], object], count: int) -> None:
    """Prints how many pieces of memory stay behind each time that a function is called, after warming up."""
    found = []
    for number in range(2 * count):
        once()
        if number + 1 in (count, 2 * count):
            gc.collect()
            found.append(sys.getallocatedblocks())
    print(f"{name}: {(found[1] - found[0]) / count:.1f} pieces each", flush=True)


def save_and_remove(checkpointer: ocp.Checkpointer, folder: Path, args) -> None:
    checkpointer.save(folder / "checkpoint", args=args)
    shutil.rmtree(folder / "checkpoint")


def main() -> None:
    spec = ts.KvStore.Spec({"driver": "file", "path": "/tmp/"})
    left_behind("TensorStore: KvStore.Spec(...).to_json()", spec.to_json, 1000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for ocdbt in (True, False):
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)) as checkpointer:
                left_behind(
                    f"Orbax: a save of {len(STATE)} arrays, use_ocdbt={ocdbt}",
                    lambda checkpointer=checkpointer: save_and_remove(
                        checkpointer, folder, ocp.args.PyTreeSave(STATE)
                    ),
                    30,
                )
        left_behind(
            "TensorStore: experimental_collect_matching_metrics",
            lambda: ts.experimental_collect_matching_metrics("/tensorstore/kvstore/"),
            1000,
        )


if __name__ == "__main__":
    main()

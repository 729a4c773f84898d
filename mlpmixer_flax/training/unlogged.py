"""Keeps the metrics of a run that are not yet logged, so that a run which continues logs the same means."""

import contextlib
import json
from pathlib import Path
from typing import Any

from mlpmixer_flax.atomic import replacing
from mlpmixer_flax.reading import read_object
from mlpmixer_flax.rundir import saved_steps
from mlpmixer_flax.training.processes import is_lead


class Unlogged:
    """The metrics of the updates between the last log and a checkpoint, in a file of the run directory.

    A run that continues from the checkpoint then logs the same means as one that was never stopped. Of several processes,
    only the first one uses the file.
    """

    def __init__(self, workdir: Path):
        self._file = workdir / "unlogged.json"

    def read(self, step: int) -> list[dict[str, float]]:
        """Returns what `write` wrote for this step; [] if it did not, or if the file is damaged."""
        return self._stored().get(step, [])

    def write(self, step: int, rows: list[dict[str, float]]) -> None:
        """Adds the metrics before a checkpoint of this step, and drops those of checkpoints that no longer exist."""
        if not is_lead():
            return
        saved = saved_steps(self._file.parent)
        # A step after the newest one may belong to a checkpoint that is being written.
        kept = {of: old for of, old in self._stored().items() if of in saved or of > max(saved, default=0)}
        with replacing(self._file) as file:
            file.write(json.dumps({**kept, step: rows}).encode())

    def _stored(self) -> dict[int, list[dict[str, float]]]:
        stored = read_object(self._file) if is_lead() else {}
        with contextlib.suppress(ValueError):  # a name that is no number
            return {int(step): rows for step, rows in stored.items() if _are_rows(rows)}
        return {}


def _are_rows(rows: Any) -> bool:
    return isinstance(rows, list) and all(
        isinstance(row, dict) and all(isinstance(value, float) for value in row.values()) for row in rows
    )

"""Writes TensorBoard's event files, so that an error of the disk is raised where it happens.

`tensorboardX.SummaryWriter` writes in a thread. A full disk ends the thread, and then training waits for it forever.
"""

import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import (  # made at run time
    Event,  # pyright: ignore[reportAttributeAccessIssue]
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)

from mlpmixer_flax.faults import naming
from mlpmixer_flax.training.processes import is_lead

_FLUSH_EVERY_SECONDS = 10.0


class Events:
    """A new event file of a run. TensorBoard hides what earlier files say of steps after `start_step`.

    Of several processes, only the first one writes.
    """

    def __init__(self, workdir: Path, *, start_step: int):
        self._folder = workdir
        with naming(workdir):
            self._writer = EventsWriter(str(workdir / "events")) if is_lead() else None
        self._flush_at = 0.0
        self._write(Event(step=start_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, summary: Any) -> None:
        """Writes what a function of `tensorboardX.summary` has made; it is on disk within seconds."""
        self._write(Event(step=step, summary=summary))

    def _write(self, event: Any) -> None:
        if self._writer is None:
            return
        event.wall_time = time.time()
        with naming(self._folder):
            self._writer.write_event(event)
            if time.monotonic() >= self._flush_at:
                self._writer.flush()  # which waits for the disk, so not for each event
                self._flush_at = time.monotonic() + _FLUSH_EVERY_SECONDS

    def close(self) -> None:
        """Closes the file."""
        if self._writer is not None:
            with naming(self._folder):
                self._writer.close()

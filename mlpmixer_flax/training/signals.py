"""Turns SIGTERM and SIGINT into requests to save and stop after the present step."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


class Interrupted(Exception):
    """A signal asked the run to stop, and the run has saved a checkpoint."""

    def __init__(self, number: int, step: int):
        super().__init__(number, step)
        self.number = number  # of the signal
        self.step = step  # the step of the checkpoint


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Yields a list to which SIGTERM and SIGINT are appended; the second signal of a kind acts as usual.

    Only the main thread may handle signals; in any other thread the list stays empty.
    """
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def note(number, frame):
        noted.append(number)
        signal.signal(number, before[number])
        # Not print: the signal may arrive in the middle of one.
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: stopping after this step; a second {name} stops at once\n".encode())

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

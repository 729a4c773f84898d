"""Turns SIGTERM, SIGINT and SIGHUP into requests to save and stop after the present step, the same in all processes."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from mlpmixer_flax.training.processes import is_lead
from mlpmixer_flax.training.step import TrainState, Update

# SIGHUP, which Windows lacks, means that the terminal was closed.
_STOPPING = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Yields a list to which SIGTERM, SIGINT and SIGHUP are appended; the second signal of a kind acts as usual.

    A signal that is ignored already stays ignored, as SIGHUP after `nohup`, and SIGINT of a script's background process.
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
        with contextlib.suppress(OSError):  # after SIGHUP there may be no terminal any more
            if is_lead():
                os.write(2, f"\n{name}: stopping after this step; a second {name} stops at once\n".encode())

    # None: a handler that is not of Python, such as that of JAX's preemption service, which then ignores the signal.
    before = {
        number: signal.getsignal(number) or signal.SIG_DFL
        for number in _STOPPING
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        for number in before:
            signal.signal(number, note)
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- in a run with several processes

# The name, in a batch and in metrics, of the number of the signal that a process has noted, 0 for none. The update takes
# their maximum, and the host reads it with the other metrics, one update late: so no process waits for another, and all
# read the same at the same step.
SIGNAL = "signal"


def signal_row(noted: Sequence[int]) -> dict[str, np.ndarray]:
    """Returns what this process adds to a batch for `agreeing`: nothing in a run with one process."""
    if jax.process_count() == 1:
        return {}
    return {SIGNAL: np.full(jax.local_device_count(), max(noted, default=0), np.int32)}


def agreeing(update: Update) -> Update:
    """Returns the update with one more metric: the greatest signal that any process has noted, int32."""

    def agreed(state: TrainState, batch, of_teacher):
        images = {name: rows for name, rows in batch.items() if name != SIGNAL}
        state, metrics = update(state, images, of_teacher)
        return state, {**metrics, SIGNAL: batch[SIGNAL].max()}

    return agreed

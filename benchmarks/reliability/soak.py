"""Trains and predicts for a long time in one process: memory, open files and the disk must stay as they are.

    python benchmarks/reliability/soak.py --minutes=30 --predictions=10000

The run evaluates every 5 steps and saves every 10. Memory, files and threads are read every 10 seconds; the first fifth
of the time is for warming up. Ends with status 1 if, after it, memory grows by more than 2 %, or files or the disk grow.
Orbax itself grows by some KiB with each checkpoint; this is measured first, without our code, and allowed beside the 2 %.
Reads /proc, so it needs Linux. Results: docs/reliability.md
"""

import argparse
import contextlib
import io
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
from PIL import Image

from mlpmixer_flax import fit, load, load_config
from mlpmixer_flax.training.processes import Interrupted

SMALL = {
    "model.hidden_dim": 32,
    "model.num_blocks": 2,
    "augment.mixup_alpha": 0.0,
    "ema_decay": 0.9,
    "total_steps": 2**31 - 1,  # a signal ends the run
    "schedule.name": "constant",
    "log_every_steps": 5,
    "eval_every_steps": 5,
    "save_every_steps": 10,
}


def memory_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Watcher(threading.Thread):
    """Reads memory, open files, threads and the size of a folder every few seconds; prints a line a minute."""

    def __init__(self, folder: Path, interval: float):
        super().__init__(daemon=True)
        self.rows: list[tuple[float, int, int, int]] = []
        self._folder, self._interval, self._ended = folder, interval, threading.Event()

    def run(self) -> None:
        begun = time.monotonic()
        while not self._ended.wait(self._interval):
            sizes = 0
            for parent, _, names in os.walk(self._folder / "checkpoints"):
                for name in names:
                    with contextlib.suppress(OSError):  # a checkpoint was removed meanwhile
                        sizes += os.stat(os.path.join(parent, name)).st_size
            row = (
                memory_mib(),
                len(os.listdir("/proc/self/fd")),
                threading.active_count(),
                sizes / 2**20,
            )
            self.rows.append(row)
            minutes = (time.monotonic() - begun) / 60
            print(
                f"{minutes:6.1f} min: {row[0]:7.1f} MiB, {row[1]} files, {row[2]} threads, {row[3]:.2f} MiB of checkpoints",
                file=sys.stderr,
                flush=True,
            )

    def stop(self) -> None:
        self._ended.set()
        self.join()


def judge(name: str, rows: list[tuple[float, int, int, int]], *, growing: float = 0.0) -> bool:
    """Prints how each figure changed from the second to the last fifth of the time; returns whether all stayed.

    Args:
      growing: MiB by which memory may grow in the whole time, beside the 2 %.
    """
    fifth = max(len(rows) // 5, 1)
    early, late = rows[fifth : 2 * fifth], rows[-fifth:]
    flat = True
    for column, (figure, of, share, more) in enumerate(
        (
            (
                "MiB of memory",
                statistics.median,
                1.02,
                growing * 0.6,
            ),  # from the middle of one part to that of the other
            ("open files", max, 1.0, 2),
            ("threads", max, 1.0, 2),
            ("MiB of checkpoints", max, 1.1, 1),
        )
    ):
        before, after = (of(row[column] for row in part) for part in (early, late))
        grown = after > before * share + more
        flat &= not grown
        print(f"{name}: {figure} {before:,.1f} -> {after:,.1f}{' GROWS' * grown}")
    return flat


def save_without_our_code(folder: Path, count: int) -> float:
    """Returns the MiB by which the process grows for each checkpoint that Orbax alone saves."""
    state = {f"{number}": np.ones((32, 32), np.float32) for number in range(100)}
    memory = []
    with ocp.StandardCheckpointer() as checkpointer:
        for number in range(2 * count):
            checkpointer.save(folder / str(number), state)
            checkpointer.wait_until_finished()
            shutil.rmtree(folder / str(number))
            if number + 1 in (count, 2 * count):
                memory.append(memory_mib())
    each = (memory[1] - memory[0]) / count
    print(f"Orbax alone: {1024 * each:.0f} KiB for each checkpoint")
    return each


def train(folder: Path, minutes: float, interval: float, *, each: float) -> bool:
    watcher = Watcher(folder, interval)
    watcher.start()
    threading.Timer(60 * minutes, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Interrupted):
        fit(load_config("digits.py", SMALL), folder)
    watcher.stop()
    steps = max(int(name) for name in os.listdir(folder / "checkpoints") if name.isdecimal())
    print(f"training: {steps:,} steps, {steps // 5:,} evaluations, {steps // 10:,} checkpoints")
    return judge("training", watcher.rows, growing=max(each, 0) * steps / 10)


def predict(run: Path, images: Path, count: int, interval: float) -> bool:
    rng, files = np.random.default_rng(0), []
    for number in range(100):
        height, width = rng.integers(20, 600, 2)
        file = images / f"{number}.{('png', 'jpg', 'webp')[number % 3]}"
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(file)
        files.append(str(file))
    model = load(run)
    watcher, done = Watcher(run, interval), 0
    watcher.start()
    while done < count:
        n = int(rng.integers(1, 9))
        done += len(model.predict([files[int(i)] for i in rng.integers(0, 100, n)]))
    watcher.stop()
    print(f"prediction: {done:,} images")
    return judge("prediction", watcher.rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30, help="length of the training (default: 30)")
    parser.add_argument("--predictions", type=int, default=10_000, help="images to predict (default: 10,000)")
    parser.add_argument("--interval", type=float, default=10, help="seconds between two looks (default: 10)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run, images = Path(folder, "run"), Path(folder, "images")
        images.mkdir()
        each = save_without_our_code(Path(folder), 200)
        flat = train(run, options.minutes, options.interval, each=each)
        flat &= predict(run, images, options.predictions, min(options.interval, 1))
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())

"""Reports the progress of a run in metrics.jsonl, TensorBoard, the terminal and a tracker, in the first process only."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from tensorboardX import summary
from tqdm import tqdm

from mlpmixer_flax import UserError
from mlpmixer_flax.atomic import replacing
from mlpmixer_flax.dataloader import Batch
from mlpmixer_flax.faults import naming, pass_on
from mlpmixer_flax.reading import open_file
from mlpmixer_flax.remote import shown
from mlpmixer_flax.training.events import Events
from mlpmixer_flax.training.processes import is_lead
from mlpmixer_flax.training.resolutions import split_sizes
from mlpmixer_flax.training.signals import SIGNAL
from mlpmixer_flax.training.step import Metrics
from mlpmixer_flax.training.tracker import Tracker

# What is measured between two logs: the speed, and the share of the time, from 0 to 1, in which the device waited
TIMINGS = ("images_per_second", "data_wait")
_LARGEST = float(np.finfo(np.float32).max)  # of a metric, unless it is infinite


class Recent:
    """The metrics of the updates since the last summary, and their speed.

    Metrics are fetched from the device one update late, so that the device never waits for the host. Every
    method raises FloatingPointError if a metric that it fetches is not finite.
    """

    def __init__(self, batch_size: int, fetched: list[dict[str, float]]):
        self.batch_size = batch_size
        self.waiting: list[tuple[int, Metrics]] = []
        self.fetched = fetched  # by update; at the start those of an earlier process, from `Unlogged`
        self.timed = 0  # updates of this process since the last summary
        self.waited = 0.0  # seconds since then in which the device had no batch
        self.started = time.monotonic()
        self.signal = 0  # the number of the signal with which all processes stop; see `signals.agreeing`

    def timing(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yields the batches, and notes how long the device waits for each.

        A wait counts if the last update has ended when the batch is ready, and then in full; otherwise not at all.
        """
        asked = time.monotonic()
        for batch in batches:
            computed = (value for _, metrics in self.waiting for value in metrics.values())
            # jax.Array does not declare `is_ready`, but all arrays have it.
            if all(value.is_ready() for value in computed):  # pyright: ignore[reportAttributeAccessIssue]
                self.waited += time.monotonic() - asked
            yield batch
            asked = time.monotonic()

    def add(self, step: int, metrics: Metrics) -> None:
        """Adds the metrics of an update, and fetches those of the one before."""
        self.timed += 1
        self.waiting.append((step, metrics))
        self._fetch(keep=1)

    def _fetch(self, *, keep: int) -> None:
        while len(self.waiting) > keep:
            step, metrics = self.waiting.pop(0)
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            self.signal = max(self.signal, int(values.pop(SIGNAL, 0)))
            for name, value in values.items():
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"{name} is {value} at step {step}: the run stops, and keeps what it has saved; begin "
                        "again in a new --workdir, and lower optimizer.learning_rate, lengthen the warmup, or lower "
                        "optimizer.clip_norm (0 is off)"
                    )
            self.fetched.append(values)

    def summary(self) -> dict[str, float]:
        """Returns means since the last summary by their TensorBoard names, and TIMINGS."""
        self._fetch(keep=0)
        rows, seconds = self.fetched, time.monotonic() - self.started
        timings = {
            "images_per_second": self.timed * self.batch_size / seconds,
            "data_wait": self.waited / seconds,
        }
        self.fetched, self.timed, self.waited, self.started = [], 0, 0.0, time.monotonic()
        rows = [row for row in rows if row.keys() == rows[-1].keys()]  # those of `Unlogged` may be damaged
        means = {f"train/{name}": sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        return {**means, **timings}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Waits for all updates so far; the time spent in the `with` block does not count in the speed."""
        self._fetch(keep=0)
        paused = time.monotonic()
        yield
        self.started += time.monotonic() - paused


class Reporter:
    """Writes scalars to `metrics.jsonl` and TensorBoard, sends them to a tracker, and shows them.

    Processes except the first one write nothing; `processes.together` hides what they print.
    A terminal shows a progress bar and a line per evaluation; any other output gets lines only. If a run
    resumes at `start_step`, everything that was written about later steps is dropped.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        start_step: int,
        total_steps: int,
        steps_per_epoch: float,
        tracker: Tracker | None = None,
    ):
        self._file = workdir / "metrics.jsonl" if is_lead() else Path(os.devnull)
        self._tracker = tracker
        if is_lead():
            _drop_after(self._file, start_step)
        self._jsonl = self._file.open("a")
        self._events = Events(workdir, start_step=start_step)
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}, ETA {remaining}",
            ncols=80,
            file=sys.stdout,
            disable=not sys.stdout.isatty(),
        )
        self._start_step, self._total_steps, self._steps_per_epoch = start_step, total_steps, steps_per_epoch
        self._started = time.monotonic()

    def beginning(self, config: Mapping[str, object], images: np.ndarray) -> None:
        """Writes the config by dotted key and images of the first step, uint8 (n, h, w, c), to TensorBoard."""
        # Indented lines are a block of code in Markdown.
        text = "\n".join(f"    {key} = {config[key]!r}" for key in config)
        self._events.add(1, summary.text("config", text))
        self._events.add(1, summary.image("training_images", _tile(images), dataformats="HWC"))

    def advance(self) -> None:
        """Moves the progress bar on by one update."""
        self._bar.update()

    def say(self, line: str) -> None:
        """Prints a line, above the progress bar if there is one."""
        with tqdm.external_write_mode(file=sys.stdout):
            print(line, flush=True)

    def first_update(self, step: int, metrics: Metrics) -> None:
        """Shows the loss of the first update: it is written with the means that follow, but they may take long."""
        loss = f"loss {float(jax.device_get(metrics['loss'])):.4f}"
        if self._bar.disable:
            print(f"{self._steps(step)}: {loss} in the first update", flush=True)
        else:
            self._bar.set_postfix_str(loss)

    def training(self, step: int, scalars: dict[str, float]) -> None:
        """Reports a `Recent.summary`: `train/loss`, `train/accuracy`, `images_per_second` and more."""
        self._write(step, scalars)
        speed = f"{scalars['images_per_second']:,.0f} img/s"
        loss, accuracy = scalars["train/loss"], scalars["train/accuracy"]
        if not self._bar.disable:
            parts = [f"epoch {self._epoch(step)}", f"loss {loss:.3f}", f"acc {accuracy:.3f}", speed]
            if len(f"{self._total_steps}") > 5:  # otherwise the line has more than 80 columns
                del parts[2]
            self._bar.set_postfix_str(", ".join(parts))
            return
        done = step - self._start_step
        left = (time.monotonic() - self._started) / done * (self._total_steps - step)
        print(
            f"{self._steps(step)}: loss {loss:.4f}, acc {accuracy:.4f}, {speed}, ETA {tqdm.format_interval(left)}",
            flush=True,
        )

    def evaluation(
        self, step: int, scalars: dict[str, float], *, balanced: bool = False, best_by: str = "accuracy"
    ) -> None:
        """Reports the scores of a split by name: `test/loss`, `validation/accuracy`, `test/accuracy_top5`.

        All are written. To fit into a line, it shows either `test/balanced_accuracy` (if `balanced`) or
        `test/accuracy_top5`. `test/skipped_images` stays the same, and was printed when the split was opened.
        Other sizes of config.resolutions_px have a line of their own, with their score that `best_by` names.
        """
        self._write(step, scalars)
        scalars, other_sizes = split_sizes(scalars, best_by=best_by)
        hidden = ("/skipped_images", "/accuracy_top5" if balanced else "/balanced_accuracy")
        scored = next(iter(scalars)).partition("/")[0]
        listed = ", ".join(
            f"{name.partition('/')[2].replace('_top5', '_top 5').replace('_', ' ')} {value:.4f}"
            for name, value in sorted(scalars.items())
            if not name.endswith(hidden)
        )
        self.say(f"step {step}, epoch {self._epoch(step)}: {scored} {listed}")
        if other_sizes:
            self.say(other_sizes)

    def by_class(self, step: int, by_class: Mapping[str, float], *, tag: str) -> None:
        """Writes a score per class to TensorBoard; NaN means that the class has no images.

        Up to 20 classes get a curve each; more classes share a histogram. `tag` is the name: "test_class_accuracy".
        """
        known = {name: value for name, value in by_class.items() if not math.isnan(value)}
        if known and len(by_class) > 20:  # TensorBoard takes no empty histogram
            values, bins = np.array(list(known.values())), np.linspace(0, 1, 21)
            self._events.add(step, summary.histogram(tag, values, bins))
            return
        for name, value in known.items():
            self._events.add(step, summary.scalar(f"{tag}/{name}", value))

    def _steps(self, step: int) -> str:
        return f"step {step}/{self._total_steps}, epoch {self._epoch(step)}"

    def _epoch(self, step: int) -> str:
        return f"{step / self._steps_per_epoch:.{1 if step >= self._steps_per_epoch else 2}f}"

    def _write(self, step: int, scalars: dict[str, float]) -> None:
        with naming(self._file):
            self._jsonl.write(json.dumps({"step": step, **scalars}) + "\n")
            self._jsonl.flush()
        for name, value in scalars.items():
            self._events.add(step, summary.scalar(name, value))
        if self._tracker:
            self._tracker.log(step, scalars)

    def close(self) -> None:
        """Ends the progress bar, and closes the files and the tracker."""
        self._bar.close()
        if self._tracker:
            self._tracker.close()
        with naming(self._file), contextlib.closing(self._events):
            self._jsonl.close()


def read_metrics(file: Path) -> list[dict[str, float]]:
    """Returns the rows of a metrics.jsonl, [] if it does not exist; leaves out damaged lines.

    A kill may cut off the last line, and a full disk or a crash of the system may damage any.

    Raises:
      UserError: the file cannot be read.
    """
    return [row for line in _read_lines(file) if (row := _parse(line)) is not None]


def _read_lines(file: Path) -> list[str]:
    if not file.exists():
        return []
    try:
        with open_file(file) as opened:
            return [line for line in opened.read().decode("utf-8", "replace").split("\n") if line]
    except OSError as error:
        pass_on(error, file)
        raise UserError(
            f"{shown(file)} cannot be read ({error.strerror}): remove it, or restore the file"
        ) from None


def _parse(line: str) -> dict[str, float] | None:
    """Returns the row of a line, or None if the line is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or not 0 <= row["step"] < 2**31:
        return None
    values = row.values()
    return row if all(type(v) in (int, float) and not _LARGEST < abs(v) < math.inf for v in values) else None


def _tile(images: np.ndarray) -> np.ndarray:
    """Returns images uint8 (n, h, w, c) in a square grid, enlarged if they are small: uint8 (H, W, c)."""
    n, h, w, c = images.shape
    times, columns = max(64 // w, 1), math.isqrt(n - 1) + 1
    rows = -(-n // columns)
    enlarged = images.repeat(times, axis=1).repeat(times, axis=2)
    cells = np.pad(enlarged, ((0, rows * columns - n), (0, 2), (0, 2), (0, 0)), constant_values=255)
    h, w = cells.shape[1:3]
    return cells.reshape(rows, columns, h, w, c).swapaxes(1, 2).reshape(rows * h, columns * w, c)


def _drop_after(file: Path, step: int) -> None:
    rows = read_metrics(file)
    if damaged := len(_read_lines(file)) - len(rows):
        print(f"{shown(file)}: {damaged} damaged line{'s' * (damaged > 1)} removed", flush=True)
    with replacing(file) as new:
        new.write("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step).encode())

"""Makes NumPy batches of a dataset: of TFDS, or a folder or table of images; in memory or streamed.

    examples = open_examples("cifar10", "train")
    batches = TrainBatches(examples, batch_size=256, seed=0)
    batches[1_000_000]  # a pure function of (seed, 1_000_000)
    for batch in iterate(batches, start=10, stop=20): ...

A batch is {"image": uint8 (n, h, w, c), "label": int32 (n,), "mask": bool (n,)}; if images may have several labels,
"label" is uint8 (n, classes), with 1 for each label. The mask is False for rows that are padding. Images of one square
size keep that size, and the device resizes them; other images are cropped and resized here. No JAX, no TensorFlow.
"""

import ast
import functools
import linecache
import os
import signal
import sys
import threading
import time
from collections.abc import Generator

import numpy as np

from mlpmixer_flax import UserError
from mlpmixer_flax.data.dataset import get_dataset_info
from mlpmixer_flax.data.examples import Examples, open_examples

__all__ = ["Batch", "Examples", "TestBatches", "TrainBatches", "get_dataset_info", "iterate", "open_examples"]

Batch = dict[str, np.ndarray]


class TrainBatches:
    """An endless shuffled stream: `batches[k]` is batch k, a pure function of (seed, k).

    The stream has one permutation of the n examples per epoch, one after another. Epoch e is at positions
    [e * n, (e + 1) * n), and a batch may contain the end of one epoch and the start of the next.
    Shard i of `shard_count` gets its share of the rows of every batch, in order.

    Raises:
      UserError: the seed is negative, the shard does not exist, or the batch size is not a
        positive multiple of `shard_count`.
    """

    def __init__(
        self, examples: Examples, *, batch_size: int, seed: int, shard_index: int = 0, shard_count: int = 1
    ):
        if seed < 0:
            raise UserError(f"seed is {seed}: use 0 or more")
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.rows = _shard_rows(batch_size, shard_index, shard_count)

    def __getitem__(self, k: int) -> Batch:
        positions = k * self.batch_size + self.rows
        epochs, offsets = np.divmod(positions, len(self.examples))
        n, used = len(self.examples), np.unique(epochs)
        indices = np.concatenate([_permutation(n, self.seed, int(e))[offsets[epochs == e]] for e in used])
        # The 1 separates the randomness of crops from that of the order, which uses 0.
        images, labels = self.examples.read(indices, [(self.seed, 1, int(p)) for p in positions])
        return {"image": images, "label": labels, "mask": np.ones(len(labels), bool)}


@functools.lru_cache(maxsize=2)  # two, because batches around the end of an epoch are read in parallel
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(n)


class TestBatches:
    """Every example once and in order: `batches[k]` for k < len(batches); the last batch is padded.

    Rows of padding are zeros with mask False. Shard i of `shard_count` gets its share of the rows of every
    batch.

    Raises:
      UserError: the shard does not exist, or the batch size is not a positive multiple of `shard_count`.
    """

    __test__ = False  # otherwise pytest takes the class for a test, because of its name

    def __init__(self, examples: Examples, *, batch_size: int, shard_index: int = 0, shard_count: int = 1):
        self.examples, self.batch_size = examples, batch_size
        self.rows = _shard_rows(batch_size, shard_index, shard_count)

    def __len__(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def __getitem__(self, k: int) -> Batch:
        if not 0 <= k < len(self):
            raise IndexError(f"batch {k} does not exist: there are {len(self)} batches")
        positions = k * self.batch_size + self.rows
        mask = positions < len(self.examples)
        image = np.zeros((len(mask), *self.examples.image_shape), np.uint8)
        image[mask], labels = self.examples.read(positions[mask])
        label = np.zeros((len(mask), *labels.shape[1:]), labels.dtype)
        label[mask] = labels
        return {"image": image, "label": label, "mask": mask}


def _shard_rows(batch_size: int, shard_index: int, shard_count: int) -> np.ndarray:
    if shard_count < 1 or not 0 <= shard_index < shard_count:
        raise UserError(f"shard {shard_index} of {shard_count} does not exist: use 0 to shard_count - 1")
    if batch_size < 1 or batch_size % shard_count:
        raise UserError(
            f"batch size {batch_size} cannot be split over {shard_count} shards: "
            f"use a positive multiple of {shard_count}"
        )
    rows = batch_size // shard_count
    return np.arange(shard_index * rows, (shard_index + 1) * rows)


def check_workers(batches: TrainBatches | TestBatches, num_workers: int) -> None:
    """Checks that `iterate` can start its worker processes from the script that runs now.

    Each worker first imports this script, as Python does in every new process. A script that trains at its top level
    would train again in each worker, and no worker would ever make a batch.

    Raises:
      UserError: the script calls this outside of `if __name__ == "__main__":`, or is not a file.
    """
    main = sys.modules["__main__"]
    script = getattr(main, "__file__", None)  # a notebook has none, so its workers import nothing
    if not num_workers or batches.examples.images is not None or script is None:
        return
    if not os.path.isfile(script):
        raise UserError(
            f"num_workers={num_workers} starts processes that import the script, but {script!r} is not a file: "
            "save the script in a file, or set num_workers to 0"
        )
    frame, guarded = sys._getframe(), []
    while frame:
        if frame.f_globals is vars(main) and frame.f_code.co_name == "<module>":
            guarded.append(_is_guarded(frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    if guarded and not any(guarded):
        raise UserError(
            f"num_workers={num_workers} starts processes that import {os.path.relpath(script)!r} and so would run "
            'all of it again: put the code that trains or reads batches below if __name__ == "__main__":, or set '
            "num_workers to 0"
        )


@functools.cache  # so that a script that is edited while it runs is judged as it was at the start
def _is_guarded(file: str, line: int) -> bool:
    """Returns whether a line at the top level of a script depends on `__name__`; True if it cannot be read."""
    try:
        statements = ast.parse("".join(linecache.getlines(file))).body
    except SyntaxError:
        return True
    around = [part for part in statements if part.lineno <= line <= (part.end_lineno or line)]
    names = {node.id for part in around for node in ast.walk(part) if isinstance(node, ast.Name)}
    return not around or "__name__" in names


def _exit_with_parent(parent: int, worker_index: int, worker_count: int) -> None:
    """Makes a worker exit when its parent does, also if the parent was killed, or ended before this call.

    Ctrl-C and SIGTERM often reach the whole process group. A worker ignores them, because the parent decides
    when to stop, and it still needs batches until then.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_after_parent, args=(parent,), daemon=True).start()


def _exit_after_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def iterate(
    batches: TrainBatches | TestBatches, start: int, stop: int, *, num_workers: int = 0
) -> Generator[Batch, None, None]:
    """Yields batches start to stop - 1, in order.

    Streamed batches are made ahead by threads, or by `num_workers` processes; the batches are the same for
    any number of them. If you stop early, close the iterator to end the processes.

    Raises:
      UserError: as `check_workers`, and as `Examples.read`, also from a worker.
    """
    check_workers(batches, num_workers)
    if batches.examples.images is not None or start >= stop:
        yield from map(batches.__getitem__, range(start, stop))
        return
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads absl flags, which only a program parses
    # Each element is a whole batch, so only a few are kept at once.
    threads = 1 if num_workers else min(os.cpu_count() or 1, 8)
    stream = (
        grain.MapDataset.range(start, stop)
        .map(batches.__getitem__)
        .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    )
    if num_workers:
        # Batches travel through pipes: in a container, shared memory is only 64 MB by default, and Grain does
        # not free all of it.
        options = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        stream = grain.experimental.WithOptionsIterDataset(stream, options)
        stream = stream.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers),
            functools.partial(_exit_with_parent, os.getpid()),
        )
    iterator = iter(stream)
    try:
        # The first batch starts the workers. They inherit that signals are held back, so that no signal to the whole
        # process group ends a worker before `_exit_with_parent` runs in it.
        held_back = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            first = next(iterator)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held_back)
        yield first
        yield from iterator
    finally:
        iterator.close()

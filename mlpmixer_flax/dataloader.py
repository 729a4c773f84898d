"""From a dataset on disk to numpy batches: TFDS directories and folders of images, in memory or streamed.

    examples = open_examples("cifar10", "train")
    batches = TrainBatches(examples, batch_size=256, seed=0)
    batches[1_000_000]  # a pure function of (seed, 1_000_000)
    for batch in iterate(batches, start=10, stop=20): ...

A batch is {"image": uint8 (n, h, w, c), "label": int32 (n,), "mask": bool (n,)}; the mask is False where a
row is padding. Images of one size travel as they are stored; images of varying size are cropped and resized
here. No JAX, no TensorFlow.
"""

import dataclasses
import functools
import io
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from mlpmixer_flax import UserError
from mlpmixer_flax.datasets import get_dataset_info, open_source
from mlpmixer_flax.images import MODES, RESAMPLING, central_box, first_line, random_box, to_mode

__all__ = ["Examples", "TestBatches", "TrainBatches", "get_dataset_info", "iterate", "open_examples"]

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """The examples of a split by index: held in memory if `images` is there, else decoded when read."""

    name: str  # of dataset and split, for messages
    source: Any  # index -> record with an encoded image
    keys: tuple[str, str]  # of image and label in a record
    num_classes: int
    image_shape: tuple[int, int, int]  # of the images that read() gives
    cropped: bool  # True: images vary in size as stored or aren't square; cropped and resized here, not on the device
    crop_fraction: float
    min_crop_area: float
    interpolation: str
    images: np.ndarray | None = None  # uint8 (n, h, w, c)
    labels: np.ndarray | None = None  # int32 (n,)

    def __len__(self) -> int:
        return len(self.source)

    def read(
        self, indices: np.ndarray, crop_seeds: Sequence[tuple[int, ...]] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images uint8 (n, h, w, c) and labels int32 (n,); with a seed for each image its crop is random.

        Raises:
          UserError: a record or image is damaged, an image has another shape than the dataset says, or a
            label is none of the classes.
        """
        if self.images is not None:
            return self.images[indices], self.labels[indices]
        images = np.empty((len(indices), *self.image_shape), np.uint8)
        labels = np.empty(len(indices), np.int32)
        try:
            records = self.source.__getitems__(indices.tolist())
        except Exception as error:
            raise UserError(
                f"Records of {self.name} are damaged ({first_line(error)}): restore or prepare them anew."
            ) from error
        for row, record in enumerate(records):
            try:
                image = self._decode(record[self.keys[0]], crop_seeds and crop_seeds[row])
                if image.shape != self.image_shape:
                    raise ValueError(f"its shape is {image.shape}, not {self.image_shape}")
                label = int(record[self.keys[1]])
                if not 0 <= label < self.num_classes:
                    raise ValueError(f"its label {label} is not in [0, {self.num_classes})")
            except Exception as error:
                identity = record.get("id", record.get("file_name", b""))
                identity = identity.decode(errors="replace") if isinstance(identity, bytes) else str(identity)
                raise UserError(
                    f"Image {indices[row]}{identity and f' ({identity})'} of {self.name} cannot be used "
                    f"({first_line(error)}): repair it or leave it out of the split."
                ) from error
            images[row], labels[row] = image, label
        return images, labels

    def _decode(self, encoded: bytes, crop_seed: tuple[int, ...] | None) -> np.ndarray:
        height, width, channels = self.image_shape
        with Image.open(io.BytesIO(encoded)) as image:
            image = to_mode(image, MODES[channels])
            if self.cropped:
                box = central_box(*image.size, self.crop_fraction)
                if crop_seed is not None and self.min_crop_area < 1:
                    rng = np.random.default_rng(crop_seed)
                    box = random_box(*image.size, self.min_crop_area, rng) or box
                image = image.resize((width, height), RESAMPLING[self.interpolation], box)
            pixels = np.asarray(image)
        return pixels.reshape(*pixels.shape[:2], channels)


def open_examples(
    dataset: str,
    split: str,
    *,
    data_dir: str = "",
    cache_bytes: int = 4 * 1024**3,
    image_size_px: int = 224,
    crop_fraction: float = 1.0,
    min_crop_area: float = 1.0,
    interpolation: str = "bilinear",
    skip_bad_images: bool = False,
    for_training: bool = False,
) -> Examples:
    """Opens a split, and decodes it into memory if it takes no more than `cache_bytes` there.

    Images of a folder are checked first, those of the split or, `for_training`, of all splits, so that one report
    names all that cannot be used; with `skip_bad_images` they are left out.
    Size, crops and interpolation matter only where images vary in size or aren't square. Those become squares of
    `image_size_px`: in TrainBatches a random box of at least `min_crop_area` of the image, resized; in
    TestBatches, or with `min_crop_area` 1, the central square of `crop_fraction` of the short side, resized.
    A split to be cropped at random is never held in memory.

    Raises:
      UserError: as `get_dataset_info`, and as `Examples.read` if the split is decoded; the dataset is
        prepared in a format without random access; or a folder has bad images, all of which are named.
    """
    source, keys, num_classes, (height, width, channels) = open_source(
        dataset,
        split,
        data_dir=data_dir,
        skip_bad_images=skip_bad_images,
        for_training=for_training,
    )
    cropped = height is None or height != width
    examples = Examples(
        name=f"split {split!r} of dataset {dataset!r}",
        source=source,
        keys=keys,
        num_classes=num_classes,
        image_shape=(image_size_px, image_size_px, channels) if cropped else (height, width, channels),
        cropped=cropped,
        crop_fraction=crop_fraction,
        min_crop_area=min_crop_area,
        interpolation=interpolation,
    )
    if len(examples) * math.prod(examples.image_shape) > cache_bytes or (cropped and min_crop_area < 1):
        return examples
    images, labels = _decode_all(examples)
    return dataclasses.replace(examples, images=images, labels=labels)


def _decode_all(examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    images = np.empty((len(examples), *examples.image_shape), np.uint8)
    labels = np.empty(len(examples), np.int32)

    def decode(chunk: np.ndarray) -> int:
        images[chunk], labels[chunk] = examples.read(chunk)
        return len(chunk)

    chunks = np.array_split(np.arange(len(examples)), -(-len(examples) // 256))
    # Threads suffice: Pillow decodes without holding the interpreter's lock.
    with tqdm(
        desc=f"decoding {examples.name}", total=len(examples), unit="img", delay=2, leave=False, disable=None
    ) as bar:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for count in pool.map(decode, chunks):
                bar.update(count)
    return images, labels


class TrainBatches:
    """`batches[k]` is batch k of an endless shuffled stream, a pure function of (seed, k).

    The stream is one permutation of the examples after another, one an epoch, so example i of epoch e
    is at a position in [e * n, (e + 1) * n); a batch may hold the end of an epoch and the start of the next.
    Shard i of `shard_count` gets its share of the rows of every batch, in order.
    """

    def __init__(
        self, examples: Examples, *, batch_size: int, seed: int, shard_index: int = 0, shard_count: int = 1
    ):
        if seed < 0:
            raise UserError(f"The seed is {seed}: give one of at least 0.")
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.rows = _shard_rows(batch_size, shard_index, shard_count)

    def __getitem__(self, k: int) -> Batch:
        positions = k * self.batch_size + self.rows
        epochs, offsets = np.divmod(positions, len(self.examples))
        n, used = len(self.examples), np.unique(epochs)
        indices = np.concatenate([_permutation(n, self.seed, int(e))[offsets[epochs == e]] for e in used])
        # 1 keeps the randomness of crops apart from that of the order, which has 0.
        images, labels = self.examples.read(indices, [(self.seed, 1, int(p)) for p in positions])
        return {"image": images, "label": labels, "mask": np.ones(len(labels), bool)}


@functools.lru_cache(maxsize=2)  # neighbouring epochs, when batches across their border are read in parallel
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(n)


class TestBatches:
    """`batches[k]` for k < len(batches): every example once and in order, the last batch filled with zeros.

    Rows that fill have mask False. Shard i of `shard_count` gets its share of the rows of every batch.
    """

    __test__ = False  # or pytest takes the name for a test

    def __init__(self, examples: Examples, *, batch_size: int, shard_index: int = 0, shard_count: int = 1):
        self.examples, self.batch_size = examples, batch_size
        self.rows = _shard_rows(batch_size, shard_index, shard_count)

    def __len__(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def __getitem__(self, k: int) -> Batch:
        if not 0 <= k < len(self):
            raise IndexError(f"batch {k} of {len(self)}")
        positions = k * self.batch_size + self.rows
        mask = positions < len(self.examples)
        image = np.zeros((len(mask), *self.examples.image_shape), np.uint8)
        label = np.zeros(len(mask), np.int32)
        image[mask], label[mask] = self.examples.read(positions[mask])
        return {"image": image, "label": label, "mask": mask}


def _shard_rows(batch_size: int, shard_index: int, shard_count: int) -> np.ndarray:
    if shard_count < 1 or not 0 <= shard_index < shard_count:
        raise UserError(f"Shard {shard_index} of {shard_count} does not exist: shards count from 0.")
    if batch_size < 1 or batch_size % shard_count:
        raise UserError(f"Batch size {batch_size} is not a positive multiple of the {shard_count} shards.")
    rows = batch_size // shard_count
    return np.arange(shard_index * rows, (shard_index + 1) * rows)


def _live_as_long_as(parent: int, worker_index: int, worker_count: int) -> None:
    """What ends a worker is the end of its parent, even a killed one; even before the worker came to run this.

    Ctrl-C and SIGTERM often reach the whole process group; they are the parent's to act on, and until it has
    done so it wants batches.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def iterate(
    batches: TrainBatches | TestBatches, start: int, stop: int, *, num_workers: int = 0
) -> Iterator[Batch]:
    """Batches start to stop - 1, in order; streamed ones come from threads, or from `num_workers` processes.

    The batches are the same for any number of workers. Close the iterator if you leave it early: that ends
    the processes.

    Raises:
      UserError: as `Examples.read`, also from a worker.
    """
    if batches.examples.images is not None or start >= stop:
        yield from map(batches.__getitem__, range(start, stop))
        return
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads flags, which only a program parses
    # An element is a whole batch: few are held at once.
    threads = 1 if num_workers else min(os.cpu_count() or 1, 8)
    stream = (
        grain.MapDataset.range(start, stop)
        .map(batches.__getitem__)
        .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    )
    if num_workers:
        # Through pipes: shared memory is 64 MB in a container by default, and Grain leaves some behind.
        options = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        stream = grain.experimental.WithOptionsIterDataset(stream, options)
        stream = stream.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers),
            functools.partial(_live_as_long_as, os.getpid()),
        )
    iterator = iter(stream)
    try:
        yield from iterator
    finally:
        iterator.close()

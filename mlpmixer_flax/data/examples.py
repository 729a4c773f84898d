"""Opens splits of datasets and reads their examples by index: decoded images and labels."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

import numpy as np
from tqdm import tqdm

from mlpmixer_flax import UserError
from mlpmixer_flax.data.dataset import Dataset, find_dataset
from mlpmixer_flax.data.decoding import decode
from mlpmixer_flax.data.image_checks import say_left_out
from mlpmixer_flax.data.images import MODES, flaw_of, to_square
from mlpmixer_flax.data.listing import FileRecords
from mlpmixer_flax.data.notes import say_once
from mlpmixer_flax.data.splits import Label, Record, Source, SplitLike
from mlpmixer_flax.data.tfds import TfdsRecords

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """The examples of a split by index: kept in memory if `images` is set, else decoded when read."""

    source: Source
    image_shape: tuple[int, int, int]  # of the images that read() returns
    cropped: bool  # True: read() crops and resizes, because stored images vary in size or are not square
    crop_fraction: float
    min_crop_area: float
    interpolation: str
    images: np.ndarray | None = None  # uint8 (n, h, w, c); set together with labels
    labels: np.ndarray | None = None  # as read() returns them
    fit: str = "crop"  # or "pad" or "stretch": how an image that is not square becomes a square

    def __len__(self) -> int:
        return len(self.source.records)

    @property
    def name(self) -> str:
        """The name of the split and the dataset, for messages."""
        return self.source.name

    @property
    def class_names(self) -> list[str]:
        """The names of the dataset's classes, in the order of their labels."""
        return self.source.class_names

    @property
    def num_classes(self) -> int:
        """The number of the dataset's classes."""
        return len(self.class_names)

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several labels, or none."""
        return self.source.multi_label

    @property
    def known_labels(self) -> np.ndarray | None:
        """The labels of all examples, as read() returns them; None if they are known only when examples are read."""
        if self.labels is not None:
            return self.labels
        records = self.source.records
        return self.as_array(records.labels) if isinstance(records, FileRecords) else None

    def as_array(self, labels: Sequence[Label]) -> np.ndarray:
        """Returns labels as an array: int32 (n,), or uint8 (n, classes) of 0 and 1 if there may be several."""
        if not self.multi_label:
            return np.array(labels, np.int32)
        array = np.zeros((len(labels), self.num_classes), np.uint8)
        for row, label in zip(array, labels, strict=True):
            row[list(cast(tuple[int, ...], label))] = 1
        return array

    @property
    def files(self) -> list[str] | None:
        """The file name of each example, relative to the folder or table; None for a TFDS dataset."""
        return self.source.records.files if isinstance(self.source.records, FileRecords) else None

    @property
    def paths(self) -> list[str] | None:
        """The absolute path of each example's file; None for a TFDS dataset."""
        records = self.source.records
        return (
            [os.path.join(records.root, file) for file in records.files]
            if isinstance(records, FileRecords)
            else None
        )

    @property
    def skipped(self) -> int:
        """How many images of the split were left out, because they cannot be used."""
        return self.source.skipped

    def read(
        self, indices: np.ndarray, crop_seeds: Sequence[tuple[int, ...]] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns images uint8 (n, h, w, c) and labels int32 (n,).

        If images may have several labels, labels are uint8 (n, classes), with 1 for each label.

        Args:
          indices: int (n,).
          crop_seeds: one per image, for a random crop (if `min_crop_area` is below 1); without them, crops
            are central.

        Raises:
          UserError: a record or image is damaged, an image has another shape than the dataset says, a label
            does not belong to any class, or a file can no longer be read.
          MemoryError, OSError: memory, the disk or a limit of the system is at fault, not the data.
        """
        if self.images is not None and self.labels is not None:
            return self.images[indices], self.labels[indices]
        images, labels = np.empty((len(indices), *self.image_shape), np.uint8), []
        for row, (record, found) in enumerate(self._read_each(indices, crop_seeds)):
            if isinstance(found, str):
                raise UserError(
                    f"image {record.name} of {self.name} cannot be used ({found}): {self.source.remedy}"
                )
            images[row] = found
            labels.append(record.label)
        return images, self.as_array(labels)

    def find_flaws(self, indices: np.ndarray) -> dict[int, tuple[str, str]]:
        """Returns index -> name and flaw, for the examples that cannot be used.

        Raises:
          UserError: as `read`, if a file can no longer be read.
        """
        each = zip(indices.tolist(), self._read_each(indices, None), strict=True)
        return {index: (record.name, found) for index, (record, found) in each if isinstance(found, str)}

    def _read_each(
        self, indices: np.ndarray, crop_seeds: Sequence[tuple[int, ...]] | None
    ) -> Iterator[tuple[Record, np.ndarray | str]]:
        """Yields each record, and its image or why it cannot be used."""
        for row, record in enumerate(self.source.records.__getitems__(indices.tolist())):
            try:
                found = record.flaw or self._decode(record, crop_seeds[row] if crop_seeds else None)
            except Exception as error:
                found = flaw_of(error, f"image {record.name} of {self.name}")
            yield record, found

    def _decode(self, record: Record, crop_seed: tuple[int, ...] | None) -> np.ndarray:
        """Returns the image of a record as `read` does; any exception means that it cannot be used."""
        size_px, _, channels = self.image_shape
        if isinstance(record.label, int) and not 0 <= record.label < self.num_classes:
            raise ValueError(f"its label {record.label} is not in [0, {self.num_classes})")
        image, notes = decode(record.image, MODES[channels])
        if self.files is None:  # the check of the files has said it already
            say_once(notes, f"image {record.name} of {self.name}")
        if self.cropped:
            image = to_square(
                image,
                size_px,
                fit=self.fit,
                crop_fraction=self.crop_fraction,
                interpolation=self.interpolation,
                min_crop_area=self.min_crop_area,
                rng=None if crop_seed is None else np.random.default_rng(crop_seed),
            )
        pixels = np.asarray(image)
        pixels = pixels.reshape(*pixels.shape[:2], channels)
        if pixels.shape != self.image_shape:
            raise ValueError(f"its shape is {pixels.shape}, not {self.image_shape}")
        return pixels


def open_examples(
    dataset: str | Dataset,
    split: SplitLike,
    *,
    data_dir: str | os.PathLike[str] = "",
    cache_bytes: int = 4 * 1024**3,
    image_size_px: int = 224,
    crop_fraction: float = 1.0,
    min_crop_area: float = 1.0,
    interpolation: str = "bilinear",
    fit: str = "crop",
    skip_bad_images: bool = False,
) -> Examples:
    """Opens a split; decodes it into memory if its decoded images fit in `cache_bytes`.

    A split with random crops is never kept in memory.

    Args:
      dataset, split, data_dir: as in `get_dataset_info`; or `dataset` is one from `find_dataset`.
      cache_bytes: the largest size of a split that is kept in memory.
      image_size_px, crop_fraction, min_crop_area, interpolation, fit: used only if images vary in size or are
        not square. Such images become squares of `image_size_px`. In `TrainBatches` each is a random box of at
        least `min_crop_area` of the image, resized. In `TestBatches`, or with `min_crop_area` 1, it is the
        central square with a side of `crop_fraction` of the short side, resized. `fit` "pad" or "stretch" uses
        whole images instead of squares from them: see `images.to_square`.
      skip_bad_images: leaves out the images that cannot be used, and counts them in `Examples.skipped`, instead of
        raising an error. For this, every image of the split is read once.

    Raises:
      UserError: as `find_dataset`, `Dataset.open` and `make_examples`.
    """
    found = dataset if isinstance(dataset, Dataset) else find_dataset(dataset, data_dir=data_dir)
    (source,) = found.open([split], skip_bad_images=skip_bad_images)
    return make_examples(
        source,
        cache_bytes=cache_bytes,
        image_size_px=image_size_px,
        crop_fraction=crop_fraction,
        min_crop_area=min_crop_area,
        interpolation=interpolation,
        fit=fit,
        skip_bad_images=skip_bad_images,
    )


def make_examples(
    source: Source,
    *,
    cache_bytes: int,
    image_size_px: int,
    crop_fraction: float,
    min_crop_area: float,
    interpolation: str,
    fit: str,
    skip_bad_images: bool,
) -> Examples:
    """Returns the examples of a split; decodes them into memory if they fit in `cache_bytes` and need no random crops.

    The arguments are those of `open_examples`. Here, `skip_bad_images` leaves out the images of a TFDS dataset that
    cannot be used, because `Dataset.open` leaves out files only.

    Raises:
      UserError: as `Examples.read`, if the examples are decoded; or no image can be used.
    """
    height, width, channels = source.image_shape
    # Whether the host or the device crops is decided only here; all other code follows `cropped`.
    if height is None or width is None or height != width:
        cropped, image_shape = True, (image_size_px, image_size_px, channels)
    else:
        cropped, image_shape = False, (height, width, channels)
    examples = Examples(
        source=source,
        image_shape=image_shape,
        cropped=cropped,
        crop_fraction=crop_fraction,
        min_crop_area=min_crop_area,
        interpolation=interpolation,
        fit=fit,
    )
    if skip_bad_images:
        examples = _leave_out_bad(examples)
    if len(examples) * math.prod(image_shape) > cache_bytes or (cropped and min_crop_area < 1):
        return examples
    images, labels = _decode_all(examples)
    return dataclasses.replace(examples, images=images, labels=labels)


def _leave_out_bad(examples: Examples) -> Examples:
    """Reads every example of a TFDS dataset once; returns the ones that `read` accepts.

    So the split is known before training, and a batch stays a function of seed and step.
    """
    records = examples.source.records
    if not isinstance(records, TfdsRecords):
        return examples  # files were checked when they were opened
    flaws: dict[int, tuple[str, str]] = {}
    for _, found in _in_chunks(examples, "checking", examples.find_flaws):
        flaws |= found
    say_left_out(dict(flaws.values()), len(examples), examples.name)
    kept = np.delete(np.arange(len(examples)), list(flaws))
    source = dataclasses.replace(
        examples.source, records=dataclasses.replace(records, kept=kept), skipped=len(flaws)
    )
    return dataclasses.replace(examples, source=source)


def _decode_all(examples: Examples) -> tuple[np.ndarray, np.ndarray]:
    images = np.empty((len(examples), *examples.image_shape), np.uint8)
    labels = examples.as_array([()] * len(examples) if examples.multi_label else [0] * len(examples))
    for chunk, decoded in _in_chunks(examples, "decoding", examples.read):
        images[chunk], labels[chunk] = decoded
    return images, labels


def _in_chunks(
    examples: Examples, verb: str, function: Callable[[np.ndarray], T]
) -> Iterator[tuple[np.ndarray, T]]:
    """Yields chunks of the indices of all examples, and what the function returns for each, in order."""
    chunks = np.array_split(np.arange(len(examples)), -(-len(examples) // 256))
    # Threads are enough: Pillow decodes without holding the interpreter's lock.
    with (
        tqdm(
            desc=f"{verb} {examples.name}",
            total=len(examples),
            unit="img",
            delay=2,
            leave=False,
            disable=None,
        ) as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        for chunk, result in zip(chunks, pool.map(function, chunks), strict=True):
            yield chunk, result
            bar.update(len(chunk))

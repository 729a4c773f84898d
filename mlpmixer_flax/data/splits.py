"""Says what a split of a dataset is: its name in TFDS's language ("train[:90%]+test"), its facts and its records."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, SupportsIndex, TypeAlias, TypedDict

if TYPE_CHECKING:
    from tensorflow_datasets.core.splits import AbstractSplit

# A name, slice or sum in TFDS's syntax, or an object of TFDS that stands for one, as tfds.even_splits makes them
SplitLike: TypeAlias = "str | AbstractSplit"


class Part(NamedTuple):
    """The examples `start` to `stop` - 1 of a split."""

    split: str
    start: int
    stop: int


def read_split(split: SplitLike, counts: Mapping[str, Any]) -> list[Part]:
    """Returns the parts that a split consists of, one for each term of a sum.

    TFDS itself reads the syntax, so that all of it works, with its rounding: slices of examples, percents and
    shards ("train[:1000]", "train[-10%:]", "train[:4shard]"), sums, and "all".

    Args:
      split: as a user gives it.
      counts: split -> an object with `num_examples` and, for slices of shards, `shard_lengths`.

    Raises:
      ValueError: the split cannot be read; the message has one line and says why.
    """
    if isinstance(split, str) and split in counts:
        return [Part(str(split), 0, counts[split].num_examples)]
    import tensorflow_datasets as tfds

    try:
        ranges = tfds.core.ReadInstruction.from_spec(split).to_absolute(counts)
    except Exception as error:
        # TFDS's first line only repeats the split, and the known ones are in our message.
        reason = str(error).splitlines()[-1].split(". Should be one of")[0] if str(error) else repr(error)
        raise ValueError(reason) from error
    parts = []
    for part in ranges:  # None = to the end; numbers are floats for some kinds of rounding
        stop = counts[part.splitname].num_examples if part.to is None else part.to
        parts.append(Part(part.splitname, int(part.from_ or 0), int(stop)))
    return parts


def num_examples(parts: Iterable[Part]) -> int:
    """Returns the number of examples of all parts; 0 if a part ends before it starts ("train[50%:40%]")."""
    sizes = [part.stop - part.start for part in parts]
    return max(0, sum(sizes)) if min(sizes, default=0) >= 0 else 0


def count_common(parts: list[Part], others: list[Part]) -> int:
    """Returns how many different examples belong to both lists of parts."""
    count = 0
    for split in {part.split for part in parts}:
        mine, theirs = ([part for part in some if part.split == split] for some in (parts, others))
        ends = sorted({end for part in mine + theirs for end in part[1:]})
        for start, stop in pairwise(ends):
            if all(any(p.start <= start and stop <= p.stop for p in some) for some in (mine, theirs)):
                count += stop - start
    return count


# --- facts and records, of all kinds of datasets alike

Label: TypeAlias = (
    "int | tuple[int, ...]"  # the number of the class, or of each class of an image with several labels
)

ImageShape = tuple[int | None, int | None, int]  # stored images: (h, w, c); h and w are None if sizes vary


def describe_split(dataset: str, split: SplitLike) -> str:
    """Returns the name of a split in messages."""
    return f"split {split!r} of dataset {dataset!r}"


class DatasetInfo(TypedDict):
    """Facts about a split that are known without decoding an image."""

    num_examples: int
    num_classes: int
    class_names: list[str]
    int2str: Callable[[SupportsIndex], str]  # label -> class name
    image_shape: ImageShape
    multi_label: bool  # whether an image may have several labels, or none


class Record(NamedTuple):
    """An example as it is stored."""

    name: str  # for messages: a file, or a number
    image: bytes  # an encoded image
    label: Label
    flaw: str = ""  # why the record is damaged, if it is; then it has no image


class Records(Protocol):
    """The records of a split by index."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: list[int], /) -> list[Record]: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """The records of a split, and how to read them."""

    name: str  # of the split and the dataset, for messages
    records: Records
    class_names: list[str]
    image_shape: ImageShape
    remedy: str  # what to do about an image that cannot be used
    skipped: int = 0  # images of the split that were left out, because they cannot be used
    multi_label: bool = False  # whether an image may have several labels, or none

"""What any dataset provides, whether it is a TFDS directory or a folder of images."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, SupportsIndex, TypedDict

ImageShape = tuple[int | None, int | None, int]  # stored images: (h, w, c); h and w are None if sizes vary


class DatasetInfo(TypedDict):
    """Facts about a split that are known without decoding an image."""

    num_examples: int
    num_classes: int
    class_names: list[str]
    int2str: Callable[[SupportsIndex], str]  # label -> class name
    image_shape: ImageShape


class Records(Protocol):
    """A list of records; a record is a dict that holds an encoded image and a label."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: list[int], /) -> list[dict[str, Any]]: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """The records of a split, and how to read them."""

    records: Records
    image_key: str
    label_key: str
    num_classes: int
    image_shape: ImageShape

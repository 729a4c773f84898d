"""Reads TFDS datasets: from a name to encoded images, from prepared directories and without TensorFlow."""

import dataclasses
import difflib
import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from mlpmixer_flax import UserError
from mlpmixer_flax.data.files import check_no_url, fetch_once, is_archive
from mlpmixer_flax.data.images import MODES
from mlpmixer_flax.data.splits import (
    DatasetInfo,
    ImageShape,
    Part,
    Record,
    Source,
    SplitLike,
    describe_split,
    num_examples,
    read_split,
)
from mlpmixer_flax.data.tables import is_table
from mlpmixer_flax.faults import first_line, pass_on
from mlpmixer_flax.remote import copy_of, fetch
from mlpmixer_flax.text import listed, printable, quoted

_SHARD = re.compile(r"-\d{5}-of-\d{5}")  # in the names of the files with examples
# tfds.core.DatasetBuilder; TFDS types its features so widely that nothing can be read from them
Builder = Any


@dataclasses.dataclass(frozen=True)
class TfdsRecords:
    """The records of a split by index, as stored on disk."""

    name: str  # of the split and the dataset, for messages
    stored: Any  # TFDS's list of records
    image_key: str
    label_key: str
    dataset: str  # name and version: "cifar10/3.0.2"
    folder: str  # with the files of the dataset
    kept: np.ndarray | None = None  # the places of these records in the split, int (n,); None = all of them

    def __len__(self) -> int:
        return len(self.stored if self.kept is None else self.kept)

    def __getitems__(self, indices: list[int]) -> list[Record]:
        """Returns records; one that is damaged has a flaw and no image.

        Raises:
          UserError: a file of the dataset does not exist or cannot be read.
          MemoryError, OSError: memory, the disk or a limit of the system is at fault.
        """
        return self._read(indices if self.kept is None else self.kept[indices].tolist())

    def _read(self, places: list[int]) -> list[Record]:
        try:
            found = self.stored.__getitems__(places)
        except Exception as error:
            pass_on(error, self.folder)
            if not _is_damage(error):
                raise UserError(
                    f"{self.name} cannot be read ({first_line(error)}): restore its files or mount their directory again"
                ) from error
            if len(places) > 1:
                return [record for place in places for record in self._read([place])]
            return [Record(str(places[0]), b"", -1, flaw=f"its record is damaged: {first_line(error)}")]
        return [self._record(place, record) for place, record in zip(places, found, strict=True)]

    def _record(self, place: int, stored: Mapping[str, Any]) -> Record:
        identity = stored.get("id", stored.get("file_name", b""))
        identity = identity.decode(errors="replace") if isinstance(identity, bytes) else str(identity)
        name = f"{place} ({printable(identity)})" if identity else str(place)
        return Record(name, stored[self.image_key], int(stored[self.label_key]))


def _is_damage(error: Exception) -> bool:
    """Returns whether single records are damaged, so that the other records of their file can be read."""
    if isinstance(error, RuntimeError):  # the only class of ArrayRecord's errors
        return "Corrupted" in str(error) and "Postscript" not in str(error)
    return not isinstance(error, OSError)


def tfds_info(builder: Builder, split: SplitLike) -> DatasetInfo:
    """Returns the facts about a split, as `dataset.get_dataset_info`.

    Raises:
      UserError: as `image_and_label_keys` and `tfds_parts`.
    """
    image, label = (builder.info.features[key] for key in image_and_label_keys(builder))
    return {
        "num_examples": num_examples(tfds_parts(builder, split)),
        "num_classes": label.num_classes,
        "class_names": list(label.names),
        "int2str": label.int2str,
        "image_shape": tuple(image.shape),
        "multi_label": False,
    }


def open_tfds(builder: Builder, dataset: str, split: SplitLike) -> Source:
    """Opens a split for reading by index; `dataset` is its name in messages.

    Raises:
      UserError: as `tfds_info`; or the dataset is prepared in a format without random access.
    """
    import tensorflow_datasets as tfds

    image_key, label_key = image_and_label_keys(builder)
    tfds_parts(builder, split)
    try:
        stored = builder.as_data_source(split, decoders={image_key: tfds.decode.SkipDecoding()})
    except Exception as error:
        pass_on(error, builder.data_dir)
        form = getattr(builder.info.file_format, "value", "nothing")
        raise UserError(
            f"dataset {dataset!r}, prepared as {form} in {builder.data_dir}, cannot be read "
            f"({first_line(error)}): prepare it again with file_format='array_record'"
        ) from error
    image, label = builder.info.features[image_key], builder.info.features[label_key]
    name = describe_split(dataset, split)
    return Source(
        name=name,
        records=TfdsRecords(
            name, stored, image_key, label_key, builder.info.full_name, str(builder.data_dir)
        ),
        class_names=list(label.names),
        image_shape=tuple(image.shape),
        remedy="restore or prepare the dataset again, or leave out what cannot be used with --skip_bad_images (in "
        "training --config.skip_bad_images=true)",
    )


def load_builder(dataset: str, data_dir: str | os.PathLike[str]) -> Builder:
    """Returns the TFDS builder of a dataset.

    A dataset that is not prepared yet is prepared first, if TensorFlow is installed.

    Raises:
      UserError: the dataset is unknown, or not prepared and cannot be prepared here; or it or data_dir is a URL.
    """
    if copy_of(dataset):
        raise UserError(f"dataset {dataset!r} is not a TFDS name: did you mean 'folder:{dataset}'?")
    check_no_url(dataset, name="dataset")
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.read_only_builder import builder_from_files

    name = re.split("[:/]", dataset)[0]
    if name == "digits":
        data_dir = str(Path(__file__).parent)  # embedded in the package
    data_dir = os.fspath(data_dir) or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    copy = copy_of(data_dir)
    if copy:  # of the dataset in it, but not yet of its examples, because it may have several versions
        data_dir = copy
        fetch(copy / name, lambda names: [name for name in names if not _SHARD.search(name)])
    else:
        check_no_url(data_dir, name="data_dir")
        data_dir = os.path.expanduser(data_dir)
    try:
        # Prepared files first: TFDS's code for a dataset may import TensorFlow and knows only one version.
        builder = builder_from_files(dataset, data_dir=data_dir)
        if copy:
            fetch_once(Path(builder.data_dir))
        return builder
    except tfds.core.DatasetNotFoundError:
        pass
    except Exception as error:
        pass_on(error, data_dir)
        _suggest_folder(dataset)
        raise UserError(
            f"dataset {dataset!r} cannot be read from {data_dir} ({first_line(error)}): "
            "restore the directory or prepare the dataset again"
        ) from error

    # <name>/<version>/ or <name>/<config>/<version>/
    depths = ("*/*/dataset_info.json", "*/*/*/dataset_info.json")
    found = []
    if os.path.isdir(data_dir):  # its name may be too long for any file
        found = [path.parent.relative_to(data_dir) for depth in depths for path in Path(data_dir).glob(depth)]
    official = tfds.list_builders(with_community_datasets=False)
    names = {"digits", *official, *(path.parts[0] for path in found)}
    if name not in names:
        _suggest_folder(dataset)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or ["digits", "cifar10"]
        raise UserError(f"dataset {dataset!r} is unknown: did you mean {' or '.join(map(repr, near))}?")
    if importlib.util.find_spec("tensorflow") is None or name not in official:
        others = listed(sorted(str(path) for path in found if path.parts[0] == name))
        raise UserError(
            f"dataset {dataset!r} is not prepared in {data_dir}{others and f' ({others} is)'}: "
            'run pip install "mlpmixer-flax[prepare]" so that it can be prepared, or set data_dir or '
            "TFDS_DATA_DIR to a directory that contains the dataset"
        )
    try:
        builder = tfds.builder(dataset, data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare()
    except Exception as error:
        pass_on(error, data_dir)
        raise UserError(
            f"dataset {dataset!r} cannot be prepared in {data_dir} ({first_line(error)}): "
            "remove the cause, or set data_dir to a directory that contains the dataset"
        ) from error
    return builder


def _suggest_folder(dataset: str) -> None:
    path = os.path.expanduser(dataset)
    if os.path.isfile(path):
        if is_table(path):
            raise UserError(f"dataset {dataset!r} is not a TFDS name: did you mean 'table:{dataset}'?")
        kind = "an archive: unpack it" if is_archive(path) else "a file: put the images in class folders"
        raise UserError(
            f"dataset {dataset!r} is {kind} and give folder:PATH, or give the name of a TFDS dataset"
        )
    if os.path.isdir(path) or dataset.startswith((".", "/", "~")):
        raise UserError(f"dataset {dataset!r} is not a TFDS name: did you mean 'folder:{dataset}'?")


def image_and_label_keys(builder: Builder) -> tuple[str, str]:
    """Returns the names of the image and the label in a record.

    Raises:
      UserError: the dataset has no uint8 image or no class label.
    """
    import tensorflow_datasets as tfds

    features = builder.info.features if isinstance(builder.info.features, tfds.features.FeaturesDict) else {}
    keys = builder.info.supervised_keys
    image_key, label_key = keys if keys is not None and len(keys) == 2 else ("image", "label")
    image, label = (features[key] if key in features else None for key in (image_key, label_key))
    if (
        not isinstance(image, tfds.features.Image)
        or image.np_dtype != np.uint8
        or cast(ImageShape, image.shape)[2] not in MODES  # TFDS types the shape as an object
        or not isinstance(label, tfds.features.ClassLabel)
    ):
        raise UserError(
            f"dataset {builder.info.name!r} cannot be used for image classification: its features are "
            f"{listed(sorted(features)) or 'not named'}; choose a dataset with an 8-bit "
            "image of 1, 3 or 4 channels and a class label"
        )
    return image_key, label_key


def tfds_parts(builder: Builder, split: SplitLike) -> list[Part]:
    """Returns the parts of the dataset's splits that a split consists of.

    Raises:
      UserError: the split is unknown or empty.
    """
    known = quoted(builder.info.splits)
    try:
        parts = read_split(split, builder.info.splits)
    except ValueError as error:
        raise UserError(
            f"split {split!r} of dataset {builder.info.name!r} cannot be read ({error}): use {known} or a slice "
            "such as 'train[:90%]'"
        ) from error
    if not num_examples(parts):
        raise UserError(
            f"split {split!r} of dataset {builder.info.name!r} has no examples: use {known} or another slice"
        )
    return parts

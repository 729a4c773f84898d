"""From the name of a dataset to its encoded images: TFDS directories and folders.

No TensorFlow.
"""

import difflib
import functools
import importlib.util
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mlpmixer_flax import UserError
from mlpmixer_flax.folders import LAYOUT, Folder, FolderSource, read_folder, select_split
from mlpmixer_flax.images import MODES, find_flaw, first_line

_FOLDER = "folder:"
_FOLDER_SHAPE = (None, None, 3)


def get_dataset_info(dataset: str, split: str = "train", *, data_dir: str = "") -> dict[str, Any]:
    """What a split holds, without decoding an image.

    Args:
      dataset: "digits" (embedded), a TFDS name: "cifar10", "cifar10:3.0.2", "name/config", or
        "folder:PATH", a folder of images laid out as `folders` says.
      split: in TFDS's syntax: "train", "train[:90%]", "train+test".
      data_dir: TFDS directory; "" = $TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Returns:
      A dict: `num_examples`, `num_classes`, `class_names` (list of str), `int2str` (label -> name) and
      `image_shape` (h, w, c), where h and w are None if the images vary in size.

    Raises:
      UserError: the dataset is unknown, not prepared or not made of images and labels, or the split is
        unknown or empty.
    """
    if dataset.startswith(_FOLDER):
        folder = read_folder(dataset.removeprefix(_FOLDER))
        return {
            "num_examples": len(select_split(folder, split)),
            "num_classes": len(folder.class_names),
            "class_names": folder.class_names,
            "int2str": folder.class_names.__getitem__,
            "image_shape": _FOLDER_SHAPE,
        }
    builder = load_builder(dataset, data_dir)
    image, label = (builder.info.features[key] for key in image_and_label_keys(builder))
    return {
        "num_examples": count_examples(builder, split),
        "num_classes": label.num_classes,
        "class_names": list(label.names),
        "int2str": label.int2str,
        "image_shape": tuple(image.shape),
    }


def open_source(
    dataset: str, split: str, *, data_dir: str, skip_bad_images: bool, for_training: bool = False
) -> tuple[Any, tuple[str, str], int, tuple[int | None, int | None, int]]:
    """A split's records by index, the keys of image and label in them, the number of classes, the image shape.

    The images of a folder's split, for training of all its splits, are checked first, as by `find_flaw`.

    Raises:
      UserError: as `get_dataset_info`; the dataset is prepared in a format without random access; images
        checked are bad, all of which are named, unless `skip_bad_images`; or a folder to train on has one class.
    """
    if dataset.startswith(_FOLDER):
        folder = read_folder(dataset.removeprefix(_FOLDER))
        source = _check(folder, split, skip_bad_images, for_training)
        return source, ("image", "label"), len(folder.class_names), _FOLDER_SHAPE
    import tensorflow_datasets as tfds

    builder = load_builder(dataset, data_dir)
    keys = image_and_label_keys(builder)
    count_examples(builder, split)
    try:
        source = builder.as_data_source(split, decoders={keys[0]: tfds.decode.SkipDecoding()})
    except Exception as error:
        form = getattr(builder.info.file_format, "value", "nothing")
        raise UserError(
            f"Dataset {dataset!r}, prepared as {form} in {builder.data_dir}, cannot be read "
            f"({first_line(error)}): prepare it anew with file_format='array_record'."
        ) from error
    image, label = (builder.info.features[key] for key in keys)
    return source, keys, label.num_classes, image.shape


def load_builder(dataset: str, data_dir: str):
    """The TFDS builder that reads a prepared dataset; prepares it first where TensorFlow is installed."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.read_only_builder import builder_from_files

    name = re.split("[:/]", dataset)[0]
    if name == "digits":
        data_dir = str(Path(__file__).parent)
    data_dir = os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"))
    try:
        # Files before code: TFDS's code of a dataset may import TensorFlow, and knows one version only.
        return builder_from_files(dataset, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        pass
    except Exception as error:
        _suggest_folder(dataset)
        raise UserError(f"Dataset {dataset!r} cannot be read from {data_dir}: {first_line(error)}") from error

    # <name>/<version>/ or <name>/<config>/<version>/
    depths = ("*/*/dataset_info.json", "*/*/*/dataset_info.json")
    found = [path.parent.relative_to(data_dir) for depth in depths for path in Path(data_dir).glob(depth)]
    official = tfds.list_builders(with_community_datasets=False)
    names = {"digits", *official, *(path.parts[0] for path in found)}
    if name not in names:
        _suggest_folder(dataset)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or ["digits", "cifar10"]
        raise UserError(f"Dataset {dataset!r} is unknown: did you mean {' or '.join(map(repr, near))}?")
    if importlib.util.find_spec("tensorflow") is None or name not in official:
        others = ", ".join(sorted(str(path) for path in found if path.parts[0] == name))
        raise UserError(
            f"Dataset {dataset!r} is not prepared in {data_dir}{others and f' ({others} is)'}: "
            'pip install "mlpmixer-flax[prepare]" to have it prepared, or give a directory that '
            "has it as data_dir or TFDS_DATA_DIR."
        )
    try:
        builder = tfds.builder(dataset, data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare()
    except Exception as error:
        raise UserError(
            f"Dataset {dataset!r} cannot be prepared in {data_dir}: {first_line(error)}"
        ) from error
    return builder


def _suggest_folder(dataset: str) -> None:
    if os.path.isdir(os.path.expanduser(dataset)) or dataset.startswith((".", "/", "~")):
        raise UserError(f"Dataset {dataset!r} is no TFDS name: did you mean 'folder:{dataset}'?")


def image_and_label_keys(builder) -> tuple[str, str]:
    """The features to learn from; UserError where there is no uint8 image with a class label."""
    import tensorflow_datasets as tfds

    features = builder.info.features if isinstance(builder.info.features, tfds.features.FeaturesDict) else {}
    keys = builder.info.supervised_keys
    image_key, label_key = keys if keys is not None and len(keys) == 2 else ("image", "label")
    image, label = (features[key] if key in features else None for key in (image_key, label_key))
    if (
        not isinstance(image, tfds.features.Image)
        or image.np_dtype != np.uint8
        or image.shape[2] not in MODES
        or not isinstance(label, tfds.features.ClassLabel)
    ):
        raise UserError(
            f"Dataset {builder.info.name!r} cannot be classified: it needs an 8-bit image of 1, 3 or 4 "
            f"channels and a class label, and has {', '.join(sorted(features)) or 'neither'}."
        )
    return image_key, label_key


def count_examples(builder, split: str) -> int:
    known = ", ".join(map(repr, builder.info.splits))
    try:
        # Part by part, since TFDS takes the -10 % of "train[50%:40%]" off the rest of a sum.
        counts = [builder.info.splits[part].num_examples for part in split.split("+")]
    except Exception as error:
        raise UserError(
            f"Split {split!r} of dataset {builder.info.name!r} cannot be read ({first_line(error)}): use "
            f"{known} or a slice such as 'train[:90%]'."
        ) from error
    if min(counts) <= 0:
        raise UserError(
            f"Split {split!r} of dataset {builder.info.name!r} has no examples: use {known} or another slice."
        )
    return sum(counts)


# --- the images of a folder


def _check(folder: Folder, split: str, skip_bad_images: bool, for_training: bool) -> FolderSource:
    source = select_split(folder, split)
    files = source.files
    _say(tuple(folder.notes))
    if for_training:
        if len(folder.class_names) < 2:
            raise UserError(
                f"Folder {folder.path!r} has training images of one class and two are needed: expected is "
                f"{'; '.join([LAYOUT, *folder.notes])}."
            )
        files = [file for classes in folder.splits.values() for images in classes.values() for file in images]
    flaws = _find_flaws(folder.root, tuple(files))
    if flaws and not skip_bad_images:
        _find_flaws.cache_clear()  # they may be repaired and tried again, from a notebook
        raise UserError(
            f"{len(flaws)} of {len(files):,} images in {folder.path!r} cannot be used: repair or delete them, or "
            f"leave them out with --skip_bad_images (in training --config.skip_bad_images=true):{_list_flaws(flaws)}"
        )
    bad = {file: flaws[file] for file in source.files if file in flaws}
    if not bad:
        return source
    print(
        f"left out of split {split!r}, since they cannot be used, {len(bad)} of {len(source)}:{_list_flaws(bad)}"
    )
    kept = [pair for pair in zip(source.files, source.labels, strict=True) if pair[0] not in bad]
    if not kept:
        raise UserError(f"No image of split {split!r} of {folder.path!r} can be used: repair some.")
    return FolderSource(folder.root, *map(list, zip(*kept, strict=True)))


def _list_flaws(flaws: dict[str, str]) -> str:
    return "".join(f"\n  {file!r}: {flaw}" for file, flaw in sorted(flaws.items()))


@functools.lru_cache(maxsize=1)  # a run opens two splits of its folder
def _say(notes: tuple[str, ...]) -> None:
    for note in notes:
        print(note)


@functools.lru_cache(maxsize=1)  # likewise
def _find_flaws(root: str, files: tuple[str, ...]) -> dict[str, str]:
    # Threads suffice: Pillow decodes without holding the interpreter's lock.
    with (
        tqdm(desc="checking images", total=len(files), unit="img", delay=2, leave=False, disable=None) as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        flaws = {}
        found = pool.map(find_flaw, (os.path.join(root, file) for file in files))
        for file, flaw in zip(files, found, strict=True):
            bar.update()
            if flaw is not None:
                flaws[file] = flaw
    return flaws

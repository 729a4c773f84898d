"""From the name of a dataset to a prepared TFDS directory: what it holds, and where. No TensorFlow."""

import difflib
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from mlpmixer_flax import UserError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> Pillow's name for such images


def get_dataset_info(dataset: str, split: str = "train", *, data_dir: str = "") -> dict[str, Any]:
    """What a split holds, without decoding an image.

    Args:
      dataset: "digits" (embedded), or a TFDS name: "cifar10", "cifar10:3.0.2", "name/config".
      split: in TFDS's syntax: "train", "train[:90%]", "train+test".
      data_dir: TFDS directory; "" = $TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Returns:
      A dict: `num_examples`, `num_classes`, `class_names` (list of str), `int2str` (label -> name) and
      `image_shape` (h, w, c), where h and w are None if the images vary in size.

    Raises:
      UserError: the dataset is unknown, not prepared or not made of images and labels, or the split is
        unknown or empty.
    """
    builder = load_builder(dataset, data_dir)
    image, label = (builder.info.features[key] for key in image_and_label_keys(builder))
    return {
        "num_examples": count_examples(builder, split),
        "num_classes": label.num_classes,
        "class_names": list(label.names),
        "int2str": label.int2str,
        "image_shape": tuple(image.shape),
    }


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
        raise UserError(f"Dataset {dataset!r} cannot be read from {data_dir}: {first_line(error)}") from error

    # <name>/<version>/ or <name>/<config>/<version>/
    depths = ("*/*/dataset_info.json", "*/*/*/dataset_info.json")
    found = [path.parent.relative_to(data_dir) for depth in depths for path in Path(data_dir).glob(depth)]
    official = tfds.list_builders(with_community_datasets=False)
    names = {"digits", *official, *(path.parts[0] for path in found)}
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or ["digits", "cifar10"]
        raise UserError(f"Dataset {dataset!r} is unknown: did you mean {' or '.join(map(repr, near))}?")
    if importlib.util.find_spec("tensorflow") is None or name not in official:
        others = ", ".join(sorted(str(path) for path in found if path.parts[0] == name))
        raise UserError(
            f"Dataset {dataset!r} is not prepared in {data_dir}{others and f' ({others} is)'}: "
            'pip install "mlpmixer-flax[prepare]" to have it prepared, or set --config.data_dir or '
            "TFDS_DATA_DIR to a directory that has it."
        )
    try:
        builder = tfds.builder(dataset, data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare()
    except Exception as error:
        raise UserError(
            f"Dataset {dataset!r} cannot be prepared in {data_dir}: {first_line(error)}"
        ) from error
    return builder


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


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

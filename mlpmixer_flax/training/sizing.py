"""Chooses model, image size and length of a run from scratch that suit the images and the device."""

import os
import statistics
from typing import Any

from PIL import Image

from mlpmixer_flax import UserError
from mlpmixer_flax.config import flatten, mixer_folder_config, mixer_tiny4_config
from mlpmixer_flax.data.dataset import find_dataset, is_files
from mlpmixer_flax.data.files import pixel_formats
from mlpmixer_flax.data.listing import select_split
from mlpmixer_flax.reading import open_file

_SAMPLE = 64  # images whose size is looked at

# (images have a side of 48 px or more, there is a GPU or TPU) -> image size and patch size in px, architecture
_SIZES = {
    (False, False): (32, 4, mixer_folder_config),
    (True, False): (64, 8, mixer_folder_config),
    (False, True): (32, 4, mixer_tiny4_config),
    (True, True): (128, 8, mixer_tiny4_config),
}
_MULTI_LABEL = {"loss": "sigmoid", "augment.label_smoothing": 0.0, "best_by": "mean_average_precision"}


def suit_images(dataset: str, *, backend: str, num_devices: int) -> dict[str, Any]:
    """Returns the changes of configs/folder.py that suit a folder or table of images and the device, by dotted key.

    Images with a typical short side below 48 px keep about their size; larger ones become 64 px on a CPU and 128 px
    on a GPU or TPU, where the model is larger too. A run sees about 400,000 images: it has 20 to 200 epochs. With
    fewer than 256 images the batches are smaller, so that an epoch still has several updates; all devices can share a batch.
    If images have several labels each, loss and scores are for these.

    Args:
      dataset: "folder:PATH" or "table:FILE".
      backend: what trains: "cpu", "gpu" or "tpu", as `jax.default_backend` says.
      num_devices: how many of them.

    Raises:
      UserError: as `find_dataset`; or the dataset is one of TFDS.
    """
    listing = find_dataset(dataset).listing if is_files(dataset) else None
    if listing is None:
        raise UserError(
            f"dataset {dataset!r} is neither a folder nor a table of images: give its config file with --config=FILE"
        )
    records = select_split(listing, "train")
    # From all parts of the split, because a table may be sorted by its labels.
    sample = records.files[:: -(-len(records) // _SAMPLE)]
    large = _typical_side(records.root, sample) >= 48
    image_size_px, patch_px, architecture = _SIZES[large, backend != "cpu"]
    batch_size = next((size for size in (64, 32) if len(records) >= 4 * size), 16)
    epochs = min(max(round(400_000 / len(records)), 20), 200)
    return {
        "preprocess.image_size_px": image_size_px,
        "batch_size": -(-batch_size // num_devices) * num_devices,
        "total_epochs": float(epochs),
        "eval_every_epochs": float(-(-epochs // 50)),
        "save_every_epochs": float(-(-epochs // 50)),
        **{f"model.{key}": value for key, value in flatten(architecture).items()},
        "model.patches.size": (patch_px, patch_px),
        **(_MULTI_LABEL if listing.multi_label else {}),
    }


def _typical_side(root: str, files: list[str]) -> float:
    """Returns the median of the short sides of images in pixels; files that are no images do not count."""
    sides = []
    for file in files:
        try:
            with (
                open_file(os.path.join(root, file)) as opened,
                Image.open(opened, formats=pixel_formats()) as image,
            ):
                sides.append(min(image.size))
        except (UserError, OSError, ValueError, SyntaxError):
            continue
    return statistics.median(sides) if sides else 0.0

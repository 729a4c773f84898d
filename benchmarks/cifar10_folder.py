"""Writes some classes of CIFAR-10 as a folder of photos: real photos of 32 px to try configs/folder.py with.

    python benchmarks/cifar10_folder.py FOLDER

Writes FOLDER/train/<class>/*.png with 860 images and FOLDER/test/<class>/*.png with 200 images of each of five
animals, from the training and the test split of CIFAR-10. Needs CIFAR-10, prepared in $TFDS_DATA_DIR or ~/tensorflow_datasets
(README.md says how).
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from mlpmixer_flax.data.examples import open_examples
from mlpmixer_flax.ending import exit_status, leave

ANIMALS = {"bird": 2, "cat": 3, "dog": 5, "frog": 6, "horse": 7}  # class -> its label in CIFAR-10
PER_CLASS = {"train": 860, "test": 200}


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="is created")
    folder = parser.parse_args().folder
    for split, per_class in PER_CLASS.items():
        examples = open_examples("cifar10", split)
        images, labels = examples.read(np.arange(len(examples)))
        for animal, label in ANIMALS.items():
            place = folder / split / animal
            place.mkdir(parents=True)
            for number, image in enumerate(images[labels == label][:per_class]):
                Image.fromarray(image).save(place / f"{number:04}.png")
    print(
        f"wrote {folder}: {len(ANIMALS)} classes with {PER_CLASS['train']} training and {PER_CLASS['test']} test images each"
    )


if __name__ == "__main__":
    leave(exit_status(main))

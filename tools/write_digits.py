"""Writes the dataset of the package, `mlpmixer_flax/data/digits/1.0.0/`, from the UCI digits in scikit-learn.

    pip install scikit-learn tensorflow-datasets array_record Pillow
    python tools/write_digits.py

The test split has every fifth image of each class and the training split has the others, so both splits have the same
share of each class. TensorFlow is not needed. Another run of this script writes the same examples.
"""

import argparse
import io
import shutil
import tempfile
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

PACKAGE_DIR = Path(__file__).resolve().parent.parent / "mlpmixer_flax"
CITATION = """@misc{alpaydin1998optical,
  title = {Optical Recognition of Handwritten Digits},
  author = {Alpaydin, E. and Kaynak, C.},
  year = {1998},
  publisher = {UCI Machine Learning Repository},
  doi = {10.24432/C50P49},
}"""


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,797 handwritten digits of 8x8 pixels."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="1,797 handwritten digits of 8x8 pixels: the test set of UCI's Optical Recognition "
            "of Handwritten Digits, as scikit-learn carries it, pixels scaled from 0..16 to 0..255.",
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
            citation=CITATION,
            license="CC BY 4.0",
        )

    def _split_generators(self, dl_manager):
        labels = load_digits().target
        is_test = np.zeros(len(labels), bool)
        for label in range(10):
            is_test[np.flatnonzero(labels == label)[::5]] = True
        return {"train": self._generate_examples(~is_test), "test": self._generate_examples(is_test)}

    def _generate_examples(self, chosen):
        digits = load_digits()
        for index in np.flatnonzero(chosen):
            pixels = np.round(digits.images[index] * 255 / 16).astype(np.uint8)
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, format="PNG", optimize=True)
            key = f"{index:04d}"
            yield key, {"id": key, "image": png.getvalue(), "label": int(digits.target[index])}


def main():
    argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        builder = Digits(data_dir=folder, file_format="array_record")
        builder.download_and_prepare()
        target = PACKAGE_DIR / "data" / "digits" / "1.0.0"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(builder.data_path, target)


if __name__ == "__main__":
    main()

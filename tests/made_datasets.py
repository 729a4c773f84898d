"""Real TFDS directories for tests, of images made by Pillow."""

import io

import tensorflow_datasets as tfds
from PIL import Image


def encode(pixels, file_format="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(
        buffer, file_format, **options
    )
    return buffer.getvalue()


def write_dataset(data_dir, name, examples, *, features=None, image_shape=(None, None, 3), **info):
    """Writes `examples` ({split: [(image bytes, label)]}) as a TFDS dataset that TFDS has no code for."""
    features = features or {
        "id": tfds.features.Text(),
        "image": tfds.features.Image(shape=image_shape),
        "label": tfds.features.ClassLabel(names=["cat", "dog", "emu"]),
    }
    info = {"supervised_keys": ("image", "label"), "file_format": "array_record", **info}
    keys = [key for key in features if key != "id"]

    class Writer(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=info["supervised_keys"],
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in examples}

        def _generate_examples(self, split):
            for i, values in enumerate(examples[split]):
                example = dict(zip(keys, values, strict=True))
                yield i, example | ({"id": f"{split}-{i}"} if "id" in features else {})

    Writer.name = name
    Writer(data_dir=data_dir, file_format=info["file_format"]).download_and_prepare()
    return str(data_dir)

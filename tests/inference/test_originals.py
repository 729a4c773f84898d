"""Images as people look at them: those of the dataset, not those of the model."""

import numpy as np
import pytest
from made_datasets import encode
from PIL import Image

from mlpmixer_flax.dataloader import open_examples
from mlpmixer_flax.inference.load import load_run
from mlpmixer_flax.inference.originals import read_originals


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four photos: wide, high and turned by its EXIF data, large, and gray."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    (root / "train" / "a").mkdir(parents=True)
    for name, shape, options in [
        ("wide", (20, 60, 3), {}),
        ("turned", (20, 60, 3), {"exif": exif}),
        ("large", (600, 1200, 3), {}),
        ("gray", (30, 40), {}),
    ]:
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        (root / "train" / "a" / f"{name}.png").write_bytes(encode(pixels, **options))
    (root / "val" / "a").mkdir(parents=True)
    (root / "val" / "a" / "1.png").write_bytes(encode(pixels))
    return root


def by_name(examples):
    names = [file.split("/")[-1].removesuffix(".png") for file in examples.files]
    return dict(zip(names, read_originals(examples, list(range(len(examples)))), strict=True))


def test_photos_have_their_own_pixels_and_aspect_ratio_whatever_the_model_sees(folder, digits_run):
    stored = {file.stem: Image.open(file) for file in (folder / "train" / "a").iterdir()}
    for examples in (
        open_examples(f"folder:{folder}", "train", image_size_px=8),  # squares of 8 px, in memory
        load_run(digits_run).open(f"folder:{folder}", "train"),  # of a model for gray images
    ):
        assert examples.read(np.arange(1))[0].shape[1:3] == (8, 8)
        found = by_name(examples)
        np.testing.assert_array_equal(found["wide"], stored["wide"])
        np.testing.assert_array_equal(found["turned"], np.rot90(stored["turned"], -1))
        np.testing.assert_array_equal(found["gray"], stored["gray"].convert("RGB"))
        assert found["large"].shape == (200, 400, 3)
        np.testing.assert_allclose(found["large"].mean(), np.mean(stored["large"]), atol=1)


def test_images_of_a_tfds_dataset_are_read_too(photos):
    examples = open_examples("photos", "test", data_dir=photos, image_size_px=8)
    images = read_originals(examples, [2, 4])
    assert [image.shape[2] for image in images] == [3, 3]
    assert all(20 <= side < 60 for image in images for side in image.shape[:2])
    assert (images[1][..., 0] == images[1][..., 1]).all()  # that one is gray
    assert images[0][..., 2].mean() == pytest.approx(6 * 2, abs=3)
    assert read_originals(examples, []) == []

"""How images that are not square become squares: crop, pad or stretch, at test time and in training."""

import numpy as np
import pytest
from made_datasets import encode, write_dataset
from PIL import Image

from mlpmixer_flax.data.images import FITS, RESAMPLING, central_box, random_box, read_square, to_square
from mlpmixer_flax.dataloader import open_examples

OPTIONS = {"crop_fraction": 1.0, "interpolation": "bilinear"}


def wide(width=160, height=16):
    """Returns a blue image with red at its left end and green at its right end."""
    image = np.full((height, width, 3), (0, 0, 255), np.uint8)
    image[:, : height // 2], image[:, -height // 2 :] = (255, 0, 0), (0, 255, 0)
    return image


def squares(image, fit, seeds, **options):
    for seed in seeds:
        rng = None if seed is None else np.random.default_rng(seed)
        image_of_pillow = Image.fromarray(image)
        yield np.asarray(to_square(image_of_pillow, 16, fit=fit, rng=rng, **OPTIONS | options))


def turned(image):
    return np.ascontiguousarray(np.swapaxes(image, 0, 1))


@pytest.mark.parametrize("turn", [np.asarray, turned])
def test_pad_and_stretch_show_the_ends_and_crop_does_not(turn):
    for fit, shown in (("crop", False), ("pad", True), ("stretch", True)):
        (square,) = squares(turn(wide()), fit, [None])
        assert (square[..., 0].max() > 120) == (square[..., 1].max() > 140) == shown
    (padded,) = squares(turn(wide()), "pad", [None])
    padded = turn(padded)
    assert (padded[:7] == 128).all() and (padded[9:] == 128).all() and (padded[7:9] != 128).all()
    (stretched,) = squares(turn(wide()), "stretch", [None])
    np.testing.assert_array_equal(
        stretched, Image.fromarray(turn(wide())).resize((16, 16), RESAMPLING["bilinear"])
    )


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_all_ways_are_the_same_for_squares(mode, interpolation):
    noise = np.random.default_rng(0).integers(0, 256, (50, 50, 4), np.uint8)
    image = Image.fromarray(noise).convert(mode)
    for crop_fraction in (1.0, 0.875, 0.3):
        for seed in (None, 1, 2, 3):
            options = {"crop_fraction": crop_fraction, "interpolation": interpolation, "min_crop_area": 0.2}
            found = [
                np.asarray(to_square(image, 16, fit=fit, rng=seed and np.random.default_rng(seed), **options))
                for fit in FITS
            ]
            if seed is None:
                np.testing.assert_array_equal(found[0], found[1])
            np.testing.assert_array_equal(found[0], found[2])


@pytest.mark.parametrize("size", [(50, 50), (60, 45), (45, 60), (60, 40), (64, 36), (37, 71)])
def test_photos_are_cropped_as_always(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
    for min_crop_area in (0.08, 0.5, 0.95, 1.0):
        for seed in range(20):
            box = central_box(*size, crop_fraction=0.875)
            if min_crop_area < 1:
                rng = np.random.default_rng(seed)
                box = random_box(*size, min_crop_area=min_crop_area, rng=rng) or box
            usual = image.resize((16, 16), RESAMPLING["bilinear"], box)
            options = {"min_crop_area": min_crop_area, "crop_fraction": 0.875, "interpolation": "bilinear"}
            ours = to_square(image, 16, fit="crop", rng=np.random.default_rng(seed), **options)
            np.testing.assert_array_equal(ours, usual)
            central = to_square(image, 16, fit="crop", **options)
            np.testing.assert_array_equal(
                central,
                image.resize((16, 16), RESAMPLING["bilinear"], central_box(*size, crop_fraction=0.875)),
            )


@pytest.mark.parametrize("turn", [np.asarray, turned])
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("min_crop_area", [0.05, 0.5, 0.9])
def test_random_crops_of_wide_images_reach_both_ends(turn, fit, min_crop_area):
    found = list(squares(turn(wide()), fit, range(300), min_crop_area=min_crop_area))
    reds = np.mean([square[..., 0][square[..., 1] != 128].max(initial=0) > 100 for square in found])
    greens = np.mean([square[..., 1][square[..., 1] != 128].max(initial=0) > 100 for square in found])
    assert min(reds, greens) > 0.02 and abs(reds - greens) < 0.15
    if fit == "crop":  # a tenth of the image, anywhere
        assert max(reds, greens) < 0.3
    assert len({square.tobytes() for square in found}) > 10


def test_images_of_one_pixel_and_one_row():
    for size in ((1, 1), (300, 1), (1, 300)):
        for fit in FITS:
            for seed in (None, 0, 1):
                (square,) = squares(wide(*size), fit, [seed], min_crop_area=0.05)
                assert square.shape == (16, 16, 3)


def test_pad_draws_around_a_crop_in_its_aspect_ratio():
    image = np.full((20, 80, 3), 200, np.uint8)
    for square in squares(image, "pad", range(30), min_crop_area=0.1):
        inside = (square[..., 0] == 200).any(1)
        assert 3 <= inside.sum() <= 6 and (square[~inside] == 128).all()  # 4 of 16 rows, times 3:4 to 4:3
        assert (square[inside] == 200).all()


def test_read_square_and_examples_agree(tmp_path):
    files = [encode(wide(160 + 8 * i, 16)) for i in range(4)] + [encode(turned(wide())), encode(wide(40, 40))]
    write_dataset(tmp_path, "wide", {"test": [(file, 0) for file in files]})
    options = {"interpolation": "bicubic", "crop_fraction": 0.9}
    results = {}
    for fit in FITS:
        examples = open_examples("wide", "test", data_dir=str(tmp_path), image_size_px=16, fit=fit, **options)
        images, _ = examples.read(np.arange(6))
        for file, image in zip(files, images, strict=True):
            np.testing.assert_array_equal(
                read_square(file, channels=3, size_px=16, fit=fit, **options), image
            )
        results[fit] = images
    usual = open_examples("wide", "test", data_dir=str(tmp_path), image_size_px=16, **options)
    np.testing.assert_array_equal(usual.images, results["crop"])
    assert (results["crop"] != results["pad"]).any() and (results["pad"] != results["stretch"]).any()
    streamed = open_examples(
        "wide", "test", data_dir=str(tmp_path), image_size_px=16, fit="crop", min_crop_area=0.2, **options
    )
    crops, _ = streamed.read(np.zeros(60, int), [(0, i) for i in range(60)])
    assert (crops[..., 0].max((1, 2)) > 100).any() and (crops[..., 1].max((1, 2)) > 100).any()

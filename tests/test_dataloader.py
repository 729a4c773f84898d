"""Examples and batches, on the embedded digits and on TFDS directories written here."""

import os

import numpy as np
import pytest
from digit_batches import assert_same, digits, run_python
from made_datasets import encode, write_dataset
from PIL import Image

from mlpmixer_flax import UserError
from mlpmixer_flax.data.images import central_box, random_box
from mlpmixer_flax.dataloader import TestBatches, TrainBatches, get_dataset_info, iterate, open_examples

DIGITS_TRAIN, DIGITS_TEST = 1433, 364


def fingerprints(batches, ks):
    """Returns one bytes object per example of these batches; all digits except a few are different."""
    rows = [(batches[k]["image"], batches[k]["label"]) for k in ks]
    return [
        image.tobytes() + bytes([label])
        for images, labels in rows
        for image, label in zip(images, labels, strict=True)
    ]


# --- examples


def test_cache_bytes_decides():
    size = DIGITS_TRAIN * 8 * 8
    cached, streamed = digits(cache_bytes=size), digits(cache_bytes=size - 1)
    assert cached.images is not None and cached.labels is not None
    assert cached.images.shape == (DIGITS_TRAIN, 8, 8, 1) and cached.images.dtype == np.uint8
    assert cached.labels.shape == (DIGITS_TRAIN,) and cached.labels.dtype == np.int32
    assert streamed.images is None and streamed.labels is None
    assert len(cached) == len(streamed) == DIGITS_TRAIN
    assert not cached.cropped


def test_image_mode_follows_the_channels_of_the_dataset(tmp_path):
    gray = np.arange(64, dtype=np.uint8).reshape(8, 8)
    color = Image.fromarray(np.stack([gray] * 3, -1))
    files = [encode(gray), encode(color), encode(color.convert("RGBA")), encode(color.convert("P"))]
    for channels in (1, 3, 4):
        name = f"modes{channels}"
        write_dataset(tmp_path, name, {"train": [(f, 0) for f in files]}, image_shape=(8, 8, channels))
        images = open_examples(name, "train", data_dir=str(tmp_path)).images
        assert images is not None and images.shape == (4, 8, 8, channels)
        for image in images[:3]:
            np.testing.assert_array_equal(
                image[..., : min(channels, 3)], np.stack([gray] * min(channels, 3), -1)
            )
        if channels == 4:
            assert (images[..., 3] == 255).all()


def test_images_of_varying_size_become_central_squares(photos):
    examples = open_examples("photos", "test", data_dir=photos, image_size_px=16, crop_fraction=0.875)
    full = open_examples("photos", "test", data_dir=photos, image_size_px=16)
    assert examples.images is not None and full.images is not None
    assert examples.images.shape == (9, 16, 16, 3) and examples.cropped
    for index, (image, whole) in enumerate(zip(examples.images, full.images, strict=True)):
        if index not in (3, 4):
            # Red rises to the right and green downwards; a central crop leaves their means at 127.
            red, green = image[..., 0].mean(0), image[..., 1].mean(1)
            assert (np.diff(red) > 0).all() and (np.diff(green) > 0).all()
            assert abs(red.mean() - 127) < 4 and abs(green.mean() - 127) < 4
            assert np.ptp(red) < np.ptp(whole[..., 0].mean(0))  # shows a smaller part of the gradient


def test_images_of_one_size_that_are_not_square_become_central_squares_too(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 8, 12, 3), dtype=np.uint8)
    encoded = {"train": [(encode(image), 0) for image in images]}
    data_dir = write_dataset(tmp_path, "wide", encoded, image_shape=(8, 12, 3))
    examples = open_examples("wide", "train", data_dir=data_dir, image_size_px=8)
    assert examples.cropped
    np.testing.assert_array_equal(examples.images, images[:, :, 2:10])


def test_central_square_is_resize_then_crop():
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 255, (6, 9, 3), np.uint8)).resize(
        (360, 240), Image.Resampling.BICUBIC
    )
    usual = smooth.resize((96, 64), Image.Resampling.BILINEAR).crop((20, 4, 76, 60))
    box = central_box(360, 240, crop_fraction=56 / 64)
    ours = smooth.resize((56, 56), Image.Resampling.BILINEAR, box)
    assert np.abs(np.asarray(usual, int) - np.asarray(ours, int)).max() <= 1


def test_interpolation_is_used(photos):
    images = [
        open_examples("photos", "test", data_dir=photos, image_size_px=64, interpolation=name).images
        for name in ("bilinear", "bicubic")
    ]
    assert (images[0] != images[1]).any()


def test_random_crops_are_random_and_a_function_of_seed_and_position(photos):
    options = {"data_dir": photos, "image_size_px": 16, "min_crop_area": 0.1}
    examples = open_examples("photos", "train", **options)
    assert examples.images is None  # crops are drawn again in each epoch, so they cannot be kept in memory
    batches = TrainBatches(examples, batch_size=40, seed=1)
    assert batches[0]["image"].shape == (40, 16, 16, 3)
    assert_same(
        batches[7], TrainBatches(open_examples("photos", "train", **options), batch_size=40, seed=1)[7]
    )
    # The crop does not depend on the batch size, because its seed has the position in the stream.
    assert_same(
        {k: v[10:20] for k, v in batches[2].items()}, TrainBatches(examples, batch_size=10, seed=1)[9]
    )
    # In a split of one image, only the crop can change with the seed.
    one = open_examples("photos", "train[:1]", **options)
    assert (
        TrainBatches(one, batch_size=1, seed=0)[0]["image"]
        != TrainBatches(one, batch_size=1, seed=1)[0]["image"]
    ).any()
    indices = np.zeros(200, int)
    images, _ = examples.read(indices, [(0, i) for i in range(200)])
    assert len({image.tobytes() for image in images}) == 200
    reds = images[..., 0].astype(float).mean(1)
    spans = np.ptp(reds, axis=1) / 255  # share of the width that the crop shows
    assert spans.min() < 0.5 and spans.max() > 0.75
    assert np.std(images[..., 0].mean((1, 2))) > 10  # crops are at the left and at the right
    assert np.std(images[..., 1].mean((1, 2))) > 10  # and at the top and at the bottom


def test_random_box_keeps_its_limits():
    for seed in range(300):
        width, height = 40 + seed % 50, 80 - seed % 30
        box = random_box(width, height, min_crop_area=0.3, rng=np.random.default_rng(seed))
        if box is not None:
            left, top, right, bottom = box
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            assert (right - left) * (bottom - top) >= 0.28 * width * height
            assert 0.7 < (right - left) / (bottom - top) < 1.43
    assert random_box(1000, 10, min_crop_area=0.9, rng=np.random.default_rng(0)) is None


def test_random_crops_do_not_touch_test_batches(photos):
    options = {"data_dir": photos, "image_size_px": 16}
    cropped = open_examples("photos", "test", min_crop_area=0.1, **options)
    central = open_examples("photos", "test", **options)
    assert_same(TestBatches(cropped, batch_size=4)[1], TestBatches(central, batch_size=4)[1])


# --- batches


def test_batch_is_a_function_of_seed_and_k():
    batches = TrainBatches(digits(), batch_size=32, seed=3)
    ks = [1_000_000, 0, 5, 44, 45]
    first = {k: batches[k] for k in ks}
    fresh = TrainBatches(digits(), batch_size=32, seed=3)
    for k in reversed(ks):
        assert_same(first[k], batches[k])
        assert_same(first[k], fresh[k])
        assert first[k]["image"].shape == (32, 8, 8, 1) and first[k]["image"].dtype == np.uint8
        assert first[k]["label"].shape == (32,) and first[k]["label"].dtype == np.int32
        assert first[k]["mask"].all() and first[k]["mask"].dtype == bool
    assert (first[0]["image"] != first[5]["image"]).any()
    assert (first[0]["image"] != TrainBatches(digits(), batch_size=32, seed=4)[0]["image"]).any()


@pytest.mark.parametrize("batch_size", [1, 32, 1433, 2000])
def test_every_example_once_per_epoch(batch_size):
    examples = open_examples("digits", "train[:50]") if batch_size == 1 else digits()
    n = len(examples)
    assert examples.images is not None and examples.labels is not None
    expected = sorted(i.tobytes() + bytes([x]) for i, x in zip(examples.images, examples.labels, strict=True))
    stream = fingerprints(
        TrainBatches(examples, batch_size=batch_size, seed=0), range(-(-3 * n // batch_size))
    )
    epochs = [stream[e * n : (e + 1) * n] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == expected
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_batch_may_be_larger_than_the_split():
    examples = open_examples("digits", "train[:7]")
    batch = TrainBatches(examples, batch_size=70, seed=0)[3]
    assert examples.labels is not None
    assert (
        np.bincount(batch["label"], minlength=10).tolist()
        == (10 * np.bincount(examples.labels, minlength=10)).tolist()
    )


@pytest.mark.parametrize("kind", [TrainBatches, TestBatches])
def test_shards_are_the_rows_of_the_global_batch(kind):
    options = {"seed": 0} if kind is TrainBatches else {}
    whole = kind(digits(), batch_size=96, **options)
    shards = [kind(digits(), batch_size=96, shard_index=i, shard_count=3, **options) for i in range(3)]
    for k in (0, 14):  # 14: the last test batch; in training it crosses the end of the epoch
        parts = [shard[k] for shard in shards]
        assert_same(whole[k], {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


@pytest.mark.parametrize(("index", "count"), [(-1, 2), (2, 2), (0, 0)])
def test_impossible_shard_is_refused(index, count):
    for make in (
        lambda **k: TrainBatches(digits(), batch_size=8, seed=0, **k),
        lambda **k: TestBatches(digits(), batch_size=8, **k),
    ):
        with pytest.raises(UserError, match=f"^shard {index} of {count} does not exist: use 0"):
            make(shard_index=index, shard_count=count)


def test_impossible_batch_size_or_seed_is_refused():
    with pytest.raises(UserError, match="^batch size 10 .* 4 shards: use a positive multiple of 4"):
        TrainBatches(digits(), batch_size=10, seed=0, shard_count=4)
    with pytest.raises(UserError, match="^batch size 0"):
        TestBatches(digits(), batch_size=0)
    with pytest.raises(UserError, match="^seed is -1: use 0 or more"):
        TrainBatches(digits(), batch_size=10, seed=-1)


@pytest.mark.parametrize(("batch_size", "shard_count"), [(364, 1), (50, 2), (128, 4), (1000, 2)])
def test_test_batches_have_every_example_once_and_in_order(batch_size, shard_count):
    examples = open_examples("digits", "test")
    shards = [
        TestBatches(examples, batch_size=batch_size, shard_index=i, shard_count=shard_count)
        for i in range(shard_count)
    ]
    images, labels = [], []
    assert {len(shard) for shard in shards} == {-(-DIGITS_TEST // batch_size)}
    for k in range(len(shards[0])):
        for shard in shards:
            batch = shard[k]
            assert (
                len(batch["image"]) == len(batch["label"]) == len(batch["mask"]) == batch_size // shard_count
            )
            assert not batch["image"][~batch["mask"]].any()
            images.append(batch["image"][batch["mask"]])
            labels.append(batch["label"][batch["mask"]])
    np.testing.assert_array_equal(np.concatenate(images), examples.images)
    np.testing.assert_array_equal(np.concatenate(labels), examples.labels)
    with pytest.raises(IndexError, match="does not exist: there are"):
        shards[0][len(shards[0])]


# --- imports


def test_import_is_light_and_loading_needs_no_tensorflow():
    heavy = "[m for m in ('jax', 'tensorflow', 'grain', 'tensorflow_datasets') if m in sys.modules]"
    result = run_python(
        "import sys, mlpmixer_flax.dataloader as d; from absl import flags\n"
        f"print({heavy}, flags.FLAGS.is_parsed())\n"
        "e = d.open_examples('digits', 'train', cache_bytes=0)\n"
        "b = d.TrainBatches(e, batch_size=8, seed=0)\n"
        "print('jax' in sys.modules, 'tensorflow' in sys.modules, flags.FLAGS.is_parsed())\n"
        "print(len(list(d.iterate(b, 0, 3))), 'tensorflow' in sys.modules)"
    )
    assert result.stdout.splitlines() == ["[] False", "False False False", "3 False"], result.stderr
    assert result.stderr == ""


def test_flags_that_a_program_has_parsed_stay():
    result = run_python(
        "import sys; from absl import app, flags\n"
        "flags.DEFINE_integer('size', 1, '')\n"
        "import mlpmixer_flax.dataloader as d\n"
        "def main(argv):\n"
        "    e = d.open_examples('digits', 'train', cache_bytes=0)\n"
        "    list(d.iterate(d.TrainBatches(e, batch_size=8, seed=0), 0, 2))\n"
        "    print(flags.FLAGS.size)\n"
        "app.run(main, ['x', '--size=3'])"
    )
    assert result.stdout.splitlines() == ["3"], result.stderr


# --- real datasets, if TFDS_DATA_DIR has them


@pytest.mark.parametrize(
    ("dataset", "shape", "train"), [("mnist", (28, 28, 1), 60000), ("cifar10", (32, 32, 3), 50000)]
)
def test_real_dataset(dataset, shape, train):
    data_dir = os.environ.get("TFDS_DATA_DIR", "")
    if not os.path.isdir(os.path.join(data_dir, dataset)) or not data_dir:
        pytest.skip(f"TFDS_DATA_DIR names no directory with {dataset}")
    info = get_dataset_info(dataset, "train")
    assert (info["num_examples"], info["num_classes"], info["image_shape"]) == (train, 10, shape)
    examples = open_examples(dataset, "test")
    assert examples.images is not None and examples.labels is not None
    assert examples.images.shape == (10000, *shape)
    assert np.bincount(examples.labels).sum() == 10000
    streamed = TrainBatches(open_examples(dataset, "train", cache_bytes=0), batch_size=64, seed=0)
    (batch,) = iterate(streamed, 12345, 12346)
    assert_same(batch, streamed[12345])

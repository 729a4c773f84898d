"""Tests which image size, model and length are chosen for a folder of images."""

from pathlib import Path

import numpy as np
import pytest
from made_datasets import encode
from made_folders import names, write

from mlpmixer_flax import UserError
from mlpmixer_flax.config import flatten, mixer_folder_config, mixer_tiny4_config
from mlpmixer_flax.training.configfile import load_config
from mlpmixer_flax.training.sizing import suit_images


def folder(root, *, height, width, count=4):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    data = encode(pixels, "PNG")
    return write(root, *names("train/a", count), *names("train/b", count), *names("test/a", 1), data=data)


@pytest.mark.parametrize(
    ("backend", "height", "width", "size_px", "patch_px", "model"),
    [
        ("cpu", 28, 28, 32, 4, mixer_folder_config),
        ("cpu", 47, 300, 32, 4, mixer_folder_config),
        ("cpu", 48, 64, 64, 8, mixer_folder_config),
        ("gpu", 28, 28, 32, 4, mixer_tiny4_config),
        ("tpu", 300, 400, 128, 8, mixer_tiny4_config),
    ],
)
def test_short_side_and_device_decide_the_image_size_and_the_model(
    tmp_path, backend, height, width, size_px, patch_px, model
):
    chosen = suit_images(
        f"folder:{folder(tmp_path, height=height, width=width)}", backend=backend, num_devices=1
    )
    config = load_config("folder.py", {"dataset": f"folder:{tmp_path}", **chosen})
    assert config.preprocess.image_size_px == size_px
    expected = {**flatten(model), "patches.size": (patch_px, patch_px)}
    assert expected.items() <= flatten(config.model).items()


@pytest.mark.parametrize(
    ("count", "epochs", "batch_size"), [(6, 200.0, 16), (80, 200.0, 32), (2500, 100.0, 64)]
)
def test_a_run_sees_about_400_000_images_in_20_to_200_epochs(tmp_path, count, epochs, batch_size):
    root = folder(tmp_path, height=8, width=8, count=count)
    write(root, "validation/a/0.png")  # so that all images of train are training images
    chosen = suit_images(f"folder:{root}", backend="cpu", num_devices=1)
    assert chosen["total_epochs"] == pytest.approx(epochs, abs=25)
    assert chosen["batch_size"] == batch_size
    assert 1 <= chosen["eval_every_epochs"] <= chosen["total_epochs"] / 40


def test_all_devices_can_share_a_batch(tmp_path):
    root = folder(tmp_path, height=8, width=8, count=6)
    assert suit_images(f"folder:{root}", backend="cpu", num_devices=3)["batch_size"] == 18


def test_a_table_that_is_sorted_by_label_is_looked_at_in_all_its_parts(tmp_path):
    small, large = (
        folder(tmp_path / "s", height=8, width=8, count=40),
        folder(tmp_path / "l", height=90, width=90, count=90),
    )
    rows = [
        f"{file.relative_to(tmp_path)},{label}"
        for label, root in (("a", small), ("b", large))
        for file in sorted(Path(root).rglob("*.png"))
    ]
    (tmp_path / "labels.csv").write_text("\n".join(["file,label", *rows]))
    chosen = suit_images(f"table:{tmp_path / 'labels.csv'}", backend="cpu", num_devices=1)
    assert chosen["preprocess.image_size_px"] == 64


def test_files_that_are_no_images_do_not_count(tmp_path):
    root = folder(tmp_path, height=64, width=64)
    write(root, *names("train/c", 5), data=b"no image")
    assert suit_images(f"folder:{root}", backend="cpu", num_devices=1)["preprocess.image_size_px"] == 64


def test_the_choice_is_valid_and_without_it_the_config_is_the_one_for_photos_on_a_cpu(tmp_path):
    chosen = suit_images(f"folder:{folder(tmp_path, height=100, width=80)}", backend="cpu", num_devices=1)
    config = load_config("folder.py", {"dataset": f"folder:{tmp_path}", **chosen})
    assert config.model.num_blocks == 4
    plain = flatten(load_config("folder.py"))
    for_few = {"total_epochs", "eval_every_epochs", "save_every_epochs", "batch_size"}
    assert {key for key in chosen if plain[key] != chosen[key]} == for_few


def test_a_dataset_of_tfds_is_refused():
    with pytest.raises(
        UserError, match="'digits' is neither a folder nor a table of images: .* --config=FILE"
    ):
        suit_images("digits", backend="cpu", num_devices=1)

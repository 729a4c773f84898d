"""TFDS datasets: the embedded digits, directories written here, and datasets and splits that are refused."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from made_datasets import encode, write_dataset

from mlpmixer_flax import UserError
from mlpmixer_flax.data import tfds as tfds_module
from mlpmixer_flax.dataloader import get_dataset_info, open_examples

DIGITS_TRAIN, DIGITS_TEST = 1433, 364


def test_info_of_digits():
    info = get_dataset_info("digits", "train")
    assert info["num_examples"] == DIGITS_TRAIN
    assert get_dataset_info("digits", "test")["num_examples"] == DIGITS_TEST
    assert get_dataset_info("digits", "train[:10]+test")["num_examples"] == 10 + DIGITS_TEST
    assert info["num_classes"] == 10
    assert info["class_names"] == list("0123456789")
    assert info["int2str"](7) == info["int2str"](np.int32(7)) == "7"
    assert info["image_shape"] == (8, 8, 1)


def test_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    images, labels = datasets.load_digits().images, datasets.load_digits().target
    expected = [
        np.round(i * 255 / 16).astype(np.uint8).tobytes() + bytes([n])
        for i, n in zip(images, labels, strict=True)
    ]
    stored = []
    for split in ("train", "test"):
        examples = open_examples("digits", split)
        assert examples.images is not None and examples.labels is not None
        stored += [i.tobytes() + bytes([n]) for i, n in zip(examples.images, examples.labels, strict=True)]
        shares = np.bincount(examples.labels) / len(examples)
        np.testing.assert_allclose(shares, np.bincount(labels) / len(labels), atol=2e-3)
    assert sorted(stored) == sorted(expected)


def test_digits_contain_no_path_of_the_machine_that_wrote_them():
    folder = Path(tfds_module.__file__).parent / "digits"
    text = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert len(text) > 100_000
    for word in (b"/root", b"/home", b"/tmp", b"/work", b"/Users"):
        assert word not in text


def test_info_of_images_of_varying_size(photos):
    info = get_dataset_info("photos", "test", data_dir=photos)
    assert info["image_shape"] == (None, None, 3)
    assert info["class_names"] == ["cat", "dog", "emu"]
    assert info["int2str"](2) == "emu"
    assert info["num_examples"] == 9


def test_version_may_be_named(photos):
    assert get_dataset_info("photos:1.0.0", data_dir=photos)["num_examples"] == 40
    with pytest.raises(UserError, match=r"'photos:2.0.0' is not prepared in .*photos/1\.0\.0.*data_dir"):
        get_dataset_info("photos:2.0.0", data_dir=photos)


@pytest.mark.parametrize("data_dir", ["a" * 5000, "a/" * 3000])
def test_a_data_dir_whose_name_no_file_can_have_is_one_without_the_dataset(data_dir):
    with pytest.raises(UserError, match="'mnist' is not prepared in a.*or set data_dir"):
        get_dataset_info("mnist", data_dir=data_dir)


def test_data_dir_comes_from_the_environment(photos, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", photos)
    assert get_dataset_info("photos")["num_examples"] == 40


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("cifar9", ["'cifar9' is unknown", "'cifar10'"]),
        ("digit", ["'digit' is unknown", "'digits'"]),
        ("fotos", ["'fotos' is unknown", "'photos'"]),
        ("", ["'' cannot be read"]),
        ("./photos", ["'./photos' is not a TFDS name: did you mean 'folder:./photos'?"]),
        ("tests", ["did you mean 'folder:tests'?"]),
        ("a/b/c:1", ["'a/b/c:1' cannot be read"]),
        (
            "svhn_cropped",
            ["'svhn_cropped' is not prepared", "mlpmixer-flax[prepare]", "TFDS_DATA_DIR", "data_dir"],
        ),
    ],
)
def test_a_dataset_that_cannot_be_used_is_refused(photos, dataset, words, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent.parent)
    if dataset == "svhn_cropped" and importlib.util.find_spec("tensorflow"):
        pytest.skip("TensorFlow is installed, so the dataset would be downloaded")
    with pytest.raises(UserError) as error:
        get_dataset_info(dataset, data_dir=photos)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("dataset", "data_dir", "words"),
    [
        ("https://a.b/photos", "", "dataset 'https://a.b/photos' is a URL"),
        ("photos", "https://a.b/tfds", "data_dir 'https://a.b/tfds' is a URL"),
        ("photos", Path("https://a.b/tfds"), "data_dir 'https:/a.b/tfds' is a URL"),
    ],
)
def test_a_url_is_refused_as_what_it_is(dataset, data_dir, words):
    for function in (get_dataset_info, open_examples):
        with pytest.raises(UserError, match=f"{words}, and only local paths and those such as"):
            function(dataset, "train", data_dir=data_dir)


def test_a_url_in_the_environment_is_refused_too(monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "https://a.b/tfds")
    with pytest.raises(UserError, match="data_dir 'https://a.b/tfds' is a URL"):
        get_dataset_info("photos")


def test_data_dir_may_be_a_path_object_or_in_the_home_directory(photos, monkeypatch):
    monkeypatch.setenv("HOME", str(Path(photos).parent))
    for data_dir in (Path(photos), f"~/{Path(photos).name}"):
        assert get_dataset_info("photos", data_dir=data_dir)["num_examples"] == 40
        assert len(open_examples("photos", "train", data_dir=data_dir, image_size_px=4)) == 40


def test_an_archive_as_a_dataset_is_refused_with_what_to_do(tmp_path, photos):
    (tmp_path / "photos.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="photos.zip' is an archive: unpack it and give folder:PATH"):
        get_dataset_info(str(tmp_path / "photos.zip"), data_dir=photos)


@pytest.mark.parametrize("split", ["trian", "train[", "", "train[::2]", "train[:99999]", "train+nope"])
def test_an_unknown_split_is_refused_with_the_known_ones(split):
    with pytest.raises(UserError, match="'train', 'test'|'test', 'train'") as error:
        open_examples("digits", split)
    assert repr(split) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("split", ["train[:0%]", "train[50%:40%]", "train[5:5]", "test+train[50%:40%]"])
def test_empty_split_is_refused(split):
    for function in (get_dataset_info, open_examples):
        with pytest.raises(UserError, match="no examples"):
            function("digits", split)


def test_dataset_without_labels_or_images_is_refused(tmp_path):
    label = tfds.features.ClassLabel(num_classes=2)
    for name, features, example in [
        ("texts", {"text": tfds.features.Text(), "label": label}, ("a", 1)),
        (
            "captions",
            {"image": tfds.features.Image(), "text": tfds.features.Text()},
            (encode(np.zeros((4, 4, 3), np.uint8)), "a"),
        ),
        (
            "deep",
            {"image": tfds.features.Image(shape=(2, 2, 1), dtype=np.uint16), "label": label},
            (encode(np.zeros((2, 2), np.uint16)), 1),
        ),
    ]:
        write_dataset(tmp_path, name, {"train": [example]}, features=features, supervised_keys=None)
        with pytest.raises(
            UserError, match=f"dataset '{name}' cannot be used for image classification: "
        ) as error:
            open_examples(name, "train", data_dir=str(tmp_path))
        assert f"its features are {', '.join(sorted(features))}; choose" in str(error.value)


def test_other_keys_are_found_by_supervised_keys(tmp_path):
    features = {"scan": tfds.features.Image(shape=(2, 2, 1)), "kind": tfds.features.ClassLabel(num_classes=4)}
    pixels = np.array([[1, 2], [3, 4]], np.uint8)
    write_dataset(
        tmp_path,
        "scans",
        {"train": [(encode(pixels), 3)]},
        features=features,
        supervised_keys=("scan", "kind"),
    )
    examples = open_examples("scans", "train", data_dir=str(tmp_path))
    assert examples.images is not None and examples.labels is not None
    np.testing.assert_array_equal(examples.images[0, :, :, 0], pixels)
    assert examples.labels.tolist() == [3]


def test_other_file_format_is_refused(photos, tmp_path):
    shutil.copytree(photos, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "photos" / "1.0.0" / "dataset_info.json"
    path.write_text(path.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(UserError, match="prepared as tfrecord .*array_record"):
        open_examples("photos", "train", data_dir=str(tmp_path))


def test_damaged_file_is_reported(tmp_path, photos):
    shutil.copytree(photos, tmp_path, dirs_exist_ok=True)
    (path,) = (tmp_path / "photos" / "1.0.0").glob("*train.array_record*")
    data = bytearray(path.read_bytes())
    data[5000:5100] = bytes(100)
    path.write_bytes(data)
    with pytest.raises(
        UserError, match="^image 6 of split 'train' of dataset 'photos' .*its record is damaged"
    ):
        open_examples("photos", "train", data_dir=str(tmp_path), image_size_px=8)
    path.unlink()
    with pytest.raises(UserError, match="'photos' cannot be read .*No such file.*mount"):
        open_examples("photos", "train", data_dir=str(tmp_path), image_size_px=8)

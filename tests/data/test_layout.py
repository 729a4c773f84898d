"""Which subfolders of a folder are splits and which are classes, and which files are images."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from made_datasets import encode
from made_folders import names, open_to_train, write

from mlpmixer_flax import UserError, get_dataset_info
from mlpmixer_flax.data import files
from mlpmixer_flax.data.files import images_below
from mlpmixer_flax.data.folders import read_folder
from mlpmixer_flax.data.layout import split_of
from mlpmixer_flax.data.listing import select_split
from mlpmixer_flax.dataloader import open_examples

JPEG = encode(np.full((6, 6, 3), 90, np.uint8), "JPEG")
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)


def found(path):
    """Returns split -> the folders of its classes, for the splits on disk and the one that is cut out."""
    folder = read_folder(str(path))
    return {
        split: sorted({image.file.rsplit("/", 2)[0] for image in images})
        for split, images in folder.splits.items()
    }


# --- splits


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        # those of ../shared/cases/split_names
        (["Training", "Testing"], {"train": "Training", "test": "Testing"}),
        (["training_set", "test_set"], {"train": "training_set", "test": "test_set"}),
        (["train", "dev"], {"train": "train", "validation": "dev"}),
        (["seg_train/seg_train", "seg_test/seg_test"], {"train": "seg_train", "test": "seg_test"}),
        # others
        (["train", "val"], {"train": "train", "validation": "val"}),
        (["Train", "VALID"], {"train": "Train", "validation": "VALID"}),
        (
            ["train", "validation", "test"],
            {"train": "train", "validation": "validation", "test": "test"},
        ),
        (["TRAIN", "TEST"], {"train": "TRAIN", "test": "TEST"}),
        (
            ["train-set", "val-set", "test-set"],
            {"train": "train-set", "validation": "val-set", "test": "test-set"},
        ),
        (["TrainSet", "TestSet"], {"train": "TrainSet", "test": "TestSet"}),
        (["trainset", "devset"], {"train": "trainset", "validation": "devset"}),
        (["train_images", "test_images"], {"train": "train_images", "test": "test_images"}),
        (["images_train", "images_val"], {"train": "images_train", "validation": "images_val"}),
        (["train2017", "val2017"], {"train": "train2017", "validation": "val2017"}),
        (["Train Data", "Validation Data"], {"train": "Train Data", "validation": "Validation Data"}),
        (["trainval", "test"], {"train": "trainval", "test": "test"}),
        (["train_val", "test"], {"train": "train_val", "test": "test"}),
        (["CUB-train", "CUB-test"], {"train": "CUB-train", "test": "CUB-test"}),
        (["ILSVRC2012_img_train", "ILSVRC2012_img_val"], {"train": "ILSVRC2012_img_train"}),
        (["train/images", "test/images"], {"train": "train", "test": "test"}),
        # either kind
        (["train", "eval"], {"train": "train", "test": "eval"}),
        (["train", "hold-out"], {"train": "train", "test": "hold-out"}),
        (["training", "validation", "evaluation"], {"validation": "validation", "test": "evaluation"}),
        (["train", "evaluation", "test"], {"validation": "evaluation", "test": "test"}),
    ],
)
def test_folders_with_usual_names_are_splits(tmp_path, folders, expected):
    for folder in folders:
        write(tmp_path, *names(f"{folder}/red", 3), *names(f"{folder}/blue", 3))
    splits = found(tmp_path)
    assert read_folder(str(tmp_path)).class_names == ["blue", "red"]
    for split, folder in expected.items():
        assert {place.split("/")[0] for place in splits[split]} == {folder}
    assert {"train", "validation"} <= splits.keys()
    assert ("test" in splits) == ("test" in expected)
    notes = "\n".join(read_folder(str(tmp_path)).notes)
    for split, folder in expected.items():
        said = f"{folder!r} is {split!r}" in notes
        assert said == (folder.lower() not in ("train", "val", "valid", "validation", "test"))


def test_a_split_is_also_found_by_its_usual_names_and_the_name_of_its_folder(tmp_path):
    write(tmp_path, *names("seg_train/a", 4), *names("seg_test/a", 4), *names("Dev/a", 4))
    folder = read_folder(str(tmp_path))
    for split, asked in {
        "train": ["train", "Training", "seg_train", "SEG_TRAIN"],
        "validation": ["validation", "valid", "val", "dev", "Dev"],
        "test": ["test", "testing", "seg_test"],
    }.items():
        for name in asked:
            assert select_split(folder, name).files == select_split(folder, split).files
            assert select_split(folder, f"{name}[:50%]").files == select_split(folder, f"{split}[:50%]").files


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"), ("validation", "validation"), ("étest", None), ("contest", None), ("invalid", None),
        ("test tube", None), ("latest", None), ("trainer", None), ("train[0:1]", None), ("eval", None), ("", None),
    ],
)  # fmt: skip
def test_a_word_counts_only_as_a_whole(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize(
    "classes",
    [
        ["bus", "train"],
        ["invalid", "valid"],
        ["test_tube", "train_station"],
        ["dev", "ops"],
        ["bullet_train", "steam_train"],
    ],
)
def test_a_class_may_have_the_name_of_a_split(tmp_path, classes):
    for name in classes:
        write(tmp_path, *names(name, 5), f"{name}/from a subfolder/x.png")
    assert read_folder(str(tmp_path)).class_names == classes


def test_names_that_only_look_like_splits_stay_classes_when_they_hold_folders(tmp_path):
    for name in ("test_tube", "train_station", "valley"):
        write(tmp_path, *names(f"{name}/at {name}", 5))
    assert read_folder(str(tmp_path)).class_names == ["test_tube", "train_station", "valley"]


@pytest.mark.parametrize(
    "folders", [["train", "Train"], ["train", "training_set"], ["train", "val", "valid"]]
)
def test_two_folders_for_one_split_are_refused(tmp_path, folders):
    for folder in folders:
        write(tmp_path, *names(f"{folder}/a", 2))
    two = ", ".join(map(repr, sorted(folders)[-2:]))
    with pytest.raises(
        UserError, match=f"has {two}, and two of these are the same split, .*: rename or remove"
    ):
        read_folder(str(tmp_path))


def test_a_folder_without_images_does_not_make_a_split_ambiguous(tmp_path):
    write(tmp_path, *names("images_train/a", 2), *names("images_val/a", 2))
    write(tmp_path, "train_labels/a/1.txt", "val_labels/a/1.txt", data=b"text")
    assert found(tmp_path) == {"train": ["images_train"], "validation": ["images_val"]}
    assert read_folder(str(tmp_path)).other_names == {"images_train": "train", "images_val": "validation"}


def test_an_unpacked_archive_has_a_folder_of_its_own_around_the_classes_or_splits(tmp_path):
    write(tmp_path / "1", *names("flowers/flower_photos/rose", 9), *names("flowers/flower_photos/tulip", 9))
    write(tmp_path / "1", "flowers/LICENSE.txt", data=b"text")
    folder = read_folder(str(tmp_path / "1"))
    assert folder.class_names == ["rose", "tulip"]
    assert "is read from its folder 'flowers/flower_photos/'" in folder.notes[0]
    write(
        tmp_path / "2",
        *names("archive/Training/a", 9),
        *names("archive/Testing/a", 9),
        "archive/Training/b/1.png",
    )
    folder = read_folder(str(tmp_path / "2"))
    assert folder.class_names == ["a", "b"] and len(select_split(folder, "test")) == 9


def test_test_images_without_classes_are_left_out_with_a_note(tmp_path):
    write(
        tmp_path,
        *names("train/a", 5),
        *names("train/b", 5),
        *names("test", 5),
        "extra/boxes.json",
        "cover.png",
    )
    folder = read_folder(str(tmp_path))
    for words in [
        "folder 'extra' beside the splits (1)",
        "folder 'test' beside the splits (1)",
        "images outside of class folders (1)",
    ]:
        assert words in folder.notes[0]
    assert {file.split("/")[0] for file in select_split(folder, "test").files} == {"train"}


# --- layouts that are refused


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], ["does not exist", "folder:PATH", "PATH/<class>"]),
        (["readme.txt"], ["has no class folders", "PATH/train/<class>"]),
        (
            ["1.png", "2.png"],
            ["has images but no class", "use its parent, folder:{parent}, if", "PATH/<class>"],
        ),
        (
            ["a/1.txt"],
            ["no images in class folders", "'.txt' files (1)", "folder 'a' without images (1)"],
        ),
        (
            ["train/1.png", "test/2.png"],
            ["'test', 'train', but no 'train' that contains class folders and no images"],
        ),
        (["Training/1.png", "Testing/2.png"], ["'Testing', 'Training', but no 'train' that contains class"]),
        (["train/1.png", "test/a/2.png"], ["but no 'train' that contains class folders and no images"]),
    ],
)
def test_another_layout_is_refused_with_the_expected_one(tmp_path, files, words):
    path = tmp_path / "photos"
    write(path, *files)
    for function in (get_dataset_info, open_examples):
        with pytest.raises(UserError) as error:
            function(f"folder:{path}", "train")
        for word in words:
            assert word.format(parent=tmp_path) in str(error.value)
        assert repr(str(path)) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("places", "words"),
    [
        (
            ["part 1/{}", "part 2/{}"],
            [
                "the folders 'part 1', 'part 2'",
                "rename them to train, validation and test",
                "out of the subfolders",
            ],
        ),
        (["训练集/{}", "测试集/{}"], ["'测试集', '训练集'", "same subfolders 'blue', 'green', 'red'"]),
        (["train/source 1/{}", "train/source 2/{}"], ["'source 1', 'source 2'", "'blue', 'green', 'red'"]),
        (["{}/train", "{}/test"], ["'blue', 'green', 'red'", "'test', 'train'", "PATH/train/<class>"]),
    ],
)
def test_classes_that_hold_the_same_subfolders_are_refused(tmp_path, places, words):
    for place in places:
        for name in ("red", "green", "blue"):
            write(tmp_path, *names(place.format(name), 2))
    for function in (get_dataset_info, open_examples):
        with pytest.raises(UserError, match="hold the same subfolders") as error:
            function(f"folder:{tmp_path}", "train")
        for word in words:
            assert word in str(error.value)
        assert "\n" not in str(error.value)


def test_a_split_that_lacks_a_class_is_refused_too_and_long_lists_are_bounded(tmp_path):
    write(tmp_path, *(f"a/{i}/0.png" for i in range(100)), *(f"b/{i}/0.png" for i in range(90)))
    with pytest.raises(UserError, match="same subfolders '0', '1', '10', '11', '12' and 85 more"):
        read_folder(str(tmp_path))


def test_classes_with_subfolders_of_their_own_or_one_for_images_are_fine(tmp_path):
    write(tmp_path / "own", *names("cat/siamese", 2), *names("cat/misc", 2), *names("dog/poodle", 2))
    write(tmp_path / "own", *names("dog/misc", 2), *names("dog/terrier", 2))
    assert read_folder(str(tmp_path / "own")).class_names == ["cat", "dog"]
    # Tiny ImageNet
    write(tmp_path / "tiny", *names("train/n01443537/images", 2), *names("train/n01629819/images", 2))
    assert read_folder(str(tmp_path / "tiny")).class_names == ["n01443537", "n01629819"]
    write(tmp_path / "mixed", *names("cat/a", 2), *names("cat/b", 2), *names("dog/a", 2), *names("dog/b", 2))
    write(tmp_path / "mixed", "dog/0.png")
    assert read_folder(str(tmp_path / "mixed")).class_names == ["cat", "dog"]


# --- paths


@pytest.mark.parametrize("path", ["xyz://bucket/photos", "https://a.b/c.zip", "https:/a.b"])
def test_a_url_is_refused_as_what_it_is(path):
    for function in (get_dataset_info, open_examples):
        with pytest.raises(UserError, match=f"folder '{path}' is a URL.*: copy it to this machine"):
            function(f"folder:{path}", "train")


def test_an_archive_or_a_file_is_refused_with_what_to_do(tmp_path):
    for file, words in {
        "photos.zip": "is an archive: unpack it and give the folder",
        "photos.tar.gz": "is an archive: unpack it",
        "cat.jpg": "is a file: put the images in class folders and give the folder",
    }.items():
        write(tmp_path, file)
        with pytest.raises(UserError, match=words) as error:
            get_dataset_info(f"folder:{tmp_path / file}", "train")
        assert file in str(error.value)


def test_home_and_path_objects_work(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "photos", *names("a", 9), *names("b", 9))
    assert get_dataset_info("folder:~/photos", "all")["num_examples"] == 18
    assert read_folder(tmp_path / "photos").class_names == ["a", "b"]
    assert images_below(tmp_path / "photos") == images_below(str(tmp_path / "photos"))


# --- which files are images


def test_images_with_suffixes_that_nobody_knows_are_used_and_said(tmp_path):
    """As in shared/cases/odd_suffix: names that downloads and cameras produce."""
    odd = ["1.jpg?w=200", "2.jpg@100w", "3.0001", "4", "5.jpg_large", "6.JPEG;1"]
    write(tmp_path, *(f"{name}/{file}" for name in "ab" for file in odd), data=JPEG)
    write(tmp_path, "a/7.0002", data=encode(np.zeros((4, 4), np.uint8), "PNG"))
    write(tmp_path, "a/8.0003", data=encode(np.zeros((4, 4, 3), np.uint8), "WEBP"))
    write(tmp_path, "a/9.png", "b/9.png")
    # not images, or copies of other images
    write(tmp_path, "a/README", "a/readme.txt", "a/x.0004", "a/empty", data=b"")
    write(tmp_path, "a/9.jpg_original", "a/9.jpg~", "a/9.jpg.bak", "a/9.thm", "a/labels.txt", data=JPEG)
    # a camera's raw photo, which begins as a TIFF with a preview
    write(tmp_path, "b/raw.nef", data=encode(np.zeros((4, 4), np.uint8), "TIFF"))
    folder = read_folder(str(tmp_path))
    used = sorted(select_split(folder, "all").files)
    expected = [f"{name}/{file}" for name in "ab" for file in odd] + [
        "a/7.0002",
        "a/8.0003",
        "a/9.png",
        "b/9.png",
    ]
    assert used == sorted(expected)
    said, left_out = folder.notes[:2]
    assert said.startswith(f"used in {str(tmp_path)!r}, because they are images by their content: ")
    for words in ["'.jpg?w=200' files (2)", "'.0001' files (2)", "'' files (2)", "'.0002' files (1)"]:
        assert words in said
    for words in ["'.nef' files (1)", "'.jpg_original' files (1)", "'' files (2)"]:
        assert words in left_out
    whole, _ = open_to_train(f"folder:{tmp_path}", "all", "test")
    assert len(whole.records) == len(expected)
    assert [Path(path).name for path in images_below(str(tmp_path / "b"))] == sorted([*odd, "9.png"])


def test_known_suffixes_cost_no_look_at_the_content(tmp_path, monkeypatch):
    write(tmp_path, *names("a", 3), *names("b", 3))
    write(tmp_path, "a/1.txt", "b/2.json", data=b"text")
    monkeypatch.setattr("builtins.open", lambda *_: pytest.fail("a file is opened"))
    read_folder(str(tmp_path))


@pytest.mark.skipif(os.name != "posix", reason="no named pipes")
def test_a_pipe_without_a_suffix_does_not_stop_the_search(tmp_path):
    write(tmp_path, *names("a", 3), *names("b", 3))
    os.mkfifo(tmp_path / "a" / "pipe")
    os.symlink(tmp_path / "gone", tmp_path / "a" / "broken link")
    assert len(select_split(read_folder(str(tmp_path)), "all")) == 6


def test_heic_photos_are_left_out_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    write(tmp_path, *names("a", 3), *names("b", 3))
    write(tmp_path, "a/1.HEIC", "a/2.heif", data=HEIC)
    folder = read_folder(str(tmp_path))
    assert "'.heic' files (1), '.heif' files (1)" in folder.notes[0]
    assert folder.notes[1].startswith("HEIC photos cannot be read here: convert them")
    assert folder.notes[1].endswith("or pip install pillow-heif")
    for name in ("only", "nothing"):
        write(tmp_path / name, "a/1.heic", "b/2.heic", data=HEIC)
        with pytest.raises(UserError, match="no images in class folders.*pip install pillow-heif"):
            read_folder(str(tmp_path / name))


def test_avif_without_a_decoder_says_what_to_do(monkeypatch):
    suffixes = files._image_suffixes() - {".avif"}
    monkeypatch.setattr(files, "_image_suffixes", lambda: suffixes)
    assert files.advice([".avif"]).endswith("or pip install --upgrade pillow")
    assert files.advice([".txt", ".jpg"]) == ""


def test_a_png_that_a_phone_calls_heic_is_read(tmp_path):
    data = encode(np.full((6, 6, 3), 7, np.uint8), "PNG")
    write(tmp_path, "a/1.heic", "b/2.heic", "a/3.png", "b/4.png", data=data)
    examples = open_examples(f"folder:{tmp_path}", "all", image_size_px=6)
    assert examples.images is not None and len(examples) == 4
    assert (examples.images == 7).all()

"""Folders of images: the order and the cut of splits, notes and errors, and training on a folder.

test_layout.py tests which subfolders are splits and classes, test_splits.py the syntax of splits, test_image_checks.py
images that cannot be used, and test_copies.py copies.
"""

import json
import os
import re
import time
import unicodedata
from collections import Counter

import numpy as np
import pytest
from made_datasets import encode
from made_folders import files_of, names, open_split, open_to_train, write
from PIL import Image
from small_runs import TINY

from mlpmixer_flax import UserError, get_dataset_info
from mlpmixer_flax.data.folders import read_folder
from mlpmixer_flax.data.listing import select_split
from mlpmixer_flax.dataloader import TestBatches, TrainBatches, iterate, open_examples
from mlpmixer_flax.train import main
from mlpmixer_flax.training.configfile import load_config
from mlpmixer_flax.training.record import make_record
from mlpmixer_flax.training.setup import make_setup, settle

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)


# --- which image is in which split


@pytest.mark.slow
def test_names_in_any_script_and_digits_enlarged_reach_the_batches(tmp_path):
    digits = open_examples("digits", "test")
    assert digits.images is not None
    classes = {"кот": 0, "猫": 1, "ñandú": 2, "a b'c": 3}
    for name, digit in classes.items():
        (tmp_path / name).mkdir()
        for i, image in enumerate(digits.images[digits.labels == digit][:10]):
            large = Image.fromarray(image[..., 0]).resize((40, 30 + i), Image.Resampling.NEAREST)
            large.save(tmp_path / name / f"{name} {i}.{('JPG', 'png', 'Gif', 'WebP', 'bmp')[i % 5]}")
    dataset = f"folder:{tmp_path}"
    info = get_dataset_info(dataset, "train")
    assert info["class_names"] == sorted(classes) and info["num_classes"] == 4
    number = info["num_examples"]
    assert info["image_shape"] == (None, None, 3) and 24 <= number <= 39
    assert info["int2str"](np.int32(3)) == info["class_names"][3]

    examples = open_examples(dataset, "train", image_size_px=16)
    assert examples.images is not None and examples.labels is not None
    assert examples.cropped and examples.images.shape == (number, 16, 16, 3)
    for index, record in enumerate(examples.source.records.__getitems__(list(range(number)))):
        label, name = record.label, record.name.split("/")[0]
        assert info["class_names"][label] == name and examples.labels[index] == label
        image = Image.open(tmp_path / record.name).convert("RGB")
        box = ((40 - min(image.size)) / 2, (image.height - min(image.size)) / 2)
        box = (*box, box[0] + min(image.size), box[1] + min(image.size))
        np.testing.assert_array_equal(
            examples.images[index], image.resize((16, 16), Image.Resampling.BILINEAR, box)
        )

    # Processes that stream random crops give the same batches.
    streamed = open_examples(dataset, "train", image_size_px=16, min_crop_area=0.5)
    batches = TrainBatches(streamed, batch_size=8, seed=0)
    for k, batch in enumerate(iterate(batches, 0, 3, num_workers=1)):
        np.testing.assert_array_equal(batch["image"], batches[k]["image"])
        np.testing.assert_array_equal(batch["label"], batches[k]["label"])
    test = TestBatches(open_examples(dataset, "test", image_size_px=16), batch_size=40)
    assert test[0]["mask"].sum() == 40 - number and len(test) == 1


def test_missing_validation_split_is_about_a_fifth_of_each_class_and_the_same_everywhere(tmp_path):
    here, there = tmp_path / "here", tmp_path / "elsewhere" / "x"
    for root, order in [(here, 1), (there, -1)]:
        write(root, *names("a", 40)[::order], *names("b", 10)[::order], *names("c", 2), "d/only.png")
    train, validation = files_of(here, "train"), files_of(here, "validation")
    assert train == files_of(there, "train") and validation == files_of(there, "validation")
    assert validation == files_of(here, "test") == files_of(here, "val")
    everything = {*names("a", 40), *names("b", 10), *names("c", 2), "d/only.png"}
    assert set(train) | set(validation) == everything and not set(train) & set(validation)
    assert {file[0] for file in train} == set("abcd")
    # Fixed here, so that no machine and no version splits differently: a run that continues there would train
    # on its test images.
    counts = {name: sum(file.startswith(name) for file in validation) for name in "abcd"}
    assert counts == {"a": 7, "b": 1, "c": 1, "d": 0}
    assert [file for file in validation if file[0] == "b"] == ["b/7.png"]


def test_the_validation_split_is_the_same_in_whatever_folder_the_classes_lie(tmp_path):
    classes = [*names("a", 30), *names("b", 30)]
    expected = None
    for place in ("", "train/", "Training/", "archive/photos/", "seg_train/seg_train/"):
        root = tmp_path / f"at {place.replace('/', ' ')}"
        write(root, *(place + file for file in classes))
        found = [file.removeprefix(place) for file in files_of(root, "validation")]
        expected = expected or found
        assert found == expected


def test_no_image_changes_its_split_when_others_are_added_or_removed(tmp_path):
    """As in shared/cases/grows: a folder gains images between two starts of a run."""
    root = tmp_path / "photos"
    write(root, *names("red", 20), *names("green", 20))
    before = {split: set(files_of(root, split)) for split in ("train", "validation")}
    write(root, *names("red", 25, start=20), *names("green", 5, start=20), *names("blue", 9))
    (root / "red" / "3.png").unlink()
    after = {split: set(files_of(root, split)) for split in ("train", "validation")}
    for split, other in [("train", "validation"), ("validation", "train")]:
        assert before[split] and before[split] - {"red/3.png"} <= after[split]
        assert not before[split] & after[other]
    assert len(after["validation"]) > len(before["validation"])


def test_the_cut_keeps_a_training_image_of_each_class_and_names_the_classes_without_validation_images(
    tmp_path,
):
    root = tmp_path / "photos"
    low = [file for file in files_of(write(tmp_path / "all", *names("low", 60)), "validation")]
    assert len(low) > 3
    write(root, *low[:3], *names("big", 60), *(f"single {i}/0.png" for i in range(40)))
    folder = read_folder(str(root))
    train, validation = (
        Counter(name for image in folder.splits[split] for name in image.classes)
        for split in ("train", "validation")
    )
    assert train["low"] == 1 and validation["low"] == 2
    assert train.keys() == {*folder.class_names} and len(train.keys() - validation.keys()) == 40
    (note,) = [note for note in folder.notes if "has no validation images" in note]
    assert (
        "about a fifth of each class" in note and "at least one image of each class stays in 'train'" in note
    )
    assert "classes without a validation image (40): 'single 0', 'single 1', 'single 10'" in note
    assert note.endswith("and 35 more") and note.count("single") == 5


def test_a_tiny_folder_has_a_validation_image_too(tmp_path):
    high = files_of(write(tmp_path / "all", *names("a", 30), *names("b", 30)), "train")
    files = [next(f for f in high if f[0] == name) for name in "ab"]
    files += [next(f for f in high if f[0] == name and f not in files) for name in "ab"]
    folder = read_folder(write(tmp_path / "few", *files))
    assert len(select_split(folder, "validation")) == 1 and len(select_split(folder, "train")) == 3
    assert any("the choice may change when images are added" in note for note in folder.notes)


def test_slices_and_sums_have_their_share_of_each_class(tmp_path):
    write(tmp_path, *names("train/a", 60), *names("train/b", 20), *names("test/a", 5), *names("val/a", 5))
    whole, first, rest = (files_of(tmp_path, split) for split in ("train", "train[:75%]", "train[75%:]"))
    assert first + rest == whole and len(first) == 60
    assert sum(file.startswith("train/b") for file in first) == 15
    assert files_of(tmp_path, "train[:3]+test") == whole[:3] + files_of(tmp_path, "test")
    assert files_of(tmp_path, "train[-10%:]") == whole[-8:]


def test_test_images_without_classes_are_left_out_with_a_note(tmp_path):
    write(tmp_path, *names("train/a", 5), *names("train/b", 5), *names("test", 5), "extra/boxes.json")
    folder = read_folder(str(tmp_path))
    assert "folder 'extra' beside the splits (1), folder 'test' beside the splits (1)" in folder.notes[0]
    assert {file.split("/")[0] for file in select_split(folder, "test").files} == {"train"}


def test_a_class_may_be_called_train(tmp_path):
    write(tmp_path, *names("train", 5), *names("bus", 5))
    assert read_folder(str(tmp_path)).class_names == ["bus", "train"]


def test_two_unicode_spellings_of_a_name_give_one_class_and_the_same_splits(tmp_path):
    for form in ("NFC", "NFD"):
        cat, emu = (unicodedata.normalize(form, name) for name in ("кошка й", "ñandú"))
        write(tmp_path / form, *names(f"train/{cat}", 9), *names(f"train/{emu}", 9))
    splits = [
        [unicodedata.normalize("NFC", f) for f in files_of(tmp_path / form, "val")] for form in ("NFC", "NFD")
    ]
    assert splits[0] == splits[1]
    assert read_folder(str(tmp_path / "NFD")).class_names == ["ñandú", "кошка й"]


def test_nested_hidden_linked_and_foreign_files(tmp_path, capsys):
    root = tmp_path / "photos"
    write(root, "cat/1.png", "cat/deep/er/2.PnG", "dog/3.png", "dog/4.png", "cover.png")
    write(tmp_path, "elsewhere/5.png", "elsewhere/6.png")
    # Hidden files and those that operating systems create are not mentioned.
    write(root, "cat/.DS_Store", "cat/._1.png", ".git/7.png", "__MACOSX/cat/8.png", "dog/@eaDir/9.png")
    write(root, "cat/notes.txt", "cat/boxes.json", "dog/more.json", "dog/README", data=b"text")
    (root / "empty").mkdir()
    (root / "cat" / "circle").symlink_to(root / "cat", target_is_directory=True)
    (root / "cat" / "linked.png").symlink_to(tmp_path / "elsewhere" / "5.png")
    (root / "dog" / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    os.mkfifo(root / "dog" / "pipe.png")
    records = open_split(root, "train+val")
    expected = ["cat/1.png", "cat/deep/er/2.PnG", "cat/linked.png"]
    expected += ["dog/3.png", "dog/4.png", "dog/linked/5.png", "dog/linked/6.png"]
    assert sorted(records.files) == expected
    out = capsys.readouterr().out.replace("\n  ", " ")
    for words in [
        "images outside of class folders (1)",
        "'.txt' files (1)",
        "'.json' files (2)",
        "'' files (1)",
        "folder 'empty' without images (1)",
        "a fifth of each class, ",
        "split 'test' is 'validation'",
    ]:
        assert words in out
    assert "git" not in out and "MACOSX" not in out and "DS_Store" not in out
    open_split(root, "test")
    assert capsys.readouterr().out == ""  # each note is printed only once


def test_a_class_may_be_missing_in_test_but_none_may_be_new(tmp_path):
    write(tmp_path, *names("train/a", 2), *names("train/b", 2), *names("val/b", 2), *names("test/c", 2))
    assert select_split(read_folder(str(tmp_path)), "val").labels == [1, 1]
    for function in (get_dataset_info, open_examples):
        with pytest.raises(
            UserError, match="split 'test' .*the training images do not have: 'c'; rename or remove"
        ):
            function(f"folder:{tmp_path}", "test")


def test_one_class_is_enough_for_evaluation_but_not_for_training(tmp_path):
    write(tmp_path, "a/1.png", "a/2.png")
    write(tmp_path, "b/1.heic", data=HEIC)
    assert len(open_examples(f"folder:{tmp_path}", "train+val", image_size_px=4)) == 2
    with pytest.raises(
        UserError, match=r"one class only: two or more are needed.*'\.heic' files \(1\), folder 'b' without"
    ):
        open_to_train(f"folder:{tmp_path}", "train", "test")


def test_a_class_whose_training_images_cannot_be_read_is_named_with_what_to_do(tmp_path):
    write(tmp_path, *names("train/cat", 2), *names("val/cat", 1), *names("val/dog", 1))
    write(tmp_path, "train/dog/1.heic", data=HEIC)
    with pytest.raises(UserError, match=r"of one class only: .*'\.heic' files .*convert them to JPEG or PNG"):
        open_to_train(f"folder:{tmp_path}", "train", "val")


def test_a_folder_may_have_only_test_images(tmp_path):
    write(tmp_path, *names("test/b", 2), *names("test/a", 2))
    info = get_dataset_info(f"folder:{tmp_path}", "test")
    assert (info["class_names"], info["num_examples"]) == (["a", "b"], 4)
    with pytest.raises(UserError, match="split 'train' .*cannot be read .*: use 'test'"):
        get_dataset_info(f"folder:{tmp_path}", "train")


def test_a_class_name_that_is_not_utf_8_is_escaped(tmp_path):
    root = os.fsencode(tmp_path)
    for name in (b"caf\xe9", b"caf\xe8"):
        os.makedirs(root + b"/" + name)
        for number in range(2):
            with open(root + b"/" + name + b"/%d.png" % number, "wb") as file:
                file.write(encode(np.zeros((6, 6), np.uint8)))
    examples = open_examples(f"folder:{tmp_path}", "train+val", image_size_px=4)
    assert examples.images is not None and len(examples.images) == 4
    assert get_dataset_info(f"folder:{tmp_path}")["class_names"] == ["caf\\xe8", "caf\\xe9"]


def test_50_000_files_are_indexed_in_under_10_seconds(tmp_path):
    (tmp_path / "class 0").mkdir()
    for i in range(1000):
        (tmp_path / "class 0" / f"{i:04}.jpg").touch()
    for c in range(1, 50):  # links, because making 50,000 files takes longer than the test may
        (tmp_path / f"class {c}").symlink_to("class 0", target_is_directory=True)
    start = time.perf_counter()
    info = get_dataset_info(f"folder:{tmp_path}", "train")
    assert time.perf_counter() - start < 10
    assert info["num_classes"] == 50 and abs(info["num_examples"] - 40_000) < 500


# --- the program


def test_to_set_up_a_run_its_folder_is_listed_once_and_each_image_looked_at_once(tmp_path, monkeypatch):
    write(tmp_path, *names("a", 10), *names("b", 10))
    options = [f"--config.dataset=folder:{tmp_path}", "--config.cache_bytes=0", *TINY]
    config = load_config("folder.py", options)
    done = Counter()

    def count(function):
        original = getattr(os, function)

        def counting(path, *arguments, **options):
            done[function, os.fspath(path)] += 1
            return original(path, *arguments, **options)

        monkeypatch.setattr(os, function, counting)

    open_to_train(f"folder:{tmp_path}", "train", "validation")  # the images are checked
    for function in ("scandir", "stat"):
        count(function)
    setup = make_setup(settle(config, {}))
    make_record(config, setup.train_batches.examples, setup.test_batches.examples)
    assert done["scandir", str(tmp_path / "a")] == 1
    for file in names("a", 10):
        assert done["stat", str(tmp_path / file)] == 1


@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
def test_a_folder_trains(tmp_path, capsys):
    path = tmp_path / "photos"
    write(path, *names("猫", 10), *names("кот", 10))
    arguments = [f"--config.dataset=folder:{path}", f"--workdir={tmp_path / 'run'}", *TINY]
    assert main(["--config=digits.py", *arguments]) == 0
    assert json.loads((tmp_path / "run" / "class_names.json").read_text()) == ["кот", "猫"]
    out = capsys.readouterr().out
    counts = {split: len(files_of(path, split)) for split in ("train", "validation")}
    said = f"{counts['train']} training images, {counts['validation']} (test|validation) images, 2 classes"
    assert re.search(said, out)
    assert f"a fifth of each class, {counts['validation']} images" in out
    assert re.search("(test|validation).accuracy", out)

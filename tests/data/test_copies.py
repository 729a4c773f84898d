"""Tests that images with the same content in two splits are counted and said."""

import re

import numpy as np
import pytest
from made_datasets import encode
from made_folders import files_of, names, open_to_train, write

from mlpmixer_flax.data import image_checks


def test_copies_in_two_splits_are_counted_by_content_and_said_once(tmp_path, capsys):
    write(tmp_path, *names("train/a", 5), *names("train/b", 5), *names("val/a", 3), *names("val/b", 3))
    write(tmp_path, *names("test/a", 3), *names("test/b", 3))
    for number, path in enumerate(sorted(tmp_path.rglob("*.png"))):  # all different, many of the same size
        path.write_bytes(encode(np.full((6, 6), number, np.uint8), "PNG"))
    for copy, original in {
        "test/a/copy.png": "train/a/0.png",
        "test/b/another class.png": "train/a/1.png",
        "val/a/copy.png": "test/a/2.png",
        "train/a/copy within the split.png": "train/a/3.png",
    }.items():
        (tmp_path / copy).write_bytes((tmp_path / original).read_bytes())
    open_to_train(f"folder:{tmp_path}", "train", "test")
    out = capsys.readouterr().out.replace("\n  ", " ")
    lines = [line for line in out.splitlines() if "same content" in line]
    assert len(lines) == 2
    assert lines[0].startswith(
        "2 images of split 'test' are also in split 'train' (same content), for example "
    )
    assert (
        "'test/a/copy.png' = 'train/a/0.png'" in out or "'test/b/another class.png' = 'train/a/1.png'" in out
    )
    assert "1 image of split 'test' is also in split 'validation'" in lines[1]
    assert "'test/a/2.png' = 'val/a/copy.png': remove one of each, or the scores of split 'test'" in lines[1]
    open_to_train(f"folder:{tmp_path}", "train", "test")
    assert "same content" not in capsys.readouterr().out


def test_copies_are_found_where_the_validation_split_is_cut_and_damaged_files_are_no_copies(tmp_path, capsys):
    write(tmp_path, *names("a", 20), *names("b", 20))
    for number, path in enumerate(sorted(tmp_path.rglob("*.png"))):
        path.write_bytes(encode(np.full((6, 6), number, np.uint8), "PNG"))
    one, other = files_of(tmp_path, "train")[0], files_of(tmp_path, "validation")[0]
    (tmp_path / other).write_bytes((tmp_path / one).read_bytes())
    for file in (files_of(tmp_path, "train")[1], files_of(tmp_path, "validation")[1]):
        (tmp_path / file).write_bytes(b"")
    open_to_train(f"folder:{tmp_path}", "train", "validation", skip_bad_images=True)
    (line,) = [
        line for line in capsys.readouterr().out.replace("\n  ", " ").splitlines() if "same content" in line
    ]
    assert line.startswith(
        "1 image of split 'validation' is also in split 'train' (same content), for example "
    )
    assert f"{other!r} = {one!r}" in line


@pytest.mark.parametrize(
    ("train_split", "test_split", "expected"),
    [
        ("train[:90%]", "train[90%:]", ["2 of test in train[:90%]", "1 of train[90%:] in train[:90%]"]),
        ("train[:90%]", "test", ["2 of test in train[:90%]"]),
        ("train[:10]+train[30:]", "test", ["1 of test in train[:10]+train[30:]"]),
        # Its images are images of "train", not copies of others.
        ("train", "train[90%:]", ["2 of test in train"]),
        ("train[:20]", "train[20:35]", ["2 of test in train[:20]"]),
        ("train[20:]+test", "train[:20]", ["3 of train[:20] in train[20:]+test"]),
        ("train[20:]+test[3:]", "train[:20]+test[:5]", ["3 of train[:20]+test[:5] in train[20:]+test[3:]"]),
        ("all", "train[:5]", []),
    ],
)
def test_copies_are_counted_in_whatever_splits_a_run_uses(
    tmp_path, capsys, train_split, test_split, expected
):
    write(tmp_path, *names("train/a", 20), *names("train/b", 20), *names("test/a", 5), *names("test/b", 5))
    write(tmp_path, "val/a/0.png")
    for number, path in enumerate(sorted(tmp_path.rglob("*.png"))):
        path.write_bytes(encode(np.full((6, 6), number, np.uint8), "PNG"))
    train, test = (files_of(tmp_path, split) for split in ("train", "test"))
    for copy, original in [
        (train[39], train[2]),
        (test[9], train[12]),
        (test[3], train[5]),
    ]:
        (tmp_path / copy).write_bytes((tmp_path / original).read_bytes())
    open_to_train(f"folder:{tmp_path}", train_split, test_split)
    lines = [
        line for line in capsys.readouterr().out.replace("\n  ", " ").splitlines() if "same content" in line
    ]
    found = [
        re.fullmatch(
            r"(\d+) images? of split '(.*)' (is|are) also in split '(.*)' \(same content\), for .*", line
        )
        for line in lines
    ]
    assert [f"{match[1]} of {match[2]} in {match[4]}" for match in found if match] == expected
    assert len(lines) == len(expected)


def test_only_files_of_equal_size_are_hashed(tmp_path, monkeypatch):
    write(tmp_path, "train/a/1.png", "train/b/2.png", "test/a/3.png", "val/a/4.png")
    for number, path in enumerate(sorted(tmp_path.rglob("*.png"))):
        path.write_bytes(encode(np.random.default_rng(0).integers(0, 256, (6 + number, 6), np.uint8)))
    monkeypatch.setattr(image_checks, "_hash_content", lambda _: pytest.fail("a file is hashed"))
    open_to_train(f"folder:{tmp_path}", "train", "test")

"""Tests that a start reads only the images that have changed since they were checked."""

import os

import numpy as np
import pytest
from made_datasets import encode
from made_folders import names, open_split, open_to_train, write

from mlpmixer_flax import UserError
from mlpmixer_flax.data import checked, image_checks


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLPMIXER_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "photos"
    write(path, *names("train/a", 3), *names("train/b", 3), "val/a/0.png", "val/b/0.png")
    return path


def damage(file, *, keep_time):
    """Replaces the content of a file by as many zeros."""
    before = file.stat()
    file.write_bytes(bytes(before.st_size))
    if keep_time:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_unchanged_files_are_not_read_again(folder):
    open_split(folder, "train")
    damage(folder / "train/a/1.png", keep_time=True)  # nobody does this: it shows that the file is not read
    assert len(open_split(folder, "train")) == 6


def test_files_are_not_read_again_to_find_copies(folder, capsys):
    write(folder, "train/a/0.png", "val/a/0.png", data=encode(np.full((6, 6), 200, np.uint8), "PNG"))
    told = []
    for _ in range(2):
        image_checks._print_once.cache_clear()
        open_to_train(f"folder:{folder}", "train", "validation")
        told.append(capsys.readouterr().out)
        damage(folder / "train/a/0.png", keep_time=True)  # as above
    assert told[0] == told[1] and "(same content)" in told[0]
    damage(folder / "train/a/0.png", keep_time=False)
    with pytest.raises(UserError, match=r"a/0\.png"):
        open_to_train(f"folder:{folder}", "train", "validation")


def test_files_that_are_gone_are_forgotten_and_those_of_other_splits_are_not(folder):
    open_to_train(f"folder:{folder}", "train", "validation")
    (folder / "train/a/1.png").unlink()
    (folder / "val/a/0.png").unlink()
    write(folder, "train/a/new.png")
    open_split(folder, "train")  # looks at the training images only
    kept = {"train/a/0.png", "train/a/2.png", "train/a/new.png", *names("train/b", 3), "val/b/0.png"}
    assert checked.read_checked(str(folder)).keys() == kept


def test_contents_are_compared_by_a_start_that_trains_also_after_one_that_only_checked(folder, capsys):
    (folder / "val/a/0.png").write_bytes((folder / "train/a/0.png").read_bytes())
    open_split(folder, "train")
    open_to_train(f"folder:{folder}", "train", "validation")
    assert "(same content)" in capsys.readouterr().out


def test_changed_new_and_bad_files_are_read_again(folder):
    open_split(folder, "train")
    damage(folder / "train/a/1.png", keep_time=False)
    write(folder, "train/b/new.png", data=b"no image")
    for _ in range(2):
        with pytest.raises(UserError, match=r"2 of 7 images(.|\n)*a/1\.png(.|\n)*b/new\.png"):
            open_split(folder, "train")
    write(folder, "train/a/1.png", "train/b/new.png")
    assert len(open_split(folder, "train")) == 7


def test_notes_about_images_are_kept(folder, capsys):
    from PIL import Image

    Image.new("I;16", (6, 6), 3000).save(folder / "train/a/0.png")
    told = []
    for _ in range(2):
        image_checks._print_once.cache_clear()
        open_split(folder, "train")
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] and "took 4095 for white" in " ".join(told[0].split())


@pytest.mark.parametrize(
    "content",
    [b"", b"5", b'{"reader": 1}', b"\xff"]
    + [
        b'{"reader": "%%s", "files": %s}' % files
        for files in (b'{"a": 3}', b"5", b'{"a": [1e400, 1, [], ""]}', b'{"a": [1, 1, [[]], ""]}')
    ],
)
def test_a_damaged_list_is_not_used(folder, content):
    open_split(folder, "train")
    (file,) = (folder.parent / "cache/checked-images").iterdir()
    file.write_bytes(content.replace(b"%s", checked._READER.encode()))
    assert len(open_split(folder, "train")) == 6
    assert len(checked.read_checked(str(folder))) == 6  # written again


def test_without_a_place_for_the_list_everything_is_read(folder, monkeypatch):
    monkeypatch.setenv("MLPMIXER_CACHE", "/proc/none")
    assert len(open_split(folder, "train")) == 6
    damage(folder / "train/a/1.png", keep_time=True)
    with pytest.raises(UserError, match="1 of 6 images"):
        open_split(folder, "train")

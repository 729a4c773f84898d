"""Tests that data which changed between two starts of a run is noticed, and that data which moved is not."""

import json
import re
import shutil

import numpy as np
import pytest
from made_datasets import encode, write_dataset

from mlpmixer_flax import UserError
from mlpmixer_flax.run_weights import read_weights
from mlpmixer_flax.rundir import read_config
from mlpmixer_flax.train import main
from mlpmixer_flax.training import record

pytestmark = pytest.mark.usefixtures("quick_to_compile")

SMALL = ["--config=digits.py", "--config.model.hidden_dim=8", "--config.model.channels_mlp_dim=8"]
SMALL += ["--config.model.num_blocks=1", "--config.augment.mixup_alpha=0", "--config.batch_size=8"]
SMALL += ["--config.test_split=validation"]


def train(workdir, dataset, *arguments, steps=2):
    given = [f"--config.dataset={dataset}", f"--config.total_steps={steps}", *arguments]
    return main([*SMALL, f"--workdir={workdir}", *given])


def write_photo(file, level):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(encode(np.full((8, 8, 3), level, np.uint8)))


@pytest.fixture
def folder(tmp_path):
    """Returns a folder of two classes with names in two scripts, and one that is no text in any."""
    for number in range(12):
        write_photo(tmp_path / "photos" / "cat" / f"{number}.png", number)
        write_photo(tmp_path / "photos" / "câlin" / f"{number}.png", 200 - number)
    write_photo(tmp_path / "photos" / "cat" / "caf\udce9.png", 99)
    return tmp_path / "photos"


def files_of(workdir):
    return {file: file.read_bytes() for file in workdir.rglob("*") if file.is_file()}


def test_a_folder_that_grows_between_two_starts_is_noticed(folder, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert train(workdir, f"folder:{folder}") == 0
    stored = json.loads((workdir / "data.json").read_text())
    assert stored["dataset"] == "folder"
    assert sum(stored[split]["examples"] for split in ("train", "test")) == 25
    names = {name for split in ("train", "test") for name in stored[split]["files"]}
    assert "cat/caf\udce9.png" in names and "câlin/0.png" in names
    before = files_of(workdir)

    for number in range(30, 42):
        write_photo(folder / "cat" / f"{number}.png", number)
    gone = sorted(name for name in stored["train"]["files"])[:3]
    for name in gone:
        (folder / name).unlink()
    changed = sorted(stored["train"]["files"])[3]
    (folder / changed).write_bytes((folder / changed).read_bytes() + b"more")
    capsys.readouterr()
    assert train(workdir, f"folder:{folder}", steps=4) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: the data of the run in {workdir} has changed since the run began (training: "
    )
    added = [int(count) for count in re.findall(r"(\d+) images? added, such as 'cat/3\d.png'", error)]
    assert sum(added) == 12
    assert f"3 images gone, such as {gone[0]!r}" in error and f"1 image changed, such as {changed!r}" in error
    assert (
        f"restore the data, or start a new run from this one with --config.init_from={workdir} and" in error
    )
    assert error.count("\n") == 1
    assert files_of(workdir) == before


def test_a_folder_that_moved_is_the_same_data(folder, tmp_path, capsys, monkeypatch):
    workdir = tmp_path / "run"
    assert train(workdir, f"folder:{folder}", "--config.save_every_steps=2", steps=4) == 0
    whole = read_weights(workdir)[1]
    shutil.rmtree(workdir / "checkpoints" / "4")
    moved = tmp_path / "elsewhere" / "pictures"
    moved.parent.mkdir()
    folder.rename(moved)
    monkeypatch.chdir(moved.parent)
    capsys.readouterr()
    assert train(workdir, "folder:pictures", "--config.save_every_steps=2", steps=4) == 0
    out = capsys.readouterr().out
    assert f"continuing with dataset=folder:{moved} (was folder:{folder})" in out
    assert (
        re.search(r"continuing from step [23] ", out) and read_config(workdir)["dataset"] == f"folder:{moved}"
    )
    np.testing.assert_array_equal(read_weights(workdir)[1]["head"]["kernel"], whole["head"]["kernel"])


def test_a_run_without_a_checkpoint_begins_anew_with_the_data_that_is_there(folder, tmp_path):
    workdir = tmp_path / "run"
    assert train(workdir, f"folder:{folder}") == 0
    shutil.rmtree(workdir / "checkpoints")  # as if it had been killed before the first one
    write_photo(folder / "cat" / "new.png", 7)
    write_photo(folder / "dog" / "new.png", 8)
    write_photo(folder / "dog" / "newer.png", 9)
    assert train(workdir, f"folder:{folder}") == 0
    stored = json.loads((workdir / "data.json").read_text())
    assert sum(stored[split]["examples"] for split in ("train", "test")) == 28
    assert json.loads((workdir / "class_names.json").read_text()) == ["cat", "câlin", "dog"]


def test_another_folder_is_not_the_same_data(folder, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert train(workdir, f"folder:{folder}") == 0
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "cat" / "0.png").rename(other / "cat" / "zero.png")
    assert train(workdir, f"folder:{other}") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: folder:{other} does not have the data of the run in {workdir} (")
    assert "1 image added, such as 'cat/zero.png'" in error and "1 image gone, such as 'cat/0.png'" in error


def test_a_run_of_an_older_version_continues_and_records_its_data(folder, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert train(workdir, f"folder:{folder}") == 0
    (workdir / "data.json").unlink()
    shutil.copytree(folder, tmp_path / "copy")
    assert train(workdir, f"folder:{tmp_path / 'copy'}") == 2  # which nothing says to be the same
    assert f"dataset was 'folder:{folder}', is 'folder:{tmp_path / 'copy'}'" in capsys.readouterr().err
    assert train(workdir, f"folder:{folder}", steps=4) == 0
    assert (workdir / "data.json").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\x00"])
def test_a_damaged_record_does_not_stop_the_run(folder, tmp_path, capsys, content):
    workdir = tmp_path / "run"
    assert train(workdir, f"folder:{folder}") == 0
    good = (workdir / "data.json").read_bytes()
    (workdir / "data.json").write_bytes(content)
    assert train(workdir, f"folder:{folder}") == 0
    assert f"{workdir / 'data.json'} is damaged and is written again: whether" in capsys.readouterr().out
    assert (workdir / "data.json").read_bytes() == good


def test_a_long_list_is_not_stored_and_changes_are_only_counted(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(record, "_MOST_FILES", 5)
    workdir = tmp_path / "run"
    assert train(workdir, f"folder:{folder}") == 0
    stored = json.loads((workdir / "data.json").read_text())
    assert "files" not in stored["train"] and len(stored["train"]["hash"]) == 32
    assert train(workdir, f"folder:{folder}", steps=4) == 0
    for number in range(30, 60):
        write_photo(folder / "cat" / f"{number}.png", number)
    capsys.readouterr()
    assert train(workdir, f"folder:{folder}", steps=6) == 2
    count = stored["train"]["examples"]
    assert re.search(rf"\(training: {count} images, now \d+; ", capsys.readouterr().err)


def test_another_order_of_the_same_images_is_noticed(tmp_path):
    record_of = {"examples": 2, "hash": "a", "files": {"a": 1, "b": 2}}
    before = {"dataset": "folder", "train": record_of, "test": record_of}
    now = {**before, "train": {**record_of, "hash": "b"}}
    with pytest.raises(
        UserError, match=r"since the run began \(training: the same images in another order\), and"
    ):
        record.check_data(tmp_path, before, now)


def test_tfds_data_that_moved_is_the_same_and_other_data_is_not(tmp_path, capsys):
    def examples(count):
        return [(encode(np.full((8, 8), i, np.uint8)), i % 3) for i in range(count)]

    def prepare(place, count):
        splits = {"train": examples(count), "validation": examples(6)}
        return write_dataset(tmp_path / place, "levels", splits, image_shape=(8, 8, 1))

    workdir = tmp_path / "run"
    assert train(workdir, "levels", f"--config.data_dir={prepare('a', 16)}") == 0
    assert json.loads((workdir / "data.json").read_text()) == {
        "dataset": "levels/1.0.0",
        "train": {"examples": 16},
        "test": {"examples": 6},
    }
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert train(workdir, "levels:1.0.0", f"--config.data_dir={tmp_path / 'b'}", steps=4) == 0
    out = capsys.readouterr().out
    assert "dataset=levels:1.0.0 (was levels)" in out and f"data_dir={tmp_path / 'b'} (was " in out
    assert train(workdir, "levels:1.0.0", f"--config.data_dir={prepare('c', 20)}", steps=6) == 2
    assert "has changed since the run began (training: 16 images, now 20), and" in capsys.readouterr().err
    assert train(workdir, "digits", steps=6) == 2
    assert "digits" in capsys.readouterr().err

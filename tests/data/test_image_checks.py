"""Images of folders that cannot be used, or that change while they are used."""

import os
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from made_datasets import encode
from made_folders import files_of, names, open_split, open_to_train, write
from PIL import Image
from small_runs import TINY, rows

from mlpmixer_flax import UserError, get_dataset_info
from mlpmixer_flax.data.folders import read_folder
from mlpmixer_flax.data.listing import select_split
from mlpmixer_flax.dataloader import TrainBatches, iterate, open_examples
from mlpmixer_flax.train import main

# --- images of folders that cannot be used


@pytest.fixture
def flawed(tmp_path):
    """A folder of 22 good images and one image with each flaw."""
    path = tmp_path / "photos"
    write(path, *names("train/a", 8), *names("train/b", 8), *names("test/a", 2), *names("test/b", 2))
    write(path, *names("val/a", 1), *names("val/b", 1))
    write(path, "train/a/cut.jpg", data=encode(np.full((16, 24), 90, np.uint8), "JPEG")[:-60])
    write(path, "train/a/empty.png", data=b"")
    write(path, "train/b/text.gif", data=b"no image")
    bomb = bytearray(encode(np.zeros((1, 1), np.uint8)))
    bomb[16:24] = struct.pack(">II", 20_000, 20_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    write(path, "test/b/bomb.png", data=bytes(bomb))
    (path / "test" / "a" / "broken link.png").symlink_to(path / "gone.png")
    return path


FLAWS = {
    "train/a/cut.jpg": "OSError: ",
    "train/a/empty.png": "empty, cut short or not an image that Pillow can read",
    "train/b/text.gif": "it is a text file, not an image",
    "test/b/bomb.png": "DecompressionBombError: Image size (400000000 pixels)",
    "test/a/broken link.png": "FileNotFoundError",
}


def test_all_bad_images_of_all_splits_are_in_one_report(flawed):
    assert get_dataset_info(f"folder:{flawed}", "train")["num_examples"] == 19  # no image is opened for this
    with pytest.raises(UserError) as error:
        open_to_train(f"folder:{flawed}", "train", "test")
    first, *lines = str(error.value).splitlines()
    assert first.startswith(f"5 of 27 images in '{flawed}' cannot be used")
    assert "--config.skip_bad_images=true; a run that has begun needs all of its images" in first
    assert len(lines) == 5
    for file, reason in FLAWS.items():
        assert any(line.startswith(f"  '{file}': {reason}") for line in lines)


def test_outside_training_only_the_images_of_one_split_are_checked(flawed):
    with pytest.raises(UserError, match="2 of 6 images .*cannot be used"):
        open_split(flawed, "test")
    assert len(open_split(flawed, "val")) == 2


def test_a_long_report_is_bounded(tmp_path, capsys):
    write(tmp_path, *names("train/a", 9), *names("train/b", 9), *names("val/a", 9))
    write(tmp_path, *names("train/a/bad", 31), data=b"")
    with pytest.raises(UserError, match="31 of 58 images") as error:
        open_to_train(f"folder:{tmp_path}", "train", "test")
    _, *lines = str(error.value).splitlines()
    assert [line.split("'")[1] for line in lines[:-1]] == sorted(names("train/a/bad", 31))[:20]
    assert lines[-1] == "  and 11 more"
    capsys.readouterr()
    assert len(open_split(tmp_path, "train", skip_bad_images=True)) == 18
    first, *lines = capsys.readouterr().out.splitlines()[-12:]
    assert first.startswith("left out 31 of the 49 images of split 'train'")
    assert [line.split("'")[1] for line in lines[:-1]] == sorted(names("train/a/bad", 31))[:10]
    assert lines[-1] == "  and 21 more"


def test_notes_and_errors_list_at_most_ten_things(tmp_path):
    write(tmp_path, *names("train/a", 2), *names("train/b", 2), *(f"test/new {i}/0.png" for i in range(30)))
    write(tmp_path, *(f"train/a/notes.x{i}" for i in range(30)), data=b"text")
    write(tmp_path, *(f"extra {i}/0.png" for i in range(30)))
    folder = read_folder(str(tmp_path))
    (note,) = [note for note in folder.notes if note.startswith("left out")]
    assert len(re.findall(r"\(\d+\)", note)) == 10 and note.endswith(" and 50 more")
    with pytest.raises(UserError, match="do not have: 'new 0', 'new 1', .* and 20 more; rename or remove"):
        select_split(folder, "test")


def test_bad_images_are_skipped_on_request_and_the_others_stay_in_their_splits(flawed, capsys):
    whole = files_of(flawed, "train")
    records = open_split(flawed, "train", skip_bad_images=True)
    assert records.files == [file for file in whole if file not in FLAWS] and len(records) == 16
    assert [file.split("/")[1] for file in records.files] == ["ab"[label] for label in records.labels]
    first, *lines = capsys.readouterr().out.rstrip().splitlines()[-4:]
    assert first == "left out 3 of the 19 images of split 'train', because they cannot be used:"
    out = "\n".join(lines)
    assert all(file in out for file in FLAWS if file.startswith("train/"))
    assert "bomb" not in out
    examples = open_examples(f"folder:{flawed}", "test", image_size_px=4, skip_bad_images=True)
    assert examples.images is not None
    assert len(examples) == 4 and examples.images.shape == (4, 4, 4, 3)
    with pytest.raises(UserError, match="no image of split 'train.*can be used"):
        bad = [whole.index(file) for file in whole if file in FLAWS][0]
        open_split(flawed, f"train[{bad}:{bad + 1}]", skip_bad_images=True)


def test_a_repaired_folder_is_read_again(flawed):
    with pytest.raises(UserError):
        open_split(flawed, "train")
    for file in FLAWS:
        (flawed / file).unlink()
        write(flawed, file)
    assert len(open_split(flawed, "train")) == 19


def test_a_drive_that_fails_or_a_folder_that_is_gone_says_nothing_about_its_images(tmp_path, capsys):
    path = tmp_path / "photos"
    write(path, *names("train/a", 3), *names("train/b", 3), *names("val/a", 3))
    (path / "train" / "b" / "9.png").symlink_to("/proc/self/mem")  # reading it is an error of input or output
    for skip in (False, True):
        with pytest.raises(OSError, match=r"\[Errno 5\] Input/output error: '.*train/b/9.png'"):
            open_split(path, "train", skip_bad_images=skip)
    assert "left out" not in capsys.readouterr().out


# --- images of folders that change while they are used


def delete(path, root):
    path.unlink()


def replace_by_a_larger(path, root):
    write(root, path.relative_to(root), data=encode(np.zeros((60, 60, 3), np.uint8)) + b"more")


def damage(path, root):
    path.write_bytes(bytes(path.stat().st_size))


def take_permission(path, root):
    path.chmod(0)


def fail_as_a_drive(path, root):
    path.unlink()
    path.symlink_to("/proc/self/mem")  # reading it is an error of input or output


def unmount(path, root):
    root.rename(root.with_name("elsewhere"))
    root.mkdir()


def rename_the_folder(path, root):
    root.rename(root.with_name("elsewhere"))


def put_a_folder_there(path, root):
    path.unlink()
    path.mkdir()


CHANGES = {
    delete: "image '{file}' was deleted, moved or renamed: restore it, and start again",
    replace_by_a_larger: "image '{file}' has 94 bytes, but had 76 when it was checked, so somebody has changed or "
    "replaced it: restore it, and start again",
    damage: "image {name} of split 'train' of dataset 'folder:{root}' cannot be used (empty, cut short or not an image "
    "that Pillow can read): it could be used when it was checked, so restore it if somebody has changed it, and start "
    "again",
    take_permission: "you have no permission ({file}): change it with chmod or chown, or choose another place",
    fail_as_a_drive: "[Errno 5] Input/output error: '{file}'",
    unmount: "folder '{root}' is empty or does not exist any more: restore it or mount its drive again, and start again",
    rename_the_folder: "folder '{root}' is empty or does not exist any more: restore it or mount its drive again, and "
    "start again",
    put_a_folder_there: "image '{file}' cannot be read now (Is a directory): restore it, and start again",
}


@pytest.fixture
def as_anybody():
    """Lets this process read as a user without special rights, if it is root."""
    user = os.geteuid()
    yield lambda: os.seteuid(65534) if user == 0 else None
    os.seteuid(user)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("skip_bad_images", [False, True])
def test_an_image_that_changes_while_it_is_used_is_named_as_what_it_is(
    tmp_path, as_anybody, change, skip_bad_images
):
    root = tmp_path / "photos"
    write(root, *names("a", 9), *names("b", 9))
    examples = open_examples(
        f"folder:{root}", "train", image_size_px=4, cache_bytes=0, skip_bad_images=skip_bad_images
    )
    assert examples.files is not None and len(examples.read(np.arange(len(examples)))[0]) == len(examples)
    name = examples.files[2]
    change(root / name, root)
    if change is take_permission:
        as_anybody()
    with pytest.raises(OSError if change is fail_as_a_drive else UserError) as error:
        examples.read(np.array([2]))
    assert str(error.value) == CHANGES[change].format(file=root / name, name=name, root=root)


@pytest.mark.slow
def test_a_photo_that_is_deleted_is_named_by_worker_processes_too(tmp_path):
    write(tmp_path, *names("a", 9), *names("b", 9))
    examples = open_examples(f"folder:{tmp_path}", "train", image_size_px=4, cache_bytes=0)
    assert examples.files is not None
    (tmp_path / examples.files[2]).unlink()
    with pytest.raises(
        UserError, match=f"^image '{tmp_path / examples.files[2]}' was deleted, moved or renamed"
    ):
        list(iterate(TrainBatches(examples, batch_size=len(examples), seed=0), 0, 2, num_workers=1))


def test_a_photo_that_is_replaced_between_two_openings_is_checked_again(tmp_path):
    write(tmp_path, *names("train/a", 3), *names("train/b", 3), *names("val/a", 1))
    options = {"image_size_px": 4, "cache_bytes": 0}
    open_examples(f"folder:{tmp_path}", "train", **options)
    write(tmp_path, "train/a/1.png", data=encode(np.zeros((60, 60, 3), np.uint8)))
    examples = open_examples(f"folder:{tmp_path}", "train", **options)
    assert examples.read(np.arange(len(examples)))[0].shape == (6, 4, 4, 3)


# --- too little memory

LITTLE_MEMORY = """
import os, resource, sys
import numpy as np
from mlpmixer_flax.data.images import open_image
from mlpmixer_flax.dataloader import open_examples
from mlpmixer_flax.faults import explain
path = sys.argv[1]
options = {"image_size_px": 4, "cache_bytes": 0, "skip_bad_images": True}
examples = open_examples(f"folder:{path}", "train", **options)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 400_000_000,) * 2)
os.utime(f"{path}/train/a/large.png")  # so that it is checked again
for step in (
    lambda: examples.read(np.arange(len(examples))),
    lambda: open_examples(f"folder:{path}", "train+validation", **options),
    lambda: open_image(f"{path}/train/a/large.png", "RGB"),
):
    try:
        step()
    except MemoryError as error:
        print(explain(error))
"""


@pytest.mark.slow
def test_too_little_memory_is_not_called_a_bad_image_and_nothing_is_skipped(tmp_path):
    write(tmp_path, "train/a/1.png", "train/b/2.png", "val/a/3.png")
    Image.new("RGB", (12_000, 12_000)).save(tmp_path / "train/a/large.png")
    command = [sys.executable, "-c", LITTLE_MEMORY, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    lines = [line for line in result.stdout.splitlines() if line.startswith("not enough memory")]
    assert len(lines) == 3 and "left out" not in result.stdout, (result.stdout, result.stderr)
    for line in lines:
        assert re.fullmatch("not enough memory: .*; it was needed for image .*train/a/large.png.*", line)


def test_bad_images_stop_the_program_before_anything_is_written(flawed, capsys):
    workdir = flawed.parent / "run"
    assert (
        main(["--config=digits.py", f"--config.dataset=folder:{flawed}", f"--workdir={workdir}", *TINY]) == 2
    )
    error = capsys.readouterr().err
    assert error.startswith("error: 5 of 27 images") and all(repr(file) in error for file in FLAWS)
    assert "Traceback" not in error and not workdir.exists()


@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
def test_the_program_skips_bad_images_when_asked(flawed, capsys):
    workdir = flawed.parent / "run"
    arguments = [f"--config.dataset=folder:{flawed}", f"--workdir={workdir}", *TINY]
    assert main(["--config=digits.py", "--config.skip_bad_images=True", *arguments]) == 0
    assert "16 training images, 4 test images, 2 classes" in capsys.readouterr().out
    training, evaluation = rows(workdir)
    assert training["train/skipped_images"] == 3 and evaluation["test/skipped_images"] == 2

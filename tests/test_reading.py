"""Tests that only regular files are read: a pipe without a writer, or an endless device, stops no program."""

import os
import shutil
import socket
import subprocess
import sys

import pytest
from made_folders import names, open_to_train, write

from mlpmixer_flax import UserError, load
from mlpmixer_flax.reading import open_file, read_json
from mlpmixer_flax.rundir import read_config
from mlpmixer_flax.training.report import read_metrics


@pytest.fixture
def pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_pipes_devices_and_links_to_them_are_named(tmp_path, pipe):
    (tmp_path / "link").symlink_to(pipe)
    (tmp_path / "device").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    for name, kind in {
        "pipe": "a named pipe",
        "link": "a named pipe",
        "device": "a device",
        "socket": "a socket",
    }.items():
        with pytest.raises(UserError, match=f"{name}' is {kind}: give a regular file$"):
            open_file(tmp_path / name)
    with pytest.raises(IsADirectoryError):
        open_file(tmp_path)
    (tmp_path / "file").write_bytes(b"cat")
    (tmp_path / "to_file").symlink_to("file")
    with open_file(tmp_path / "to_file") as file:
        assert file.read() == b"cat"


@pytest.mark.parametrize("content", [b"", b"\xff", b"[" * 100_000, b"{", b"NaN,"])
def test_what_is_no_json_is_a_value_error(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError):
        read_json(tmp_path / "a.json")


def test_nothing_of_a_run_is_read_from_a_pipe(digits_run, tmp_path):
    for name in ("config.json", "class_names.json", "metrics.jsonl"):
        run = tmp_path / name.partition(".")[0]
        shutil.copytree(digits_run, run)
        (run / name).unlink()
        os.mkfifo(run / name)
    with pytest.raises(UserError, match="config.json' is a named pipe"):
        read_config(tmp_path / "config")
    with pytest.raises(UserError, match="class_names.json' is a named pipe"):
        load(tmp_path / "class_names")
    with pytest.raises(UserError, match="metrics.jsonl' is a named pipe"):
        read_metrics(tmp_path / "metrics" / "metrics.jsonl")


def test_weights_and_images_are_not_read_from_a_pipe_or_device(digits_run, tmp_path, pipe):
    for source in (pipe, "/dev/zero", "/dev/null"):
        with pytest.raises(UserError, match="is a (named pipe|device): give a regular file"):
            load(str(source))
    model = load(digits_run)
    (prediction,) = model.predict_each([str(pipe)])
    assert "is a named pipe: give a regular file" in prediction.flaw


def test_a_folder_with_a_link_to_a_pipe_is_checked_without_waiting(tmp_path, pipe):
    write(tmp_path / "photos", *names("cat", 3), *names("dog", 3))
    (tmp_path / "photos" / "cat" / "pipe.png").symlink_to(pipe)
    with pytest.raises(UserError, match="(?s)1 of 7 images .*'cat/pipe.png': .*is a named pipe"):
        open_to_train(f"folder:{tmp_path / 'photos'}", "train", "train")


def test_a_config_file_that_is_a_pipe_is_refused_at_once(tmp_path, pipe):
    done = subprocess.run(
        [sys.executable, "-m", "mlpmixer_flax.train", f"--config={pipe}"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: config file ")

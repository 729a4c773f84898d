"""Tests of remote paths with an S3 server on this machine: data, weights and runs, read and written by the programs."""

import csv
import shutil
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
from made_folders import names, write

from mlpmixer_flax import UserError, analyze, evaluate, export, load, predict, remote, rundir
from mlpmixer_flax.benchmark import write_figures
from mlpmixer_flax.data import files
from mlpmixer_flax.data.dataset import get_dataset_info
from mlpmixer_flax.data.examples import open_examples
from mlpmixer_flax.data.tfds import load_builder
from mlpmixer_flax.inference.load import load_run
from mlpmixer_flax.remote import NothingThere, copy_of, fetch, publish, shown, url_of
from mlpmixer_flax.weights import source


def upload(folder, url):
    """Uploads a folder as its owner would, with another program."""
    fs, root = fsspec.url_to_fs(url)
    for name in remote.local_files(Path(folder)):
        fs.put_file(str(Path(folder, name)), f"{root}/{name}")


def listed(url):
    """Returns the names of the files at a remote path."""
    fs, root = remote.connect(url)
    return sorted(name.removeprefix(f"{root}/") for name in fs.find(root))


@pytest.fixture
def run(bucket, digits_run):
    """The address of a run that was trained on this machine and then uploaded."""
    upload(digits_run, f"{bucket}/runs/digits")
    return f"{bucket}/runs/digits"


# --- paths


def test_a_remote_path_and_its_copy_are_names_of_each_other(tmp_path, monkeypatch):
    monkeypatch.setenv("MLPMIXER_CACHE", str(tmp_path))
    for given, url in {
        "s3://bucket/runs/a": "s3://bucket/runs/a",
        "gs://bucket/photos/": "gs://bucket/photos",
        Path("s3://bucket/a"): "s3://bucket/a",
        "AZ://container//a": "az://container/a",
    }.items():
        copy = copy_of(given)
        assert url_of(copy) == shown(copy) == url
        assert copy.is_relative_to(tmp_path) and not copy.exists()
        working = copy_of(given, folder=remote.WORKING_COPIES)
        assert url_of(working) is None and shown(working) == url
    assert url_of(copy_of("s3://bucket/a") / "b" / "c.png") == "s3://bucket/a/b/c.png"


def test_a_local_path_and_a_web_address_are_not_remote(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("s3:/here").mkdir(parents=True)
    for path in (
        "runs/a",
        "/runs/a",
        "~/a",
        "",
        "C:/a",
        "s3://here",
        "https://a.b/c",
        "file:///a",
        "x://a/b",
        "xyz://a/b",
    ):
        assert copy_of(path) is None
    assert url_of(Path("runs/a")) is None and shown(Path("runs/a")) == "runs/a"
    assert fetch(Path("runs/a")) == Path("runs/a")
    publish(Path("runs/a"))
    for path in ("az://", "gs://bucket/../other", "gs:///"):
        with pytest.raises(UserError, match="cannot be used: give an address such as s3://bucket/folder"):
            copy_of(path)


def test_without_a_home_directory_local_paths_need_no_cache(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("MLPMIXER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-of-this-name")
    assert copy_of("runs/a") is None and shown(Path("runs/a")) == "runs/a"


# --- copies


def test_a_copy_follows_the_folder_file_by_file(bucket, tmp_path, capsys):
    fs, root = fsspec.url_to_fs(f"{bucket}/data")
    for name in ("a/1", "a/2", "b/1", "folder/"):
        fs.pipe_file(f"{root}/{name}", name.encode())
    copy = copy_of(f"{bucket}/data")
    assert fetch(copy) == copy and remote.local_files(copy) == ["a/1", "a/2", "b/1"]
    assert capsys.readouterr().err == f"copying {bucket}/data (3 files, 0.0 MiB) to {copy}\n"
    before = (copy / "a/1").stat().st_ino
    fs.rm_file(f"{root}/b/1")
    fs.pipe_file(f"{root}/a/2", b"longer")
    (copy / "a/3.part").write_bytes(b"left by a process that was killed")
    fetch(copy)
    assert remote.local_files(copy) == ["a/1", "a/2"] and not (copy / "b").exists()
    assert (copy / "a/2").read_bytes() == b"longer" and (copy / "a/1").stat().st_ino == before
    assert "(1 files, 0.0 MiB)" in capsys.readouterr().err
    (copy / "a/1").write_bytes(b"dam")  # as big as the file
    fetch(copy)
    assert (copy / "a/1").read_bytes() == b"a/1"
    fetch(copy)
    assert capsys.readouterr().err.count("\n") == 1  # the last call found nothing to copy


def test_a_file_and_a_folder_are_uploaded(bucket):
    file, folder = copy_of(f"{bucket}/out/w.npz"), copy_of(f"{bucket}/out/scores")
    folder.mkdir(parents=True)
    for path in (file, folder / "a.json", folder / "b.png"):
        path.write_text(path.name)
    publish(file, folder)
    assert listed(f"{bucket}/out") == ["scores/a.json", "scores/b.png", "w.npz"]
    shutil.rmtree(remote.cache_dir())
    assert fetch(file).read_text() == "w.npz"


def test_the_figures_of_a_benchmark_are_uploaded(bucket):
    write_figures(copy_of(f"{bucket}/figures/speed.json"), {"device": "cpu"}, [])
    assert listed(f"{bucket}/figures") == ["speed.json"]


# --- data


def test_a_folder_of_images(bucket, tmp_path):
    write(tmp_path / "photos", *names("cat", 12), *names("dog", 12))
    upload(tmp_path / "photos", f"{bucket}/photos")
    dataset = f"folder:{bucket}/photos"
    info = get_dataset_info(dataset)
    assert info["class_names"] == ["cat", "dog"]
    theirs, ours = (
        open_examples(name, "train", image_size_px=6) for name in (dataset, f"folder:{tmp_path / 'photos'}")
    )
    assert theirs.files == ours.files
    for a, b in zip(theirs.read(np.arange(5)), ours.read(np.arange(5)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert files.absolute(f"{bucket}/photos") == f"{bucket}/photos"


def test_a_tfds_directory_of_which_only_one_dataset_is_copied(bucket, photos, monkeypatch):
    upload(photos, f"{bucket}/tfds")
    fsspec.filesystem("s3").pipe_file(f"{bucket}/tfds/other/1.0.0/big-00000-of-00001", b"big")
    assert len(open_examples("photos", "train", data_dir=f"{bucket}/tfds", image_size_px=4)) == 40
    monkeypatch.setenv("TFDS_DATA_DIR", f"{bucket}/tfds")
    assert get_dataset_info("photos", "test")["num_examples"] == 9
    assert url_of(Path(load_builder("photos", "").data_dir)) == f"{bucket}/tfds/photos/1.0.0"
    assert not copy_of(f"{bucket}/tfds/other").exists()
    with pytest.raises(UserError, match=f"^nothing is at {bucket}/tfds/cifar10: correct the address$"):
        get_dataset_info("cifar10")
    with pytest.raises(UserError, match=f"is not a TFDS name: did you mean 'folder:{bucket}/photos'"):
        get_dataset_info(f"{bucket}/photos")


# --- runs and weights


@pytest.mark.slow
def test_programs_read_a_run_and_write_into_it(run, bucket, digits_run, tmp_path, capsys):
    assert evaluate.main([f"--workdir={run}", "--split=test[:40]"]) == 0
    assert f"\nin {run}/evaluation-test_40-" in capsys.readouterr().out
    assert analyze.main([f"--workdir={run}", "curves"]) == 0
    assert f"{run}, files in {run}/analysis:\ncurves: curves.png\n" in capsys.readouterr().out
    written = {name for name in listed(run) if name.startswith(("evaluation", "analysis"))}
    assert {Path(name).name for name in written} == {
        *("scores.json", "per_class.csv", "confusion.png", "mistakes.png", "calibration.png", "curves.png")
    }
    for name, extra in {"w.npz": 0, "w.safetensors": 0, "w.stablehlo": 1}.items():
        output = f"--output={bucket}/out/{name}"
        assert export.main([f"--workdir={run}", f"--format={name.partition('.')[2]}", output]) == 0
        assert f"-> {bucket}/out/{name} (" in capsys.readouterr().out.replace("\n  ", " ")
        assert len(listed(f"{bucket}/out/{name}")) == 1 and len(listed(f"{bucket}/out")) >= 1 + extra
    # Only what was needed is on this machine: the weights of one of four checkpoints.
    assert len(list(copy_of(run).glob("checkpoints/*/weights"))) == 1
    assert not list(copy_of(run).glob("checkpoints/*/default"))

    write(tmp_path / "photos", *names("cat", 2))
    upload(tmp_path / "photos", f"{bucket}/photos")
    weights = f"--weights={bucket}/out/w.npz"
    assert predict.main([weights, "--csv", "--top=1", f"{bucket}/photos", f"{bucket}/photos/cat/0.png"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["file"] for row in rows] == [f"{bucket}/photos/cat/{i}.png" for i in range(2)]
    np.testing.assert_array_equal(
        load(f"{run}@best").params["head"]["kernel"], load_run(digits_run).params["head"]["kernel"]
    )


def test_a_checkpoint_without_its_marker_is_not_complete(run, bucket):
    steps = rundir.saved_steps(rundir.fetch_run(copy_of(run)))
    assert steps == [10, 20, 30, 40]
    fsspec.filesystem("s3").rm_file(f"{run}/checkpoints/40/{rundir.MARKER}")
    assert load(f"{run}@last").step == 30
    assert rundir.saved_steps(copy_of(run)) == [10, 20, 30]


def test_names_of_weights(run, bucket):
    assert source.named_run(f"{run}@20") == (copy_of(run), "20")
    with pytest.raises(UserError, match=f"^no weights '{bucket}/nothing'"):
        load(f"{bucket}/nothing")
    with pytest.raises(UserError, match=f"give .*{run}@20"):
        load(f"{run}/checkpoints/20")


# --- errors


def one_line(capsys):
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_errors_are_one_sentence(bucket, monkeypatch, capsys):
    assert evaluate.main([f"--workdir={bucket}-x/run"]) == 2
    assert f"{bucket}-x/run cannot be reached (The specified bucket does not exist): check" in one_line(
        capsys
    )
    assert evaluate.main([f"--workdir={bucket}/run"]) == 2
    assert one_line(capsys) == f"error: nothing is at {bucket}/run: correct the address\n"
    with pytest.raises(NothingThere):
        get_dataset_info(f"folder:{bucket}/photos")
    monkeypatch.setitem(sys.modules, "adlfs", None)
    assert evaluate.main(["--workdir=az://container/run"]) == 2
    assert "az://container/run needs another package" in one_line(capsys)


def test_no_credentials(bucket, tmp_path, monkeypatch, capsys):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    assert evaluate.main([f"--workdir={bucket}/run"]) == 2
    error = one_line(capsys)
    assert f"{bucket}/run cannot be reached (" in error and "check the address, your credentials" in error
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.mark.slow
def test_the_network_is_gone(bucket, monkeypatch, capsys):
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert evaluate.main([f"--workdir={bucket}/run"]) == 2
    assert "cannot be reached (" in one_line(capsys)
    fsspec.get_filesystem_class("s3").clear_instance_cache()

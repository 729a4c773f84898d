"""Predictions for image files: which files are read, which numbers come out, and how they are printed."""

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
from pathlib import Path

import jax
import numpy as np
import pytest
from made_datasets import encode
from PIL import Image
from rich.cells import cell_len

from mlpmixer_flax import UserError, export
from mlpmixer_flax.dataloader import open_examples
from mlpmixer_flax.inference.load import load_run
from mlpmixer_flax.inference.scores import open_split, score_images
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.predict import find_files, main, parse, predict
from mlpmixer_flax.rundir import read_class_names
from mlpmixer_flax.training.report import read_metrics
from mlpmixer_flax.weights import download
from mlpmixer_flax.weights.catalog import PUBLISHED
from mlpmixer_flax.weights.files import write_npz

ACROSS, DOWN = np.meshgrid(np.linspace(0, 255, 60), np.linspace(40, 160, 40))
PHOTO = Image.fromarray(np.stack([ACROSS, DOWN, (ACROSS + DOWN) / 2], -1).astype(np.uint8))


@pytest.fixture(scope="module")
def run(digits_run, tmp_path_factory):
    """Returns a run that has learned the digits to some degree."""
    return shutil.copytree(digits_run, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Returns the folder of the test digits as PNG files: <label>/<number>.png."""
    folder = tmp_path_factory.mktemp("images") / "digits"
    examples = open_examples("digits", "test")
    for i, (image, label) in enumerate(zip(examples.images, examples.labels, strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(folder / str(label) / f"{i}.png")
    return folder


def write(root, *files, data=None):
    for file in files:
        path = Path(root, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(PHOTO, "PNG") if data is None else data)
    return str(root)


def with_class_names(run, copy, names):
    shutil.copytree(run, copy)
    (copy / "class_names.json").write_text(json.dumps(names))
    return copy


def run_program(*arguments, **options):
    command = [sys.executable, "-m", "mlpmixer_flax.predict", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


# --- predictions


def test_predictions_of_files_have_the_scores_of_the_run(run, digits, capsys):
    assert main([f"--workdir={run}", "--csv", "--top=10", "--batch_size=50", str(digits)]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 10 * 364  # 7 full batches and part of one
    right = [row for row in rows if row["class_name"] == Path(row["file"]).parent.name]
    rows_of_run = [row for row in read_metrics(run / "metrics.jsonl") if "test/accuracy" in row]
    best = max(rows_of_run, key=lambda row: (row["test/accuracy"], row["step"]))  # the default
    assert sum(row["rank"] == "1" for row in right) / 364 == pytest.approx(best["test/accuracy"], abs=1e-6)
    assert sum(int(row["rank"]) <= 5 for row in right) / 364 == pytest.approx(best["test/accuracy_top5"])
    loss = -sum(math.log(float(row["probability"])) for row in right) / 364
    assert loss == pytest.approx(best["test/loss"], rel=1e-4)


@pytest.mark.slow
def test_photos_are_prepared_as_in_evaluation(run, tmp_path):
    """Photos of any size and mode are cropped, and read in gray because the model needs it."""
    for i in range(10):
        photo = PHOTO.rotate(36 * i).resize((30 + 4 * i, 60 - 3 * i)).convert("RGBA" if i % 2 else "RGB")
        write(tmp_path, f"test/{i}/x.png", f"train/{i}/x.png", data=encode(photo))
    changed = json.loads((run / "config.json").read_text())
    changed["preprocess"] |= {"crop_fraction": 0.75, "interpolation": "bicubic"}
    other = with_class_names(run, tmp_path / "run", read_class_names(run))
    (other / "config.json").write_text(json.dumps(changed))
    model = load_run(other)
    examples, classes = open_split(model, f"folder:{tmp_path}", "test")
    rows = score_images(model, examples, classes=classes)
    files = [tmp_path / file for file in examples.files]
    predictions = list(predict(model, files, batch_size=4))
    assert [p.image for p in predictions] == [str(file) for file in files]
    assert [[score.label for score in p.top] for p in predictions] == rows["best"].tolist()
    found = [p.top[0].probability for p in predictions]
    np.testing.assert_allclose(found, rows["confidence"], rtol=1e-5)
    (whole,) = predict(load_run(run), files[:1])
    assert whole.top[0].probability != pytest.approx(found[0], rel=1e-3)  # the crop makes a difference


def test_one_compilation_serves_all_batches(run, digits, caplog):
    files = find_files(str(digits))[:8]
    model = dataclasses.replace(load_run(run), class_names=(*"012345678", "n02123045"))
    predictions = predict(model, files, batch_size=3, top=99)
    first = next(predictions)
    assert len(first.top) == 10 and sum(score.probability for score in first.top) == pytest.approx(1)
    assert {score.label: score.class_name for score in first.top}[9] == "tabby, tabby cat"  # in words
    with jax.log_compiles():
        rest = list(predictions)
    assert [p.image for p in [first, *rest]] == files
    assert "ompil" not in caplog.text


def test_published_weights_have_the_class_names_of_imagenet(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLPMIXER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    weights = PUBLISHED["gsam/Mixer-S_32"]
    model = MlpMixer(num_classes=1000, **weights.origin["model"])
    images = np.zeros((1, 224, 224, 3), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    params = jax.tree.map(lambda p: np.zeros(p.shape, np.float32), shapes)
    params["head"]["bias"][[281, 36, 2]] = 9, 8, 7
    place = download.cache_file(weights.url)
    place.parent.mkdir(parents=True)
    write_npz(place, params, metadata={})
    photo = Path(write(tmp_path, "a" * 70 + ".png")) / ("a" * 70 + ".png")

    assert main(["--weights=gsam/Mixer-S_32", "--top=3", str(photo)]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[-1] for line in lines] == [
        "tabby, tabby cat",
        "terrapin",
        "great white shark, white shark, man-e…",
    ]
    assert main(["--weights=gsam/Mixer-S_32", "--top=3", "--json", str(photo)]) == 0
    out, err = capsys.readouterr()
    names = [score["class_name"] for score in json.loads(out)["top"]]
    assert names[2].startswith("great white shark, white shark, man-eater") and "kept" in err


# --- which files


def test_folders_and_patterns_stand_for_their_images_in_order(tmp_path, monkeypatch):
    files = ["b/2.PNG", "b/a/1.jpg", "b/.hidden.png", "b/notes.txt", "c/é.webp", "[x].png", "c/d/notes.txt"]
    write(tmp_path, *files)
    monkeypatch.chdir(tmp_path)
    assert find_files("b") == find_files("b/") == ["b/2.PNG", "b/a/1.jpg"]
    assert find_files("[x].png") == ["[x].png"]
    assert find_files("b/notes.txt") == ["b/notes.txt"]
    assert find_files("*/*.[pw]*") == ["c/é.webp"]
    assert find_files("**/*.jpg") == ["b/a/1.jpg"]
    write(tmp_path, "holiday [1]/2.png")
    assert find_files("holiday [1]/*.png") == ["holiday [1]/2.png"]
    assert find_files("[bc]") == ["b/2.PNG", "b/a/1.jpg", "c/é.webp"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_files("~/c/*.webp") == [str(tmp_path / "c/é.webp")]
    assert find_files(Path("b")) == find_files("b") and find_files(Path("~/c/é.webp")) == [
        f"{tmp_path}/c/é.webp"
    ]
    for nothing in ("absent.png", "*.gif", ""):
        with pytest.raises(UserError, match="no file matches it as a pattern: give another path"):
            find_files(nothing)


def test_a_folder_without_images_says_what_it_has_and_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.chdir(tmp_path)
    write(
        ".",
        "heic/1.HEIC",
        "heic/a/2.heic",
        "some/3.heic",
        "csv/list.csv",
        "clips/a.mp4",
        "clips/b.mp4",
        data=b"",
    )
    write(".", "zip/a.zip", "zip/b.tar.gz", data=b"")
    write(".", "some/4.png", "some/5.png")
    Path("empty/.hidden").mkdir(parents=True)
    heic = "HEIC photos cannot be read here: convert them to JPEG or PNG, or pip install pillow-heif"
    for path, message in [
        ("heic", f"'heic' has no images, only '.heic' files (2): {heic}"),
        ("csv", "'csv' has no images, only '.csv' files (1): give another path"),
        ("clips/", "'clips/' has no images, only '.mp4' files (2): give another path"),
        ("zip", "'zip' has no images, only '.gz' files (1), '.zip' files (1): unpack its archives"),
        ("empty", "'empty' has no images: give another path"),
        ("[cz]*", "'[cz]*' has no images, only '.csv' files (1), '.gz' files (1), '.mp4' files (2), '.zip' files (1): "
         "unpack its archives"),
    ]:  # fmt: skip
        with pytest.raises(UserError) as error:
            find_files(path)
        assert str(error.value) == message
    assert capsys.readouterr().err == ""
    assert find_files("some") == ["some/4.png", "some/5.png"]
    assert capsys.readouterr().err == f"left out of 'some': '.heic' files (1); {heic}\n"
    find_files("*")
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("url", ["xyz://bucket/photos", "https://example.org/cat.jpg"])
def test_a_url_is_refused_before_the_model_is_loaded(url, capsys):
    assert main(["--workdir=nowhere", url]) == 2
    assert capsys.readouterr().err == (
        f"error: image {url!r} is a URL, and only local paths and those such as s3://bucket/folder can be used: copy it "
        "to this machine, and give the path there\n"
    )


def test_names_after_two_dashes_may_begin_with_a_dash(tmp_path, monkeypatch):
    assert parse(["--workdir=r", "a.png", "--top=1", "--", "-x.png", "--", "b.png"]).images == [
        *("a.png", "./-x.png", "./--", "b.png")
    ]
    monkeypatch.chdir(tmp_path)
    write(".", "-x.png")
    assert find_files("./-x.png") == ["./-x.png"] and find_files("-*.png") == ["-x.png"]


@pytest.mark.slow
def test_unusable_files_are_reported_and_the_others_are_predicted(run, tmp_path):
    """Runs in another process, with an exported file of weights, and class names that are not ASCII."""
    names = [f"Ziffer {i} 数字" for i in range(10)]
    named = with_class_names(run, tmp_path / "run", names)
    weights, folder = tmp_path / "w.npz", tmp_path / "photos"
    assert export.main([f"--workdir={named}", "--checkpoint=ema", "--format=npz", f"--output={weights}"]) == 0
    jpeg = encode(PHOTO, "JPEG", quality=95)
    write(folder, "cut.jpg", data=jpeg[: len(jpeg) // 2])
    write(folder, "empty.png", data=b"")
    write(folder, "grey.png", data=encode(PHOTO.convert("I;16")))
    write(folder, "ink.jpg", data=encode(PHOTO.convert("CMYK"), "JPEG"))
    write(folder, "notes.txt", data=b"no image")
    write(folder, "palette.gif", data=encode(PHOTO, "GIF"))
    write(folder, "猫/犬 ü.png")
    bad = [folder / "absent.png", folder / "notes.txt", folder / "cut.jpg", folder / "empty.png"]
    with run_program(f"--weights={weights}", bad[0], "--json", bad[1], folder, folder / "ink.jpg") as process:
        out, err = process.communicate()
    assert process.returncode == 1
    lines = [json.loads(line) for line in out.splitlines()]
    good = [folder / name for name in ("grey.png", "ink.jpg", "palette.gif", "猫/犬 ü.png")]
    assert [line["file"] for line in lines] == [str(file) for file in good]
    found = list(predict(load_run(named), good))
    for line, prediction in zip(lines, found, strict=True):
        for score, expected in zip(line["top"], prediction.top, strict=True):
            assert score["label"] == expected.label and score["class_name"] == names[expected.label]
            assert score["probability"] == pytest.approx(expected.probability, rel=1e-5)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 4 and all(str(file) in line for file, line in zip(bad, errors, strict=True))
    assert "Traceback" not in err


# --- output formats


def test_the_table_fits_80_columns_for_any_names(run, digits, tmp_path, capsys):
    for number, names in enumerate([["数字" * 30 + str(i) for i in range(10)], list("0123456789")]):
        named = with_class_names(run, tmp_path / f"run{number}", names)
        folder = tmp_path / f"{number}" / ("写真" * 20)
        write(folder, "e\u0301 photo.png", "bad\udcff\n\x07.png")
        assert main([f"--workdir={named}", "--top=3", str(folder), str(digits / "0")]) == 0
        _, *lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 3 * (2 + len(list((digits / "0").iterdir())))
        assert max(map(cell_len, lines)) <= 80
        files = [line.split("  ")[0] for line in lines[::3]]
        assert files[0].endswith("bad\\udcff\\n\\x07.png") and files[1].endswith("e\u0301 photo.png")
        assert all(line.startswith(" ") for i, line in enumerate(lines) if i % 3)
    assert main([f"--workdir={named}", "--csv", "--top=1", str(folder)]) == 0
    _, row, _ = csv.reader(io.StringIO(capsys.readouterr().out))
    assert row[0] == str(folder / "bad\\udcff\n\x07.png") and row[1:4] == ["1", row[2], row[2]]


def test_no_progress_bar_is_left_in_a_terminal(run, digits):
    """The bar shares the terminal with the predictions."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (50, 80))
    command = [sys.executable, "-m", "mlpmixer_flax.predict", f"--workdir={run}", "--top=1", digits / "0"]
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # Linux raises it when the other end is closed
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    assert process.wait() == 0
    assert b"predicting: " in shown
    lines = []
    for line in shown.decode().split("\r\n"):
        seen = ""
        for part in line.split("\r"):  # each overwrites the line from the left
            seen = part + seen[len(part) :]
        lines.append(seen.rstrip())
    using, head, *rows, last = lines
    assert using.startswith("using step 40, the best checkpoint (test accuracy ")
    assert head.split() == ["file", "%", "class"] and last == ""
    assert len(rows) == len(list((digits / "0").iterdir()))
    assert all(".png" in row for row in rows)
    assert not any("predicting" in row for row in rows)


@pytest.mark.slow
def test_the_reader_of_the_output_may_stop_early(run, digits):
    with run_program(f"--workdir={run}", "--batch_size=2", digits) as process:
        assert process.stdout.readline().split() == ["file", "%", "class"]
        process.stdout.close()
        assert process.wait() == 1
        assert re.fullmatch(
            r"using step 40, the best checkpoint \(.*\), EMA weights\n", process.stderr.read()
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir={run}", "--top=0", "{photo}"], "top=0 must be at least 1"),
        (["--workdir={run}", "{photo}", "--batch_size=0"], "batch_size=0 must be at least 1"),
        (
            ["--workdir={run}", "{photo}", f"--batch_size={10**20}"],
            "must be at most 16,777,216, because more do",
        ),
        (
            ["--workdir={run}", "absent.png"],
            "'absent.png' does not exist, and no file matches it as a pattern: give another path",
        ),
        (["--workdir={run}", "{notes}"], "notes.txt' cannot be used"),
        (["--workdir=nowhere", "{photo}"], "no run in nowhere"),
        (["--weights=nothing", "{photo}"], "no weights 'nothing'"),
        (["--workdir={run}", "{photo}", "--threshold="], "threshold"),
    ],
)
def test_an_error_is_one_line(run, tmp_path, arguments, message, capsys):
    places = {"run": run, "photo": write(tmp_path, "x.png") + "/x.png", "notes": tmp_path / "notes.txt"}
    write(tmp_path, "notes.txt", data=b"no image")
    assert main([argument.format(**places) for argument in arguments]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("using step ")]
    assert len(err) == 1 and err[0].startswith("error: ") and message in err[0]

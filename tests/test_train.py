"""Tests the training program as a user runs it: real processes, real kills, real data."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from faulty_machine import QUICK_TO_COMPILE
from made_datasets import encode, write_dataset
from small_runs import SMALL, last_state, rows, run_small, start_process
from written_events import events, scalars

from mlpmixer_flax import UserError
from mlpmixer_flax.train import main, train
from mlpmixer_flax.training.configfile import load_config

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.mark.slow
def test_the_run_directory_has_what_later_programs_need(tmp_path, capsys):
    workdir = tmp_path / "run"
    assert run_small(workdir, "--config.total_steps=30", "--config.eval_every_steps=10") == 0
    out = capsys.readouterr().out
    names = {file.name for file in workdir.iterdir()}
    assert {"config.json", "class_names.json", "data.json", "metrics.jsonl", "checkpoints"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    config = json.loads((workdir / "config.json").read_text())
    assert config["total_steps"] == 30 and config["model"]["hidden_dim"] == 16
    assert config["preprocess"] == {
        "image_size_px": 8,
        "crop_fraction": 1.0,
        "fit": "crop",
        "interpolation": "bilinear",
        "mean": [0.5],
        "std": [0.5],
    }
    assert json.loads((workdir / "class_names.json").read_text()) == [str(i) for i in range(10)]
    logged = rows(workdir)
    assert [row["step"] for row in logged if "train/loss" in row] == [10, 20, 30]
    assert [row["step"] for row in logged if "test/accuracy" in row] == [10, 20, 30]
    assert {"train/accuracy", "train/learning_rate", "images_per_second"} <= logged[0].keys()
    assert {"test/loss", "test/accuracy_top5"} <= logged[1].keys()
    assert all(row["test/accuracy"] <= row["test/accuracy_top5"] for row in logged if "test/accuracy" in row)
    assert re.search(r"total: [\d,]+ parameters", out) and "compiled in" in out
    best = max(row["test/accuracy"] for row in logged if "test/accuracy" in row)
    assert f"best: {best:.2%}" in out and str(workdir) in out
    # The first loss is there after one update; then come epochs, 22.4 steps each, and the time at the end.
    assert re.search(r"^step 1/30, epoch 0.04: loss \d\.\d{4} in the first update$", out, re.MULTILINE)
    assert re.search(r"^step 30/30, epoch 1.3: loss \d", out, re.MULTILINE)
    assert re.search(r"^step 30, epoch 1.3: test accuracy 0\.\d{4}, accuracy top 5 \d", out, re.MULTILINE)
    assert "30 steps (1.34 epochs) of 64 images on 1 x cpu,\n" in out
    assert re.search(r"^done: test accuracy \d+\.\d\d% after 30 steps, in \d\d:\d\d$", out, re.MULTILINE)
    assert out.count("no GPU found, using the CPU\n") == 1
    assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 90

    # TensorBoard also gets the config, images, and the accuracy per class.
    found = events(workdir)
    tags = [value.tag for event in found for value in event.summary.value]
    assert tags.count("config/text_summary") == tags.count("training_images") == 1
    for row in logged[1::2]:
        by_class = {
            tag: value
            for step, tag, value in scalars(found)
            if step == row["step"] and tag.startswith("test_class_accuracy/")
        }
        assert by_class.keys() == {f"test_class_accuracy/{i}" for i in range(10)}
        assert (
            abs(np.mean(list(by_class.values())) - row["test/accuracy"]) < 0.02
        )  # classes have nearly the same size

    # The same command again has nothing to do, says so, and changes nothing.
    before = (workdir / "metrics.jsonl").read_text()
    assert run_small(workdir, "--config.total_steps=30", "--config.eval_every_steps=10") == 0
    assert "done: test accuracy" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_intervals_are_independent_and_everything_is_due_at_the_end(tmp_path):
    intervals = {"log_every_steps": 4, "eval_every_steps": 5, "save_every_steps": 3, "keep_checkpoints": 9}
    arguments = [f"--config.{key}={value}" for key, value in intervals.items()]
    assert run_small(tmp_path / "run", "--config.total_steps=11", *arguments) == 0
    logged = rows(tmp_path / "run")
    assert [row["step"] for row in logged if "train/loss" in row] == [4, 8, 11]
    assert [row["step"] for row in logged if "test/accuracy" in row] == [5, 10, 11]
    saved = {int(folder.name) for folder in (tmp_path / "run" / "checkpoints").iterdir()}
    assert {3, 6, 9, 11} <= saved <= {3, 5, 6, 9, 10, 11}  # 5 and 10 only if they were the best so far


@pytest.mark.slow
def test_a_warmup_that_is_longer_than_the_run_is_said(tmp_path, capsys):
    arguments = ["--config.total_steps=1", "--config.optimizer.learning_rate=0.03"]
    assert run_small(tmp_path / "run", *arguments, "--config.schedule.warmup_steps=500") == 0
    line = (
        "the warmup has 500 steps, so the learning rate never reaches 0.03:\n  lower schedule.warmup_steps or"
    )
    assert line in capsys.readouterr().out


@pytest.mark.slow
def test_a_diverging_run_stops_with_the_step_and_keeps_its_checkpoint(tmp_path, capsys):
    workdir = tmp_path / "run"
    arguments = [
        "--config.optimizer.name=sgd",
        "--config.optimizer.learning_rate=1e4",
        "--config.optimizer.weight_decay=0",
    ]
    arguments += ["--config.optimizer.clip_norm=0", "--config.save_every_steps=1", "--config.total_steps=200"]
    assert run_small(workdir, *arguments, "--config.schedule.warmup_steps=150") == 1
    message = capsys.readouterr().err
    step = int(re.search(r"error: \w+ is (nan|inf) at step (\d+): .*learning_rate", message)[2])
    state = last_state(workdir)
    assert 1 <= int(state["step"]) < step
    assert all(np.isfinite(leaf).all() for leaf in state["params"]["head"].values())


@pytest.mark.long
@pytest.mark.slow
def test_microbatches_and_streaming_train_the_same_as_whole_batches_from_memory(tmp_path):
    """Streamed data has the same order as data in memory, and microbatches give the same result as one batch."""
    scores = []
    for name, *arguments in (
        ["plain"],
        ["streamed", "--config.cache_bytes=0"],
        ["accumulated", "--config.accumulation_steps=4"],
    ):
        options = ["--config.total_steps=20", "--config.model.dropout_rate=0", *arguments]
        options.append("--config.model.stochastic_depth_rate=0")
        config = load_config("digits.py", [*SMALL, *options])
        scores.append(train(config, tmp_path / name)["test/loss"])
    assert scores[0] == scores[1]
    np.testing.assert_allclose(scores[2], scores[0], rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.batch_size=0"], "batch_size=0 must be at least 1"),
        (
            ["--config.accumulation_steps=7"],
            "batch_size=64 is not divisible by 1 devices x accumulation_steps=7",
        ),
        (["--config.dataset=digit"], "dataset 'digit' is unknown: did you mean 'digits'"),
        (["--config.train_split=trian"], "split 'trian' of dataset 'digits' cannot be read"),
        (["--config.test_split=test[:0]"], "split 'test.:0.' of dataset 'digits' has no examples"),
        (
            ["--config.preprocess.mean=0.1,0.2,0.3"],
            "preprocess.mean=.* has 3 values, but images of 'digits' have 1 channel: give one value, or one per",
        ),
        (
            ["--config.init_from=imagenet21k/Mixer-B16"],
            "no weights 'imagenet21k/Mixer-B16': .*did you mean imagenet21k/Mixer-B_16",
        ),
        (["--config.modle.remat=1"], "no key 'modle.remat': did you mean 'model.remat'"),
    ],
)
def test_bad_input_ends_with_one_sentence_and_status_2_and_writes_nothing(
    tmp_path, capsys, arguments, message
):
    assert run_small(tmp_path / "run", *arguments) == 2
    captured = capsys.readouterr()
    assert re.search(f"^error: .*{message}", captured.err) and captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda image: (image[: len(image) // 2], 1),
            r"image 3 \(train-3\) of split 'train' of dataset 'broken' ",
        ),
        (lambda image: (image, -1), "its label -1 is not in "),
    ],
)
def test_a_bad_example_is_named_and_nothing_is_written(tmp_path, capsys, damage, message):
    image = encode(np.random.default_rng(0).integers(0, 256, (8, 8, 1), np.uint8)[..., 0])
    examples = [(image, i % 3) for i in range(8)]
    examples[3] = damage(image)
    data_dir = write_dataset(
        tmp_path / "data", "broken", {"train": examples, "test": examples[:2]}, image_shape=(8, 8, 1)
    )
    arguments = ["--config.dataset=broken", f"--config.data_dir={data_dir}", "--config.batch_size=4"]
    capsys.readouterr()
    assert run_small(tmp_path / "run", *arguments) == 2
    captured = capsys.readouterr()
    assert re.search(f"^error: .*{message}", captured.err) and captured.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_batch_size_not_divisible_by_the_devices_is_refused(tmp_path):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    command = [
        sys.executable,
        "-m",
        "mlpmixer_flax.train",
        "--config=digits.py",
        f"--workdir={tmp_path / 'run'}",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and list(tmp_path.iterdir()) == []
    assert "batch_size=64 is not divisible by 3 devices: choose a multiple of 3" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_workdir_with_another_config_is_refused_with_the_keys(tmp_path, capsys):
    workdir = tmp_path / "run"
    assert run_small(workdir, "--config.total_steps=2") == 0
    before = {file: file.stat().st_mtime_ns for file in workdir.rglob("*")}
    capsys.readouterr()
    assert run_small(workdir, "--config.total_steps=3", "--config.seed=5", "--config.loss=sigmoid") == 2
    message = capsys.readouterr().err
    assert "seed was 0, is 5" in message and "loss was 'softmax', is 'sigmoid'" in message
    assert "total_steps" not in message  # which may change
    assert {file: file.stat().st_mtime_ns for file in workdir.rglob("*")} == before


@pytest.mark.slow
def test_help_explains_the_options_and_a_missing_config_is_an_error():
    done = subprocess.run(
        [sys.executable, "-m", "mlpmixer_flax.train", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "--config.KEY=VALUE" in done.stdout and "mnist.py" in done.stdout
    continuing = "To continue a run that was stopped, repeat the command with the same --workdir"
    assert continuing in " ".join(done.stdout.split())
    done = subprocess.run([sys.executable, "-m", "mlpmixer_flax.train"], capture_output=True, text=True)
    assert done.returncode == 2 and "--config" in done.stderr


@pytest.mark.slow
def test_images_that_vary_in_size_train_and_continue_with_the_same_config(tmp_path, capsys):
    rng = np.random.default_rng(0)
    examples = [(encode(rng.integers(0, 256, (9 + i, 12, 3), np.uint8), "JPEG"), i % 3) for i in range(12)]
    data_dir = write_dataset(tmp_path / "data", "photos", {"train": examples, "test": examples[:5]})
    arguments = ["--config.dataset=photos", f"--config.data_dir={data_dir}", "--config.total_steps=3"]
    arguments += ["--config.augment.min_crop_area=0.3", "--config.preprocess.crop_fraction=0.875"]
    assert run_small(tmp_path / "run", *arguments) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["preprocess"]["crop_fraction"] == 0.875 and config["augment"]["min_crop_area"] == 0.3
    assert run_small(tmp_path / "run", *arguments) == 0, capsys.readouterr().err
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert run_small(tmp_path / "run", *arguments) == 0
    # Its scores are gone, so the last state is evaluated again.
    assert re.search(
        r"^done: test accuracy .* after 3 steps, in \d\d:\d\d$", capsys.readouterr().out, re.MULTILINE
    )


@pytest.mark.long
@pytest.mark.slow
def test_a_chosen_cpu_needs_no_word_about_a_gpu(tmp_path):
    process = start_process(tmp_path / "run", "--config.total_steps=1", env_changes={"JAX_PLATFORMS": "cpu"})
    out = process.communicate()[0]
    assert process.returncode == 0 and "1 x cpu" in out and "no GPU" not in out


@pytest.mark.long
@pytest.mark.slow
def test_default_run_directories_have_the_name_of_the_config_and_the_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20260102-030405")  # two runs start in the same second
    for count in range(1, 4):
        assert main(["--config=digits.py", *SMALL, f"--config.total_steps={count}"]) == 0
    begin = "digits-20260102-030405"
    found = {folder.name: rows(folder)[-1]["step"] for folder in Path("runs").iterdir()}
    assert found == {begin: 1, f"{begin}-2": 2, f"{begin}-3": 3}


@pytest.mark.long
@pytest.mark.slow
def test_default_run_directories_of_processes_are_different(tmp_path):
    arguments = [sys.executable, "-m", "mlpmixer_flax.train", "--config=digits.py", *SMALL]
    arguments += ["--config.total_steps=1"]
    both = [subprocess.Popen(arguments, cwd=tmp_path, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    runs = list((tmp_path / "runs").iterdir())
    assert len(runs) == 2
    assert all(re.fullmatch(r"digits-\d{8}-\d{6}(-2)?", run.name) and rows(run) for run in runs)


def test_an_error_leaves_no_default_run_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--config=digits.py", "--config.dataset=digit"]) == 2
    assert not list(tmp_path.iterdir())
    Path("runs").mkdir()
    assert main(["--config=digits.py", "--config.dataset=digit"]) == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"] and not list(Path("runs").iterdir())
    Path("runs").rmdir()
    Path("runs").touch()
    capsys.readouterr()
    assert main(["--config=digits.py", *SMALL]) == 2
    error = capsys.readouterr().err
    assert re.match(r"error: cannot create a directory in .*runs \(.*\): give --workdir\n$", error)


def test_an_empty_workdir_is_refused_and_a_tilde_is_the_home_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(SystemExit) as stop:
        run_small("")
    assert stop.value.code == 2 and "argument --workdir: it is empty: give a path" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert run_small("~/run", "--config.total_steps=1") == 0
    assert (tmp_path / "home" / "run" / "config.json").exists() and not (tmp_path / "~").exists()
    config = load_config("digits.py", [*SMALL, "--config.total_steps=1"])
    assert train(config, "~/run")["step"] == 1  # the function too
    with pytest.raises(UserError, match="the run directory has an empty name"):
        train(config, "")


@pytest.mark.slow
def test_no_tensorflow_is_loaded(tmp_path):
    code = (
        "import sys; from mlpmixer_flax.train import main; status = main(sys.argv[1:]); "
        "loaded = [m for m in sys.modules if m.split('.')[0] in ('tensorflow', 'torch')]; "
        "sys.exit(f'{status} {loaded}' if status or loaded else 0)"
    )
    arguments = ["--config=digits.py", f"--workdir={tmp_path / 'run'}", *SMALL, "--config.total_steps=1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=QUICK_TO_COMPILE
    )
    assert done.returncode == 0, done.stderr

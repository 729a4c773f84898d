"""Tests the program that measures speed and memory."""

import json
import os
import re
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from mlpmixer_flax.benchmark import MODELS, main
from mlpmixer_flax.config import resolve
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.training.configfile import load_config
from mlpmixer_flax.training.optimizer import SCHEDULES
from mlpmixer_flax.training.speed import Row, format_row, make_row, prepare, time_calls
from mlpmixer_flax.training.table import count_macs

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def test_a_call_of_known_length_is_timed():
    calls = []
    times = time_calls(lambda n: calls.append(time.sleep(0.01 * n)), seconds=0.2, repetitions=4)
    assert len(times) == 4 and times == sorted(times) and len(calls) == 6
    assert 0.01 <= times[0] < 0.05


def test_multiply_accumulates_are_those_of_the_paper():
    # Table 1 of the paper gives the cost per core only; S/32 by hand: stem, 8 blocks, head.
    model = MlpMixer(num_classes=1000, **MODELS["s32"][0])
    images = np.zeros((1, 224, 224, 3), np.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    stem, head = 49 * 32 * 32 * 3 * 512, 512 * 1000
    block = 2 * 512 * 49 * 256 + 2 * 49 * 512 * 2048
    assert count_macs(model, (224, 224, 3), params) == stem + 8 * block + head


def test_an_update_counts_as_three_forward_passes():
    row = make_row("x", "training", 10, [0.5, 1.0, 2.0], macs=10**12, product_tflops=120)
    assert (row.images_per_second, row.spread, row.tflops, row.share) == (10, 1.5, 60, 0.5)
    assert make_row("x", "inference", 10, [1.0], macs=10**12, product_tflops=40).share == 0.5
    assert format_row(row).split() == ["x", "training", "10", "10", "150%", "60", "50%"]
    assert format_row(Row("x", "training", 10)).endswith("out of memory")


@pytest.mark.slow
def test_a_model_is_measured(tmp_path, capsys):
    file = tmp_path / "new" / "folder.json"
    arguments = ["--model=digits", "--batch_size=8,16", "--seconds=0.2", f"--json={file}"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert re.search(r"^a matrix product in float32 reaches \S+ TFLOP/s", said, re.MULTILINE)
    assert len(re.findall(r"^digits +(?:training|inference) ", said, re.MULTILINE)) == 4
    assert max(map(len, said.splitlines()[2:])) <= 80
    written = json.loads(file.read_text())
    assert [(row["kind"], row["batch_size"]) for row in written["rows"]] == [
        ("training", 8),
        ("training", 16),
        ("inference", 8),
        ("inference", 16),
    ]
    for row in written["rows"]:
        assert row["images_per_second"] > 0 and row["memory_mib"] > 0 and row["compile_seconds"] > 0
        expected = row["tflops"] / written["product_tflops"]["float32"]
        assert row["share"] == pytest.approx(expected)
    assert written["jax"] == jax.__version__


@pytest.mark.long
def test_compile_times_are_not_those_of_programs_that_were_kept(tmp_path):
    command = [sys.executable, "-m", "mlpmixer_flax.benchmark", "--model=digits", "--kind=inference"]
    environment = {**os.environ, "MLPMIXER_CACHE": str(tmp_path)}
    del environment["JAX_COMPILATION_CACHE_DIR"]
    subprocess.run([*command, "--seconds=0.05"], env=environment, check=True)
    (folder,) = (tmp_path / "compiled").iterdir()
    assert not list(folder.glob("*-cache"))


@pytest.mark.slow
def test_a_config_is_measured_with_its_batch_size(capsys):
    arguments = ["--config=configs/mnist.py", "--config.batch_size=4", "--config.model.num_blocks=1"]
    assert main([*arguments, "--seconds=0.1", "--kind=training"]) == 0
    assert re.search(r"^mnist +training +4 ", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_updates_have_a_learning_rate_with_every_schedule(schedule):
    config = load_config("digits.py", {"schedule.name": schedule, "schedule.warmup_epochs": 1.0})
    config.model.num_blocks = 1
    prepared = prepare(resolve(config, {}), "training", 8, num_classes=10)
    with jax.debug_nans(True):
        prepared.run(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=b17"], "there is no model 'b17': choose one of s8, s16"),
        (["--model=digits", "--batch_size=0"], "batch_size=0 must be at least 1"),
        (
            ["--model=digits", f"--batch_size={10**20}"],
            "must be at most 16777216, because larger batches do not",
        ),
        (
            ["--model=digits", "--num_classes=10000000000"],
            "num_classes=10000000000 must be at most 16,777,216",
        ),
        *[
            (
                ["--model=digits", f"--seconds={seconds}"],
                f"seconds={float(seconds)} must be above 0 and at most 86400",
            )
            for seconds in ("0", "inf", "nan", "1e300")
        ],
        (
            ["--model=digits", "--config.batch_size=8"],
            "--config.batch_size=8 has no meaning without --config",
        ),
        (
            ["--config=digits.py", "--config.accumulation_steps=4", "--batch_size=6"],
            "batch_size=6 is not divisible by 1 devices x accumulation_steps=4: choose a multiple of 4",
        ),
        (
            ["--config=digits.py", "--config.preprocess.mean=0.5,0.5"],
            "preprocess.mean=(0.5, 0.5) has 2 values, but images of the benchmark have 3 channels: give one value",
        ),
        (
            ["--config=digits.py", "--config.distill_from=runs/teacher"],
            "distill_from='runs/teacher': updates with a teacher are not measured, so add --config.distill_from=",
        ),
    ],
)
def test_a_mistake_is_named_before_anything_is_measured(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "matrix product" not in captured.out


@pytest.mark.parametrize("batch_sizes", ["8,x", "8,", ""])
def test_batch_sizes_that_are_no_numbers_are_refused(batch_sizes, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--model=digits", f"--batch_size={batch_sizes}"])
    assert stop.value.code == 2
    assert (
        f"argument --batch_size: '{batch_sizes}' is not a list of whole numbers, such as 8,32"
        in capsys.readouterr().err
    )

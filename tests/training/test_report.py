"""Tests what a run reports in metrics.jsonl, in TensorBoard and on the terminal."""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import SessionLog
from written_events import events, scalars

from mlpmixer_flax import UserError
from mlpmixer_flax.training.report import Reporter, read_metrics

TRAINING = {"train/loss": 1.23456, "train/accuracy": 0.5, "images_per_second": 1234.5}
TEST = {"test/loss": 2.5, "test/accuracy": 0.25, "test/accuracy_top5": 0.75}


def open_reporter(workdir, start_step=0, total_steps=100):
    reporter = Reporter(workdir, start_step=start_step, total_steps=total_steps, steps_per_epoch=40.0)
    return contextlib.closing(reporter)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


# The file and TensorBoard


def test_the_file_and_tensorboard_hold_the_scalars_by_name(tmp_path):
    with open_reporter(tmp_path) as reporter:
        reporter.training(50, TRAINING)
        # Each line is on disk at once: a killed run keeps it.
        assert lines(tmp_path) == [{"step": 50, **TRAINING}]
        reporter.evaluation(50, TEST)
        reporter.training(100, {**TRAINING, "train/loss": 0.5})
    rows = lines(tmp_path)
    assert rows == [
        {"step": 50, **TRAINING},
        {"step": 50, **TEST},
        {"step": 100, **TRAINING, "train/loss": 0.5},
    ]
    assert all(next(iter(row)) == "step" for row in rows)
    assert read_metrics(tmp_path / "metrics.jsonl") == rows
    expected = [
        (row["step"], name, np.float32(v)) for row in rows for name, v in row.items() if name != "step"
    ]
    assert scalars(events(tmp_path)) == expected


def test_tensorboard_holds_the_config_and_a_sheet_of_images(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 40, 40, 3), dtype=np.uint8)
    with open_reporter(tmp_path) as reporter:
        reporter.beginning({"seed": 0, "preprocess.mean": (0.5,), "dataset": "folder:a|b"}, images)
    text, sheet = ((event.step, value) for event in events(tmp_path) for value in event.summary.value)
    assert (text[0], text[1].tag, text[1].metadata.plugin_data.plugin_name) == (
        1,
        "config/text_summary",
        "text",
    )
    (markdown,) = text[1].tensor.string_val
    assert markdown.decode().splitlines() == [
        "    seed = 0",
        "    preprocess.mean = (0.5,)",
        "    dataset = 'folder:a|b'",
    ]
    assert (sheet[0], sheet[1].tag) == (1, "training_images")
    pixels = np.asarray(Image.open(io.BytesIO(sheet[1].image.encoded_image_string)))
    assert pixels.shape == (2 * 42, 3 * 42, 3)
    for i, image in enumerate(images):
        top, left = 42 * (i // 3), 42 * (i % 3)
        np.testing.assert_array_equal(pixels[top : top + 40, left : left + 40], image)
    assert (pixels[42:, 84:] == 255).all() and (pixels[40:42] == 255).all()


@pytest.mark.parametrize(("count", "shape"), [(1, (66, 66, 3)), (64, (528, 528, 3))])
def test_small_grey_images_are_enlarged(tmp_path, count, shape):
    images = np.arange(64 * count, dtype=np.uint8).reshape(count, 8, 8, 1)
    with open_reporter(tmp_path) as reporter:
        reporter.beginning({}, images)
    (sheet,) = (value for event in events(tmp_path) for value in event.summary.value if value.image.height)
    pixels = np.asarray(Image.open(io.BytesIO(sheet.image.encoded_image_string)))
    assert pixels.shape == shape
    np.testing.assert_array_equal(pixels[4:64:8, 4:64:8, 0], images[0, :, :, 0])


def test_few_classes_get_a_curve_each_and_many_a_histogram_but_no_line_in_the_file(tmp_path):
    few = {"cat": 0.5, "great auk": np.nan, "кот": 1.0}
    many = {f"class {i}": i / 40 for i in range(40)} | {"unseen": np.nan}
    with open_reporter(tmp_path) as reporter:
        reporter.by_class(10, few, tag="test_class_accuracy")
        reporter.by_class(20, many, tag="validation_class_accuracy")
    found = events(tmp_path)
    *curves, (step, tag, _) = scalars(found)
    assert curves == [(10, "test_class_accuracy/cat", 0.5), (10, "test_class_accuracy/кот", 1.0)]
    (histogram,) = (value.histo for event in found for value in event.summary.value if value.histo.num)
    assert (step, tag, histogram.num) == (20, "validation_class_accuracy", 40)
    assert sum(histogram.bucket) == 40 and max(histogram.bucket) <= 3
    assert not lines(tmp_path)


@pytest.mark.parametrize("classes", [3, 30])
def test_a_split_of_images_without_any_label_has_no_scores_per_class(classes, tmp_path):
    with open_reporter(tmp_path) as reporter:
        tag = "validation_class_average_precision"
        reporter.by_class(10, {f"class {i}": np.nan for i in range(classes)}, tag=tag)
    assert not scalars(events(tmp_path))


def test_resuming_drops_later_lines_and_keeps_earlier_ones(tmp_path):
    with open_reporter(tmp_path) as reporter:
        for step in (10, 20, 30):
            reporter.training(step, TRAINING)
            reporter.evaluation(step, TEST)
    for file in tmp_path.glob("*tfevents*"):
        file.rename(tmp_path / f"0.{file.name}")  # within a second, tensorboardX would write the same file
    with open_reporter(tmp_path, start_step=20) as reporter:
        reporter.training(30, {**TRAINING, "train/loss": 9.0})
    assert [(row["step"], row.get("train/loss")) for row in lines(tmp_path)] == [
        (10, 1.23456),
        (10, None),
        (20, 1.23456),
        (20, None),
        (30, 9.0),
    ]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("start_step", [0, 20])  # 0: killed before its first checkpoint
def test_resuming_makes_tensorboard_drop_the_later_steps(tmp_path, start_step):
    """TensorBoard drops everything at or after the step of a start event."""
    with open_reporter(tmp_path) as reporter:
        for step in (10, 20, 30):
            reporter.training(step, TRAINING)
    for file in tmp_path.glob("*tfevents*"):
        file.unlink()
    with open_reporter(tmp_path, start_step=start_step) as reporter:
        reporter.training(start_step + 10, TRAINING)
    starts = [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START]
    assert starts == [start_step + 1]


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 10, "train/loss": 1.0}\n{"step": 20, "train/lo')
    assert read_metrics(file) == [{"step": 10, "train/loss": 1.0}]
    with open_reporter(tmp_path, start_step=20) as reporter:
        reporter.training(30, TRAINING)
    assert lines(tmp_path) == [{"step": 10, "train/loss": 1.0}, {"step": 30, **TRAINING}]


DAMAGED = [
    b"\0" * 40,
    b"\xff\xfe\xfa",
    b"nonsense",
    b"{",
    b"3",
    b"null",
    b"[1, 2]",
    b'"step"',
    b"{}",
    b"[" * 9999,
]
DAMAGED += [b'{"train/loss": 1.0}', b'{"step": "7", "train/loss": 1.0}', b'{"step": 7, "train/loss": "low"}']
DAMAGED += [
    b'{"step": 1%s}' % (b"0" * 4000),
    b'{"step": 7, "train/loss": 1%s}' % (b"0" * 4000),
    b'{"step": -7}',
]
DAMAGED += [b'{"step": 7, "train/loss": 1e308}', b'{"step": 2147483648, "train/loss": 1.0}']
DAMAGED += [b'{"step": 7, "train/loss": null}', b'{"step": 1, "train/lo{"step": 2, "train/loss": 1.0}']


@pytest.mark.parametrize("line", DAMAGED, ids=lambda line: str(line[:20]))
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_damaged_line_does_not_stop_a_run_from_resuming(tmp_path, capsys, line, place):
    file = tmp_path / "metrics.jsonl"
    good = [b'{"step": 10, "train/loss": 1.0}', b'{"step": 20, "train/loss": 0.5}']
    file.write_bytes(b"\n".join([*good[:place], line, *good[place:]]) + b"\n")
    assert [row["step"] for row in read_metrics(file)] == [10, 20]
    with open_reporter(tmp_path, start_step=20) as reporter:
        reporter.training(30, TRAINING)
    assert [row["step"] for row in lines(tmp_path)] == [10, 20, 30]
    assert f"{file}: 1 damaged line removed" in capsys.readouterr().out


def test_a_complete_last_line_without_its_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "train/loss": 1.0}')
    with open_reporter(tmp_path, start_step=10) as reporter:
        reporter.training(20, TRAINING)
    assert [row["step"] for row in lines(tmp_path)] == [10, 20]


def test_without_a_file_there_are_no_rows(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_scores_that_are_not_finite_are_no_damage(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "test/loss": NaN, "test/accuracy": Infinity}')
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_a_folder_in_place_of_the_file_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="metrics.jsonl cannot be read .*: remove it, or restore the file$"):
        read_metrics(tmp_path / "metrics.jsonl")


# The terminal


def test_plain_lines_if_the_output_is_not_a_terminal(tmp_path, capsys, clock):
    with open_reporter(tmp_path, start_step=100, total_steps=200) as reporter:
        reporter.first_update(101, {"loss": np.float32(2.30259), "accuracy": np.float32(0)})
        for _ in range(50):
            reporter.advance()
        clock.now += 90  # 50 steps in 90 s: as long again for the other 50
        reporter.training(150, TRAINING)
        reporter.evaluation(150, TEST)
        reporter.evaluation(150, {"validation/accuracy": 0.5, "validation/loss": 1.5})
        reporter.say("stopped")
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "step 101/200, epoch 2.5: loss 2.3026 in the first update",
        "step 150/200, epoch 3.8: loss 1.2346, acc 0.5000, 1,234 img/s, ETA 01:30",
        "step 150, epoch 3.8: test accuracy 0.2500, accuracy top 5 0.7500, loss 2.5000",
        "step 150, epoch 3.8: validation accuracy 0.5000, loss 1.5000",
        "stopped",
    ]
    assert err == ""
    assert max(map(len, out.splitlines())) <= 80


BAR = """
import pathlib, sys, time
from mlpmixer_flax.training.report import Reporter
start, total, speed = int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
reporter = Reporter(pathlib.Path(sys.argv[1]), start_step=start, total_steps=total, steps_per_epoch=4.0)
for step in range(start + 1, start + 5):
    time.sleep(0.15)  # longer than the 0.1 s between two looks of the bar
    reporter.advance()
    if step == start + 1:
        reporter.first_update(step, {"loss": 2.30259})
    if step == start + 2:
        scalars = {"train/loss": 11.234, "train/accuracy": 0.4567, "images_per_second": speed}
        reporter.training(step, scalars)
        reporter.evaluation(step, {"test/loss": 2.5, "test/accuracy": 0.25})
reporter.close()
"""


def on_a_terminal(*arguments, columns=80):
    """Returns what BAR, called with these arguments, writes to a pseudo-terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", BAR, *map(str, arguments)],
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # Linux: the other end is closed
            break
        if not piece:
            break
        written += piece
    os.close(ours)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err.decode()
    return written.decode()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "total", "speed", "shown"),
    [(0, 8, 1234.5, "1,234 img/s"), (0, 1_000_000, 123456.0, "123,456 img/s")],
)
def test_progress_bar_on_a_terminal(tmp_path, start, total, speed, shown):
    written = on_a_terminal(tmp_path, start, total, speed)
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", written)
    frames = [frame.strip("\n") for frame in re.split(r"[\r\n]+", text)]
    assert max(map(len, frames)) <= 80
    bars = [frame for frame in frames if "|" in frame]
    full = bars[-1]
    assert re.match(rf" *\d+%\|.*\| {start + 4}/{total}, ", full), full
    for part in (f"epoch {(start + 2) / 4:.{2 if start == 0 else 1}f}", "loss 11.234", shown):
        assert part in full
    assert ("acc 0.457" in full) == (total < 100_000)  # otherwise there is no room for it
    assert any("loss 2.3026" in bar for bar in bars)
    assert re.search(r", ETA (\d+:)?\d\d:\d\d *$", full), full  # not cut off at the edge
    # The evaluation has a line of its own above the bar; there is no other line.
    others = [frame.strip() for frame in frames if frame.strip() and "|" not in frame]
    assert others == [f"step {start + 2}, epoch 0.50: test accuracy 0.2500, loss 2.5000"]

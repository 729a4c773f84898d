"""Batches made ahead by threads and by worker processes, and scripts that start such processes."""

import multiprocessing
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from digit_batches import assert_same, digits, run_python
from made_datasets import encode, write_dataset

from mlpmixer_flax import UserError
from mlpmixer_flax.dataloader import TestBatches, TrainBatches, iterate, open_examples


@pytest.mark.slow
def test_streamed_batches_are_the_cached_ones_for_any_number_of_workers():
    cached = TrainBatches(digits(), batch_size=100, seed=5)
    streamed = TrainBatches(digits(cache_bytes=0), batch_size=100, seed=5)
    expected = list(iterate(cached, 10, 18))
    assert len(expected) == 8
    for k, batch in enumerate(expected):
        assert_same(batch, cached[10 + k])
    for num_workers in (0, 1, 2):
        got = list(iterate(streamed, 10, 18, num_workers=num_workers))
        assert len(got) == 8
        for a, b in zip(expected, got, strict=True):
            assert_same(a, b)
    # Starts in the middle and crosses the end of the epoch, which is in batch 14 (1433 / 100).
    for a, b in zip(expected[4:], iterate(streamed, 14, 18), strict=True):
        assert_same(a, b)


@pytest.mark.slow
def test_more_workers_than_batches_and_no_batches():
    streamed = TrainBatches(digits(cache_bytes=0), batch_size=10, seed=0)
    assert len(list(iterate(streamed, 3, 4, num_workers=2))) == 1
    assert list(iterate(streamed, 3, 3, num_workers=2)) == []


@pytest.mark.slow
def test_photos_stream_the_same_from_workers(photos):
    examples = open_examples("photos", "train", data_dir=photos, image_size_px=16, min_crop_area=0.2)
    batches = TrainBatches(examples, batch_size=16, seed=0)
    for k, batch in enumerate(iterate(batches, 0, 4, num_workers=2)):
        assert_same(batch, batches[k])
    test = open_examples("photos", "test", data_dir=photos, image_size_px=16, cache_bytes=0)
    cached = open_examples("photos", "test", data_dir=photos, image_size_px=16)
    batches = TestBatches(test, batch_size=4)
    assert test.images is None
    got = list(iterate(batches, 0, len(batches)))
    assert [batch["mask"].sum() for batch in got] == [4, 4, 1]
    for k, batch in enumerate(got):
        assert_same(batch, TestBatches(cached, batch_size=4)[k])


@pytest.mark.slow
def test_workers_end_with_the_iterator():
    streamed = TrainBatches(digits(cache_bytes=0), batch_size=10, seed=0)
    before = set(multiprocessing.active_children())
    iterator = iterate(streamed, 0, 1000, num_workers=2)
    next(iterator)
    assert len(set(multiprocessing.active_children()) - before) == 2
    iterator.close()
    deadline = time.time() + 20
    while set(multiprocessing.active_children()) - before and time.time() < deadline:
        time.sleep(0.1)
    assert not set(multiprocessing.active_children()) - before


def test_a_worker_exits_if_its_parent_was_killed_before_it_started():
    """A worker takes a second to start; the parent may end before. (The test's own process is alive.)"""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    code = (
        f"import time, mlpmixer_flax.dataloader as d; d._exit_with_parent({gone.pid}, 0, 1); time.sleep(60)"
    )
    start = time.monotonic()
    assert run_python(code).returncode == 1 and time.monotonic() - start < 30


# Lines of a script, with "    " before them if they are guarded.
READS = """
batches = TrainBatches(open_examples("digits", "train", cache_bytes={cache_bytes}), batch_size=32, seed=0)
for batch in iterate(batches, 0, 3, num_workers=2):
    print(len(batch["label"]), flush=True)
"""


IMPORTS = "from mlpmixer_flax.dataloader import TrainBatches, iterate, open_examples\n"


UNGUARDED = IMPORTS + READS


IN_A_FUNCTION = IMPORTS + "def work():" + READS.replace("\n", "\n    ") + "\n"


TRAINS = """
import mlpmixer_flax as mf
mf.fit(mf.load_config("digits.py", {{"cache_bytes": {cache_bytes}, "num_workers": 1, "total_steps": 2}}), "run")
"""


def run_script(tmp_path, script, *, cache_bytes=0, stdin=False):
    """Runs a script in a session of its own; returns the result, after a check that no process of it is left."""
    file = tmp_path / "script.py"
    file.write_text(script.format(cache_bytes=cache_bytes))
    command = [sys.executable, "-"] if stdin else [sys.executable, "script.py"]
    with (
        file.open() as source,
        subprocess.Popen(
            command,
            stdin=source if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            start_new_session=True,
        ) as process,
    ):
        out, err = process.communicate(timeout=100)
    deadline = time.monotonic() + 20  # Python's own helper of workers ends a moment later
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.1)
    return process.returncode, out, err


@pytest.mark.parametrize(
    "script", [UNGUARDED, IN_A_FUNCTION + "work()", IN_A_FUNCTION + "if work:\n    work()"]
)
def test_a_script_without_a_main_guard_is_told_in_a_sentence(tmp_path, script):
    returncode, out, err = run_script(tmp_path, script)
    assert returncode == 1 and out == "" and err.count("Traceback") == 1
    assert err.splitlines()[-1] == (
        "mlpmixer_flax.UserError: num_workers=2 starts processes that import 'script.py' and so would run all of it "
        'again: put the code that trains or reads batches below if __name__ == "__main__":, or set num_workers to 0'
    )


@pytest.mark.slow
def test_training_without_a_main_guard_stops_before_anything_is_written(tmp_path):
    returncode, _, err = run_script(tmp_path, TRAINS)
    assert returncode == 1 and err.count("Traceback") == 1
    assert "num_workers=1 starts processes that import 'script.py'" in err.splitlines()[-1]
    assert os.listdir(tmp_path) == ["script.py"]


def test_a_script_from_standard_input_is_told_to_be_saved(tmp_path):
    returncode, out, err = run_script(tmp_path, UNGUARDED, stdin=True)
    assert returncode == 1 and out == "" and "'<stdin>' is not a file: save the script in a file" in err


@pytest.mark.slow
def test_a_script_with_a_main_guard_gets_its_batches(tmp_path):
    script = IN_A_FUNCTION + 'if __name__ == "__main__":\n    work()'
    assert run_script(tmp_path, script) == (0, "32\n" * 3, "")


def test_a_main_guard_may_have_any_form(tmp_path):
    script = """
from mlpmixer_flax.dataloader import TrainBatches, check_workers, open_examples
batches = TrainBatches(open_examples("digits", "train", cache_bytes=0), batch_size=32, seed=0)
def work(form):
    check_workers(batches, 2)
    print(form)
if __name__ == "__main__":
    work(1)
if __name__ != "__main__":
    pass
else:
    work(2)
__name__ == "__main__" and work(3)
try:
    if "__main__" == __name__:
        work(4)
finally:
    pass
exec("if __name__ == '__main__':\\n    work(5)")
if __name__ == "__main__": exec("work(6)")
work(7)
"""
    returncode, out, err = run_script(tmp_path, script)
    assert returncode == 1 and out.split() == list("123456") and "__main__" in err.splitlines()[-1]


@pytest.mark.slow
def test_a_script_needs_no_main_guard_where_no_worker_starts(tmp_path):
    assert run_script(tmp_path, UNGUARDED, cache_bytes=10**9) == (0, "32\n" * 3, "")
    assert run_script(tmp_path, UNGUARDED.replace("num_workers=2", "num_workers=0")) == (0, "32\n" * 3, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("cut", ["image 4 (train-4)", "'train' of dataset 'bad'"]),
        ("text", ["image 4 (train-4)", "it is a text file, not an image"]),
        ("size", ["image 4 (train-4)", "(7, 8, 3), not (8, 8, 3)"]),
        ("label", ["image 4 (train-4)", "label -1 is not in [0, 3)"]),
    ],
)
def test_a_bad_example_is_named_cached_or_streamed(tmp_path, damage, words):
    rng = np.random.default_rng(0)
    examples = [(encode(rng.integers(0, 255, (8, 8, 3), np.uint8)), i % 3) for i in range(6)]
    image, label = examples[4]
    examples[4] = {
        "cut": (image[:-60], label),
        "text": (b"not an image", label),
        "size": (encode(np.zeros((7, 8, 3), np.uint8)), label),
        "label": (image, -1),
    }[damage]
    write_dataset(tmp_path, "bad", {"train": examples}, image_shape=(8, 8, 3))

    def cached():
        open_examples("bad", "train", data_dir=str(tmp_path))

    def streamed(num_workers):
        batches = TrainBatches(
            open_examples("bad", "train", data_dir=str(tmp_path), cache_bytes=0), batch_size=3, seed=0
        )
        list(iterate(batches, 0, 4, num_workers=num_workers))

    for read in [cached, lambda: streamed(0)] + [lambda: streamed(2)] * (damage == "cut"):
        with pytest.raises(UserError) as error:
            read()
        for word in words:
            assert word in str(error.value)
        assert "\n" not in str(error.value)

"""Tests of runs with several processes: real processes that meet on this machine, real kills and signals."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from made_datasets import encode
from made_folders import write
from several_processes import (
    CHANGES,
    ENVIRONMENT,
    arguments,
    finish,
    free_port,
    read_until,
    start_all,
    state_at,
)
from small_runs import rows

from mlpmixer_flax.evaluate import main as evaluate
from mlpmixer_flax.train import main as train
from mlpmixer_flax.training.report import TIMINGS

ROOT = Path(__file__).parent.parent.parent


# --- the same numbers

CHILD = """
import json, sys
import jax
at, index, out, run, changes = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4], json.loads(sys.argv[5])
jax.distributed.initialize(at, 2, index)  # as a launcher of one's own does
from pathlib import Path
from mlpmixer_flax import UserError, fit, load_config
from mlpmixer_flax.evaluate import main as evaluate
from mlpmixer_flax.training.processes import check_same, check_shared, from_lead, gather, is_lead, same_fate, together

def refusal(function):
    try:
        function()
    except UserError as error:
        return str(error)

def fail_in(indices):
    with same_fate():
        if index in indices:
            raise UserError(f"failed in {index}")

def made():
    assert index == 0
    return {"made by": index}

def refused():
    raise UserError("refused")

found = {
    "gathered": gather({"index": index, "text": "\\u00e9" * 3000 * index}),
    "lead": is_lead(),
    "from the lead": from_lead(made),
    "refused by the lead": refusal(lambda: from_lead(refused)),
    "nobody fails": refusal(lambda: fail_in([])),
    "one fails": refusal(lambda: fail_in([1])),
    "both fail": refusal(lambda: fail_in([0, 1])),
    "differs": refusal(lambda: check_same("a thing", {"a": 1, "b": index}, advice="mend it")),
    "same": refusal(lambda: check_same("a thing", {"a": 1}, advice="mend it")),
    "not shared": refusal(lambda: check_shared(Path(out, "nowhere"), seconds=0.1)),
    "shared": refusal(lambda: check_shared(Path(out))),
    "odd batch": refusal(lambda: fit(load_config("digits.py", {"batch_size": 63}), out + "/odd")),
    "other data": refusal(lambda: fit(load_config("digits.py", {"dataset": "folder:other"}), out + "/data")),
    "other seed": refusal(lambda: fit(load_config("digits.py", {"seed": index}), out + "/other")),
    "workdir of one": refusal(lambda: fit(load_config("digits.py"), "" if index == 0 else out + "/one")),
}
config = load_config("digits.py", changes)
found["scores"] = fit(config, out + "/run" if index == 0 else "ignored")
with together():
    print("said by", index)
found["again"] = fit(config, out + "/second")
found["evaluated"] = evaluate([f"--workdir={run}", f"--output={out}/scores", "--batch_size=50"])
Path(out, f"{index}.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def origin(digits_run):
    return {**CHANGES, "init_from": str(digits_run), "freeze": "stem"}


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """Two directories that stand for two machines: they have the same photos, and other photos that differ."""
    rng = np.random.default_rng(0)
    folders = [tmp_path_factory.mktemp(f"machine{index}") for index in range(2)]
    for split, count in (("train", 20), ("val", 4)):
        for number in range(count):
            data = encode(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8), "PNG")
            for dataset in ("photos", "other"):
                for folder in folders:
                    write(folder / dataset, f"{split}/{'ab'[number % 2]}/{number}.png", data=data)
    (folders[1] / "other/train/b/7.png").unlink()
    return folders


@pytest.fixture(scope="module")
def two(common, origin, digits_run, machines):
    """What two processes found, which a program has connected, the directory with their run, and what they printed."""
    out, printed = common / "two", common / "two.json"
    with FileLock(f"{out}.lock"):
        if not printed.exists():
            out.mkdir()
            printed.write_text(json.dumps(_run_two(out, origin, digits_run, machines)))
    found = [json.loads((out / f"{index}.json").read_text()) for index in range(2)]
    return found, out, json.loads(printed.read_text())


def _run_two(out, origin, digits_run, machines):
    at, changes = f"127.0.0.1:{free_port()}", json.dumps({**origin, "total_steps": 20})
    processes = [
        subprocess.Popen(
            [sys.executable, "-u", "-c", CHILD, at, str(index), str(out), str(digits_run), changes],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=machines[index],
            env=os.environ | ENVIRONMENT,
        )
        for index in range(2)
    ]
    statuses, texts, errors = finish(processes)
    assert statuses == [0, 0], errors
    return texts


@pytest.mark.slow
def test_processes_agree_or_refuse_together(two):
    (first, second), out, _ = two
    assert (first["lead"], second["lead"]) == (True, False)
    assert first["odd batch"].startswith("batch_size=63 is not divisible by 2 devices")
    both = {
        "gathered": [{"index": 0, "text": ""}, {"index": 1, "text": "é" * 3000}],
        "from the lead": {"made by": 0},
        "nobody fails": None,
        "same": None,
        "differs": "process 1 has a thing that differs from that of process 0 (b is 1, not 0): mend it",
        "not shared": f"{out}/nowhere is not on this machine: choose a directory that all machines share",
        "shared": None,
        "other seed": "process 1 has a config that differs from that of process 0 (seed is 1, not 0): start all "
        "processes with the same command",
    }
    for name, value in both.items():
        assert first[name] == second[name] == value, name
    assert first["refused by the lead"] == "refused" and second["refused by the lead"] == "process 0: refused"
    assert first["one fails"] == "process 1: failed in 1" and second["one fails"] == "failed in 1"
    assert first["both fail"] == "failed in 0" and second["both fail"] == "failed in 1"
    assert second["workdir of one"].startswith("process 0: the run directory has an empty name")
    assert re.fullmatch(
        r"process 1 has data that differs from that of process 0 \(training images is 19, not 20, hash is .*\): copy the "
        "same data to all machines",
        first["other data"],
    )
    assert {path.name for path in out.iterdir()} == {"0.json", "1.json", "run", "second", "scores"}


@pytest.mark.slow
def test_fit_in_a_program_that_has_connected_the_processes(two):
    (first, second), out, texts = two
    assert first["scores"] == second["scores"] == rows(out / "run")[-1]
    assert first["again"] == second["again"]
    assert "done: test accuracy" in texts[0] and "said by 0\n" in texts[0]
    assert texts[1] == ""
    assert len(list((out / "run").glob("events.out.tfevents*"))) == 1
    assert not list(out.rglob("*.tmp")) and not (out / "run" / "in_use.json").exists()


@pytest.mark.slow
def test_two_processes_compute_what_one_with_two_devices_does_bit_for_bit(two, origin, tmp_path):
    workdir, (_, out, _) = tmp_path / "run", two
    one = subprocess.run(
        [
            sys.executable,
            "-m",
            "mlpmixer_flax.train",
            *arguments({**origin, "total_steps": 20}),
            f"--workdir={workdir}",
        ],
        env=os.environ | ENVIRONMENT | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        capture_output=True,
        text=True,
    )
    assert one.returncode == 0 and "on 2 x cpu" in one.stdout, one.stderr
    for a, b in zip(rows(workdir), rows(out / "run"), strict=True):
        assert {**a, **dict.fromkeys(TIMINGS)} == {**b, **dict.fromkeys(TIMINGS)}
    ours, theirs = state_at(workdir, 20), state_at(out / "run", 20)
    assert len(ours) > 40 and ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
def test_a_run_continues_on_more_and_on_fewer_processes_with_the_same_trajectory(two, origin, tmp_path):
    (_, out, _), one = two, tmp_path / "one"
    workdir = shutil.copytree(out / "run", tmp_path / "run")  # two processes have begun it
    four = start_all(4, "train", *arguments({**origin, "total_steps": 100_000}), f"--workdir={workdir}")
    read_until(four[0], r"^step 28/")
    four[2].send_signal(signal.SIGTERM)
    statuses, texts, errors = finish(four)
    assert statuses == [128 + signal.SIGTERM] * 4, errors
    stopped = int(re.search(r"^SIGTERM: saved step (\d+); ", texts[0], re.MULTILINE)[1])
    assert stopped >= 28 and texts[1:] == [""] * 3
    assert {path.name for path in (workdir / "checkpoints").iterdir()} >= {"20", str(stopped)}

    total = stopped + 12
    for each in (workdir, one):
        assert train([*arguments({**origin, "total_steps": total}), f"--workdir={each}"]) == 0
    for key in ("train/loss", "train/accuracy", "test/loss", "test/accuracy"):
        ours, theirs = (
            [(row["step"], row[key]) for row in rows(each) if key in row] for each in (workdir, one)
        )
        assert len(ours) >= 2
        np.testing.assert_allclose(
            ours, [row for row in theirs if row[0] in dict(ours)], rtol=1e-4, err_msg=key
        )
    ours, theirs = state_at(workdir, total), state_at(one, total)
    for name in ours:  # sums over four devices are rounded otherwise than sums over one
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
def test_evaluate_divides_the_images_over_processes(two, digits_run, tmp_path):
    (first, second), out, texts = two
    assert (first["evaluated"], second["evaluated"]) == (0, 0)
    assert "split test: 364 images" in texts[0]
    assert evaluate([f"--workdir={digits_run}", f"--output={tmp_path}"]) == 0
    ours, theirs = (json.loads((folder / "scores.json").read_text()) for folder in (out / "scores", tmp_path))
    assert ours["images"] == 364
    assert ours.pop("mistakes") and theirs.pop("mistakes")  # equally confident ones may change places
    for name in ("loss", "calibration_error"):
        assert ours.pop(name) == pytest.approx(theirs.pop(name), rel=1e-5)
    assert ours == theirs


# --- one fails, all end


PHOTOS = {
    **CHANGES,
    "dataset": "folder:photos",
    "batch_size": 4,
    "preprocess.image_size_px": 8,
    "preprocess.mean": (0.5,),
    "preprocess.std": (0.5,),
    "accumulation_steps": 1,
    "optimizer.sam_rho": 0.0,
    "cache_bytes": 0,
    "log_every_steps": 1,
    "total_steps": 100_000,
    "eval_every_steps": 100_000,
}


@pytest.mark.long
@pytest.mark.slow
def test_an_image_that_one_process_cannot_read_ends_all_with_its_sentence(machines, tmp_path):
    workdir = tmp_path / "run"
    processes = start_all(2, "train", *arguments(PHOTOS), f"--workdir={workdir}", folders=machines)
    read_until(processes[0], r"^step 4/")
    (bad,) = machines[1].glob("photos/train/*/7.png")
    bad.write_bytes(bad.read_bytes()[:100])
    broken = time.monotonic()
    statuses, _, errors = finish(processes, timeout=60)
    assert time.monotonic() - broken < 60
    assert statuses == [2, 2], errors
    assert re.fullmatch(r"error: process 1: .*7\.png.*\n", errors[0]), errors
    assert errors[1] == ""

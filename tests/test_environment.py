"""Tests programs where something is wrong with the machine or the environment: devices, memory, permissions, disks."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from faulty_machine import (
    fill,
    run,
    small_disk,
    start_training,
    with_little_memory,
    without_rights,
)
from made_datasets import encode

from mlpmixer_flax import UserError, fit, load, load_config
from mlpmixer_flax.ending import exit_status
from mlpmixer_flax.export import export
from mlpmixer_flax.export import main as export_main
from mlpmixer_flax.train import main as train_main

pytestmark = pytest.mark.usefixtures("quick_to_compile")

SMALL = {
    "model.hidden_dim": 16,
    "model.channels_mlp_dim": 16,
    "model.num_blocks": 1,
    "augment.mixup_alpha": 0.0,  # otherwise compiling takes seconds
}


def small(**changes):
    return [f"--config.{key}={value}" for key, value in (SMALL | changes).items()]


# --- devices

# All programs in one process, because none of them can start a device.
ALL_PROGRAMS = """
import importlib, sys
run, output = sys.argv[1:]
for program, *arguments in [
    ["train", "--config=digits.py", f"--workdir={output}/run"],
    ["predict", f"--workdir={run}", "cat.jpg"],
    ["evaluate", f"--workdir={run}", f"--output={output}/scores"],
    ["evaluate", f"--weights={run}/no.npz", "--dataset=digits", f"--output={output}/scores"],
    ["analyze", f"--workdir={run}", f"--output={output}/analysis"],
    ["export", f"--workdir={run}", "--format=npz", f"--output={output}/w.npz"],
    ["summary", f"--workdir={run}"],
]:
    open("cat.jpg", "wb").close()
    print(program, importlib.import_module(f"mlpmixer_flax.{program}").main(arguments), flush=True)
"""


@pytest.mark.parametrize(
    ("env", "sentence"),
    [
        (
            {"JAX_PLATFORMS": "nonsense"},
            "JAX_PLATFORMS=nonsense cannot be used here (Backend 'nonsense' is not in the list of known backends: ",
        ),
        ({"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": ""}, "JAX_PLATFORMS=cuda cannot be used here ("),
        (
            {"JAX_PLATFORMS": "", "PJRT_NAMES_AND_LIBRARY_PATHS": "gpu_of_tests:/no/such/plugin.so"},
            "JAX cannot start a device of this machine (INTERNAL: Failed to open /no/such/plugin.so",
        ),
    ],
    ids=["nonsense", "cuda", "plugin"],
)
def test_a_device_that_cannot_be_started_is_named_by_every_program(digits_run, tmp_path, env, sentence):
    command = [sys.executable, "-c", ALL_PROGRAMS, str(digits_run), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env, cwd=tmp_path)
    programs = ["train", "predict", "evaluate", "evaluate", "analyze", "export", "summary"]
    assert done.stdout.splitlines() == [f"{program} 2" for program in programs], done.stderr
    errors = done.stderr.splitlines()
    assert len(errors) == len(programs)
    assert all(
        line.startswith(f"error: {sentence}") and line.endswith("or set JAX_PLATFORMS=cpu") for line in errors
    )
    assert os.listdir(tmp_path) == ["cat.jpg"]


# --- options of JAX


@pytest.fixture
def jax_option():
    before = {}

    def set_option(name, value):
        before[name] = getattr(jax.config, name)
        jax.config.update(name, value)

    yield set_option
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax_enable_x64", True),
        ("jax_default_prng_impl", "rbg"),
        ("jax_threefry_partitionable", False),
        ("jax_random_seed_offset", 1),
        ("jax_disable_jit", True),
        ("jax_numpy_dtype_promotion", "strict"),
        ("jax_numpy_rank_promotion", "raise"),
    ],
)
def test_training_refuses_options_of_jax_with_which_it_would_be_another(tmp_path, jax_option, name, value):
    jax_option(name, value)
    with pytest.raises(
        UserError, match=f"^{name}={value} is set, .*: unset the environment variable {name.upper()}"
    ):
        fit(load_config("digits.py"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_loss_that_diverges_has_its_sentence_with_jax_debug_nans_too(tmp_path, jax_option, capsys):
    jax_option("jax_debug_nans", True)
    options = small(
        **{
            "optimizer.name": "sgd",
            "optimizer.learning_rate": 1e4,
            "optimizer.clip_norm": 0,
            "optimizer.weight_decay": 0,
        }
    )
    options += [
        "--config.schedule.warmup_steps=150",
        "--config.total_steps=200",
        "--config.save_every_steps=1",
    ]
    assert train_main(["--config=digits.py", f"--workdir={tmp_path / 'run'}", *options]) == 1
    assert re.fullmatch(r"error: \w+ is (nan|inf) at step \d+: .*learning_rate.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax_enable_x64", True),
        ("jax_debug_nans", True),
        ("jax_disable_jit", True),
        ("jax_numpy_rank_promotion", "raise"),
        ("jax_log_compiles", True),
        ("jax_default_matmul_precision", "highest"),
    ],
)
def test_options_of_jax_do_not_change_predictions_and_exports(digits_run, tmp_path, jax_option, name, value):
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)

    def results(form):
        model = load(digits_run)
        export(model, tmp_path / form, format="npz")
        scores = [
            {score.class_name: score.probability for score in each.top} for each in model.predict(images)
        ]
        return scores, model.features(images), (tmp_path / form).read_bytes()

    scores, features, exported = results("without")
    jax_option(name, value)
    other_scores, other_features, other_exported = results("with")
    assert other_exported == exported and other_features.dtype == np.float32
    np.testing.assert_allclose(other_features, features, rtol=1e-5, atol=1e-6)
    for one, other in zip(scores, other_scores, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


# --- memory


@pytest.mark.slow
def test_a_training_without_enough_memory_names_the_keys_that_help(tmp_path):
    options = small(**{"batch_size": 2048, "preprocess.image_size_px": 128, "model.hidden_dim": 512})
    options += [
        "--config.total_steps=1",
        "--config.model.channels_mlp_dim=2048",
        "--config.accumulation_steps=1",  # on a CPU, the microbatches that the program chooses need little memory
        f"--workdir={tmp_path / 'run'}",
    ]
    status, err = run("train", "--config=digits.py", *options, lacking=with_little_memory)
    assert status == 1
    assert re.fullmatch(
        r"error: not enough memory \(Out of memory allocating \d+ bytes\): end other programs that use it; training "
        r"needs less with a higher accumulation_steps than now, .*: docs/recipes.md#out-of-memory\n",
        err,
    )
    # It has made no update, so that every key may change, also those of the advice that change results.
    less = small(**{"batch_size": 8, "preprocess.image_size_px": 8, "test_split": "test[:8]"})
    assert run("train", "--config=digits.py", *less, "--config.total_steps=1", options[-1]) == (0, "")


@pytest.mark.slow
def test_an_evaluation_without_enough_memory_names_the_batch_size(digits_run, tmp_path):
    options = [f"--workdir={digits_run}", "--batch_size=10000000", f"--output={tmp_path}"]
    status, err = run("evaluate", *options, lacking=with_little_memory)
    assert status == 1
    assert re.fullmatch(r"error: not enough memory \(.*\): .*; a smaller batch_size needs less\n", err)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in Linux's /proc")
def test_a_worker_that_the_system_kills_is_named_as_such(tmp_path):
    options = small(cache_bytes=0, num_workers=2, total_steps=10**6, log_every_steps=10, save_every_steps=20)
    options += [f"--workdir={tmp_path / 'run'}", "--config.eval_every_steps=1000000"]
    process = start_training("--config=digits.py", *options, until="step 60/")
    for file in Path(f"/proc/{process.pid}/task").glob("*/children"):
        for child in file.read_text().split():
            if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text():
                os.kill(int(child), signal.SIGKILL)
    *_, last = process.stdout
    assert process.wait() == 1
    assert re.fullmatch(
        r"error: a process that reads images was ended by SIGKILL, as the system does when memory runs out: .* or lower "
        r"num_workers; the checkpoints up to step \d+ are whole, .*\n",
        last,
    )


# --- permissions


def read_only(folder):
    folder.chmod(0o555)
    return folder


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="takes a right from root as Linux does")
def test_a_missing_permission_is_not_called_missing_or_damaged(digits_run, tmp_path):
    hidden = tmp_path / "hidden"
    shutil.copytree(digits_run, hidden / "run")
    (hidden / "cat.png").write_bytes(encode(np.zeros((8, 8), np.uint8)))
    assert export_main([f"--workdir={digits_run}", "--format=npz", f"--output={hidden / 'w.npz'}"]) == 0
    for name in ("a", "b"):
        (hidden / "photos" / name).mkdir(parents=True)
    readable = shutil.copytree(hidden, tmp_path / "readable")
    (readable / "w.npz").chmod(0)
    (readable / "run" / "config.json").chmod(0)
    (readable / "cat.png").chmod(0)
    (tmp_path / "full").mkdir()
    locked = read_only(tmp_path / "full")
    hidden.chmod(0)
    cat, model = hidden / "cat.png", f"--workdir={digits_run}"
    cases = [
        (["predict", model, cat], cat),
        (["predict", model, readable / "cat.png"], readable / "cat.png"),
        (["evaluate", f"--weights={hidden / 'w.npz'}", "--dataset=digits"], hidden / "w.npz"),
        (["evaluate", f"--weights={readable / 'w.npz'}", "--dataset=digits"], readable / "w.npz"),
        (["evaluate", f"--workdir={hidden / 'run'}"], hidden / "run" / "config.json"),
        (["evaluate", f"--workdir={readable / 'run'}"], readable / "run" / "config.json"),
        (["evaluate", model, f"--output={locked / 'scores'}"], locked / "scores"),
        (["analyze", model, "stem", f"--output={locked / 'analysis'}"], locked / "analysis"),
        (["export", model, "--format=npz", f"--output={locked / 'w.npz'}"], locked / "w.npz"),
        (["export", model, "--format=stablehlo", f"--output={locked / 'w.hlo'}"], locked / "w.hlo"),
        (["train", hidden / "photos", f"--workdir={tmp_path / 'new'}"], hidden / "photos"),
        (["train", f"--config={hidden / 'config.py'}"], hidden / "config.py"),
        (["summary", f"--workdir={hidden / 'run'}"], hidden / "run" / "config.json"),
    ]
    try:
        for arguments, named in cases:
            status, err = run(*arguments, lacking=without_rights)
            assert status == 2, arguments
            last = err.splitlines()[-1]
            assert last.startswith(f"error: you have no permission ({named}"), (arguments, err)
            assert last.endswith("): change it with chmod or chown, or choose another place")
        status, err = run(
            "train", "--config=digits.py", f"--workdir={locked / 'run'}", lacking=without_rights
        )
        assert (status, err) == (
            2,
            f"error: cannot write to workdir {locked / 'run'}: {locked} is not a directory you may write to\n",
        )
    finally:
        hidden.chmod(0o755)
    assert not (tmp_path / "new").exists() and os.listdir(locked) == []


# --- full disks


@pytest.mark.parametrize("form", ["npz", "safetensors", "stablehlo"])
def test_an_export_to_a_full_disk_leaves_the_old_files_and_nothing_beside_them(
    digits_run, tmp_path, form, capsys
):
    with small_disk(tmp_path / "disk", 1000) as disk:
        command = [f"--workdir={digits_run}", f"--format={form}", f"--output={disk / 'w'}"]
        (disk / "w").write_text("old")
        fill(disk, leave_kb=8)  # enough for the description of a stablehlo file
        assert export_main(command) == 1
        assert re.search(
            rf"^error: no space is left on the disk \({disk / 'w'}\): make room there$",
            capsys.readouterr().err,
            re.MULTILINE,
        )
        assert sorted(os.listdir(disk)) == ["filling", "w"] and (disk / "w").read_text() == "old"


@pytest.mark.slow
def test_scores_and_figures_on_a_full_disk_are_whole_or_not_there(digits_run, tmp_path):
    with small_disk(tmp_path / "disk", 1000) as disk:
        fill(disk, leave_kb=60)
        status, err = run("evaluate", f"--workdir={digits_run}", f"--output={disk / 'scores'}")
        assert status == 1
        assert re.search(
            rf"^error: no space is left on the disk \({disk}/scores/\w+\.\w+\): ", err, re.MULTILINE
        )
        assert not list(disk.rglob("*tmp*"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("program", ["pretrained", "summary"])
def test_output_that_cannot_be_written_is_an_error(program):
    arguments = ["--weights=imagenet1k/Mixer-B_16"] if program == "summary" else []
    with open("/dev/full", "w") as full:
        assert run(program, *arguments, output=full) == (
            1,
            "error: no space is left on the disk: make room there\n",
        )


@pytest.mark.slow
def test_a_closed_stream_of_output_is_like_one_that_nobody_reads(digits_run, tmp_path):
    (tmp_path / "cat.png").write_bytes(encode(np.zeros((8, 8), np.uint8)))
    program = f"{sys.executable} -m mlpmixer_flax.predict --workdir={digits_run} --csv {tmp_path}/cat.png"

    def output(closed):
        command = f"{program} {closed}"
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
        return done.stdout, done.stderr

    out, err = output("")
    assert out.startswith("file,rank,label") and err
    assert output("2>&-") == (out, "")
    assert output("0<&- 1>&-") == ("", err)


@pytest.mark.parametrize(
    ("error", "status", "err"),
    [
        (
            OSError(28, "No space left on device", "a"),
            1,
            "error: no space is left on the disk (a): make room there\n",
        ),
        (
            PermissionError(13, "Permission denied", "a"),
            2,
            "error: you have no permission (a): change it with chmod",
        ),
        (MemoryError(), 1, "error: not enough memory: end other programs that use it\n"),
    ],
    ids=repr,
)
def test_faults_have_one_sentence_and_their_exit_status(error, status, err, capsys):
    def program():
        raise error

    assert exit_status(program) == status
    assert capsys.readouterr().err.startswith(err)

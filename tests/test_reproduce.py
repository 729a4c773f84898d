"""Tests the program that runs published figures again, with the row "digits" and without a network."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import jax
import pytest
from copied_reproduce import copied_program, stand_in, write_photos


@pytest.fixture
def program(tmp_path, monkeypatch):
    return copied_program(tmp_path, monkeypatch)


def test_without_a_row_the_table_says_what_is_missing_and_nothing_is_run(program, tmp_path, capsys):
    stand_in("sam/Mixer-B_32", num_blocks=1)
    assert program.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-2])) <= 80
    missing = {line[:20].strip(): line[54:].strip() for line in lines[1:-3]}
    assert (
        missing["digits"] == "nothing"
        and missing["mnist"] == "mnist"
        and missing["sam_b32"] == "imagenet2012"
    )
    gpu = ", GPU" * (jax.default_backend() == "cpu")
    assert missing["vt_b16_imagenet21k"] == "cifar10, weights" + gpu
    assert not (tmp_path / "runs").exists() and not (tmp_path / "docs" / "reproduction.md").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "no row 'nothing': without a ROW, the command lists them"),
        (["nano"], "no row 'nano': did you mean 'nano_cifar10' or 'omihub777_nano'?"),
        (["mnits"], "no row 'mnits': did you mean 'mnist'?"),
        (["mnist", "--device=3"], "unrecognized argument: --device=3"),
        (["digits", "--seeds=0"], "at least 1"),
        (["digits", "--seed=3"], "unrecognized argument: --seed=3"),
        (
            ["paper_b16", "--config.data_dir=/nope"],
            "error: /nope does not exist: give a --config.data_dir that contains imagenet2012, or give "
            "--imagenet=folder:PATH",
        ),
        (["sam_b16"], "or give --imagenet=folder:PATH of a folder with train/ and val/"),
        (["sam_b16", "--config.seed=3"], "leave out --config.seed=3"),
        (["mnist"], "mnist"),  # the dataset is not prepared
        (["digits", "mnist"], "mnist"),  # before anything runs
        (["digits", "--config.total_stepz=3"], "total_stepz"),
    ],
)
def test_what_cannot_run_is_said_before_anything_runs(program, arguments, said, tmp_path, capsys):
    try:
        assert program.main(arguments) == 2
    except SystemExit as stop:
        assert stop.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_help_fits_80_columns_and_its_examples_are_parsed(program, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        program.parse(["--help"])
    text = capsys.readouterr().out
    assert "[--imagenet=DATASET] [--config.KEY=VALUE ...]" in text.partition("\n\n")[0]
    assert stop.value.code == 0 and max(map(len, text.splitlines())) <= 80
    head = sys.modules["reproduction_page"].HEAD  # the top of the page has examples, too
    shown = text.partition("examples:\n")[2] + head.partition("```")[2].partition("```")[0]
    examples = [line.split()[2:] for line in shown.splitlines() if "python benchmarks/reproduce.py" in line]
    assert len(examples) == 6 and sum(bool(program.parse(words).rows) for words in examples) == 5


def scores_in(run):
    """Returns the accuracies in the metrics of a run, in %."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [pytest.approx(100 * row["test/accuracy"]) for row in rows if "test/accuracy" in row]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
def test_a_result_is_what_the_run_measured_at_its_end(program, tmp_path, capsys):
    assert program.main(["all", "digits", "digits"]) == 0  # all that can run here is the digits
    assert "== 1 of 1: digits, seed 0" in capsys.readouterr().out
    (result,) = program.read_measured()
    run = tmp_path / "runs" / "reproduce" / "digits-seed0"
    scores = scores_in(run)
    assert len(scores) > 1 and (result["row"], result["seed"]) == ("digits", 0)
    assert (result["first"], result["accuracy"]) == (scores[0], scores[-1])
    assert 0 < result["minutes"] < 5 and "jax" in result["versions"] and not result["data"]
    page = (tmp_path / "docs" / "reproduction.md").read_text()
    assert f"| 50 (40 after one epoch) | {result['accuracy']:.2f} (n = 1) | digits |" in page
    assert program.main(["digits"]) == 0  # a finished run is not run again
    assert "first update" not in capsys.readouterr().out
    assert (tmp_path / "docs" / "reproduction.md").read_text() == page

    assert program.main(["digits", f"--workdir={run}"]) == 2
    assert capsys.readouterr().err == (
        f"error: {run} is itself a run directory: give the folder that contains it, --workdir={run.parent}\n"
    )

    row = program.ROWS["digits"]  # which becomes longer
    program.ROWS["digits"] = dataclasses.replace(row, changes={**row.changes, "total_epochs": 4.0})
    assert program.main(["digits"]) == 0
    assert "continuing from step" in capsys.readouterr().out
    (longer,) = program.read_measured()
    assert longer["accuracy"] == scores_in(run)[-1] and longer["step"] == 2 * result["step"]
    assert longer["form"] != result["form"] and len(scores_in(run)) == 2 * len(scores)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
def test_a_run_that_ends_or_is_scored_otherwise_is_a_trial_with_a_directory_of_its_own(
    program, tmp_path, capsys
):
    stopped = ["--config.early_stopping_evals=1", "--config.eval_every_steps=2", "--config.total_steps=8"]
    once = ["--config.eval_every_epochs=0", "--config.total_steps=6"]
    for overrides, said in [
        (stopped, "early_stopping_evals, eval_every_steps, total_steps changed"),
        (once, "eval_every_epochs, total_steps changed"),
    ]:
        assert program.main(["digits", *overrides]) == 0
        words = " ".join(capsys.readouterr().out.split())
        assert f"a trial, so its result is not recorded: {said} " in words
    assert program.read_measured() == []
    folders = sorted(path.name for path in (tmp_path / "runs" / "reproduce").iterdir())
    assert len(folders) == 2 and all(name.startswith("digits-seed0-trial-") for name in folders)


@pytest.mark.parametrize(
    "change", ["num_workers=0", "accumulation_steps=2", "keep_checkpoints=1", "data_dir=."]
)
def test_what_changes_no_result_is_no_trial(program, change, tmp_path):
    task = program.Task("digits", 0, tmp_path, "imagenet2012", (f"--config.{change}",))
    assert not task.trial and task.run.name == "digits-seed0"


def test_all_says_what_it_leaves_out_and_why(program, tmp_path, capsys, monkeypatch):
    write_photos(tmp_path / "imagenet", {"n01440764": 1, "n01443537": 1})
    stand_in("sam/Mixer-B_32", num_blocks=1)
    monkeypatch.delitem(program.ROWS, "digits")
    assert program.main(["all", "--imagenet=folder:imagenet", "--config.total_steps=2"]) == 2
    said, error = capsys.readouterr()
    words = " ".join(said.split())
    assert "left out (they have no config to change): imagenet1k_b16, " in words and "sam_b32" in words
    gpu = ", GPU" * (jax.default_backend() == "cpu")
    assert f"left out (missing here: cifar10{gpu}): omihub777_nano, " in words
    assert max(map(len, said.splitlines())) <= 80 and not (tmp_path / "runs").exists()
    assert error == "error: no row can run here: the lines above say what is missing\n"


@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
def test_an_interrupted_row_continues_with_the_same_command(program, tmp_path, capsys):
    trial = "--config.total_steps=300"
    command = [sys.executable, str(tmp_path / "benchmarks" / "reproduce.py"), "digits", trial]
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, **output, text=True, env=environment) as process:
        assert process.stdout
        next(line for line in process.stdout if line.startswith("step 5/"))
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    step = int(rest.partition("SIGINT: saved step ")[2].partition(";")[0])
    assert process.returncode == 128 + signal.SIGINT and step < 300
    assert rest.endswith("; the same command continues\n") and "--workdir" not in rest
    assert program.main(["digits", trial]) == 0
    said = capsys.readouterr().out
    assert f"continuing from step {step} " in said and "(published: 50%)" in said
    assert not (tmp_path / "benchmarks" / "measured.jsonl").exists()  # of another length than the row

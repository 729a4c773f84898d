"""Text, options and errors that all programs share."""

import argparse
import ast
import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.cells import cell_len
from tqdm import tqdm

from mlpmixer_flax import UserError
from mlpmixer_flax.checksums import write_checksums
from mlpmixer_flax.cli import add_dataset, add_model, check_dataset, load_model
from mlpmixer_flax.ending import exit_status
from mlpmixer_flax.text import pad, printable, shorten, shorten_start, wrap

PROGRAMS = [
    "train",
    "predict",
    "evaluate",
    "analyze",
    "embed",
    "export",
    "summary",
    "pretrained",
    "benchmark",
]
TEXTS = ["", "cat", "a" * 30, "数字" * 9, "Ka\u0308fer " * 5, "bad\udcff\n.png", "\x1b[31mred", "é" * 20]


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_fits_80_columns_and_begins_with_a_command(program, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"mlpmixer_flax.{program}").main(["--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    assert lines[0].startswith(f"usage: python -m mlpmixer_flax.{program} ")
    assert any(f": python -m mlpmixer_flax.{program}" in line for line in lines)


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_abbreviated_option_is_refused(program, capsys):
    try:
        assert importlib.import_module(f"mlpmixer_flax.{program}").main(["--hel"]) == 2
    except SystemExit as stop:
        assert stop.code == 2
    assert "usage: " not in capsys.readouterr().out  # it is not taken for --help


def test_no_parser_takes_abbreviated_options():
    """--seed=3 must not mean --seeds=3; the programs of benchmarks/ and tools/ have parsers of their own."""
    root = Path(__file__).parent.parent
    files = [
        file for folder in ("mlpmixer_flax", "benchmarks", "tools") for file in (root / folder).rglob("*.py")
    ]
    parsers = [
        (file.name, ast.unparse(call))
        for file in files
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "argparse.ArgumentParser"
    ]
    assert len(parsers) > 20
    assert [name for name, call in parsers if "allow_abbrev=False" not in call] == []


@pytest.mark.slow
def test_a_script_of_benchmarks_ends_like_a_program(tmp_path):
    script = Path(__file__).parent.parent / "benchmarks" / "resolutions.py"
    done = subprocess.run(
        [sys.executable, script, f"--workdir={tmp_path}"], stderr=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: no run in {tmp_path}: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("columns", [4, 7, 12, 40])
def test_text_fits_its_columns_in_any_script(text, columns):
    shown = printable(text)
    assert shown.isprintable()
    for short in (shorten(text, columns), shorten_start(text, columns)):
        assert cell_len(short) <= columns and short.isprintable()
        assert short == shown if cell_len(shown) <= columns else "…" in short
    assert cell_len(pad(text, columns)) == columns
    assert pad(text, columns).rstrip() == shorten(text, columns).rstrip()


def test_the_start_or_the_end_of_a_text_is_kept():
    assert shorten("holiday/cat.jpg", 8) == "holiday…"
    assert shorten_start("holiday/cat.jpg", 8) == "…cat.jpg"
    assert pad("cat", 5) == "cat  "


def test_a_text_of_a_million_characters_is_shortened_at_once():
    start = time.perf_counter()
    assert shorten("数" * 10**6, 21) == "数" * 10 + "…"
    assert shorten_start("数" * 10**6, 21) == "…" + "数" * 10
    assert time.perf_counter() - start < 1


def test_long_notes_are_broken_at_spaces():
    assert wrap("a " * 45 + "'/photos/of-a-long-name/" + "b" * 70) == (
        "a " * 39 + "a\n  a a a a a\n  '/photos/of-a-long-name/" + "b" * 70
    )


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_model(parser)
    add_dataset(parser)
    return parser.parse_args(arguments)


def test_weights_need_a_dataset_and_a_run_has_one(digits_run, tmp_path):
    check_dataset(parse("--workdir=nowhere"))
    check_dataset(parse(f"--weights={digits_run}"))
    check_dataset(parse(f"--weights={digits_run}@best"))
    with pytest.raises(UserError, match="is not a run and has no dataset of its own: give --dataset$"):
        check_dataset(parse(f"--weights={tmp_path}"))  # a directory, but not of a run
    check_dataset(parse("--weights=w.npz", "--dataset=digits"))
    with pytest.raises(UserError, match="^w.npz is not a run and has no dataset of its own: give --dataset$"):
        check_dataset(parse("--weights=w.npz"))


def test_an_option_that_is_a_path_may_begin_with_a_tilde_and_may_not_be_empty(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse("--workdir=~/runs/a").workdir == tmp_path / "runs" / "a"
    for text, message in [
        ("", "argument --workdir: it is empty: give a path"),
        (
            "~nobody-of-this-name/a",
            "argument --workdir: '~nobody-of-this-name/a' cannot be used (.*): give another",
        ),
    ]:
        with pytest.raises(SystemExit) as stop:
            parse(f"--workdir={text}")
        assert stop.value.code == 2 and re.search(
            message.replace("(", r"\(").replace(")", r"\)"), capsys.readouterr().err
        )


def test_a_model_of_a_run_is_that_of_its_best_checkpoint_and_this_is_said(digits_run, tmp_path, capsys):
    run = shutil.copytree(digits_run, tmp_path / "run")
    file = run / "checkpoints" / "20" / "metrics" / "metrics"
    file.write_text(json.dumps({"test/accuracy": 0.9712}))
    write_checksums(file.parent.parent)
    best = "using step 20, the best checkpoint (test accuracy 97.12%), EMA weights\n"
    for arguments, step, line in [
        ([f"--workdir={run}"], 20, best),
        ([f"--weights={run}"], 20, best),
        ([f"--workdir={run}", "--checkpoint=best"], 20, best),
        (
            [f"--workdir={run}", "--checkpoint=last"],
            40,
            "using step 40, the newest checkpoint, without EMA\n",
        ),
        ([f"--weights={run}@last"], 40, "using step 40, the newest checkpoint, without EMA\n"),
        ([f"--workdir={run}", "--checkpoint=30"], 30, "using step 30, EMA weights\n"),
    ]:
        assert load_model(parse(*arguments)).step == step
        assert capsys.readouterr().out == line
    with pytest.raises(
        UserError, match="has no weights 'bset': choose one of last, best, ema, or a step it has"
    ):
        load_model(parse(f"--workdir={run}", "--checkpoint=bset"))
    with pytest.raises(UserError, match="--checkpoint=best is for --workdir only"):
        load_model(parse(f"--weights={run}", "--checkpoint=best"))
    with pytest.raises(UserError, match="no run in"):
        load_model(parse(f"--workdir={tmp_path}"))


@pytest.mark.parametrize(
    ("result", "status", "err"),
    [
        (None, 0, ""),
        (1, 1, ""),
        (UserError("no cat: give one"), 2, "error: no cat: give one\n"),
        (
            UserError("no a\x1b[31m\udcff.png:\n  give one"),
            2,
            "error: no a\\x1b[31m\\udcff.png:\n  give one\n",
        ),
        (UserError("a b " * 9999 + "\n  give one"), 2, f"error: {'a b ' * 125}…{'a b ' * 125}\n  give one\n"),
        (FloatingPointError("the loss is nan"), 1, "error: the loss is nan\n"),
        (KeyboardInterrupt(), 128 + signal.SIGINT, "stopped\n"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_exit_status(result, status, err, capsys):
    def program():
        if isinstance(result, BaseException):
            raise result
        return result

    assert exit_status(program, interrupted="stopped") == status
    assert capsys.readouterr().err == err


def test_other_exceptions_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_status(lambda: 1 // 0)


def test_what_programs_print_cannot_control_the_terminal(capsys):
    def program():
        print("a\x1b[31m \\ 'b'\r\n数 c", end="")
        print("\n\x1b[A\x9b\t", file=sys.stderr)

    assert exit_status(program) == 0
    assert capsys.readouterr() == ("a\\x1b[31m \\ 'b'\\r\n数 c", "\n\\x1b[A\\x9b\\t\n")


def test_progress_bars_are_drawn_and_data_is_exact_unless_a_terminal_shows_it(capfd):
    def program():
        with tqdm(desc="one", total=2, file=sys.stdout), tqdm(desc="two", file=sys.stdout):
            tqdm.write("\x07a")

    assert exit_status(program) == 0
    out = capfd.readouterr().out
    assert "\rone: " in out and "\x1b[A" in out and "\\x07a\n" in out and "\\x1b" not in out
    assert exit_status(lambda: print("\x07a"), data=True) == 0
    assert capfd.readouterr().out == "\x07a\n"
    ours, theirs = os.openpty()
    with open(theirs, "w") as terminal, contextlib.redirect_stdout(terminal):
        assert exit_status(lambda: print("\x07a"), data=True) == 0
    assert os.read(ours, 99) == b"\\x07a\r\n"
    os.close(ours)

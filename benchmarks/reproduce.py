"""Run published figures of MLP-Mixers again: python benchmarks/reproduce.py ROW

Without a ROW, it prints the table: each published figure, ours, and whether the
row can run here; nothing is run. With rows, it trains or evaluates them one
after another. "all" are the rows that can run here: their dataset is prepared,
their weights are in the cache, and a row that takes days without a GPU finds
one. A row that you name is run on any device, and its weights are downloaded.

A row is a run directory, WORKDIR/ROW-seedN. Repeat the command to continue what
was interrupted; a finished run is not run again. Each result is added to
benchmarks/measured.jsonl and docs/reproduction.md, with hardware and versions.
The minutes are the number of updates times their median time, without
compilation and evaluation.

--config.KEY=VALUE changes the config of the rows, to try them on a small scale.
Unless the key changes no result (data_dir, accumulation_steps and the like),
this is a trial: its result is printed only. So is that of a row of ImageNet
with other images than ImageNet's.
"""

if __name__ == "__main__":
    from mlpmixer_flax import quiet_ctrl_c

    quiet_ctrl_c()

import argparse
import datetime
import statistics
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from figures import ROWS
from machine import commit, hardware, is_jpeg_copy, versions
from measured import Result, read_measured
from reproduction_page import PAGE, record, summarize
from reproduction_task import Task, check, missing

from mlpmixer_flax import UserError, evaluate, fit, get_dataset_info
from mlpmixer_flax.atomic import replacing, write_json
from mlpmixer_flax.cli import path
from mlpmixer_flax.data.dataset import with_absolute_path
from mlpmixer_flax.ending import exit_status, leave
from mlpmixer_flax.huge_pages import use_huge_pages
from mlpmixer_flax.reading import read_json, read_object
from mlpmixer_flax.run_weights import score_of
from mlpmixer_flax.rundir import is_run
from mlpmixer_flax.text import wrap
from mlpmixer_flax.training.report import read_metrics


def run(task: Task) -> int:
    """Trains or evaluates a task to its end; returns the exit status of a program that does."""
    if not task.row.weights:
        return exit_status(
            lambda: _train(task),
            interrupted="stopped at once; the same command continues from the newest checkpoint, if there is one",
        )
    if stored_result(task):
        return 0
    (task.run / "result.json").unlink(missing_ok=True)  # of other images
    split = ["--split=validation", f"--dataset={task.dataset}"]
    return evaluate.main([f"--weights={task.row.weights}", *split, f"--output={task.run}"])


def _train(task: Task) -> None:
    fit(task.config, task.run)


def result_of(task: Task) -> Result:
    """Returns what a finished run measured; stored in the run, with the machine and the day on which it ended."""
    if stored := stored_result(task):
        return stored
    result = measure(task)
    with replacing(task.run / "result.json") as file:
        write_json(file, result)
    return result


def stored_result(task: Task) -> Result:
    """Returns the result in a run directory; {} if there is none, or it is of other steps, images or another form."""
    stored = read_object(task.run / "result.json")
    same = stored.get("form") == task.form and stored.get("step") == last_step(task)
    if same and task.row.weights:
        scored = read_object(task.run / "scores.json")
        images = get_dataset_info(task.dataset, "validation")["num_examples"]
        same = (scored.get("dataset"), scored.get("images")) == (with_absolute_path(task.dataset), images)
    return stored if same else {}


def last_step(task: Task) -> int:
    """Returns the step of the last scores of a run; 0 if it has none."""
    scored = [row["step"] for row in read_metrics(task.run / "metrics.jsonl") if score_of(row)]
    return int(scored[-1]) if scored else 0


def measure(task: Task) -> Result:
    """Returns the result of a run that has just ended, as a line of measured.jsonl."""
    found = _of_weights(task) if task.row.weights else _of_training(task)
    about = {"hardware": hardware(), "versions": versions(), "commit": commit()}
    return {
        "row": task.name,
        "seed": task.seed,
        **found,
        **about,
        "date": f"{datetime.date.today()}",
        "form": task.form,
        "step": last_step(task),
    }


def _of_weights(task: Task) -> Mapping[str, Any]:
    scores = read_json(task.run / "scores.json")
    return {"accuracy": 100 * scores["accuracy"], "first": 0.0, "minutes": 0.0, "data": ""}


def _of_training(task: Task) -> Mapping[str, Any]:
    rows = read_metrics(task.run / "metrics.jsonl")
    scores = [100 * score.value for row in rows if (score := score_of(row))]
    timed = [row for row in rows if "images_per_second" in row]
    # The median, because a process that was held up for a while computed nothing in that time.
    speed = statistics.median(row["images_per_second"] for row in timed)
    minutes = timed[-1]["step"] * task.config.batch_size / speed / 60
    data = "JPEG copy" if is_jpeg_copy(task.dataset, task.data_dir) else ""
    return {"accuracy": scores[-1], "first": scores[0], "minutes": minutes, "data": data}


def show_table(tasks: Sequence[Task]) -> None:
    """Prints a line per row: published, ours, and whether it can run here."""
    results = read_measured()
    print(f"{'row':<20}{'published':>10}  {'ours':<22}missing here")
    for task in tasks:
        ours = summarize([result for result in results if result["row"] == task.name])
        time = f"; takes about {task.row.hours:g} h" if task.row.hours else ""
        absent = ", ".join(missing(task)) or f"nothing{time}"
        print(f"{task.name:<20}{task.row.accuracy:>9g}%  {ours:<22}{absent}", flush=True)
    print(f"\n{PAGE}\nhas sources and commands. To run a row: python benchmarks/reproduce.py ROW")


def that_can_run(tasks: Sequence[Task]) -> list[str]:
    """Returns the names of the tasks that can run here, and prints why the others are left out."""
    lacking: dict[str, list[str]] = {}  # what -> names; "" = nothing
    for task in tasks:
        fixed = task.row.weights and task.overrides
        why = "they have no config to change" if fixed else ", ".join(missing(task))
        lacking.setdefault(why if fixed or not why else f"missing here: {why}", []).append(task.name)
    names = lacking.pop("", [])
    for why, others in lacking.items():
        print(wrap(f"left out ({why}): {', '.join(others)}"), flush=True)
    return names


def run_all(tasks: Sequence[Task]) -> int:
    """Runs tasks one after another; returns 1 if any failed, or the status of the signal that stopped one."""
    failed = []
    for number, task in enumerate(tasks, 1):
        title = f"{task.name}, seed {task.seed}"
        print(f"== {number} of {len(tasks)}: {title}, in {task.run}", flush=True)
        if task.trial:
            print(wrap(f"a trial, so its result is not recorded: {task.trial}"), flush=True)
        status = run(task)
        if status > 128:  # stopped by a signal
            return status
        if status:
            failed.append(title)
            continue
        result = result_of(task)
        print(f"== {title}: {result['accuracy']:.2f}% (published: {task.row.accuracy:g}%)", flush=True)
        if not task.trial:
            record(result)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the options; exits with a message if they are wrong."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        usage="python benchmarks/reproduce.py [ROW ...] [--seeds=N] [--workdir=FOLDER]\n"
        "           [--imagenet=DATASET] [--config.KEY=VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python benchmarks/reproduce.py mnist nano_cifar10 --seeds=3\n"
        "  python benchmarks/reproduce.py timm_miil_b16 --imagenet=folder:imagenet\n"
        "  python benchmarks/reproduce.py vt_b16_imagenet21k --config.total_steps=20",
    )
    parser.add_argument(
        "rows", nargs="*", metavar="ROW", help='names of rows, or "all" (default: show the table)'
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="runs with seeds 0 to N-1 (default: 1); weights are evaluated once",
    )
    parser.add_argument(
        "--workdir",
        type=path,
        default=Path("runs/reproduce"),
        metavar="FOLDER",
        help="for the run directories (default: runs/reproduce)",
    )
    parser.add_argument(
        "--imagenet",
        default="imagenet2012",
        metavar="DATASET",
        help="where ImageNet is: a TFDS name, or folder:PATH with train/ and val/ (default: imagenet2012)",
    )
    arguments, arguments.overrides = parser.parse_known_args(argv)
    for word in arguments.overrides:
        if not word.startswith("--config."):
            parser.error(f"unrecognized argument: {word}")
    if arguments.seeds < 1:
        parser.error(f"--seeds={arguments.seeds} must be at least 1")
    for name in arguments.rows:
        if name not in (*ROWS, "all"):
            parser.error(f"no row {name!r}: {_near(name)}")
    return arguments


def _near(name: str) -> str:
    near = [row for row in ROWS if name in row] or get_close_matches(name, ROWS)
    if not near:
        return "without a ROW, the command lists them"
    return f"did you mean {' or '.join(map(repr, near[:3]))}?"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program.

    Exit status: 0 done, 1 a row failed (the others were run), 2 unusable input, 128 + n stopped by signal n.
    """
    arguments = parse(argv)
    return exit_status(lambda: _main(arguments))


def _main(arguments: argparse.Namespace) -> int:
    workdir = arguments.workdir
    if is_run(workdir) or (workdir / "result.json").exists():
        raise UserError(
            f"{workdir} is itself a run directory: give the folder that contains it, --workdir={workdir.parent}"
        )
    read_measured()  # now, so that a damaged line is found before hours of work

    def tasks_of(names: Sequence[str], seeds: int) -> list[Task]:
        common = (workdir, arguments.imagenet, tuple(arguments.overrides))
        return [
            Task(name, seed, *common)
            for seed in range(seeds)
            for name in names
            if seed == 0 or not ROWS[name].weights  # an evaluation has no seed
        ]

    if not arguments.rows:
        show_table(tasks_of(list(ROWS), 1))
        return 0
    names = [name for name in dict.fromkeys(arguments.rows) if name != "all"]
    if "all" in arguments.rows:
        names += that_can_run(tasks_of([name for name in ROWS if name not in names], 1))
    if not names:
        raise UserError("no row can run here: the lines above say what is missing")
    tasks = tasks_of(names, arguments.seeds)
    for task in tasks:
        check(task)
    return run_all(tasks)


if __name__ == "__main__":
    use_huge_pages()
    leave(main())

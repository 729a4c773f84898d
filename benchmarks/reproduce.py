"""Run published figures of MLP-Mixers again: python benchmarks/reproduce.py ROW

Without a ROW, it prints the table: each published figure, ours, and whether the
row can run here; nothing is run. With rows, it trains or evaluates them one
after another. "all" are the rows that can run here: their dataset is prepared,
their weights are in the cache, and a row that takes days without a GPU finds
one. A row that you name is run on any device, and its weights are downloaded.

A row is a run directory, WORKDIR/ROW-seedN. Repeat the command to continue what
was interrupted; a finished run is not run again. Each result is added to
benchmarks/measured.jsonl and docs/reproduction.md, with hardware and versions.
The minutes are those of the updates alone, without compilation and evaluation.

--config.KEY=VALUE changes the config of the rows, to try them on a small scale.
Unless the key changes no update (data_dir, accumulation_steps and the like),
the result is then printed only.
"""

if __name__ == "__main__":
    from mlpmixer_flax import quiet_ctrl_c

    quiet_ctrl_c()

import argparse
import dataclasses
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from figures import ROWS, Row
from machine import hardware, is_jpeg_copy, versions
from reproduction_page import PAGE, Result, as_text, needed, read_measured, record, summarize

from mlpmixer_flax import UserError, evaluate, get_dataset_info, train
from mlpmixer_flax.atomic import replacing, write_json
from mlpmixer_flax.cli import path
from mlpmixer_flax.config import CHANGE_NO_UPDATE, ConfigDict
from mlpmixer_flax.ending import exit_status, leave
from mlpmixer_flax.huge_pages import use_huge_pages
from mlpmixer_flax.run_weights import score_of
from mlpmixer_flax.training.configfile import load_config
from mlpmixer_flax.training.report import read_metrics
from mlpmixer_flax.weights.catalog import PUBLISHED
from mlpmixer_flax.weights.download import cache_file
from mlpmixer_flax.weights.source import find


@dataclasses.dataclass(frozen=True)
class Task:
    """A row with one seed, and what the user asked for."""

    name: str  # of the row
    seed: int
    workdir: Path
    imagenet: str  # the dataset that stands for "imagenet2012"
    overrides: tuple[str, ...]  # --config.KEY=VALUE

    @property
    def row(self) -> Row:
        return ROWS[self.name]

    @property
    def is_trial(self) -> bool:
        """Whether the overrides make it another run than that of the row."""
        keys = {override.partition("=")[0].removeprefix("--config.") for override in self.overrides}
        return not keys <= {*CHANGE_NO_UPDATE}

    @property
    def run(self) -> Path:
        return self.workdir / f"{self.name}-seed{self.seed}{'-trial' * self.is_trial}"

    @property
    def changes(self) -> list[str]:
        """The arguments that change the config of the row, in the order in which they count."""
        values = {**self.row.changes, "seed": self.seed}
        if needed(self.row)[0] == "imagenet2012":
            values["dataset"] = self.imagenet
        return [*(f"--config.{key}={as_text(value)}" for key, value in values.items()), *self.overrides]

    @property
    def config(self) -> ConfigDict:
        return load_config(self.row.config, self.changes)


def open_dataset(task: Task) -> None:
    """Raises UserError if the dataset of a task cannot be opened."""
    if task.row.weights:
        get_dataset_info(task.imagenet, "validation")
    else:
        get_dataset_info(task.config.dataset, task.config.train_split, data_dir=task.config.data_dir)


def weights_of(task: Task) -> str:
    """Returns the name of the weights that a task evaluates or starts from; "" = none."""
    return task.row.weights or task.config.init_from


def missing(task: Task) -> list[str]:
    """Returns what a task needs and this machine does not have, in words."""
    absent = []
    try:
        open_dataset(task)
    except UserError:
        absent.append(task.imagenet if task.row.weights else task.config.dataset)
    if (weights := weights_of(task)) in PUBLISHED and not is_cached(weights):
        absent.append("weights")
    if task.row.gpu and jax.default_backend() == "cpu":
        absent.append("GPU")
    return absent


def is_cached(weights: str) -> bool:
    """Returns whether published weights are in the cache; uses no network."""
    url = PUBLISHED[weights].url
    if not url.startswith("hf-hub:"):
        return cache_file(url).is_file()
    try:
        import huggingface_hub
    except ImportError:
        return False
    return isinstance(
        huggingface_hub.try_to_load_from_cache(url.removeprefix("hf-hub:"), "model.safetensors"), str
    )


def check(task: Task) -> None:
    """Makes sure that a task can begin, and downloads its weights.

    Raises:
      UserError: its dataset cannot be opened, its weights cannot be had, or a config is changed that it does not have.
    """
    if task.row.weights and task.overrides:
        raise UserError(f"{task.name} evaluates weights and has no config: leave out {task.overrides[0]}")
    open_dataset(task)
    if weights := weights_of(task):
        find(weights)


def run(task: Task) -> int:
    """Trains or evaluates a task to its end, and returns the exit status of the program that did."""
    if not task.row.weights:
        return train.main([f"--config={task.row.config}", f"--workdir={task.run}", *task.changes])
    if (task.run / "result.json").exists():
        return 0
    split = ["--split=validation", f"--dataset={task.imagenet}"]
    return evaluate.main([f"--weights={task.row.weights}", *split, f"--output={task.run}"])


def result_of(task: Task) -> Result:
    """Returns what a finished run measured; stored in the run, with the machine and the day on which it ended."""
    file = task.run / "result.json"
    if task.is_trial or not file.exists():
        result = measure(task)
        with replacing(file) as opened:
            write_json(opened, result)
    return json.loads(file.read_text())


def measure(task: Task) -> Result:
    """Returns the result of a run that has just ended, as a line of measured.jsonl."""
    result = {"row": task.name, "seed": task.seed}
    if task.row.weights:
        scores = json.loads((task.run / "scores.json").read_text())
        result |= {"accuracy": 100 * scores["accuracy"], "first": 0.0, "minutes": 0.0, "data": ""}
    else:
        rows = read_metrics(task.run / "metrics.jsonl")
        scores = [100 * score.value for row in rows if (score := score_of(row))]
        timed = [row for row in rows if "images_per_second" in row]
        steps = [0, *(row["step"] for row in timed)]
        seconds = sum(
            (step - before) * task.config.batch_size / row["images_per_second"]
            for row, step, before in zip(timed, steps[1:], steps, strict=False)
        )
        result |= {"accuracy": scores[-1], "first": scores[0], "minutes": seconds / 60}
        lossy = is_jpeg_copy(task.config.dataset, task.config.data_dir)
        result |= {"data": "JPEG copy" if lossy else ""}
    return result | {
        "hardware": hardware(),
        "versions": versions(),
        "date": f"{datetime.date.today()}",
    }


def show_table(tasks: Sequence[Task]) -> None:
    """Prints a line per row: published, ours, and whether it can run here."""
    results = read_measured()
    print(f"{'row':<20}{'published':>10}  {'ours':<22}missing here")
    for task in tasks:
        ours = summarize([result for result in results if result["row"] == task.name])
        absent = ", ".join(missing(task)) or "-"
        print(f"{task.name:<20}{task.row.accuracy:>9g}%  {ours:<22}{absent}", flush=True)
    print(f"\n{PAGE}\nhas sources and commands. To run a row: python benchmarks/reproduce.py ROW")


def run_all(tasks: Sequence[Task]) -> int:
    """Runs tasks one after another; returns 1 if any failed, or the status of the signal that stopped one."""
    failed = []
    for number, task in enumerate(tasks, 1):
        title = f"{task.name}, seed {task.seed}"
        print(f"== {number} of {len(tasks)}: {title}, in {task.run}", flush=True)
        status = run(task)
        if status > 128:  # stopped by a signal
            return status
        if status:
            failed.append(title)
            continue
        result = result_of(task)
        print(f"== {title}: {result['accuracy']:.2f}% (published: {task.row.accuracy:g}%)", flush=True)
        if not task.is_trial:
            record(result)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the options; exits with a message if they are wrong."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        usage="python benchmarks/reproduce.py [ROW ...] [--seeds=N] [--workdir=FOLDER]",
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
        "--seeds", type=int, default=1, metavar="N", help="runs with seeds 0 to N-1 (default: 1)"
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
            parser.error(f"no row {name!r}: without a ROW, the command lists them")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program.

    Exit status: 0 done, 1 a row failed (the others were run), 2 unusable input, 128 + n stopped by signal n.
    """
    arguments = parse(argv)
    return exit_status(lambda: _main(arguments))


def _main(arguments: argparse.Namespace) -> int:
    def tasks_of(names: Sequence[str], seeds: int) -> list[Task]:
        common = (arguments.workdir, arguments.imagenet, tuple(arguments.overrides))
        return [Task(name, seed, *common) for seed in range(seeds) for name in names]

    if not arguments.rows:
        show_table(tasks_of(list(ROWS), 1))
        return 0
    names = [name for name in arguments.rows if name != "all"]
    if "all" in arguments.rows:
        names += [
            task.name for task in tasks_of(list(ROWS), 1) if task.name not in names and not missing(task)
        ]
    tasks = tasks_of(names, arguments.seeds)
    for task in tasks:
        check(task)
    return run_all(tasks)


if __name__ == "__main__":
    use_huge_pages()
    leave(main())

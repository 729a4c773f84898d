"""Compares one Mixer for five image sizes with five Mixers for one size each, on the digits and on CIFAR-10.

    python benchmarks/flexible.py digits --workdir=FOLDER
    python benchmarks/flexible.py cifar10 --workdir=FOLDER
    python benchmarks/flexible.py nano --workdir=FOLDER --start=RUN

All models of a dataset have the same architecture, training images, updates and learning rate, and are scored on all test
images:

- flexible: one model for all five sizes
- specialist: one model per size
- resampled: the specialist for the own size, with its token mixing resampled to the others and not trained further
- made flexible: the same specialist, after 3 more epochs with all sizes
- flexible, 5 times: one model for all sizes again, with five times the updates, so each size has as many as its specialist
- other patches: a model for images of the own size, in larger or smaller patches that give as many tokens as the
  specialist's. It tells what a model for several patch sizes could gain over one for several image sizes.

`digits`: configs/digits.py, 672 updates of 64 images, three seeds. The own size is 8 px.
`cifar10`: configs/flexible_cifar10.py with a smaller model (4 blocks of width 48: 66,000 parameters), 1,000 updates of 128
images, on 10,000 of the training images, two seeds. The own size is 32 px.
`nano`: configs/flexible_cifar10.py as it is. It is for --start.

With --start, all models begin with the weights of a run, as they could begin with published weights, and train for 3 epochs:
"made flexible" with all sizes, "fine-tuned" with one size each. "Resampled" is the run itself.

On one CPU core, a seed of digits takes about 8 minutes, and one of cifar10 more than an hour. After each run the table is
printed, and FOLDER/EXPERIMENT (with --start, FOLDER/EXPERIMENT_from_run) has it as results.json and as a picture,
flexible.png. What is finished is not run again, and a run that was interrupted continues. Results: docs/resolutions.md
"""

if __name__ == "__main__":
    from mlpmixer_flax import quiet_ctrl_c

    quiet_ctrl_c()

import argparse
import itertools
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from resolutions import accuracy

from mlpmixer_flax import fit, load_config
from mlpmixer_flax.atomic import replacing
from mlpmixer_flax.ending import exit_status, leave
from mlpmixer_flax.inference.load import load_run
from mlpmixer_flax.run_weights import sized


@dataclass(frozen=True)
class Experiment:
    """What is trained; `finetuning` and `longer` are added to `changes` for the last two kinds of models."""

    config: str
    sizes: tuple[int, ...]  # in px
    seeds: tuple[int, ...]
    changes: dict[str, Any]
    finetuning: dict[str, Any]
    longer: dict[str, Any]


_END_ONLY = {"log_every_steps": 100, "eval_every_epochs": 0.0, "save_every_steps": 50}
_THREE_EPOCHS = {"total_steps": 0, "total_epochs": 3.0, "optimizer.learning_rate": 1e-3}
EXPERIMENTS = {
    "digits": Experiment(
        config="digits.py",
        sizes=(4, 6, 8, 12, 16),
        seeds=(0, 1, 2),
        changes=_END_ONLY,
        finetuning=_THREE_EPOCHS,
        longer={"total_epochs": 150.0},
    ),
    "cifar10": Experiment(
        config="flexible_cifar10.py",
        sizes=(16, 24, 32, 48, 64),
        seeds=(0, 1),
        changes={
            **_END_ONLY,
            "train_split": "train[:10000]",
            "model.num_blocks": 4,
            "model.hidden_dim": 48,
            "model.tokens_mlp_dim": 48,
            "model.channels_mlp_dim": 96,
            "total_steps": 1000,
            "schedule.warmup_steps": 50,
        },
        finetuning={**_THREE_EPOCHS, "schedule.warmup_steps": 20},
        longer={"total_steps": 5000},
    ),
    "nano": Experiment(
        config="flexible_cifar10.py",
        sizes=(16, 24, 32, 48, 64),
        seeds=(0,),
        changes=_END_ONLY,
        finetuning={**_THREE_EPOCHS, "schedule.warmup_steps": 100},
        longer={},
    ),
}
KINDS_FROM_START = ("fine-tuned", "made flexible", "resampled")
KINDS = ("specialist", "flexible", "resampled", "made flexible", "flexible, 5 times")

Results = dict[str, dict[str, float]]  # "flexible, seed 0" -> size in px -> accuracy in %


@dataclass(frozen=True)
class Run:
    """One training: its model is for one size, or for all of the experiment if `size` is None."""

    kind: str
    seed: int
    changes: dict[str, Any]
    size: int | None = None  # in px

    @property
    def name(self) -> str:
        """The name of its accuracies in the results."""
        return f"{self.kind}, seed {self.seed}"

    @property
    def folder(self) -> str:
        """The name of its run directory."""
        size = f"_{self.size}" if self.size else ""
        return f"{self.kind.replace(' ', '_').replace(',', '')}{size}-seed{self.seed}"


def runs(experiment: Experiment) -> Iterator[Run]:
    """Yields all trainings, the most telling first."""
    config = load_config(experiment.config)
    own, patch = config.preprocess.image_size_px, config.model.patches.size[0]
    others = [size for size in experiment.sizes if size != own]
    for seed in experiment.seeds:
        yield Run("flexible", seed, {})
        for size in (own, *others):
            specialist = Run("specialist", seed, {"preprocess.image_size_px": size}, size)
            yield specialist
            if size == own:
                yield Run("made flexible", seed, {**experiment.finetuning, "init_from": specialist.folder})
    for seed in experiment.seeds:
        yield Run("flexible, 5 times", seed, experiment.longer)
    for seed in experiment.seeds:
        for size in others:
            side, rest = divmod(own * patch, size)
            if not rest:
                yield Run("other patches", seed, {"model.patches.size": (side, side)}, size)


def runs_from(start: Path, experiment: Experiment) -> Iterator[Run]:
    """Yields the trainings that begin with the weights of a run."""
    changes = {**experiment.finetuning, "init_from": str(start.absolute())}
    for seed in experiment.seeds:
        yield Run("made flexible", seed, changes)
        for size in experiment.sizes:
            yield Run("fine-tuned", seed, {**changes, "preprocess.image_size_px": size}, size)


def train(experiment: Experiment, run: Run, workdir: Path) -> dict[str, float]:
    """Trains a run to its end, or continues it; returns its accuracies in %, by size in px."""
    changes = {**experiment.changes, **run.changes, "seed": run.seed}
    changes["resolutions_px"] = () if run.size else experiment.sizes
    if "init_from" in changes:
        changes["init_from"] = str(workdir / changes["init_from"])
    config = load_config(experiment.config, changes)
    scores, own, usual = fit(config, workdir / run.folder), config.preprocess.image_size_px, "test/accuracy"
    if run.size:
        return {str(run.size): 100 * scores[usual]}
    sizes = experiment.sizes
    return {str(size): 100 * scores[usual if size == own else sized(usual, size)] for size in sizes}


def resampled(experiment: Experiment, workdir: Path) -> dict[str, float]:
    """Returns the accuracies in % of a run at all sizes, without further training, by size in px."""
    model = load_run(workdir)
    return {str(size): accuracy(model.at_size(size)) for size in experiment.sizes}


def measure(
    experiment: Experiment, planned: Iterable[Run], workdir: Path, done: Results
) -> Iterator[Results]:
    """Trains what is not done; yields the accuracies of each new run, which the caller adds to `done`."""
    for run in planned:
        if run.name not in done or (run.size and str(run.size) not in done[run.name]):
            yield {run.name: {**done.get(run.name, {}), **train(experiment, run, workdir)}}
        name = f"resampled, seed {run.seed}"
        if run.kind == "made flexible" and name not in done:
            yield {name: resampled(experiment, workdir / run.changes["init_from"])}


def scores_of(done: Results, kind: str, size: int) -> list[float]:
    """Returns the accuracies of all seeds that are done."""
    found = [scores for name, scores in sorted(done.items()) if name.startswith(f"{kind}, seed ")]
    return [scores[str(size)] for scores in found if str(size) in scores]


def table(sizes: Sequence[int], done: Results, kinds: Sequence[str] = KINDS) -> list[str]:
    """Returns a row per size: the mean over the seeds that are done and, if there are several, each."""

    def cell(kind: str, size: int) -> str:
        scores = scores_of(done, kind, size)
        each = f" ({', '.join(f'{score:.1f}' for score in scores)})" if len(scores) > 1 else ""
        return f"{statistics.mean(scores):.1f}{each}" if scores else "–"

    rows = [f"| {size} px | {' | '.join(cell(kind, size) for kind in kinds)} |" for size in sizes]
    return [f"| size | {' | '.join(kinds)} |", f"|---|{'---|' * len(kinds)}", *rows, ""]


def picture(sizes: Sequence[int], done: Results, kinds: Sequence[str] = KINDS) -> Figure:
    """Returns the accuracies over the sizes: a line through the means of each kind, and a dot per seed."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for kind, marker in zip(kinds, "sovD^", strict=False):
        found = {size: scores for size in sizes if (scores := scores_of(done, kind, size))}
        (line,) = axes.plot(
            list(found), list(map(statistics.mean, found.values())), marker=marker, label=kind
        )
        for size, scores in found.items():
            axes.plot([size] * len(scores), scores, ".", color=line.get_color(), alpha=0.5)
    axes.set(xticks=sizes, xlabel="side of the images, px", ylabel="test accuracy, %")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--workdir", type=Path, required=True, help="directory for runs; takes 100 MB")
    parser.add_argument("--start", type=Path, metavar="RUN", help="begin with the weights of this run")
    arguments = parser.parse_args()
    experiment, start = EXPERIMENTS[arguments.experiment], arguments.start
    if arguments.experiment == "nano" and not start:
        parser.error("nano needs --start=RUN: training all its models from scratch would take days")
    workdir = arguments.workdir / (f"{arguments.experiment}_from_run" if start else arguments.experiment)
    planned, kinds = (runs_from(start, experiment), KINDS_FROM_START) if start else (runs(experiment), KINDS)
    workdir.mkdir(parents=True, exist_ok=True)
    file = workdir / "results.json"
    done: Results = json.loads(file.read_text()) if file.exists() else {}
    # First what is done already
    for new in itertools.chain([{}], measure(experiment, planned, workdir, done)):
        done |= new
        with replacing(file) as opened:
            opened.write(json.dumps(done, indent=1).encode())
        picture(experiment.sizes, done, kinds).savefig(workdir / "flexible.png", dpi=110)
        print("", *table(experiment.sizes, done, kinds), sep="\n", flush=True)
    if start:
        return
    patches = [int(size) for size in done[f"other patches, seed {experiment.seeds[0]}"]]
    print(*table(patches, done, ("specialist", "other patches")), sep="\n")


if __name__ == "__main__":
    leave(exit_status(main))

"""Compares one Mixer for five image sizes with five Mixers for one size each, on CIFAR-10.

    python benchmarks/flexible.py --workdir=FOLDER

All have the same architecture (4 blocks of width 48, patches of 4 px: 66,000 parameters at 32 px), images, updates and
learning rate. They are trained for 1,000 updates of 128 images, on 10,000 training images, and scored on the 10,000 test
images:

- flexible: one model, configs/flexible_cifar10.py, for 16, 24, 32, 48 and 64 px
- specialist: one model per size
- resampled: the specialist for 32 px, with its token mixing resampled to the other sizes and not trained further
- made flexible: the specialist for 32 px, after 3 more epochs (234 updates) with all sizes

A seed takes about 35 minutes of one CPU core; two seeds are run. FOLDER/results.json has the scores of finished runs,
which are not run again; a run that was interrupted continues. The table is printed, and the picture FOLDER/flexible.png
drawn, after each run. Results: docs/resolutions.md
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from resolutions import accuracy, resampled

from mlpmixer_flax import fit, load_config
from mlpmixer_flax.atomic import replacing
from mlpmixer_flax.inference.load import load_run

SIZES, OWN, SEEDS = (16, 24, 32, 48, 64), 32, (0, 1)
COMMON: dict[str, Any] = {
    "train_split": "train[:10000]",
    "model.num_blocks": 4,
    "model.hidden_dim": 48,
    "model.tokens_mlp_dim": 48,
    "model.channels_mlp_dim": 96,
    "total_steps": 1000,
    "schedule.warmup_steps": 50,
    "log_every_steps": 100,
    "eval_every_epochs": 0.0,
    "save_every_steps": 50,
}
FINETUNING = {
    "total_steps": 0,
    "total_epochs": 3.0,
    "schedule.warmup_steps": 20,
    "optimizer.learning_rate": 1e-3,
}
KINDS = ("specialist", "flexible", "resampled", "made flexible")

Results = dict[str, dict[str, float]]  # "flexible, seed 0" -> size in px -> accuracy in %


def train(workdir: Path, **changes: Any) -> dict[str, float]:
    """Trains a run to its end, or continues it; returns its accuracies in %, by size in px."""
    config = load_config("flexible_cifar10.py", {**COMMON, **changes})
    scores, own = fit(config, workdir), config.preprocess.image_size_px
    suffixes = {size: "" if size == own else f"_{size}px" for size in config.resolutions_px or (own,)}
    return {str(size): 100 * scores[f"test/accuracy{suffix}"] for size, suffix in suffixes.items()}


def experiment(workdir: Path, done: Results) -> Iterator[Results]:
    """Runs what is not done; yields the accuracies of each new run by its name, the most telling runs first."""
    for seed in SEEDS:

        def folder(kind: str, seed: int = seed) -> Path:
            return workdir / f"{kind.replace(' ', '_')}-seed{seed}"

        def name(kind: str, seed: int = seed) -> str:
            return f"{kind}, seed {seed}"

        def specialist(size: int, seed: int = seed) -> dict[str, float]:
            changes = {"preprocess.image_size_px": size, "resolutions_px": ()}
            return train(folder(f"specialist {size}"), seed=seed, **changes)

        if name("flexible") not in done:
            yield {name("flexible"): train(folder("flexible"), seed=seed)}
        for size in (OWN, *(size for size in SIZES if size != OWN)):
            if str(size) not in done.get(name("specialist"), {}):
                scores = {**done.get(name("specialist"), {}), **specialist(size)}
                yield {name("specialist"): scores}
            if size == OWN and name("resampled") not in done:
                model = load_run(folder(f"specialist {OWN}"))
                sized = {size: model if size == OWN else resampled(model, size) for size in SIZES}
                yield {name("resampled"): {str(size): accuracy(each) for size, each in sized.items()}}
            if size == OWN and name("made flexible") not in done:
                changes = {**FINETUNING, "init_from": str(folder(f"specialist {OWN}"))}
                yield {name("made flexible"): train(folder("made flexible"), seed=seed, **changes)}


def scores_of(done: Results, kind: str, size: int) -> list[float]:
    """Returns the accuracies of all seeds that are done."""
    found = (done.get(f"{kind}, seed {seed}", {}).get(str(size)) for seed in SEEDS)
    return [score for score in found if score is not None]


def table(done: Results) -> list[str]:
    """Returns a row per size: the mean over the seeds that are done and, if there are several, each."""

    def cell(kind: str, size: int) -> str:
        scores = scores_of(done, kind, size)
        each = f" ({', '.join(f'{score:.2f}' for score in scores)})" if len(scores) > 1 else ""
        return f"{statistics.mean(scores):.2f}{each}" if scores else "–"

    return [
        f"| size | tokens | {' | '.join(KINDS)} |",
        f"|---|---|{'---|' * len(KINDS)}",
        *(
            f"| {size} px | {size // 4}x{size // 4} | {' | '.join(cell(kind, size) for kind in KINDS)} |"
            for size in SIZES
        ),
    ]


def picture(done: Results) -> Figure:
    """Returns the accuracies over the sizes: a line through the means of each kind, and a dot per seed."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for kind, marker in zip(KINDS, "sovD", strict=True):
        found = {size: scores for size in SIZES if (scores := scores_of(done, kind, size))}
        if not found:
            continue
        means = [statistics.mean(scores) for scores in found.values()]
        (line,) = axes.plot(list(found), means, marker=marker, label=kind)
        for size, scores in found.items():
            axes.plot([size] * len(scores), scores, ".", color=line.get_color(), alpha=0.5)
    axes.set(xticks=SIZES, xlabel="side of the images, px", ylabel="test accuracy, %")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def report(done: Results, workdir: Path) -> None:
    """Writes the results and the picture, and prints the table."""
    with replacing(workdir / "results.json") as file:
        file.write(json.dumps(done, indent=1).encode())
    picture(done).savefig(workdir / "flexible.png", dpi=110)
    print("", *table(done), "", sep="\n", flush=True)


def read(workdir: Path) -> Results:
    """Returns the results of finished runs."""
    file = workdir / "results.json"
    return json.loads(file.read_text()) if file.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True, help="directory for runs; takes 100 MB")
    workdir = parser.parse_args().workdir
    workdir.mkdir(parents=True, exist_ok=True)
    done = read(workdir)
    for new in experiment(workdir, done):
        done |= new
        report(done, workdir)
    report(done, workdir)


if __name__ == "__main__":
    main()

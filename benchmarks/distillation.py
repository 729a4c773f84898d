"""Measures what a larger teacher brings to a small Mixer on CIFAR-10, beside the same training on labels.

    python benchmarks/distillation.py --workdir=FOLDER

The teacher has the sizes of mixer_folder (0.31 M parameters) and learns from labels for 1,200 updates of 128 images. The
student (67,000 parameters) has the sizes of mixer_digits, but patches of 8 px, like the teacher. It learns for 800 updates,
from labels, and from the teacher at two temperatures, and for 4,000 updates from labels and from the teacher, each with two
seeds. All use Muon and random crops and flips. Training images are the first 45,000 of CIFAR-10's. The other 5,000, "held
out", are there to choose a row by; nothing is chosen by the 10,000 test images.

Takes about half an hour on 2 CPU cores. Finished runs in FOLDER are not run again, and one that was stopped goes on.
Results: docs/recipes.md
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from mlpmixer_flax import fit, load, load_config
from mlpmixer_flax.config import flatten, mixer_digits_config, mixer_folder_config
from mlpmixer_flax.ending import exit_status, leave
from mlpmixer_flax.inference.scores import measure, open_split, score_images

SEEDS = (0, 1)
TEACHER = {f"model.{key}": value for key, value in flatten(mixer_folder_config).items()}
TEACHER |= {"optimizer.learning_rate": 4e-3, "total_steps": 1200}
STUDENT = {f"model.{key}": value for key, value in flatten(mixer_digits_config).items()}
STUDENT |= {"model.patches.size": (8, 8), "optimizer.learning_rate": 8e-3, "total_steps": 800}


def run(workdir: Path, **changes: Any) -> tuple[float, float]:
    """Trains, and returns the accuracy on the held-out images and on the test images, in %."""
    values = {
        "accumulation_steps": 1,
        "train_split": "train[:90%]",
        "test_split": "train[90%:]",
        "optimizer.name": "muon",
        "optimizer.momentum": 0.95,
        "schedule.warmup_steps": 50,
        "eval_every_epochs": 0.0,
        "save_every_epochs": 0.0,
        **changes,
    }
    held_out = fit(load_config("nano_cifar10.py", values), workdir)["validation/accuracy"]
    model = load(workdir)
    examples, classes = open_split(model, "cifar10", "test")
    return 100 * held_out, 100 * measure(score_images(model, examples, classes=classes))["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True, help="directory for the runs")
    workdir = parser.parse_args().workdir
    teacher = workdir / "teacher"
    of_teacher = run(teacher, **TEACHER)
    taught = {"distill_from": str(teacher)}
    rows = {
        "labels": {},
        "the teacher, temperature 1": {**taught, "distill_temperature": 1.0},
        "the teacher, temperature 4": {**taught, "distill_temperature": 4.0},
        "labels, 4,000 updates": {"total_steps": 4_000},
        "the teacher, temperature 4, 4,000 updates": {
            **taught,
            "distill_temperature": 4.0,
            "total_steps": 4_000,
        },
    }
    found = {name: [] for name in rows}
    for seed in SEEDS:  # so that a script that was stopped has one seed of each
        for number, (name, changes) in enumerate(rows.items()):
            found[name].append(
                run(workdir / f"student{number}-seed{seed}", **{**STUDENT, **changes}, seed=seed)
            )
            print(f"{name}, seed {seed}: held out {found[name][-1][0]:.2f}, test {found[name][-1][1]:.2f}")
    print("| learns from | held out, % | test, % | each seed, test |", "|---|---|---|---|", sep="\n")
    print(f"| (the teacher itself, from labels) | {of_teacher[0]:.2f} | {of_teacher[1]:.2f} | |")
    for name, scores in found.items():
        held_out, test = zip(*scores, strict=True)
        each = ", ".join(f"{score:.2f}" for score in test)
        print(f"| {name} | {statistics.mean(held_out):.2f} | {statistics.mean(test):.2f} | {each} |")


if __name__ == "__main__":
    leave(exit_status(main))

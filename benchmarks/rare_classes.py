"""Trains on digits of which half of the classes are rare, with and without class weights.

    python benchmarks/rare_classes.py FOLDER

Writes FOLDER/labels.csv and its images: all training digits 0 to 4, ten of each of 5 to 9, and the whole test split. Then
trains configs/digits.py without and with class_weights=balanced, three seeds each, and prints the means and the standard
deviations of the accuracy and of the balanced accuracy at the end, and the mean recall of the rare classes.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image

import mlpmixer_flax as mf
from mlpmixer_flax.dataloader import open_examples
from mlpmixer_flax.ending import exit_status, leave
from mlpmixer_flax.inference.scores import measure, open_split, per_class, score_images

RARE, IMAGES_OF_RARE, SEEDS = (5, 6, 7, 8, 9), 10, (0, 1, 2)


def write_table(folder: Path) -> Path:
    rows = [("file", "label", "split")]
    (folder / "images").mkdir(parents=True)
    for split in ("train", "test"):
        examples = open_examples("digits", split)
        images, labels = examples.read(np.arange(len(examples)))
        places = {digit: np.flatnonzero(labels == digit) for digit in range(10)}
        for digit, found in places.items():
            for place in found[: IMAGES_OF_RARE if split == "train" and digit in RARE else None]:
                file = f"images/{split}{place:04}.png"
                Image.fromarray(images[place, :, :, 0]).save(folder / file)
                rows.append((file, str(digit), split))
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder / "labels.csv"


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="is created")
    folder = parser.parse_args().folder
    table, lines = write_table(folder), []
    for weights in ("", "balanced"):
        found = []
        for seed in SEEDS:
            changes = {
                "dataset": f"table:{table}",
                "train_split": "train+validation",
                "class_weights": weights,
            }
            workdir = folder / f"run-{weights or 'none'}-{seed}"
            mf.fit(mf.load_config("digits.py", {**changes, "seed": seed, "eval_every_epochs": 0.0}), workdir)
            model = mf.load(workdir)
            examples, classes = open_split(model, f"table:{table}", "test")
            rows = score_images(model, examples, classes=classes)
            rare = np.mean(
                [row["recall"] for row in per_class(rows, model.class_names) if row["class"] in RARE]
            )
            scores = measure(rows)
            found.append((scores["accuracy"], scores["balanced_accuracy"], rare))
        means, deviations = np.mean(found, axis=0), np.std(found, axis=0, ddof=1)
        each = [f"{100 * mean:.2f} ± {100 * std:.2f}" for mean, std in zip(means, deviations, strict=True)]
        lines.append(f"| `{weights}` | {' | '.join(each)} |")
    print(
        "| `class_weights` | accuracy, % | balanced accuracy, % | recall of rare classes, % |\n|---|---|---|---|"
    )
    print("\n".join(lines))


if __name__ == "__main__":
    leave(exit_status(main))

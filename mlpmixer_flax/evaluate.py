"""Score a model on a split: python -m mlpmixer_flax.evaluate --workdir=runs/b16

A run is scored on the test split of its own dataset. Runs and other weights can
be scored on any dataset or folder of images, if the model has its classes.
Classes are matched by name. For ImageNet, the WordNet number (n01440764) is
also a name. If a TFDS dataset or the model has no class names, classes are
matched by number. Images are read in gray or color, as the model needs them.
The program writes to --output:

  scores.json      all scores; "confusion": [true class, predicted class,
                   images] for all pairs that occur; "mistakes", with file names
                   if the dataset is a folder
  per_class.csv    one row per class: accuracy, and the class it is most often
                   mistaken for
  confusion.png    confusion matrix: which class is mistaken for which
  mistakes.png     the 30 mistakes with the highest confidence
  calibration.png  accuracy and number of predictions by their confidence
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlpmixer_flax.atomic import make_folder, replacing
from mlpmixer_flax.cli import (
    add_dataset,
    add_model,
    check_dataset,
    exit_status,
    load_model,
    make_parser,
    named_dataset,
    pad,
    shorten,
)
from mlpmixer_flax.dataloader import Examples
from mlpmixer_flax.inference import figures
from mlpmixer_flax.inference.classes import in_words
from mlpmixer_flax.inference.forward import Rows, check_positive
from mlpmixer_flax.inference.scores import (
    confusions,
    list_mistakes,
    measure,
    open_split,
    per_class,
    score_images,
)
from mlpmixer_flax.training.evaluation import evaluate

__all__ = ["evaluate", "main", "open_split", "score_images"]


def write_scores(output: Path, found: Mapping[str, Any], *, rows: Rows, examples: Examples) -> None:
    """Writes the files that the module's docstring lists.

    `found` is the content of scores.json. The images of mistakes.png are read again from `examples`.

    Raises:
      UserError: a file cannot be written.
    """
    names = [row["name"] for row in found["per_class"]]
    lines = (f'  "{key}": {json.dumps(value, ensure_ascii=False)}' for key, value in found.items())
    with replacing(output / "scores.json") as file:
        file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, found["per_class"][0])
    table.writeheader()
    table.writerows(found["per_class"])
    with replacing(output / "per_class.csv") as file:
        file.write(text.getvalue().encode())
    figures.save(figures.confusion(found["confusion"], names), output / "confusion.png")
    figures.save(
        figures.calibration(rows["confidence"], rows["label"] == rows["best"][:, 0]),
        output / "calibration.png",
    )
    worst = found["mistakes"][:30]
    images = list(examples.read(np.array([row["image"] for row in worst]))[0]) if worst else []
    captions = ([row[key] for row in worst] for key in ("is", "said", "confidence"))
    figures.save(figures.mistakes(images, *captions), output / "mistakes.png")


def _run(arguments: argparse.Namespace) -> None:
    check_positive(batch_size=arguments.batch_size)
    check_dataset(arguments)
    model = load_model(arguments)
    data = named_dataset(arguments, model)
    examples, classes = open_split(
        model,
        data.dataset,
        data.test_split,
        data_dir=data.data_dir,
        skip_bad_images=data.skip_bad_images,
    )
    output = arguments.output or (arguments.workdir or Path()) / "evaluation"
    make_folder(output)  # first, so that an error here is found before an hour of work

    names = in_words(model.class_names)
    rows = score_images(model, examples, classes=classes, batch_size=arguments.batch_size)
    found = {
        "model": model.name,
        "checkpoint": arguments.checkpoint,  # None: the default
        "step": model.step,
        "dataset": data.dataset,
        "split": data.test_split,
        "images": len(examples),
        **measure(rows),
        "per_class": per_class(rows, names),
        "confusion": confusions(rows),
        "mistakes": list_mistakes(rows, examples, names),
    }
    write_scores(output, found, rows=rows, examples=examples)
    print(_as_text(found))
    print(f"in {output}:\nscores.json, per_class.csv, confusion.png, mistakes.png, calibration.png")


def _as_text(found: Mapping[str, Any]) -> str:
    """Returns the scores as text of 80 columns."""
    measured = {"top-1 accuracy": f"{found['accuracy']:.2%}"}
    if len(found["per_class"]) > 5:  # else it is always 100 %
        measured["top-5 accuracy"] = f"{found['accuracy_top5']:.2%}"
    measured["loss"] = f"{found['loss']:.4f}"
    measured["calibration error"] = f"{found['calibration_error']:.4f}"
    step = "" if found["step"] is None else f", step {found['step']},"
    head = f"{found['model']}{step} on {found['dataset']}, split {found['split']}: {found['images']:,} images"
    lines = [head, "", *(f"{name:<19}{value:>8}" for name, value in measured.items()), ""]
    return "\n".join([*lines, as_table(found["per_class"]), ""])


def as_table(classes: Sequence[Mapping[str, Any]]) -> str:
    """Returns the rows of `scores.per_class` as text of 80 columns, without classes that have no images.

    If more than 20 classes have images, only the 10 worst and the 10 best are shown.
    """
    head = f"{'class':<28}{'images':>8}{'accuracy':>10}  most often mistaken for (times)"
    seen = [row for row in classes if row["images"]]
    if len(seen) <= 20:
        return "\n".join([head, *map(_as_line, seen)])
    ranked = [_as_line(row) for row in sorted(seen, key=lambda row: row["accuracy"])]
    worst, best = ranked[:10], ranked[:-11:-1]
    return "\n".join([f"the 10 worst of {len(seen):,} classes", head, *worst, "", "the 10 best", head, *best])


def _as_line(row: Mapping[str, Any]) -> str:
    taken_for = f"  {shorten(row['taken_for'], 22)} ({row['times']:,})" if row["times"] else ""
    return f"{pad(row['name'], 28)}{row['images']:>8,}{row['accuracy']:>10.2%}{taken_for}"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the options of the program; exits with a message if they are wrong."""
    parser = make_parser(
        "evaluate",
        __doc__,
        examples="  python -m mlpmixer_flax.evaluate --workdir=runs/b16 --checkpoint=best\n"
        "  python -m mlpmixer_flax.evaluate --workdir=runs/b16 --dataset=folder:photos \\\n"
        "      --split=train+validation --output=photos-scores\n"
        "  python -m mlpmixer_flax.evaluate --weights=imagenet1k/Mixer-B_16 \\\n"
        "      --dataset=imagenet2012 --split=validation",
    )
    add_model(parser)
    add_dataset(parser)
    parser.add_argument(
        "--split",
        dest="test_split",
        metavar="SPLIT",
        help='split to score, such as "validation" or "train[:10%%]" (default: the test_split of the run, else '
        '"test"); a folder without train/ and val/ is divided into "train" and "validation", so "train+validation" '
        "is all of its images",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="directory to write (default: evaluation, in the run directory or else in the current one)",
    )
    parser.add_argument(
        "--batch_size", type=int, default=64, metavar="N", help="images per forward pass (default: 64)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program. Exit status: 0 done, 1 nobody reads the output any more, 2 unusable input."""
    arguments = parse(argv)
    return exit_status(lambda: _run(arguments))


if __name__ == "__main__":
    sys.exit(main())

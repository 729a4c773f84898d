"""Score a model on a split: python -m mlpmixer_flax.evaluate --workdir=runs/b16

A run is scored on the test split of its own dataset. Runs and other weights can
be scored on any dataset or folder of images, if the model has its classes.
Classes are matched by name. For ImageNet, the WordNet number (n01440764) is
also a name. If a TFDS dataset or the model has no class names, classes are
matched by number. Images are read in gray or color, as the model needs them.
The program writes to a directory:

  scores.json      all scores, with model, dataset and split; with --flip, a
                   second time under "flip"; "confusion": [true class,
                   predicted class, images] for all pairs that occur;
                   "mistakes", with file names for a folder or table
  per_class.csv    one row per class: precision, recall (its accuracy) and F1,
                   and the class it is most often mistaken for
  confusion.png    confusion matrix: which class is mistaken for which
  mistakes.png     the 30 mistakes with the highest confidence: images as they
                   are stored, with file names for a folder or table
  calibration.png  accuracy and number of predictions by their confidence

If images have several labels each, it writes the first two files only, with the
average precision of each class and the threshold with its highest F1.

Without --output, the directory is RUN/evaluation. If the dataset, split,
checkpoint or size is not the default of the run, it is part of the name, as in
RUN/evaluation-cifar10-train, so scores never replace scores of something else.
For weights that are no run, the directory is evaluation-WEIGHTS-DATASET-SPLIT
in the current one. Paths and slices are shortened, and a code is added.
"""

import argparse
import csv
import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlpmixer_flax.atomic import make_folder, replacing
from mlpmixer_flax.cli import (
    add_dataset,
    add_distributed,
    add_flip,
    add_model,
    check_dataset,
    load_model,
    make_parser,
    named_dataset,
    path,
)
from mlpmixer_flax.data.dataset import with_absolute_path
from mlpmixer_flax.dataloader import Examples
from mlpmixer_flax.ending import exit_status, leave
from mlpmixer_flax.inference import figures, multi_label
from mlpmixer_flax.inference.classes import in_words
from mlpmixer_flax.inference.drawing import save
from mlpmixer_flax.inference.forward import Rows
from mlpmixer_flax.inference.model import Model
from mlpmixer_flax.inference.originals import read_originals
from mlpmixer_flax.inference.scores import (
    confusions,
    list_mistakes,
    measure,
    open_split,
    per_class,
    score_images,
    table_of_classes,
)
from mlpmixer_flax.limits import check_positive
from mlpmixer_flax.remote import publish, shown
from mlpmixer_flax.run_weights import default_checkpoint
from mlpmixer_flax.text import pad, printable, shorten
from mlpmixer_flax.training.evaluation import evaluate
from mlpmixer_flax.training.launch import start
from mlpmixer_flax.training.processes import check_same, is_lead, together
from mlpmixer_flax.weights.source import NamedRun, named_run

__all__ = ["evaluate", "main", "open_split", "score_images"]


def write_scores(output: Path, found: Mapping[str, Any], *, rows: Rows, examples: Examples) -> None:
    """Writes the files that the module's docstring lists.

    `found` is the content of scores.json. The images of mistakes.png are read again from `examples`.

    Raises:
      UserError: a file cannot be written.
    """
    _write_tables(output, found)
    names = [row["name"] for row in found["per_class"]]
    title, worst = _subject(found), found["mistakes"][:30]
    correct = rows["label"] == rows["best"][:, 0]
    images = read_originals(examples, [row["image"] for row in worst])
    for name, figure in {
        "confusion": figures.confusion(found["confusion"], names, title=title),
        "calibration": figures.calibration(rows["confidence"], correct, title=title),
        "mistakes": figures.mistakes(images, worst, title=title),
    }.items():
        save(figure, output / f"{name}.png")


def _write_tables(output: Path, found: Mapping[str, Any]) -> None:
    lines = (f'  "{key}": {json.dumps(value, ensure_ascii=False)}' for key, value in found.items())
    # Names may have bytes that are not text; as escapes they are valid JSON.
    with replacing(output / "scores.json") as file:
        file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode(errors="backslashreplace"))
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, found["per_class"][0])
    table.writeheader()
    table.writerows(found["per_class"])
    with replacing(output / "per_class.csv") as file:
        file.write(text.getvalue().encode(errors="backslashreplace"))


def _run(arguments: argparse.Namespace) -> None:
    start(arguments.distributed)
    with together():
        _evaluate(arguments)


def _evaluate(arguments: argparse.Namespace) -> None:
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
    workdir = arguments.workdir
    run = named_run(arguments.weights) if workdir is None else NamedRun(workdir, arguments.checkpoint)
    subject = {
        "model": model.name,
        "checkpoint": run and (run.checkpoint or default_checkpoint(run.workdir)),
        "step": model.step,
        "dataset": with_absolute_path(data.dataset),
        "split": data.test_split,
        "images": len(examples),
        **({"image_size_px": arguments.image_size_px} if arguments.image_size_px else {}),
    }
    output = arguments.output or default_output(subject, model, run)
    if is_lead():
        make_folder(output)  # first, so that an error here is found before an hour of work

    seen = {
        "images": len(examples),
        "model": model.name,
        "step": model.step,
        "classes": list(model.class_names),
    }
    check_same("a model or data", seen, advice="start all processes with the same command and data")
    names = in_words(model.class_names)
    images = {"examples": examples, "classes": classes, "batch_size": arguments.batch_size}
    score = multi_label.score_multi_label if examples.multi_label else score_images
    rows = score(model, **images)
    flipped = score(dataclasses.replace(model, flip=True), **images) if arguments.flip else None
    if not is_lead():
        return
    written = "scores.json, per_class.csv"
    if examples.multi_label:
        measure_rows = multi_label.measure_multi_label
        more = {"per_class": multi_label.per_class(rows, names)}
    else:
        measure_rows = partial(_measure, names=names)
        more = _per_image(rows, examples, names)
    found = {**subject, **measure_rows(rows), **({"flip": measure_rows(flipped)} if flipped else {}), **more}
    if examples.multi_label:
        _write_tables(output, found)
        print(f"{printable(_subject(found))}: {found['images']:,} images\n\n{multi_label.as_text(found)}")
    else:
        write_scores(output, found, rows=rows, examples=examples)
        print(_as_text(found))
        written += ", confusion.png, mistakes.png, calibration.png"
    publish(output)
    print(f"in {printable(shown(output))}:\n{written}")


def _per_image(rows: Rows, examples: Examples, names: Sequence[str]) -> dict[str, Any]:
    """Returns what scores.json has about classes and mistakes, of images with one label each."""
    return {
        "per_class": per_class(rows, names),
        "confusion": confusions(rows),
        "mistakes": list_mistakes(rows, examples, names),
    }


def _measure(rows: Rows, names: Sequence[str]) -> dict[str, float]:
    """Returns the scores of `scores.measure`, without one that would always be 1."""
    return {key: value for key, value in measure(rows).items() if key != "accuracy_top5" or len(names) > 5}


def default_output(subject: Mapping[str, Any], model: Model, run: NamedRun | None) -> Path:
    """Returns the directory for scores of this subject, as the module's docstring says.

    Args:
      subject: the first keys of scores.json.
      run: that the model comes from; None for other weights.
    """
    own, folder = {}, Path()
    if run:
        config, folder = model.config, run.workdir
        own = {"model": model.name, "dataset": config["dataset"], "split": config["test_split"]}
        own["checkpoint"] = default_checkpoint(folder)
    keys = ("model", "dataset", "split", "checkpoint")
    others = {key: _as_name(subject[key]) for key in keys if subject[key] != own.get(key)}
    if others.get("checkpoint", "").isdigit():
        others["checkpoint"] = f"step{others['checkpoint']}"
    if size_px := subject.get("image_size_px"):
        others["size"] = f"{size_px}px"
    return folder / "-".join(["evaluation", *others.values()])


def _as_name(text: str) -> str:
    """Returns a text as part of a file's name; texts that differ have names that differ."""
    name = re.sub(r"[^\w.+%-]+", "_", text.rstrip("/").rpartition("/")[2])
    code = hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:6]
    short = name.encode()[-40:].decode(errors="ignore").strip("._-")
    return name if name == text == short else f"{short}-{code}"


def _subject(found: Mapping[str, Any]) -> str:
    """Returns what was scored, for a title: "runs/b16, step 300, on cifar10, split test"."""
    step = "" if found["step"] is None else f", step {found['step']},"
    size = f", {found['image_size_px']} px" if "image_size_px" in found else ""
    return f"{found['model']}{step} on {found['dataset']}, split {found['split']}{size}"


def _as_text(found: Mapping[str, Any]) -> str:
    """Returns the scores as text of 80 columns."""
    head = f"{printable(_subject(found))}: {found['images']:,} images"
    lines = [head, "", *_score_lines(found), "", as_table(found["per_class"]), ""]
    if "flip" in found:
        lines += ["with --flip, from each image and its mirror image:", *_score_lines(found["flip"]), ""]
    return "\n".join(lines)


def _score_lines(found: Mapping[str, Any]) -> list[str]:
    measured = {"top-1 accuracy": f"{found['accuracy']:.2%}"}
    if "accuracy_top5" in found:
        measured["top-5 accuracy"] = f"{found['accuracy_top5']:.2%}"
    measured["balanced accuracy"] = f"{found['balanced_accuracy']:.2%}"
    measured["loss"] = f"{found['loss']:.4f}"
    measured["calibration error"] = f"{found['calibration_error']:.4f}"
    return [f"{name:<19}{value:>8}" for name, value in measured.items()]


def as_table(classes: Sequence[Mapping[str, Any]]) -> str:
    """Returns the rows of `scores.per_class` as text of 80 columns, without classes that have no images.

    If more than 20 classes have images, only the 10 worst and the 10 best are shown.
    """
    head = f"{'class':<22}{'images':>8}{'precision':>11}{'recall':>8}{'F1':>8}  mistaken for (times)"
    return "\n".join(table_of_classes(classes, head, _as_line, by="recall"))


def _as_line(row: Mapping[str, Any]) -> str:
    # A class that is never predicted has no precision.
    precision, recall, f1 = (
        "-" if row[key] is None else f"{row[key]:.1%}" for key in ("precision", "recall", "f1")
    )
    taken_for = f"  {shorten(row['taken_for'], 12)} ({row['times']:,})" if row["times"] else ""
    return f"{pad(row['name'], 22)}{row['images']:>8,}{precision:>11}{recall:>8}{f1:>8}{taken_for}"


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
    add_distributed(parser)
    parser.add_argument(
        "--split",
        dest="test_split",
        metavar="SPLIT",
        help='split to score, such as "validation" or "train[:10%%]" (default: without --dataset the '
        'test_split of the run, else "test"); a folder without train/ and val/ is divided into "train" and "validation", so "train+validation" '
        "is all of its images",
    )
    parser.add_argument(
        "--output",
        type=path,
        metavar="DIR",
        help="directory to write; files of an earlier evaluation in it are replaced (default: see above)",
    )
    parser.add_argument(
        "--batch_size", type=int, default=64, metavar="N", help="images per forward pass (default: 64)"
    )
    add_flip(parser, effect="also score")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program. Exit status: 0 done, 1 nobody reads the output any more, 2 unusable input."""
    arguments = parse(argv)
    return exit_status(lambda: _run(arguments))


if __name__ == "__main__":
    leave(main())

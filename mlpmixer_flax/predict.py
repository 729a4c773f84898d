"""Classify images: python -m mlpmixer_flax.predict --workdir=runs/b16 cat.jpg

Takes files, folders (all images in them and in their subfolders) and quoted
patterns. Prints a table with the most probable classes of each image, or

  --csv    one line per class: file, rank (from 1), label (number of the class,
           from 0), class_name, probability
  --json   one line per image: {"file": ..., "top": [{"label": ...,
           "class_name": ..., "probability": ...}, ...]}

If the model was trained on images with several labels each, or if --threshold
is given, it prints sets of classes: those with at least this probability. An
empty set is "(none)" in the table, a line with only a file in CSV, and an empty
list in JSON.

Files that cannot be used are reported on stderr, and the program continues with
the other files. The exit status is then 1, or 2 if no file could be used.
"""

import argparse
import contextlib
import csv
import dataclasses
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from rich.cells import cell_len
from tqdm import tqdm

from mlpmixer_flax.cli import add_alone, add_flip, add_model, load_model, make_parser, parse_names
from mlpmixer_flax.ending import exit_status, leave
from mlpmixer_flax.inference.classes import in_words
from mlpmixer_flax.inference.inputs import find_all_files, find_files
from mlpmixer_flax.inference.load import load_run
from mlpmixer_flax.inference.model import Model, Prediction, Score
from mlpmixer_flax.inference.multi_label import USUAL_THRESHOLD, read_thresholds
from mlpmixer_flax.limits import check_positive
from mlpmixer_flax.remote import url_of
from mlpmixer_flax.text import pad, printable, shorten, shorten_start
from mlpmixer_flax.training.launch import check_alone

__all__ = ["Prediction", "Score", "as_set", "find_files", "load_run", "main", "predict"]  # some are handed on

_TEXT_COLUMNS = 70  # for file and class in a table of 80


def predict(
    model: Model, files: Sequence[str | os.PathLike], *, top: int = 5, batch_size: int = 32
) -> Iterator[Prediction]:
    """Yields the `top` most probable classes of each file, in the order of the files; see `Model.predict_each`.

    for prediction in predict(load_run("runs/b16"), ["cat.jpg"]):
        print(prediction.image, prediction.top[0].class_name)
    """
    return model.predict_each(files, top=top, batch_size=batch_size)


def as_set(prediction: Prediction, thresholds: Sequence[float]) -> Prediction:
    """Returns the prediction with only the classes that have at least their threshold, one for each class number."""
    kept = tuple(score for score in prediction.top if score.probability >= thresholds[score.label])
    return dataclasses.replace(prediction, top=kept)


def _as_table(prediction: Prediction, file_columns: int) -> str:
    margin = pad(shorten_start(prediction.image, file_columns), file_columns)
    lines = [] if prediction.top else [f"{margin}{'':>8}  (none)"]
    for score in prediction.top:
        name = shorten(score.class_name, _TEXT_COLUMNS - file_columns)
        lines.append(f"{margin}{100 * score.probability:>8.2f}  {name}")
        margin = " " * file_columns
    return "\n".join(lines)


def _as_csv(prediction: Prediction) -> str:
    lines = io.StringIO()
    rows = [(prediction.image, rank, *score) for rank, score in enumerate(prediction.top, 1)]
    empty = (prediction.image, *[""] * (1 + len(Score._fields)))
    csv.writer(lines, lineterminator="\n").writerows(rows or [empty])
    return lines.getvalue().removesuffix("\n")


def _as_json(prediction: Prediction) -> str:
    return json.dumps({"file": prediction.image, "top": [score._asdict() for score in prediction.top]})


def _output_format(
    name: str, files: Sequence[str], class_names: Sequence[str]
) -> tuple[str, Callable[[Prediction], str]]:
    """Returns the header line ("" for none) and the function that turns a prediction into text."""
    longest_file, longest_name = (
        max(cell_len(printable(text)) for text in texts) for texts in (files, class_names)
    )
    file_columns = max(min(longest_file, _TEXT_COLUMNS - min(longest_name, 38)), len("file"))
    return {
        "table": (f"{'file':<{file_columns}}{'%':>8}  class", partial(_as_table, file_columns=file_columns)),
        "csv": (",".join(("file", "rank", *Score._fields)), _as_csv),
        "json": ("", _as_json),
    }[name]


def _run(arguments: argparse.Namespace) -> int:
    if arguments.distributed == "auto":
        check_alone("predict")
    check_positive(top=5 if arguments.top is None else arguments.top, batch_size=arguments.batch_size)
    files, all_usable = find_all_files(arguments.images)
    usable = 0
    if not files:
        return 2
    with contextlib.redirect_stdout(sys.stderr):  # notes about the weights are not predictions
        model = dataclasses.replace(load_model(arguments), flip=arguments.flip)
    names = {file: url_of(Path(file)) or file for file in files}
    class_names = in_words(model.class_names)
    thresholds = None
    if arguments.threshold is not None or model.multi_label:
        thresholds = read_thresholds(
            str(USUAL_THRESHOLD) if arguments.threshold is None else arguments.threshold, class_names
        )
    header, show = _output_format(arguments.form, list(names.values()), class_names)
    if header:
        print(header, flush=True)
    top = arguments.top or (len(class_names) if thresholds else 5)
    predictions = predict(model, files, top=top, batch_size=arguments.batch_size)
    # No delay: with one, tqdm.write shows the bar at once all the same, and its end does not clear it.
    bar = tqdm(predictions, "predicting", len(files), unit="img", leave=False, disable=None)
    for prediction in bar:
        if prediction.flaw:
            tqdm.write(f"error: {prediction.flaw}", file=sys.stderr)
            all_usable = False
        else:
            if thresholds:
                prediction = as_set(prediction, thresholds)
            tqdm.write(show(dataclasses.replace(prediction, image=names[prediction.image])))
            sys.stdout.flush()
            usable += 1
    return 2 if not usable else 0 if all_usable else 1


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the options of the program; exits with a message if they are wrong."""
    parser = make_parser(
        "predict",
        __doc__,
        examples="  python -m mlpmixer_flax.predict --weights=imagenet1k/Mixer-B_16 cat.jpg\n"
        "  python -m mlpmixer_flax.predict --workdir=runs/b16 --top=1 'holiday/**/*.png'\n"
        "  python -m mlpmixer_flax.predict --workdir=runs/b16 --csv holiday > holiday.csv",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder or quoted pattern")
    add_model(parser)
    parser.add_argument("--top", type=int, metavar="N", help="classes per image (default: 5; of a set, all)")
    parser.add_argument(
        "--threshold",
        metavar="P",
        help="print sets of classes: those with a probability of at least P; or a scores.json of evaluate, for its "
        "threshold of each class (default for a model with several labels per image: 0.5)",
    )
    parser.add_argument(
        "--batch_size", type=int, default=32, metavar="N", help="images per forward pass (default: 32)"
    )
    add_flip(parser, effect="predict from")
    add_alone(parser)
    parser.set_defaults(form="table")
    forms = parser.add_mutually_exclusive_group()
    for form in ("csv", "json"):
        forms.add_argument(f"--{form}", dest="form", action="store_const", const=form, help="see above")
    return parse_names(parser, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program. Exit status: 0 done, 1 some files are unusable, 2 all files are, or another input is."""
    arguments = parse(argv)
    return exit_status(lambda: _run(arguments), data=arguments.form != "table")


if __name__ == "__main__":
    leave(main())

"""What is in images: python -m mlpmixer_flax.predict --workdir=runs/b16 cat.jpg

Takes files, folders, which stand for all images in them and in their folders,
and quoted patterns. The most probable classes of each image come as a table, or

  --csv    a line a class: file, rank (from 1), label (number of the class, from
           0), class_name, probability
  --json   a line an image: {"file": ..., "top": [{"label": ..., "class_name":
           ..., "probability": ...}, ...]}

What cannot be used is said on stderr while the rest goes on; the exit status is
then 1, or 2 if nothing could be used.
"""

import argparse
import contextlib
import csv
import dataclasses
import glob
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from mlpmixer_flax import UserError
from mlpmixer_flax.folders import images_below
from mlpmixer_flax.images import read_square
from mlpmixer_flax.terminal import check_positive, exit_status, printable, shorten, width
from mlpmixer_flax.trained import Trained, add_arguments, in_words, load_named, make_predict

_TEXT_COLUMNS = 70  # for file and class in a table of 80


class Score(NamedTuple):
    """What a model thinks of one class."""

    label: int  # the class's number, from 0
    class_name: str
    probability: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The classes of an image, the most probable first, or why it has none."""

    file: str
    top: tuple[Score, ...]
    flaw: str = ""  # a sentence, where the file cannot be used; `top` is empty then


def predict(
    trained: Trained, files: Sequence[str | os.PathLike], *, top: int = 5, batch_size: int = 32
) -> Iterator[Prediction]:
    """The `top` classes of each file, all where the model has fewer, in the order of the files.

        for prediction in predict(load_run(Path("runs/b16")), ["cat.jpg"]):
            print(prediction.file, prediction.top[0].class_name)

    An image is seen as in evaluation, but that the small ones of a dataset are enlarged on the device there,
    and here by Pillow, which rounds. Threads read the next batch while the device works.

    Raises:
      UserError: `top` or `batch_size` is below 1.
    """
    check_positive(top=top, batch_size=batch_size)
    files = [os.fspath(file) for file in files]
    batch_size = min(batch_size, len(files)) or 1
    class_names = in_words(trained.class_names)
    size_px, channels = trained.preprocess["image_size_px"], trained.channels
    read = partial(
        _read,
        channels=channels,
        size_px=size_px,
        crop_fraction=trained.preprocess["crop_fraction"],
        interpolation=trained.preprocess["interpolation"],
    )
    probabilities_of = make_predict(trained.for_cropped_images())  # so that all sizes make one batch
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        upcoming = pool.map(read, files[:batch_size])
        for start in range(0, len(files), batch_size):
            stop = start + batch_size
            images = list(upcoming)
            upcoming = pool.map(read, files[stop : stop + batch_size])
            # Of one shape, so that one compilation serves; rows without an image are computed in vain.
            batch = np.zeros((batch_size, size_px, size_px, channels), np.uint8)
            for row, image in enumerate(images):
                if not isinstance(image, UserError):
                    batch[row] = image
            best = jax.lax.top_k(probabilities_of(batch), min(top, len(class_names)))
            rows = zip(*(array.tolist() for array in jax.device_get(best)), strict=True)
            for file, image, (probabilities, labels) in zip(files[start:stop], images, rows, strict=False):
                if isinstance(image, UserError):
                    yield Prediction(file, (), flaw=str(image))
                    continue
                names = [class_names[label] for label in labels]
                yield Prediction(file, tuple(map(Score, labels, names, probabilities)))


def _read(file: str, **preprocess) -> np.ndarray | UserError:
    try:
        return read_square(file, **preprocess)
    except UserError as error:
        return error


def find_files(path: str) -> list[str]:
    """The files that a path stands for, in a fixed order.

    A folder stands for the images in it and in its folders, a pattern ("*.jpg", "holiday/**/*.png") for what
    it matches, any other path for itself.

    Raises:
      UserError: it stands for nothing, or a folder cannot be read.
    """
    path = os.path.expanduser(path)
    folder = path
    while folder and not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    # Brackets in the name of a folder that is there stand for themselves.
    matches = sorted(glob.glob(glob.escape(folder) + path.removeprefix(folder), recursive=True))
    files = []
    for match in matches:
        files += images_below(match) if os.path.isdir(match) else [match]
    if not files:
        what = "holds no images" if matches else "is no file or folder, and as a pattern matches none"
        raise UserError(f"{path!r} {what}: give another path")
    return files


def _as_table(prediction: Prediction, file_columns: int) -> str:
    file = printable(prediction.file)
    while width(file) > file_columns:
        file = "…" + file[2:]  # of a path the end says more
    margin = file + " " * (file_columns - width(file))
    lines = []
    for score in prediction.top:
        name = shorten(score.class_name, _TEXT_COLUMNS - file_columns)
        lines.append(f"{margin}{100 * score.probability:>8.2f}  {name}")
        margin = " " * file_columns
    return "\n".join(lines)


def _as_csv(prediction: Prediction) -> str:
    lines = io.StringIO()
    rows = ((prediction.file, rank, *score) for rank, score in enumerate(prediction.top, 1))
    csv.writer(lines, lineterminator="\n").writerows(rows)
    return lines.getvalue().removesuffix("\n")


def _as_json(prediction: Prediction) -> str:
    return json.dumps({"file": prediction.file, "top": [score._asdict() for score in prediction.top]})


def _form(
    name: str, files: Sequence[str], class_names: Sequence[str]
) -> tuple[str, Callable[[Prediction], str]]:
    """The line above all predictions, if any, and how one is written."""
    longest_file, longest_name = (
        max(width(printable(text)) for text in texts) for texts in (files, class_names)
    )
    file_columns = max(min(longest_file, _TEXT_COLUMNS - min(longest_name, 38)), len("file"))
    return {
        "table": (f"{'file':<{file_columns}}{'%':>8}  class", partial(_as_table, file_columns=file_columns)),
        "csv": (",".join(("file", "rank", *Score._fields)), _as_csv),
        "json": ("", _as_json),
    }[name]


def _run(arguments: argparse.Namespace) -> int:
    check_positive(top=arguments.top, batch_size=arguments.batch_size)
    files, usable, flawless = {}, 0, True  # a dict, since a file may be named twice
    for path in arguments.images:
        try:
            files |= dict.fromkeys(find_files(path))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            flawless = False
    if not files:
        return 2
    with contextlib.redirect_stdout(sys.stderr):  # what is said of the weights is no prediction
        trained = load_named(arguments)
    header, show = _form(arguments.form, list(files), in_words(trained.class_names))
    if header:
        print(header, flush=True)
    predictions = predict(trained, list(files), top=arguments.top, batch_size=arguments.batch_size)
    # No delay: with one, tqdm.write shows the bar at once, and the end of it doesn't clear what it shows.
    bar = tqdm(predictions, "predicting", len(files), unit="img", leave=False, disable=None)
    for prediction in bar:
        if prediction.flaw:
            tqdm.write(f"error: {prediction.flaw}", file=sys.stderr)
            flawless = False
        else:
            tqdm.write(show(prediction))
            sys.stdout.flush()
            usable += 1
    return 2 if not usable else 0 if flawless else 1


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the program; exits as argparse does where they cannot be parsed."""
    parser = argparse.ArgumentParser(
        prog="python -m mlpmixer_flax.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python -m mlpmixer_flax.predict --weights=imagenet1k/Mixer-B_16 cat.jpg\n"
        "  python -m mlpmixer_flax.predict --workdir=runs/b16 --top=1 'holiday/**/*.png'\n"
        "  python -m mlpmixer_flax.predict --workdir=runs/b16 --csv holiday > holiday.csv",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="file, folder or quoted pattern")
    add_arguments(parser)
    parser.add_argument(
        "--top", type=int, default=5, help="classes an image (default: 5); 1 = a line an image"
    )
    parser.add_argument("--batch_size", type=int, default=32, help="images at a time (default: 32)")
    parser.set_defaults(form="table")
    forms = parser.add_mutually_exclusive_group()
    for form in ("csv", "json"):
        forms.add_argument(f"--{form}", dest="form", action="store_const", const=form, help="see above")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Exit status: 0 done, 1 some files were unusable, 2 all were, or another input was."""
    arguments = parse(argv)
    return exit_status(lambda: _run(arguments))


if __name__ == "__main__":
    sys.exit(main())

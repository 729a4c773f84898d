"""Write features of images: python -m mlpmixer_flax.embed --workdir=runs/b16

Takes files, folders (all images in them and in their subfolders) and quoted
patterns; without any, the images of a split. Writes one row per image:

  features    the input of the model's head: float32 (n, hidden_dim)
  file        name of the file; not for a TFDS dataset, which has no files
  label       for a split, number of the class; if images have several labels,
              1 or 0 for every class
  class_name  for a split, name of the class, or names such as sea|sand

--output ends in .npz (numpy.load reads it) or .parquet (pandas.read_parquet and
others do).

--nearest=IMAGE prints which of the images are most similar to IMAGE, by the
cosine similarity of their features, and draws them: in holiday.png if the
output is holiday.npz. It may be given several times. IMAGE itself is left out.

Files that cannot be used are reported on stderr, and the program continues with
the other files. The exit status is then 1, or 2 if no file could be used.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from mlpmixer_flax import UserError
from mlpmixer_flax.atomic import make_folder
from mlpmixer_flax.cli import (
    add_alone,
    add_dataset,
    add_model,
    check_dataset,
    load_model,
    make_parser,
    named_dataset,
    parse_names,
    path,
)
from mlpmixer_flax.data.images import MODES, open_image
from mlpmixer_flax.ending import exit_status, leave
from mlpmixer_flax.inference.drawing import save
from mlpmixer_flax.inference.embedding import (
    Table,
    check_format,
    embed_files,
    embed_split,
    nearest,
    write_table,
)
from mlpmixer_flax.inference.inputs import find_all_files, find_files
from mlpmixer_flax.inference.model import Model
from mlpmixer_flax.inference.originals import read_originals
from mlpmixer_flax.inference.sheet import COLUMNS, MOST_ROWS, Cell, sheet
from mlpmixer_flax.limits import check_positive
from mlpmixer_flax.remote import publish, shown, url_of
from mlpmixer_flax.text import printable
from mlpmixer_flax.training.launch import check_alone

_SIDE_PX = 200  # of the larger side of an image in the sheet
Reader = Callable[[Sequence[int]], list[np.ndarray]]  # numbers of images -> uint8 (h, w, c)
# The file of a query, the numbers of the images that are most similar to it, and their similarities
Found = tuple[str, np.ndarray, np.ndarray]


def _run(arguments: argparse.Namespace) -> int:
    if arguments.distributed == "auto":
        check_alone("embed")
    output = arguments.output
    check_format(output)
    check_positive(batch_size=arguments.batch_size, count=arguments.count)
    if arguments.images and (arguments.dataset or arguments.test_split):
        raise UserError("images and a split are both given: leave out the images, or --dataset and --split")
    files, all_usable = find_all_files(arguments.images)
    if arguments.images and not files:
        return 2
    if not arguments.images:
        check_dataset(arguments)
    queries = [file for name in arguments.nearest for file in find_files(name)]
    if len(queries) * -(-arguments.count // COLUMNS) > MOST_ROWS:
        raise UserError(
            f"--nearest for {len(queries)} images with --count={arguments.count} does not fit on a sheet of "
            f"{MOST_ROWS} rows of {COLUMNS}: give fewer"
        )
    sheet_file = output.with_suffix(".png")
    if queries:
        _check_not_drawn_over([*files, *queries], sheet_file)
    model = load_model(arguments)
    make_folder(output.parent)  # first, so that an error here is found before the work
    if files:
        table, flaws = embed_files(model, files, batch_size=arguments.batch_size)
        for flaw in flaws:
            print(f"error: {printable(flaw)}", file=sys.stderr)
        all_usable = all_usable and not flaws
        used = table["file"].tolist()
        table["file"] = np.array([url_of(Path(file)) or file for file in used])
        subject, paths, read = f"{len(used):,} images", used, _reader_of_files(used, model)
    else:
        data = named_dataset(arguments, model)
        examples = model.open(
            data.dataset, data.test_split, data_dir=data.data_dir, skip_bad_images=data.skip_bad_images
        )
        if queries:
            _check_not_drawn_over(examples.paths or [], sheet_file)
        table = embed_split(model, examples, batch_size=arguments.batch_size)
        subject = f"{data.dataset}, split {data.test_split}"
        paths, read = examples.paths or [], partial(read_originals, examples, side_px=_SIDE_PX)
    found = _find_nearest(queries, model, table["features"], paths, arguments.count) if queries else []
    write_table(output, table)
    publish(output)
    n, width = table["features"].shape
    print(f"{shown(output)}: features of {n:,} images, {width} numbers each, by {printable(model.name)}")
    if found:
        _show_nearest(found, table, read, model, sheet_file, subject=subject)
    return 0 if all_usable else 1


def _check_not_drawn_over(images: Sequence[str], sheet_file: Path) -> None:
    """Raises UserError if the file of the sheet is one of the images: it would be lost."""
    there = os.path.realpath(sheet_file)
    if sheet_file.exists() and any(os.path.realpath(image) == there for image in images):
        raise UserError(
            f"the similar images would be drawn in {shown(sheet_file)}, which is one of the images: choose another --output"
        )


def _find_nearest(
    queries: Sequence[str], model: Model, features: np.ndarray, paths: Sequence[str], count: int
) -> list[Found]:
    """Returns the images that are most similar to each query, which is left out itself.

    Args:
      queries: files.
      features: of the images, (n, hidden_dim).
      paths: of the images; empty if they are not files.

    Raises:
      UserError: a query cannot be used, or there is no other image.
    """
    own = np.array([os.path.realpath(path) for path in paths], str)
    found = []
    for query, query_features in zip(queries, model.features(queries), strict=True):
        itself = np.flatnonzero(own == os.path.realpath(query)).tolist()
        if len(itself) == len(features):
            raise UserError(
                f"there is no other image to compare --nearest={shown(Path(query))} with: give more images"
            )
        found.append((query, *nearest(query_features, features, count, leave_out=itself)))
    return found


def _reader_of_files(files: Sequence[str], model: Model) -> Reader:
    return lambda numbers: [_read(files[number], model) for number in numbers]


def _read(file: str, model: Model) -> np.ndarray:
    image = open_image(file, MODES[max(model.channels, 3)])
    image.thumbnail((_SIDE_PX, _SIDE_PX))
    return np.asarray(image)


def _show_nearest(
    found: Sequence[Found],
    table: Table,
    read: Reader,
    model: Model,
    output: Path,
    *,
    subject: str,
) -> None:
    """Prints and draws the images that are most similar to each query."""
    files, class_names = table.get("file"), table.get("class_name")
    rows = []
    for query, numbers, scores in found:
        query = url_of(Path(query)) or query
        print(f"most similar to {printable(query)}:")
        cells = []
        for number, score, image in zip(numbers, scores, read(numbers.tolist()), strict=True):
            name = f"image {number}" if files is None else str(files[number])
            kind = () if class_names is None else (str(class_names[number]) or "(none)",)
            print(f"  {score:6.3f}  {printable(', '.join((name, *kind)))}")
            cells.append(Cell(image, (name.rpartition("/")[2], *kind, f"{score:.3f}")))
        rows.append((Cell(_read(query, model), (query.rpartition("/")[2],)), cells))
    save(sheet(rows, title=f"{model.name}: {subject}"), output)
    publish(output)
    print(f"sheet: {shown(output)}")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the options of the program; exits with a message if they are wrong."""
    parser = make_parser(
        "embed",
        __doc__,
        examples="  python -m mlpmixer_flax.embed --workdir=runs/b16 holiday --output=holiday.npz\n"
        "  python -m mlpmixer_flax.embed --weights=imagenet21k/Mixer-B_16 holiday \\\n"
        "      --nearest=cat.jpg --output=holiday.parquet\n"
        "  python -m mlpmixer_flax.embed --weights=imagenet21k/Mixer-B_16 \\\n"
        "      --dataset=cifar10 --split=train --output=cifar10.npz",
    )
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="file, folder or quoted pattern")
    add_model(parser)
    add_dataset(parser)
    parser.add_argument(
        "--split",
        dest="test_split",
        metavar="SPLIT",
        help='split of the dataset, such as "train[:10%%]" (default: without --dataset the '
        'test_split of the run, else "test")',
    )
    parser.add_argument(
        "--output",
        type=path,
        required=True,
        metavar="FILE",
        help="file to write, .npz or .parquet; its folder is created, and an existing file is replaced",
    )
    parser.add_argument(
        "--nearest",
        action="append",
        default=[],
        metavar="IMAGE",
        help="show the images that are most similar to this one",
    )
    parser.add_argument(
        "--count",
        type=int,
        default=COLUMNS,
        metavar="N",
        help=f"how many similar images to show (default: {COLUMNS})",
    )
    parser.add_argument(
        "--batch_size", type=int, default=64, metavar="N", help="images per forward pass (default: 64)"
    )
    add_alone(parser)
    return parse_names(parser, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program. Exit status: 0 done, 1 some files are unusable, 2 all files are, or another input is."""
    arguments = parse(argv)
    return exit_status(lambda: _run(arguments))


if __name__ == "__main__":
    leave(main())

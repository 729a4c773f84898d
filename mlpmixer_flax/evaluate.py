"""Score a model on a split: python -m mlpmixer_flax.evaluate --workdir=runs/b16

A run is scored on its own test split, with the weights that its last test
accuracy is of; weights, and a run too, on any dataset or folder of images of
the model's classes, or of some of them. Classes are matched by name, ImageNet's
also by WordNet number (n01440764); those of a TFDS dataset, where either side
has no names, by number. Images are decoded as grey or in colour, as the model
takes them. Into --output go:

  scores.json      all that is shown; "confusion": [true class, predicted class,
                   images] wherever there are images; "mistakes", with the file
                   of each where the dataset is a folder
  per_class.csv    each class: how often it is right, and what it is taken for
  confusion.png    which class is taken for which
  mistakes.png     the 30 mistakes made with the highest confidence
  calibration.png  how often predictions of a confidence are right
"""

import argparse
import collections
import contextlib
import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from mlpmixer_flax import UserError, figures, scores, sharding
from mlpmixer_flax.atomic import make_folder, replacing
from mlpmixer_flax.dataloader import Examples, TestBatches, get_dataset_info, iterate
from mlpmixer_flax.folders import FolderSource
from mlpmixer_flax.step import LOSSES
from mlpmixer_flax.terminal import check_positive, exit_status
from mlpmixer_flax.trained import PROBABILITIES, Trained, add_arguments, in_words, load_named


def evaluate(
    eval_step: Callable,
    params,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    mesh: jax.sharding.Mesh,
) -> dict[str, float]:
    """Means over all unmasked images: `loss`, `accuracy` and `accuracy_top5` in [0, 1].

    `eval_step` is a jitted `step.make_eval_step`; sums and counts are added up and divided once, so a
    partly filled last batch weighs what it holds.
    """
    return evaluate_classes(eval_step, params, batches, mesh=mesh)[0]


def evaluate_classes(
    eval_step: Callable,
    params,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    mesh: jax.sharding.Mesh,
) -> tuple[dict[str, float], np.ndarray]:
    """The means of `evaluate`, and the accuracy of each class: float64 (classes,), NaN where there are no images."""
    totals = collections.Counter()
    for sums in _fetch(eval_step, params, batches, mesh=mesh):
        totals.update({name: np.float64(value) for name, value in sums.items()})
    count, class_count = totals.pop("count"), totals.pop("class_count")
    with np.errstate(invalid="ignore"):
        class_accuracy = totals.pop("class_accuracy") / class_count
    return {name: float(total / count) for name, total in totals.items()}, class_accuracy


def _fetch(step: Callable, params, batches, *, mesh: jax.sharding.Mesh) -> Iterator[dict[str, np.ndarray]]:
    """The result of a jitted step for each batch, fetched while the device works on the next one."""
    waiting = None
    for batch in batches:
        result = step(params, sharding.put_batch(batch, mesh))
        if waiting is not None:
            yield jax.device_get(waiting)
        waiting = result
    if waiting is not None:
        yield jax.device_get(waiting)


def open_split(
    trained: Trained, dataset: str, split: str, *, data_dir: str = "", skip_bad_images: bool = False
) -> tuple[Examples, np.ndarray]:
    """A split for `score_images`, and the model's class of each of its own.

    Raises:
      UserError: as `Trained.open` and `scores.match_classes`.
    """
    info = get_dataset_info(dataset, split, data_dir=data_dir)
    names = in_words(info["class_names"]), in_words(trained.class_names)
    classes = scores.match_classes(*names, numbered=not dataset.startswith("folder:"))
    return trained.open(dataset, split, data_dir=data_dir, skip_bad_images=skip_bad_images), classes


def score_images(
    trained: Trained, examples: Examples, *, classes: np.ndarray, batch_size: int = 64
) -> dict[str, np.ndarray]:
    """The `rows` of `scores` for a split, in its order; labels are numbers of the model's classes.

    `examples` and `classes` are those of `open_split`; `batch_size` is rounded up to a multiple of the devices.
    """
    if examples.cropped:  # as in training
        trained = trained.for_cropped_images()
    mesh = sharding.make_mesh()
    num_classes = len(trained.class_names)

    def score(params, batch):
        label = batch["label"]
        logits = trained.logits(params, batch["image"])
        return {
            "label": label,
            "best": jax.lax.top_k(logits, min(5, num_classes))[1],
            "confidence": PROBABILITIES[trained.loss](logits).max(axis=-1),
            "loss": LOSSES[trained.loss](logits, jax.nn.one_hot(label, num_classes)),
            "mask": batch["mask"],
        }

    batches = TestBatches(examples, batch_size=-(-batch_size // mesh.size) * mesh.size)
    everywhere = sharding.replicated(mesh)
    score = jax.jit(score, out_shardings=everywhere)
    params = jax.device_put(trained.params, everywhere)
    rows = collections.defaultdict(list)
    with (
        contextlib.closing(iterate(batches, 0, len(batches))) as stream,
        tqdm(desc="scoring", total=len(examples), unit="img", delay=2, leave=False, disable=None) as bar,
    ):
        relabelled = ({**batch, "label": classes[batch["label"]]} for batch in stream)
        for result in _fetch(score, params, relabelled, mesh=mesh):
            mask = result.pop("mask")
            for name, values in result.items():
                rows[name].append(values[mask])
            bar.update(mask.sum())
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def list_mistakes(rows: scores.Rows, examples: Examples, names: Sequence[str]) -> list[dict[str, Any]]:
    """All images that are taken for another class, the most confident first; `file` is that of a folder's image."""
    files = examples.source.files if isinstance(examples.source, FolderSource) else None
    return [
        {
            "image": i,
            "file": files and files[i],
            "is": names[rows["label"][i]],
            "said": names[rows["best"][i, 0]],
            "confidence": float(rows["confidence"][i]),
        }
        for i in scores.confident_mistakes(rows, len(examples)).tolist()
    ]


def write_scores(output: Path, found: Mapping[str, Any], *, rows: scores.Rows, examples: Examples) -> None:
    """Writes the files that the module's docstring lists; UserError where they can't be written.

    `found` is what scores.json holds; the images of mistakes.png are read from `examples` once more.
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
    images = examples.read(np.array([row["image"] for row in worst]))[0] if worst else []
    told = ([row[key] for row in worst] for key in ("is", "said", "confidence"))
    figures.save(figures.mistakes(images, *told), output / "mistakes.png")


def _run(arguments: argparse.Namespace) -> None:
    check_positive(batch_size=arguments.batch_size)
    if arguments.weights and not arguments.dataset:
        raise UserError(f"--weights={arguments.weights} come without a dataset: give --dataset too")
    trained = load_named(arguments)
    own = {} if arguments.dataset else trained.config
    dataset = arguments.dataset or own["dataset"]
    split = arguments.split or own.get("test_split", "test")
    examples, classes = open_split(
        trained,
        dataset,
        split,
        data_dir=arguments.data_dir or own.get("data_dir", ""),
        skip_bad_images=arguments.skip_bad_images or own.get("skip_bad_images", False),
    )
    output = arguments.output or (arguments.workdir or Path()) / "evaluation"
    make_folder(output)  # now, and not after an hour

    names = in_words(trained.class_names)
    rows = score_images(trained, examples, classes=classes, batch_size=arguments.batch_size)
    found = {
        "model": trained.name,
        "checkpoint": arguments.checkpoint,  # None: the default
        "step": trained.step,
        "dataset": dataset,
        "split": split,
        "images": len(examples),
        **scores.measure(rows),
        "per_class": scores.per_class(rows, names),
        "confusion": scores.confusions(rows),
        "mistakes": list_mistakes(rows, examples, names),
    }
    write_scores(output, found, rows=rows, examples=examples)
    measured = {"top-1 accuracy": f"{found['accuracy']:.2%}"}
    if len(names) > 5:  # of fewer, one of the five likeliest is always right
        measured["top-5 accuracy"] = f"{found['accuracy_top5']:.2%}"
    measured["loss"] = f"{found['loss']:.4f}"
    measured["calibration error"] = f"{found['calibration_error']:.4f}"
    step = "" if trained.step is None else f", step {trained.step},"
    print(f"{trained.name}{step} on {dataset}, split {split}: {len(examples):,} images\n")
    for name, value in measured.items():
        print(f"{name:<19}{value:>8}")
    print(f"\n{scores.as_table(found['per_class'])}\n")
    print(f"in {output}:\nscores.json, per_class.csv, confusion.png, mistakes.png, calibration.png")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the program; exits as argparse does where they cannot be parsed."""
    parser = argparse.ArgumentParser(
        prog="python -m mlpmixer_flax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python -m mlpmixer_flax.evaluate --workdir=runs/b16 --checkpoint=best\n"
        "  python -m mlpmixer_flax.evaluate --workdir=runs/b16 --dataset=folder:photos \\\n"
        "      --split=train+validation --output=photos-scores\n"
        "  python -m mlpmixer_flax.evaluate --weights=imagenet1k/Mixer-B_16 \\\n"
        "      --dataset=imagenet2012 --split=validation",
    )
    add_arguments(parser)
    parser.add_argument("--dataset", help='TFDS name, "digits" or folder:PATH (default: that of the run)')
    parser.add_argument(
        "--split",
        help='"validation", "train[:10%%]", of a folder without splits "train+validation" (default: "test", or of '
        "the run's own dataset its test split)",
    )
    parser.add_argument("--data_dir", help="TFDS directory (default: as in training, or $TFDS_DATA_DIR)")
    parser.add_argument(
        "--skip_bad_images", action="store_true", help="leave out images of a folder that cannot be used"
    )
    parser.add_argument("--output", type=Path, help="directory (default: evaluation, in that of the run)")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time (default: 64)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Exit status: 0 done, 1 its output was closed, 2 unusable input."""
    arguments = parse(argv)
    return exit_status(lambda: _run(arguments))


if __name__ == "__main__":
    sys.exit(main())

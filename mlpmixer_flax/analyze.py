"""Show what a model has learned: python -m mlpmixer_flax.analyze --workdir=RUN

What to show may follow, else it is all but the last:

  curves        loss, accuracy and learning rate over a run: curves.png
  token_mixing  weights from patches to hidden units, as the paper's Figure 5:
                token_mixing_block00.png and on, one a block
  stem          the kernels that embed a patch: stem.png
  fewshot       test accuracy of a linear classifier that sees 5 images a
                class through the model's features (ridge regression, three
                draws): fewshot.json
  shuffle       the paper's Figure 4: --config, which --config.KEY=VALUE changes
                as in train, trained three times: on images as they are, with
                shuffled patches and pixels in them, and with all pixels
                shuffled: shuffle.png. And how little logits change when the
                model's weights are shuffled as the patches are
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from mlpmixer_flax import UserError, figures, sharding
from mlpmixer_flax.atomic import make_folder, replacing
from mlpmixer_flax.configfile import load_config
from mlpmixer_flax.dataloader import Examples, TestBatches, TrainBatches, iterate
from mlpmixer_flax.fewshot import few_shot
from mlpmixer_flax.metrics import read_metrics
from mlpmixer_flax.plan import make_plan, settle
from mlpmixer_flax.shuffling import learn, shuffle_patches, shuffle_pixels, symmetry
from mlpmixer_flax.terminal import check_positive, exit_status
from mlpmixer_flax.trained import Trained, add_arguments, load_named

# Times as many training images a class as are drawn: few are then drawn twice, and no large split is read whole.
_POOL = 10


def features(
    trained: Trained, examples: Examples, *, per_class: int = 0, batch_size: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """What the head sees of images: pre-logits float32 (n, hidden_dim), and the labels int32 (n,).

    Of all examples, in order; with `per_class` of as many, in random order, as hold that many of each class,
    if there are. `examples` have as many channels as the model takes.
    """
    if examples.cropped:  # as in training
        trained = trained.for_cropped_images()
    headless = dataclasses.replace(trained, model=trained.model.clone(num_classes=0))
    mesh = sharding.make_mesh()
    everywhere = sharding.replicated(mesh)
    apply = jax.jit(headless.logits, out_shardings=everywhere)
    params = jax.device_put(trained.params, everywhere)
    batch_size = -(-batch_size // mesh.size) * mesh.size
    if per_class:
        batches = TrainBatches(examples, batch_size=batch_size, seed=0)
    else:
        batches = TestBatches(examples, batch_size=batch_size)

    found, labels, counts = [], [], np.zeros(examples.num_classes, int)
    num_batches = -(-len(examples) // batch_size)
    with contextlib.closing(iterate(batches, 0, num_batches)) as stream:
        for batch in tqdm(stream, "computing features", num_batches, delay=2, leave=False, disable=None):
            found.append(np.asarray(apply(params, sharding.put_batch(batch, mesh)["image"])))
            labels.append(batch["label"])
            counts += np.bincount(batch["label"], minlength=len(counts))
            if per_class and counts.min() >= per_class:
                break
    # What is beyond is padding, or begins the next epoch.
    return np.concatenate(found)[: len(examples)], np.concatenate(labels)[: len(examples)]


def _curves(trained: Trained, arguments: argparse.Namespace) -> None:
    if arguments.workdir is None:
        raise UserError(f"{trained.name} has no training curves: give --workdir, the directory of a run")
    rows = read_metrics(arguments.workdir / "metrics.jsonl")
    figures.save(figures.curves(rows, title=trained.name), arguments.output / "curves.png")
    print("curves: curves.png")


def _token_mixing(trained: Trained, arguments: argparse.Namespace) -> None:
    rows, columns = (trained.preprocess["image_size_px"] // side for side in trained.model.patches["size"])
    files = [f"token_mixing_block{i:02}.png" for i in range(trained.model.num_blocks)]
    for i, file in enumerate(tqdm(files, "drawing token mixing", delay=2, leave=False, disable=None)):
        kernel = trained.params[f"MixerBlock_{i}"]["token_mixing"]["Dense_0"]["kernel"]
        title = f"Token mixing, block {i} of {trained.name}"
        figures.save(figures.token_mixing(kernel, grid=(rows, columns), title=title), arguments.output / file)
    print(f"token_mixing: {files[0]}" + f" to {files[-1]}" * (len(files) > 1))


def _stem(trained: Trained, arguments: argparse.Namespace) -> None:
    figure = figures.stem(trained.params["stem"]["kernel"], title=f"Stem of {trained.name}")
    figures.save(figure, arguments.output / "stem.png")
    print("stem: stem.png")


def _fewshot(trained: Trained, arguments: argparse.Namespace) -> None:
    if not (arguments.dataset or trained.config):
        raise UserError(f"{trained.name} comes without a dataset: give --dataset")
    check_positive(shots=arguments.shots, batch_size=arguments.batch_size)
    # Splits and directory of a run are those of its own dataset.
    own = {} if arguments.dataset else trained.config
    dataset = arguments.dataset or own["dataset"]
    splits = {
        "train_split": arguments.train_split or own.get("train_split", "train"),
        "test_split": arguments.test_split or own.get("test_split", "test"),
    }
    train, test = (
        trained.open(
            dataset,
            split,
            data_dir=arguments.data_dir or own.get("data_dir", ""),
            skip_bad_images=arguments.skip_bad_images or own.get("skip_bad_images", False),
        )
        for split in splits.values()
    )
    shots, batch_size = arguments.shots, arguments.batch_size
    train = features(trained, train, per_class=_POOL * shots, batch_size=batch_size)
    test = features(trained, test, batch_size=batch_size)
    result = few_shot(*train, *test, shots=shots)
    named = {"model": trained.name, "dataset": dataset, **splits, "shots": shots, "test_images": len(test[1])}
    with replacing(arguments.output / "fewshot.json") as file:
        file.write((json.dumps({**named, **result}, indent=2) + "\n").encode())
    draws = ", ".join(f"{accuracy:.2%}" for accuracy in result["accuracy_by_seed"])
    print(
        f"fewshot: {result['accuracy']:.2%} of {len(test[1]):,} test images of {dataset}\n"
        f"  from {shots} images a class; each draw: {draws}; fewshot.json"
    )
    if own:
        print("  (though its features are of a training on all labels of this dataset)")


def _shuffle(trained: Trained, arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    if config.init_from:
        raise UserError(f"init_from={config.init_from!r} has learned from images as they are: leave it empty")
    largest, difference = symmetry(trained, seed=config.seed)
    print(
        f"shuffle: with weights shuffled as the patches are, logits of up to {largest:.3g}\n"
        f"  differ by at most {difference:.1e} from those of the originals",
        flush=True,
    )
    print(f"  {arguments.config}, trained three times:", flush=True)
    plan = make_plan(settle(config, {}))
    patch_px = plan.model.patches["size"]
    shuffles = {
        "as they are": lambda images: images,
        "with shuffled patches and pixels in them": partial(
            shuffle_patches, patch_px=patch_px, seed=config.seed
        ),
        "with all pixels shuffled": partial(shuffle_pixels, seed=config.seed),
    }
    runs = {}
    for name, shuffle in shuffles.items():
        runs[name] = learn(plan, shuffle)
        print(f"  {runs[name][-1]['test/accuracy']:.2%} test accuracy on images {name}", flush=True)
    figure = figures.compare(runs, title=f"{arguments.config}, trained on images …")
    figures.save(figure, arguments.output / "shuffle.png")
    print("  shuffle.png")


# In this order; all but the last unless some are named.
_PARTS = {
    "curves": _curves,
    "token_mixing": _token_mixing,
    "stem": _stem,
    "fewshot": _fewshot,
    "shuffle": _shuffle,
}


def _run(arguments: argparse.Namespace) -> None:
    for name in arguments.what:
        if name not in _PARTS:
            raise UserError(f"there is nothing called {name!r} to show: choose from {', '.join(_PARTS)}")
    trained = load_named(arguments)
    make_folder(arguments.output)
    print(f"{trained.name}, into {arguments.output}:", flush=True)
    asked_for = {*arguments.what} | ({"fewshot"} if arguments.dataset else set())
    for name in [part for part in _PARTS if part in arguments.what] or list(_PARTS)[:-1]:
        try:
            _PARTS[name](trained, arguments)
        except UserError as error:
            if name in asked_for:
                raise
            print(f"{name}: left out, {error}", flush=True)
    if not arguments.what:
        print("shuffle: left out, since it trains three models: name it to have it")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the program; exits as argparse does where they cannot be parsed."""
    parser = argparse.ArgumentParser(
        prog="python -m mlpmixer_flax.analyze",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python -m mlpmixer_flax.analyze --workdir=runs/b16\n"
        "  python -m mlpmixer_flax.analyze --weights=imagenet1k/Mixer-B_16 stem fewshot \\\n"
        "      --dataset=cifar10 --test_split='test[:1000]'\n"
        "  python -m mlpmixer_flax.analyze --workdir=runs/mnist shuffle \\\n"
        "      --config=configs/mnist.py --config.total_epochs=1",
    )
    parser.add_argument("what", nargs="*", metavar="WHAT", help=", ".join(_PARTS))
    add_arguments(parser)
    parser.add_argument("--output", type=Path, help="directory (default: analysis, in that of the run)")
    fewshot = parser.add_argument_group("fewshot")
    fewshot.add_argument(
        "--dataset", help='TFDS name, "digits" or folder:PATH (default: the run\'s; weights have none)'
    )
    for split in ("train", "test"):
        fewshot.add_argument(
            f"--{split}_split", help=f'such as "{split}[:10%%]" (default: the run\'s, or {split})'
        )
    fewshot.add_argument("--data_dir", help="TFDS directory (default: the run's, or $TFDS_DATA_DIR)")
    fewshot.add_argument(
        "--skip_bad_images", action="store_true", help="leave out images of a folder that cannot be used"
    )
    fewshot.add_argument("--shots", type=int, default=5, help="images a class (default: 5)")
    fewshot.add_argument("--batch_size", type=int, default=64, help="images at a time (default: 64)")
    shuffle = parser.add_argument_group("shuffle")
    shuffle.add_argument(
        "--config", default="configs/digits.py", help="what is trained (default: configs/digits.py)"
    )
    arguments, arguments.overrides = parser.parse_known_intermixed_args(argv)
    if arguments.overrides and "shuffle" not in arguments.what:  # whose config they change
        parser.error(f"unrecognized arguments: {' '.join(arguments.overrides)}")
    arguments.output = arguments.output or (arguments.workdir or Path()) / "analysis"
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """The program. Exit status: 0 done, 1 a training of shuffle diverged, 2 unusable input."""
    arguments = parse(argv)
    return exit_status(lambda: _run(arguments))


if __name__ == "__main__":
    sys.exit(main())

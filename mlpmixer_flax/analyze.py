"""Show what a model has learned: python -m mlpmixer_flax.analyze --workdir=RUN

Give the parts to show. Without any, all parts are shown except shuffle, which
trains three models.

  curves        loss, accuracy and learning rate of a run, over its steps and
                epochs: curves.png; the scores of other sizes of resolutions_px
                are thin lines
  token_mixing  weights from patches to hidden units, as in the paper's Figure
                5: token_mixing_block00.png and so on, one file per block
  stem          the kernels of the stem, the patch embedding: stem.png
  fewshot       accuracy on --test_split of a linear classifier (ridge
                regression) trained on the model's features of 5 images per
                class, drawn three times: fewshot.json
  shuffle       the paper's Figure 4: trains --config three times: on the
                original images, with patches and their pixels shuffled, and
                with all pixels shuffled: shuffle.png. Also prints how much
                logits change if the model's weights are shuffled in the same
                way as the patches. --config.KEY=VALUE changes the config, as in
                train
"""

import argparse
import difflib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mlpmixer_flax import UserError
from mlpmixer_flax.atomic import make_folder, replacing
from mlpmixer_flax.cli import add_dataset, add_model, load_model, make_parser, named_dataset, path
from mlpmixer_flax.config import ConfigDict, flatten, get_config
from mlpmixer_flax.data.dataset import find_dataset
from mlpmixer_flax.ending import exit_status, leave
from mlpmixer_flax.inference import figures, weight_figures
from mlpmixer_flax.inference.drawing import save
from mlpmixer_flax.inference.embedding import features_of_split
from mlpmixer_flax.inference.fewshot import few_shot
from mlpmixer_flax.inference.model import Model
from mlpmixer_flax.inference.shuffling import learn, shuffle_patches, shuffle_pixels, symmetry
from mlpmixer_flax.limits import check_positive
from mlpmixer_flax.reading import read_json
from mlpmixer_flax.remote import publish, shown
from mlpmixer_flax.run_weights import score_of
from mlpmixer_flax.rundir import fetch_run, read_config_of_run
from mlpmixer_flax.training import record
from mlpmixer_flax.training.configfile import load_config
from mlpmixer_flax.training.keys import find_key
from mlpmixer_flax.training.report import read_metrics
from mlpmixer_flax.training.setup import make_setup, settle
from mlpmixer_flax.training.validate import complete

# Features are computed for _POOL * shots training images per class, and each draw takes `shots` of them: enough
# that two draws have few images in common, without reading all of a large split.
_POOL = 10
_TOO_MANY_IMAGES = 2**48  # no dataset has so many, but a damaged file may say so


def _curves(model: Model | None, arguments: argparse.Namespace) -> None:
    if arguments.workdir is None:
        raise UserError(f"{arguments.weights} has no training curves: give a run directory, --workdir")
    workdir = arguments.workdir
    config = (
        model.config if model else complete(read_config_of_run(workdir), name=f"{shown(workdir)}/config.json")
    )
    rows, per_epoch = read_metrics(workdir / "metrics.jsonl"), steps_per_epoch(config["batch_size"], workdir)
    figure = figures.curves(rows, title=shown(workdir), steps_per_epoch=per_epoch)
    save(figure, arguments.output / "curves.png")
    print("curves: curves.png")


def steps_per_epoch(batch_size: int, workdir: Path) -> float | None:
    """Returns the updates per epoch; None if the run has no record of its data, or a damaged one."""
    try:
        images = read_json(workdir / record.FILE)["train"]["examples"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    usable = type(images) is int and 0 < images < _TOO_MANY_IMAGES
    return images / batch_size if usable else None


def _named(model: Model) -> str:
    return model.name if model.step is None else f"{model.name}, step {model.step}"


def _token_mixing(model: Model, arguments: argparse.Namespace) -> None:
    rows, columns = (model.preprocess["image_size_px"] // side for side in model.module.patches["size"])
    size = f", {arguments.image_size_px} px" if arguments.image_size_px else ""
    files = [f"token_mixing_block{i:02}.png" for i in range(model.module.num_blocks)]
    for i, file in enumerate(tqdm(files, "drawing token mixing", delay=2, leave=False, disable=None)):
        kernel = model.params[f"MixerBlock_{i}"]["token_mixing"]["Dense_0"]["kernel"]
        title = f"Token mixing, block {i} of {_named(model)}{size}"
        save(weight_figures.token_mixing(kernel, grid=(rows, columns), title=title), arguments.output / file)
    print(f"token_mixing: {files[0]}" + f" to {files[-1]}" * (len(files) > 1))


def _stem(model: Model, arguments: argparse.Namespace) -> None:
    figure = weight_figures.stem(model.params["stem"]["kernel"], title=f"Patch embedding of {_named(model)}")
    save(figure, arguments.output / "stem.png")
    print("stem: stem.png")


def _fewshot(model: Model, arguments: argparse.Namespace) -> None:
    data = named_dataset(arguments, model)
    check_positive(shots=arguments.shots, batch_size=arguments.batch_size)
    dataset = find_dataset(data.dataset, data_dir=data.data_dir)
    train, test = (
        model.open(dataset, split, skip_bad_images=data.skip_bad_images)
        for split in (data.train_split, data.test_split)
    )
    if train.multi_label:
        raise UserError(
            f"fewshot needs one label per image, but images of {data.dataset!r} may have several: choose another dataset"
        )
    shots, batch_size = arguments.shots, arguments.batch_size
    train = features_of_split(model, train, per_class=_POOL * shots, batch_size=batch_size)
    test = features_of_split(model, test, batch_size=batch_size)
    result = few_shot(*train, *test, shots=shots)
    named = {
        "model": model.name,
        "step": model.step,
        **({"image_size_px": arguments.image_size_px} if arguments.image_size_px else {}),
        "dataset": data.dataset,
        "train_split": data.train_split,
        "test_split": data.test_split,
        "shots": shots,
        "test_images": len(test[1]),
    }
    with replacing(arguments.output / "fewshot.json") as file:
        file.write((json.dumps({**named, **result}, indent=2) + "\n").encode())
    draws = ", ".join(f"{accuracy:.2%}" for accuracy in result["accuracy_by_seed"])
    print(
        f"fewshot: {result['accuracy']:.2%} of {len(test[1]):,} images are classified correctly\n"
        f"  ({data.dataset}, split {data.test_split})\n"
        f"  with {shots} images per class of split {data.train_split}: {draws}; fewshot.json"
    )
    if not arguments.dataset:
        print("  (the model was trained on this dataset, so this does not measure transfer)")


def _shuffle(model: Model, arguments: argparse.Namespace) -> None:
    config = arguments.shuffled
    largest, difference = symmetry(model, seed=config.seed)
    print(
        f"shuffle: logits change by at most {difference:.1e} if patches and weights are shuffled in\n"
        f"  the same way (the largest logit is {largest:.3g})",
        flush=True,
    )
    print(f"  {arguments.config}, trained three times:", flush=True)
    setup = make_setup(settle(config, {}))
    if setup.multi_label:
        raise UserError(
            f"shuffle needs one label per image, but images of {config.dataset!r} may have several: choose another dataset"
        )
    shuffles = {
        "images as they are": lambda images: images,
        "patches and their pixels shuffled": partial(
            shuffle_patches, patch_px=setup.model.patches["size"], seed=config.seed
        ),
        "all pixels shuffled": partial(shuffle_pixels, seed=config.seed),
    }
    runs = {}
    for name, shuffle in shuffles.items():
        runs[name] = learn(setup, shuffle)
        if last := score_of(runs[name][-1]):
            print(f"  {last.value:.2%} {last.scored} accuracy: {name}", flush=True)
    title = f"{arguments.config}, trained on images as they are and on shuffled ones"
    figure = figures.compare(runs, title=title, steps_per_epoch=setup.steps_per_epoch)
    save(figure, arguments.output / "shuffle.png")
    print("  shuffle.png")


# In the order in which they are shown; the last only if it is named. The model is None if it is not needed.
_PARTS: dict[str, Callable[[Any, argparse.Namespace], None]] = {
    "curves": _curves,
    "token_mixing": _token_mixing,
    "stem": _stem,
    "fewshot": _fewshot,
    "shuffle": _shuffle,
}


def _check_options(arguments: argparse.Namespace) -> None:
    """Checks options that the parser does not know: only shuffle uses them, to change its config.

    Raises:
      UserError: shuffle is not asked for, or the option is similar to one of this program.
    """
    own = vars(arguments).keys() - {"parts", "overrides"}
    shuffles = "shuffle" in arguments.parts
    for argument in arguments.overrides:
        name, equals, value = argument.partition("=")
        if name.startswith("--config."):
            if not shuffles:
                raise UserError(f"{argument} changes the config of shuffle: add shuffle, or leave it out")
            continue
        plain = name.strip("-").replace("-", "_").casefold()
        if near := difflib.get_close_matches(plain, own, n=1, cutoff=0.75):
            raise UserError(f"cannot use {argument!r}: did you mean --{near[0]}{equals}{value}?")
        if not shuffles:
            key = find_key(plain, list(flatten(get_config())))
            meant = f"did you mean shuffle --config.{key}={value or 'VALUE'}?" if key else ""
            raise UserError(f"cannot use {argument!r}: {meant or '--help lists all options'}")


def _config_to_shuffle(arguments: argparse.Namespace) -> ConfigDict:
    """Returns the config that shuffle trains; raises UserError as `load_config`, or if shuffle cannot use it."""
    config = load_config(arguments.config, arguments.overrides)
    for key in ("init_from", "distill_from"):
        if config[key]:
            raise UserError(
                f"{key}={config[key]!r} cannot be used for shuffle, because it was trained on images that are not "
                f"shuffled: set --config.{key}= (empty)"
            )
    if config.resolutions_px:
        raise UserError(
            f"resolutions_px={config.resolutions_px} cannot be used for shuffle, because it trains with images of one "
            "size: set --config.resolutions_px= (empty)"
        )
    return config


def _run(arguments: argparse.Namespace) -> None:
    _check_options(arguments)
    for name in arguments.parts:
        if name not in _PARTS:
            raise UserError(f"part {name!r} is unknown: choose from {', '.join(_PARTS)}")
    if "shuffle" in arguments.parts:
        arguments.shuffled = _config_to_shuffle(arguments)
    if (
        arguments.parts == ["curves"] and arguments.workdir
    ):  # need no weights: the run may have saved none yet
        model, named = None, shown(fetch_run(arguments.workdir))
    else:
        model = load_model(arguments)
        named = model.name
    size = f"-{arguments.image_size_px}px" if arguments.image_size_px else ""
    arguments.output = arguments.output or (arguments.workdir or Path()) / f"analysis{size}"
    make_folder(arguments.output)
    print(f"{named}, files in {shown(arguments.output)}:", flush=True)
    asked_for = {*arguments.parts} | ({"fewshot"} if arguments.dataset else set())
    for name in [part for part in _PARTS if part in arguments.parts] or list(_PARTS)[:-1]:
        try:
            _PARTS[name](model, arguments)
        except UserError as error:
            if name in asked_for:
                raise
            print(f"{name}: left out, because {error}", flush=True)
    publish(arguments.output)
    if not arguments.parts:
        print("shuffle: not run, because it trains three models: add shuffle to the command")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the options of the program; exits with a message if they are wrong."""
    parser = make_parser(
        "analyze",
        __doc__,
        examples="  python -m mlpmixer_flax.analyze --workdir=runs/b16\n"
        "  python -m mlpmixer_flax.analyze --weights=imagenet1k/Mixer-B_16 stem fewshot \\\n"
        "      --dataset=cifar10 --test_split='test[:1000]'\n"
        "  python -m mlpmixer_flax.analyze --workdir=runs/mnist shuffle \\\n"
        "      --config=configs/mnist.py --config.total_epochs=1",
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(_PARTS)}: see above")
    add_model(parser)
    parser.add_argument(
        "--output",
        type=path,
        metavar="DIR",
        help="directory to write (default: analysis, in the run directory or else in the current one; with "
        "--image_size_px=16 it is analysis-16px)",
    )
    fewshot = parser.add_argument_group("fewshot")
    add_dataset(fewshot)
    for split in ("train", "test"):
        fewshot.add_argument(
            f"--{split}_split",
            metavar="SPLIT",
            help=f'such as "{split}[:10%%]" (default: without --dataset that of the run, else "{split}")',
        )
    fewshot.add_argument("--shots", type=int, default=5, metavar="N", help="images per class (default: 5)")
    fewshot.add_argument(
        "--batch_size", type=int, default=64, metavar="N", help="images per forward pass (default: 64)"
    )
    shuffle = parser.add_argument_group("shuffle")
    shuffle.add_argument(
        "--config",
        default="configs/digits.py",
        metavar="FILE",
        help="config file to train (default: configs/digits.py)",
    )
    arguments, arguments.overrides = parser.parse_known_intermixed_args(argv)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program. Exit status: 0 done, 1 a training of shuffle diverged, 2 unusable input."""
    arguments = parse(argv)
    return exit_status(lambda: _run(arguments))


if __name__ == "__main__":
    leave(main())

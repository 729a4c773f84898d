"""Measures how much accuracy a change of resolution costs before any fine-tuning.

    python benchmarks/resolutions.py --workdir=RUN

Resizes the stored test images of the run to each size, on the device, and scores them with the run's weights adapted to
that number of tokens. There are three ways to get the token-mixing weights: as tiles (exact, Appendix C of the paper;
only for whole multiples of the run's size), resampled (approximate), and random, as if they had not been loaded.
Takes about a quarter of an hour for mixer_nano4 and 5,000 images on 2 CPU cores. Results: docs/weights.md
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mlpmixer_flax.dataloader import Examples
from mlpmixer_flax.ending import exit_status, leave
from mlpmixer_flax.inference.load import load_run
from mlpmixer_flax.inference.model import Model
from mlpmixer_flax.inference.scores import score_images
from mlpmixer_flax.training.optimizer import Params
from mlpmixer_flax.weights.adapt import adapt

SCALES = (1 / 2, 3 / 4, 7 / 8, 1, 9 / 8, 5 / 4, 3 / 2, 2, 3)  # of the side of the run's images
BATCH_SIZE = 250


def tiled(model: Model, size_px: int) -> Model | None:
    """Returns the model for larger images, with token mixing per tile; None if the tiles are not whole."""
    tiles, rest = divmod(size_px, model.preprocess["image_size_px"])
    if tiles <= 1 or rest:
        return None
    sized = dataclasses.replace(
        model,
        module=model.module.clone(tokens_mlp_dim=model.module.tokens_mlp_dim * tiles**2),
        preprocess={**model.preprocess, "image_size_px": size_px},
    )
    like = jax.eval_shape(lambda key: _init(sized, key), jax.random.key(0))
    flat = flatten_dict(model.params, sep="/")
    shapes = {name: array.shape for name, array in flat.items()}
    params, _ = adapt(shapes, flat.__getitem__, like, head="keep")
    return dataclasses.replace(sized, params=params)


def with_random_token_mixing(model: Model) -> Model:
    """Returns the model with new random weights in its token-mixing MLPs."""
    random = flatten_dict(_init(model, jax.random.key(0)))
    params = {
        name: random[name] if "token_mixing" in name else array
        for name, array in flatten_dict(model.params).items()
    }
    return dataclasses.replace(model, params=unflatten_dict(params))


def _init(model: Model, key: jax.Array) -> Params:
    size_px = model.preprocess["image_size_px"]
    return model.module.init(key, np.zeros((1, size_px, size_px, model.channels), np.float32))["params"]


def open_test_split(model: Model) -> Examples:
    """Opens the test split of the model's run."""
    config = model.config
    return model.open(config["dataset"], config["test_split"], data_dir=config["data_dir"])


def accuracy(model: Model) -> float:
    """Returns the accuracy of a model on the test split of its run, in per cent."""
    examples = open_test_split(model)
    classes = np.arange(len(model.class_names), dtype=np.int32)
    rows = score_images(model, examples, classes=classes, batch_size=BATCH_SIZE)
    return 100 * float(np.mean(rows["label"] == rows["best"][:, 0]))


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True, help="run directory")
    model = load_run(parser.parse_args().workdir)
    patch_px = model.module.patches["size"][0]
    print(f"accuracy in % on {len(open_test_split(model)):,} test images, without fine-tuning")
    print(
        "| size | tokens | resampled | tiles (exact) | random token mixing |",
        "|---|---|---|---|---|",
        sep="\n",
    )
    for scale in SCALES:
        size_px = round(model.preprocess["image_size_px"] * scale)
        if size_px % patch_px:
            continue
        sized = model.at_size(size_px)
        models = (sized, tiled(model, size_px), with_random_token_mixing(sized))
        scores = [f"{accuracy(found):.1f}" if found else "–" for found in models]
        side = size_px // patch_px
        print(f"| {size_px} px | {side}x{side} | {' | '.join(scores)} |", flush=True)


if __name__ == "__main__":
    leave(exit_status(main))

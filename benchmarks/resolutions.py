"""What a change of resolution costs before any fine-tuning: accuracy of a run on test images of other sizes.

    python benchmarks/resolutions.py --workdir=RUN

The run's test images are resized from what is stored to each size, on the device, and scored by the run's weights
fitted to that many tokens: token mixing as tiles (exact, Appendix C of the paper; where the size is a multiple),
resampled (approximate), and random, as it would be if it were left out of what is loaded.
About a quarter of an hour for mixer_nano4 and 5,000 images on 2 CPU cores.
"""

import argparse
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from tqdm import tqdm

from mlpmixer_flax.data import augment
from mlpmixer_flax.dataloader import TestBatches, open_examples
from mlpmixer_flax.inference.load import load_run
from mlpmixer_flax.inference.model import Model
from mlpmixer_flax.weights.adapt import adapt

SCALES = (1 / 2, 3 / 4, 7 / 8, 1, 9 / 8, 5 / 4, 3 / 2, 2, 3)  # of the side the run was trained with
BATCH_SIZE = 250


def fitted(trained: Model, size_px: int, *, widened: bool):
    """(model, parameters) for images of another size; None where it has no whole number of tiles to widen for."""
    factor = (size_px / trained.preprocess["image_size_px"]) ** 2
    if widened and (factor <= 1 or factor**0.5 % 1):
        return None
    width = trained.module.tokens_mlp_dim
    model = trained.module.clone(tokens_mlp_dim=round(width * factor) if widened else width)
    shape = (1, size_px, size_px, trained.channels)
    like = jax.eval_shape(model.init, jax.random.key(0), np.zeros(shape, np.float32))["params"]
    flat = flatten_dict(trained.params, sep="/")
    shapes = {name: array.shape for name, array in flat.items()}
    params, _ = adapt(shapes, flat.__getitem__, like, head="keep")
    return model, params


def with_random_token_mixing(model, params, size_px: int):
    images = np.zeros((1, size_px, size_px, params["stem"]["kernel"].shape[2]), np.float32)
    random = flatten_dict(model.init(jax.random.key(0), images)["params"])
    flat = {
        name: random[name] if "token_mixing" in name else leaf for name, leaf in flatten_dict(params).items()
    }
    return unflatten_dict(flat)


def accuracy(trained: Model, model, params, examples, size_px: int) -> float:
    preprocess = {**trained.preprocess, "image_size_px": size_px}

    @jax.jit
    def correct(params, batch):
        logits = model.apply({"params": params}, augment.prepare(batch["image"], **preprocess))
        return ((logits.argmax(-1) == batch["label"]) & batch["mask"]).sum()

    batches = TestBatches(examples, batch_size=BATCH_SIZE)
    counts = [correct(params, batches[k]) for k in tqdm(range(len(batches)), f"{size_px} px", leave=False)]
    return 100 * int(sum(counts)) / len(examples)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True, help="directory of a run")
    trained = load_run(parser.parse_args().workdir)
    examples = open_examples(
        trained.config["dataset"], trained.config["test_split"], data_dir=trained.config["data_dir"]
    )
    patch = trained.module.patches["size"][0]
    print(f"{len(examples):,} test images, no fine-tuning; accuracy in %")
    print(
        "| size | tokens | resampled | tiles (exact) | random token mixing |",
        "|---|---|---|---|---|",
        sep="\n",
    )
    for scale in SCALES:
        size_px = round(trained.preprocess["image_size_px"] * scale)
        if size_px % patch:
            continue
        resampled, tiled = (fitted(trained, size_px, widened=widened) for widened in (False, True))
        scores = [
            f"{accuracy(trained, *found, examples, size_px):.1f}" if found else "–"
            for found in (resampled, tiled, (resampled[0], with_random_token_mixing(*resampled, size_px)))
        ]
        side = size_px // patch
        print(f"| {size_px} px | {side}x{side} | {' | '.join(scores)} |", flush=True)


if __name__ == "__main__":
    main()

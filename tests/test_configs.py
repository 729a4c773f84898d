"""Tests every config of the package: it is valid, it builds, and a small copy of it takes a step."""

import ast
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mlpmixer_flax.config import get_finetuning_config, resolve
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.training.configfile import load_config
from mlpmixer_flax.training.setup import make_setup
from mlpmixer_flax.weights.adapt import adapt
from mlpmixer_flax.weights.catalog import PUBLISHED

pytestmark = pytest.mark.usefixtures("quick_to_compile")

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "configs").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_config_builds_at_full_size(file):
    config = resolve(load_config(str(file)), {})
    size = config.preprocess.image_size_px
    model = MlpMixer(num_classes=10, **config.model.to_dict())
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, size, size, 3), np.float32))
    assert sum(p.size for p in jax.tree.leaves(shapes)) > 10_000


# Configs whose small copies compile nearly the program of another one
LIKE_ANOTHER = {
    "b16_cifar10": "finetune_folder",
    "b16_cifar10_384": "finetune_folder",
    "b16_cifar10_448": "finetune_folder",
    "b16_cifar10_quick": "finetune_folder",
    "b16_imagenet21k": "b16_imagenet",
    "cifar10": "b16_imagenet",
    "l16_cifar10": "finetune_folder",
    "l16_imagenet21k": "b16_imagenet",
}
MARKED = [pytest.param(file, marks=[pytest.mark.long] * (file.stem in LIKE_ANOTHER)) for file in FILES]


@pytest.mark.slow
@pytest.mark.parametrize("file", MARKED, ids=lambda file: file.stem)
def test_a_small_copy_of_the_config_takes_a_step(file):
    config = load_config(str(file))
    patch = config.model.patches["size"]
    assert patch[0] == patch[1]
    config.update_from_flattened_dict(
        {
            # The included digits: the dataset of the config may be a download of 150 GB.
            "dataset": "digits",
            "train_split": "train[:40]",
            "test_split": "test[:8]",
            "num_workers": 0,
            "init_from": "",
            "batch_size": 8,
            "accumulation_steps": min(config.accumulation_steps, 2),
            "preprocess.image_size_px": 2 * patch[0],
            "preprocess.mean": config.preprocess.mean[:1],
            "preprocess.std": config.preprocess.std[:1],
            "model.hidden_dim": 8,
            "model.num_blocks": 2,
            "model.tokens_mlp_dim": 4,
            "model.channels_mlp_dim": 8,
            "total_steps": 10,
            "schedule.warmup_steps": min(config.schedule.warmup_steps, 1),
        }
    )
    setup = make_setup(resolve(config, {}))
    update = jax.jit(setup.update)
    state = setup.init(None)
    for k in range(2):  # with a warmup, the learning rate of the first update is 0
        state, metrics = update(state, setup.train_batches[k])
    assert int(state.step) == 2
    assert all(np.isfinite(value) for value in metrics.values()), metrics
    moved = jax.tree.map(
        lambda a, b: bool((a != b).any()), setup.init(None).params["head"], state.params["head"]
    )
    assert all(jax.tree.leaves(moved))
    sums = jax.jit(setup.eval_step)(state.eval_params, setup.test_batches[0])
    assert sums["count"] == 8


def test_finetuning_is_the_recipe_of_vision_transformer():
    config = get_finetuning_config()
    assert (config.batch_size, config.total_steps, config.schedule.warmup_steps) == (512, 10_000, 500)
    assert (config.optimizer.name, config.optimizer.learning_rate) == ("sgd", 0.03)
    assert (config.optimizer.momentum, config.optimizer.accumulator_dtype) == (0.9, "bfloat16")
    assert (config.optimizer.clip_norm, config.optimizer.weight_decay) == (1.0, 0.0)
    assert (config.preprocess.image_size_px, config.augment.min_crop_area) == (224, 0.05)
    assert config.augment.flip and config.schedule.name == "cosine"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("b16_cifar10", None),
        ("b16_cifar10_quick", None),
        ("b16_cifar10_384", "14x14 to 24x24 tokens, resampled"),
        ("b16_cifar10_448", "14x14 to 28x28 tokens, exact"),
        ("l16_cifar10", None),
    ],
)
def test_published_weights_fit_the_model_of_the_config(name, note):
    """Compares shapes only: the weights have the shapes of the published model, and zeros as values."""
    config = resolve(load_config(f"{name}.py"), {})
    published = PUBLISHED[config.init_from]
    theirs = MlpMixer(num_classes=published.num_classes, **published.origin["model"])
    ours = MlpMixer(num_classes=10, **config.model.to_dict())

    def shapes(model, size):
        images = np.zeros((1, size, size, 3), np.float32)
        return jax.eval_shape(model.init, jax.random.key(0), images)["params"]

    weights = {key: leaf.shape for key, leaf in flatten_dict(shapes(theirs, 224), sep="/").items()}
    like = shapes(ours, config.preprocess.image_size_px)
    params, notes = adapt(weights, lambda key: np.zeros(weights[key], np.float32), like)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, like)
    assert any(note in said for said in notes) if note else len(notes) == 1  # of the head
    assert name[0] == config.init_from.split("-")[1][0].lower()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_docstring_has_the_command(file):
    text = ast.get_docstring(ast.parse(file.read_text()))
    assert re.search(rf"python -m mlpmixer_flax\.train --config=configs/{file.name} --workdir=runs/", text)

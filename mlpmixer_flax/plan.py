"""From a config to everything a run consists of, with nothing written yet."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from mlpmixer_flax import UserError, pretrained, sharding
from mlpmixer_flax.config import LEFT_OPEN, flatten, in_steps, is_left_open, resolve
from mlpmixer_flax.dataloader import TestBatches, TrainBatches, get_dataset_info, open_examples
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.step import (
    Params,
    TrainState,
    init_state,
    make_eval_step,
    make_look_step,
    make_optimizer,
    make_schedule,
    make_train_step,
)


@dataclass(frozen=True)
class Plan:
    """All that is decided before the first update, with nothing written yet."""

    config: ConfigDict
    info: Mapping[str, Any]  # of the training split
    train_batches: TrainBatches
    test_batches: TestBatches
    model: MlpMixer
    input_shape: tuple[int, int, int]
    mesh: jax.sharding.Mesh
    total_steps: int
    eval_every: int  # steps; 0 = at the end
    save_every: int  # likewise
    init: Callable[[Params | None], TrainState]  # from given parameters, or random ones
    update: Callable  # (state, batch) -> (state, metrics)
    score: Callable  # (parameters, batch) -> sums
    look: Callable  # (batch) -> images as the first update sees them


def settle(config: ConfigDict, stored: Mapping[str, Any]) -> ConfigDict:
    """The config with what it leaves open decided: as in the `stored` one of this run, else as init_from's weights.

    Says aloud what follows the weights, and what doesn't. Raises UserError as `pretrained.describe`.
    """
    origin = stored or (pretrained.describe(config.init_from) if config.init_from else {})
    origin = {key: _as_in_config(value) for key, value in flatten_dict(dict(origin), sep=".").items()}
    settled = resolve(config, origin)
    for key in LEFT_OPEN if config.init_from and not stored else ():
        value = flatten(settled)[key]
        if is_left_open(config, key) and key in origin:
            print(f"{key}={value}, to suit {config.init_from}")
        elif origin.get(key, value) not in (value, _as_in_config(value)):
            print(f"{key}={value}, though {origin[key]} would suit {config.init_from}")
    return settled


def to_store(config: ConfigDict) -> dict[str, Any]:
    """The config as a run keeps it: a folder by its absolute path, so that later programs find it from anywhere."""
    dataset = config.dataset
    if dataset.startswith("folder:"):
        dataset = f"folder:{os.path.abspath(os.path.expanduser(dataset.removeprefix('folder:')))}"
    return {**config.to_dict(), "dataset": dataset}


def _as_in_config(value: Any) -> Any:
    """JSON's lists as tuples; values that are the same for all channels as one, which suits any number of channels."""
    if not isinstance(value, (list, tuple)):
        return value
    return tuple(value[:1] if len(value) > 1 and all(element == value[0] for element in value) else value)


def make_plan(config: ConfigDict) -> Plan:
    """Opens the data and builds model and step functions for a valid, settled config; UserError as `train`."""
    mesh = sharding.make_mesh()
    _check_devices(config, num_devices=mesh.size)
    info = get_dataset_info(config.dataset, config.train_split, data_dir=config.data_dir)
    channels = info["image_shape"][2]
    _check_channels(config, channels)
    train_batches, test_batches = _open_batches(config)
    steps_per_epoch = len(train_batches.examples) / config.batch_size
    total_steps = in_steps(config, "total", steps_per_epoch)

    model = MlpMixer(num_classes=info["num_classes"], **config.model.to_dict())
    input_shape = (config.preprocess.image_size_px, config.preprocess.image_size_px, channels)
    warmup_steps = in_steps(config.schedule, "warmup", steps_per_epoch)
    schedule = make_schedule(config, total_steps=total_steps, warmup_steps=warmup_steps)
    optimizer = make_optimizer(config, schedule)
    on_device = ConfigDict(config.to_dict())  # a copy to the leaves, unlike ConfigDict(config)
    if train_batches.examples.cropped:  # by the host already
        on_device.augment.min_crop_area = on_device.preprocess.crop_fraction = 1.0
    return Plan(
        config=config,
        info=info,
        train_batches=train_batches,
        test_batches=test_batches,
        model=model,
        input_shape=input_shape,
        mesh=mesh,
        total_steps=total_steps,
        eval_every=in_steps(config, "eval_every", steps_per_epoch),
        save_every=in_steps(config, "save_every", steps_per_epoch),
        init=partial(init_state, model=model, optimizer=optimizer, config=config, image_shape=input_shape),
        update=make_train_step(model, optimizer, schedule, on_device),
        score=make_eval_step(model, on_device),
        look=make_look_step(on_device, num_classes=info["num_classes"]),
    )


def load_weights(plan: Plan, like: Params) -> Params:
    """The parameters that config.init_from names, on the host, fitted to the model; `like` are shapes of all."""
    config, patch = plan.config, plan.model.patches["size"]
    rows, columns = plan.input_shape[0] // patch[0], plan.input_shape[1] // patch[1]
    # A new head starts as in a run from random weights.
    like = {**like, "head": jax.jit(lambda: plan.init(None).params["head"])()}
    return pretrained.load(
        config.init_from,
        like,
        grid=(rows, columns),
        head=config.init_head,
        class_names=plan.info["class_names"],
    )


def _check_devices(config: ConfigDict, *, num_devices: int) -> None:
    parts = num_devices * config.accumulation_steps
    if config.batch_size % parts:
        raise UserError(
            f"batch_size={config.batch_size} is not divisible by {num_devices} devices x "
            f"accumulation_steps={config.accumulation_steps}: choose a multiple of {parts}"
        )


def _check_channels(config: ConfigDict, channels: int) -> None:
    for key in ("mean", "std"):
        values = config.preprocess[key]
        if len(values) not in (1, channels):
            raise UserError(
                f"preprocess.{key}={values} has {len(values)} values, images of {config.dataset!r} have "
                f"{channels} channels: give one value, or one a channel"
            )


def _open_batches(config: ConfigDict) -> tuple[TrainBatches, TestBatches]:
    def open_split(split, min_crop_area):
        return open_examples(
            config.dataset,
            split,
            data_dir=config.data_dir,
            cache_bytes=config.cache_bytes,
            image_size_px=config.preprocess.image_size_px,
            crop_fraction=config.preprocess.crop_fraction,
            interpolation=config.preprocess.interpolation,
            min_crop_area=min_crop_area,
            skip_bad_images=config.skip_bad_images,
            for_training=True,
        )

    shard = {"shard_index": jax.process_index(), "shard_count": jax.process_count()}
    train_examples = open_split(config.train_split, config.augment.min_crop_area)
    test_examples = open_split(config.test_split, 1.0)
    return (
        TrainBatches(train_examples, batch_size=config.batch_size, seed=config.seed, **shard),
        TestBatches(test_examples, batch_size=config.batch_size, **shard),
    )

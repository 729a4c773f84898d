"""Sets up a run: from a config to data, model and step functions, before anything is written."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from mlpmixer_flax.config import LEFT_OPEN, ConfigDict, flatten, in_steps, is_left_open, resolve
from mlpmixer_flax.data.dataset import Dataset, find_dataset, with_absolute_path
from mlpmixer_flax.data.examples import make_examples
from mlpmixer_flax.data.files import absolute
from mlpmixer_flax.dataloader import TestBatches, TrainBatches
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.text import shorten
from mlpmixer_flax.training import sharding
from mlpmixer_flax.training.class_weights import weights_of
from mlpmixer_flax.training.devices import check_devices, check_jax
from mlpmixer_flax.training.distillation import Teacher, load_teacher
from mlpmixer_flax.training.evaluation import EvalStep, make_eval_step
from mlpmixer_flax.training.intervals import Intervals
from mlpmixer_flax.training.multi_label import make_multi_label_step
from mlpmixer_flax.training.optimizer import Params, check_frozen_head, make_optimizer, make_schedule
from mlpmixer_flax.training.resolutions import models_by_size
from mlpmixer_flax.training.step import (
    PreviewStep,
    TrainState,
    Update,
    init_state,
    make_preview_step,
    make_train_step,
)
from mlpmixer_flax.training.validate import check_channels, check_labels, validate
from mlpmixer_flax.weights import source
from mlpmixer_flax.weights.origin import comparable


@dataclass(frozen=True)
class Setup:
    """Everything a run consists of, before its first update."""

    config: ConfigDict
    class_names: list[str]  # in the order of the head's outputs
    train_batches: TrainBatches
    test_batches: TestBatches
    overlap: int  # how many images are in both splits
    scored: str  # what the names of scores begin with: "validation" or "test"
    model: MlpMixer
    input_shape: tuple[int, int, int]  # (height, width, channels) of the model's input
    class_weights: np.ndarray | None  # float32 (classes,), or None if all images weigh the same
    teacher: Teacher | None  # the model of config.distill_from
    mesh: jax.sharding.Mesh
    intervals: Intervals
    init: Callable[[Params | None], TrainState]  # from these parameters; None = from random ones
    # By size in px: (state, batch, parameters of the teacher if there is one) -> (state, metrics)
    updates: Mapping[int, Update]
    # By size in px: (parameters, batch) -> sums over the batch; rows, if images may have several labels
    eval_steps: Mapping[int, EvalStep]
    preview: PreviewStep  # first batch -> images as the first update sees them

    @property
    def update(self) -> Update:
        """The update with images of the model's own size."""
        return self.updates[self.input_shape[0]]

    @property
    def eval_step(self) -> EvalStep:
        """The evaluation with images of the model's own size."""
        return self.eval_steps[self.input_shape[0]]

    @cached_property
    def like(self) -> TrainState:
        """The shapes, dtypes and placements of the state."""
        shapes = jax.eval_shape(self.init, None)
        return sharding.with_placements(shapes, sharding.state_placements(shapes, self.mesh))

    @property
    def placements(self) -> TrainState:
        """The placements of the state: a tree of NamedSharding."""
        return jax.tree.map(lambda x: x.sharding, self.like)

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several labels, or none."""
        return self.train_batches.examples.multi_label

    @property
    def steps_per_epoch(self) -> float:
        """Updates per pass over the training split."""
        return len(self.train_batches.examples) / self.config.batch_size


def settle(config: ConfigDict, stored: Mapping[str, Any]) -> ConfigDict:
    """Fills the keys of a config that are left open.

    Their values come from this run's stored config, else from the weights of init_from, else from LEFT_OPEN.
    When a run starts, prints which of these keys follow the weights, and which differ from them.

    Args:
      stored: the config in the run directory, or {} when the run starts.

    Raises:
      UserError: the result is not a valid config, or the weights cannot be found.
    """
    origin = stored or (source.describe(config.init_from) if config.init_from else {})
    origin = {key: comparable(value) for key, value in flatten_dict(dict(origin), sep=".").items()}
    settled = resolve(config, origin)
    validate(settled)  # again, because the metadata of weights may say anything
    if config.init_from and not stored:
        _print_origin(config, settled, origin)
    return settled


def _print_origin(config: ConfigDict, settled: ConfigDict, origin: Mapping[str, Any]) -> None:
    for key in LEFT_OPEN:
        value = flatten(settled)[key]
        if key in origin and is_left_open(config, key):
            print(f"{key}={value}, as in the training of {config.init_from}")
        elif key in origin and origin[key] != comparable(value):
            theirs = shorten(str(origin[key]), 120)
            print(f"{key}={value}, although {config.init_from} was trained with {theirs}")


def to_store(config: ConfigDict) -> dict[str, Any]:
    """Returns the config as a run stores it: with absolute paths of data, valid from any directory."""
    dataset, data_dir = with_absolute_path(config.dataset), config.data_dir
    return {**config.to_dict(), "dataset": dataset, "data_dir": data_dir and absolute(data_dir)}


def make_setup(config: ConfigDict) -> Setup:
    """Opens the data and builds the model and the step functions for a config from `settle`.

    Raises:
      UserError: the data cannot be used, or does not fit the config or the devices.
    """
    check_jax()
    check_devices(config, batch_size=config.batch_size)
    mesh = sharding.make_mesh(fsdp=config.mesh.fsdp)
    dataset = find_dataset(config.dataset, data_dir=config.data_dir)
    info = dataset.info(config.train_split)
    channels = info["image_shape"][2]
    check_channels(config, channels, of=repr(config.dataset))
    check_labels(config, multi_label=info["multi_label"])
    train_batches, test_batches = _open_batches(config, dataset)
    class_weights = weights_of(config.class_weights, info["class_names"], train_batches.examples)
    steps_per_epoch = len(train_batches.examples) / config.batch_size
    total_steps = in_steps(config, "total", steps_per_epoch)

    model = MlpMixer(num_classes=info["num_classes"], **config.model.to_dict())
    input_shape = (config.preprocess.image_size_px, config.preprocess.image_size_px, channels)
    teacher = load_teacher(config, class_names=info["class_names"], image_shape=input_shape)
    warmup_steps = in_steps(config.schedule, "warmup", steps_per_epoch)
    schedule = make_schedule(config, total_steps=total_steps, warmup_steps=warmup_steps)
    optimizer = make_optimizer(config, schedule)
    make_step = make_multi_label_step if info["multi_label"] else make_eval_step
    cropped = train_batches.examples.cropped
    models = models_by_size(model, config)
    return Setup(
        config=config,
        class_names=info["class_names"],
        train_batches=train_batches,
        test_batches=test_batches,
        overlap=dataset.count_overlap(config.train_split, config.test_split),
        scored=_scored(dataset, config.test_split),
        model=model,
        input_shape=input_shape,
        class_weights=class_weights,
        teacher=teacher,
        mesh=mesh,
        intervals=Intervals(
            total_steps=total_steps,
            log_every=config.log_every_steps,
            evaluate_every=in_steps(config, "eval_every", steps_per_epoch),
            save_every=in_steps(config, "save_every", steps_per_epoch),
        ),
        init=partial(init_state, model=model, optimizer=optimizer, config=config, image_shape=input_shape),
        updates={
            size_px: make_train_step(
                resized,
                optimizer,
                schedule,
                config,
                mesh=mesh,
                cropped=cropped,
                class_weights=class_weights,
                multi_label=info["multi_label"],
                teacher=teacher and teacher.module,
            )
            for size_px, resized in models.items()
        },
        eval_steps={
            size_px: make_step(resized, config, mesh=mesh, cropped=test_batches.examples.cropped)
            for size_px, resized in models.items()
        },
        preview=make_preview_step(config, num_classes=info["num_classes"], mesh=mesh, cropped=cropped),
    )


def initial_params(setup: Setup) -> Params | None:
    """Returns the weights of config.init_from, adapted to the model, as numpy arrays; None = random weights.

    Raises:
      UserError: the weights cannot be used, or config.freeze would freeze a new head.
    """
    config, patch = setup.config, setup.model.patches["size"]
    if not config.init_from and not config.freeze:
        return None
    # If the model gets a new head, it starts exactly as in a run from random weights.
    new_head = jax.device_get(jax.jit(lambda: setup.init(None).params["head"])())
    params = None
    if config.init_from:
        params = source.load(
            config.init_from,
            {**setup.like.params, "head": new_head},
            grid=(setup.input_shape[0] // patch[0], setup.input_shape[1] // patch[1]),
            head=config.init_head,
            class_names=setup.class_names,
        )
    check_frozen_head(config.freeze, (params or {"head": new_head})["head"]["kernel"])
    return params


def start_state(setup: Setup, params: Params | None) -> TrainState:
    """Returns the state before the first update, from `initial_params`.

    Every device creates, or receives from the host, only its own part of it.
    """
    if params is not None:
        params = sharding.put_parts(params, setup.placements.params)
    return jax.jit(setup.init, out_shardings=setup.placements)(params)


def _scored(dataset: Dataset, test_split: str) -> str:
    """Returns "validation" if all parts of the test split are of validation or training splits, else "test".

    A part of the training split serves for validation. "test" of a folder without test images is its validation
    split.
    """
    names = {part.split.casefold() for part in dataset.parts(test_split)}
    others = [
        name for name in names if not (name.startswith(("val", "dev", "train")) or "validation" in name)
    ]
    return "test" if others else "validation"


def _open_batches(config: ConfigDict, dataset: Dataset) -> tuple[TrainBatches, TestBatches]:
    splits = (config.train_split, config.test_split)
    sources = dataset.open(splits, skip_bad_images=config.skip_bad_images, for_training=True)
    train_examples, test_examples = (
        make_examples(
            source,
            cache_bytes=config.cache_bytes,
            image_size_px=config.preprocess.image_size_px,
            crop_fraction=config.preprocess.crop_fraction,
            min_crop_area=min_crop_area,
            interpolation=config.preprocess.interpolation,
            fit=config.preprocess.fit,
            skip_bad_images=config.skip_bad_images,
        )
        for source, min_crop_area in zip(sources, (config.augment.min_crop_area, 1.0), strict=True)
    )
    shard = {"shard_index": jax.process_index(), "shard_count": jax.process_count()}
    return (
        TrainBatches(train_examples, batch_size=config.batch_size, seed=config.seed, **shard),
        # With accumulation_steps, no more images at a time than an update computes: more might not fit into the memory
        TestBatches(test_examples, batch_size=config.batch_size // (config.accumulation_steps or 1), **shard),
    )

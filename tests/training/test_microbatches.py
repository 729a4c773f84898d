"""How many microbatches an update has if the config does not say, and what they save."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mlpmixer_flax import load_config
from mlpmixer_flax.benchmark import named_config
from mlpmixer_flax.config import resolve
from mlpmixer_flax.training import sharding
from mlpmixer_flax.training.compiling import compile_steps
from mlpmixer_flax.training.microbatches import describe_microbatches, microbatches_of
from mlpmixer_flax.training.setup import make_setup

ON_CPU = sharding.make_mesh(devices=jax.devices("cpu")[:1])


def images_at_once(model, batch_size, *, mesh=ON_CPU, **values):
    config = resolve(named_config(model), {})
    config.update(values)
    return batch_size / microbatches_of(config, batch_size=batch_size, mesh=mesh)


@pytest.mark.parametrize(
    ("model", "batch_size", "images"),
    [
        ("nano4", 128, 16),
        ("nano4", 32, 16),
        ("nano4", 8, 8),
        ("mnist", 64, 64),
        ("mnist", 512, 64),
        ("digits", 64, 64),
        ("digits", 512, 256),
        ("s16", 64, 8),
        ("l32", 64, 32),  # has many parameters for its tokens
    ],
)
def test_on_a_cpu_microbatches_have_the_size_that_was_fast(model, batch_size, images):
    assert images_at_once(model, batch_size) == images


def test_a_batch_that_only_small_numbers_divide_stays_whole():
    assert images_at_once("nano4", 97) == 97
    assert images_at_once("nano4", 2 * 97) == 2 * 97


def test_chunks_are_divided_as_batches_are_whatever_the_number_of_devices():
    assert images_at_once("nano4", 8 * 32, reproducible=8) == 8 * 16  # 16 of each chunk


def test_what_the_config_says_is_done():
    assert images_at_once("nano4", 128, accumulation_steps=1) == 128
    assert images_at_once("nano4", 128, accumulation_steps=64) == 2


def test_other_devices_get_whole_batches():
    gpu = SimpleNamespace(devices=np.array([SimpleNamespace(platform="gpu")]), size=1)
    assert images_at_once("nano4", 128, mesh=gpu) == 128


def test_the_line_at_the_start_has_the_images_that_a_device_or_a_chunk_computes_at_a_time():
    config = resolve(named_config("nano4"), {})
    config.batch_size, config.reproducible = 8 * 32, 8
    assert describe_microbatches(config, ON_CPU).startswith("for speed, 16 images at a time")
    config.accumulation_steps = 2  # chosen by the user
    assert describe_microbatches(config, ON_CPU) == ""


@pytest.mark.slow
@pytest.mark.usefixtures("quick_to_compile")
def test_an_evaluation_needs_less_memory_too():
    """Otherwise a batch that fits only because it is divided would fail at the end of the first epoch."""

    def memory(accumulation_steps):
        changes = {"batch_size": 512, "accumulation_steps": accumulation_steps, "augment.mixup_alpha": 0.0}
        setup = make_setup(resolve(load_config("digits.py", changes), {}))
        score = compile_steps(setup, None, params=None).eval_steps[8]
        return score.memory_analysis().temp_size_in_bytes

    assert memory(32) < memory(1) / 8

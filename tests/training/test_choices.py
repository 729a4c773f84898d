"""Every name that the config allows builds a run, and no other name does."""

import jax
import numpy as np
import pytest
from tiny_updates import MESH, config_with, start, tiny_batch, tiny_model

from mlpmixer_flax.config import INIT_HEADS
from mlpmixer_flax.data.images import RESAMPLING
from mlpmixer_flax.models import GELU
from mlpmixer_flax.training.evaluation import make_eval_step
from mlpmixer_flax.training.losses import LOSSES
from mlpmixer_flax.training.optimizer import DIRECTIONS, SCHEDULES, make_optimizer, make_schedule
from mlpmixer_flax.training.step import make_train_step
from mlpmixer_flax.training.validate import CHOICES

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def test_names_in_the_config_are_those_of_the_tables():
    assert set(CHOICES["loss"]) == set(LOSSES)
    assert set(CHOICES["model.gelu"]) == set(GELU)
    assert set(CHOICES["optimizer.name"]) == set(DIRECTIONS)
    assert set(CHOICES["schedule.name"]) == set(SCHEDULES)
    assert set(CHOICES["preprocess.interpolation"]) == set(RESAMPLING)
    assert set(CHOICES["init_head"]) == set(INIT_HEADS)


def build(config):
    """Traces everything that reads a name, without compiling it."""
    schedule = make_schedule(config, total_steps=10, warmup_steps=2)
    optimizer = make_optimizer(config, schedule)
    model = tiny_model(config)
    state = jax.eval_shape(lambda: start(model, optimizer, config))
    batch = {**tiny_batch(), "image": np.zeros((8, 6, 6, 1), np.uint8)}  # resized to 8 px
    jax.eval_shape(make_train_step(model, optimizer, schedule, config, mesh=MESH), state, batch)
    jax.eval_shape(make_eval_step(model, config, mesh=MESH), state.params, batch)


@pytest.mark.slow
@pytest.mark.parametrize(("key", "name"), [(key, name) for key, names in CHOICES.items() for name in names])
def test_every_name_in_the_config_builds_a_run(key, name):
    build(config_with(**{key: name}))


@pytest.mark.parametrize(
    "key", sorted(CHOICES.keys() - {"init_head", "preprocess.fit", "tracker", "best_by"})
)  # read elsewhere
def test_no_other_name_builds_a_run(key):
    with pytest.raises((ValueError, KeyError, TypeError), match="lamb"):
        build(config_with(**{key: "lamb"}))

"""Tests the config: sizes, locks, durations, keys left open; and that every key is read."""

import inspect
import re
from pathlib import Path

import pytest

from mlpmixer_flax.config import (
    LEFT_OPEN,
    flatten,
    get_config,
    in_steps,
    is_left_open,
    mixer_b16_config,
    resolve,
)
from mlpmixer_flax.data import augment
from mlpmixer_flax.models import MlpMixer

PACKAGE = Path(__file__).parent.parent / "mlpmixer_flax"


def changed(**values):
    config = get_config()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in values.items()})
    return config


def test_the_base_config_is_locked():
    config = get_config()
    with pytest.raises(AttributeError, match="batch_size"):
        config.batch_sizes = 3
    with pytest.raises(TypeError):
        config.batch_size = "many"


def test_the_sizes_cannot_be_changed_by_accident():
    with pytest.raises(AttributeError):
        mixer_b16_config.hidden_dim = 1


def test_steps_are_used_if_above_0_else_epochs():
    assert in_steps(changed(total_epochs=2.5), "total", 10.0) == 25
    assert in_steps(changed(total_epochs=2.5, total_steps=7), "total", 10.0) == 7
    assert in_steps(get_config().schedule, "warmup", 10.0) == 0
    assert in_steps(changed(total_epochs=0.01), "total", 10.0) == 1


def test_keys_left_open_follow_the_weights_and_other_keys_stay():
    config = changed(preprocess__std=(0.2,))
    left_open = {key for key in flatten(config) if is_left_open(config, key)}
    assert left_open == LEFT_OPEN.keys() - {"preprocess.std"}
    origin = {"model.gelu": "erf", "preprocess.mean": (0.0,), "preprocess.std": (1.0,), "batch_size": 7}
    settled = resolve(config, origin)
    assert settled.model.gelu == "erf" and settled.preprocess.mean == (0.0,)
    assert settled.preprocess.interpolation == "bilinear"  # the weights do not say
    assert settled.preprocess.std == (0.2,) and settled.batch_size == config.batch_size
    assert config.model.gelu == "" and config.preprocess.mean == ()  # the config itself is not changed
    assert not any(is_left_open(settled, key) for key in flatten(settled))


def test_a_change_of_one_config_does_not_change_another():
    config = get_config()
    config.model.patches.size = (4, 4)
    assert get_config().model.patches["size"] == (2, 2)


@pytest.mark.parametrize("key", flatten(get_config()))
def test_every_key_is_read_somewhere(key):
    """The keys of a section that is passed as a whole must be the parameters of the function that takes it.

    Any other key must be named in the code.
    """
    group, _, leaf = key.rpartition(".")
    parameters = {
        "model": set(inspect.signature(MlpMixer).parameters) - {"num_classes", "parent", "name"},
        "model.patches": {"size"},
        "preprocess": set(inspect.signature(augment.prepare).parameters) - {"images"},
        "augment": set(inspect.signature(augment.augment).parameters)
        - {"key", "images", "labels", "num_classes", "preprocess"},
    }
    if group in parameters:
        assert leaf in parameters[group]
        return
    files = [file for file in PACKAGE.rglob("*.py") if file.stem not in ("config", "configfile", "validate")]
    code = "\n".join(file.read_text() for file in files)
    stem = re.sub("_(steps|epochs)$", "", leaf)
    section = re.escape(f"config.{group}" if group else "config")
    duration = rf'in_steps\({section}, "{stem}"'
    alias = "|o" if group == "optimizer" else ""  # its name in optimizer.py
    assert re.search(rf"\b({section}{alias})\.{leaf}\b", code) or re.search(duration, code), (
        f"nothing reads {key}"
    )

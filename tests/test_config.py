"""The knobs: sizes, checks, durations; and that no knob is dead."""

import inspect
import re
from pathlib import Path

import pytest

from mlpmixer_flax import UserError, augment
from mlpmixer_flax.config import flatten, get_config, in_steps, mixer_b16_config, validate
from mlpmixer_flax.models import MlpMixer

PACKAGE = Path(__file__).parent.parent / "mlpmixer_flax"


def changed(**values):
    config = get_config()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in values.items()})
    return config


def test_base_config_is_valid_and_locked():
    config = get_config()
    validate(config)
    with pytest.raises(AttributeError, match="batch_size"):
        config.batch_sizes = 3
    with pytest.raises(TypeError):
        config.batch_size = "many"


def test_mixer_configs_cannot_be_changed_by_accident():
    with pytest.raises(AttributeError):
        mixer_b16_config.hidden_dim = 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"batch_size": -3}, "batch_size=-3 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be 0 or more"),
        ({"model__hidden_dim": 0}, "model.hidden_dim=0 must be at least 1"),
        ({"model__patches": {"size": (0, 2)}}, r"model.patches.size=\(0, 2\) must be at least 1"),
        ({"model__patches": {"size": (3, 3)}}, "patch of 3x3 px does not divide an image of 8x8 px"),
        ({"preprocess__image_size_px": 0}, "preprocess.image_size_px=0 must be at least 1"),
        ({"preprocess__std": (0.5, 0.0, 0.5)}, "preprocess.std=.* must be above 0"),
        ({"preprocess__interpolation": "nearest"}, "unknown preprocess.interpolation 'nearest': .*bicubic"),
        ({"augment__mixup_alpha": -0.1}, "augment.mixup_alpha=-0.1 must be 0 or more"),
        ({"augment__erase_probability": 1.5}, "augment.erase_probability=1.5 must be at most 1"),
        ({"augment__randaugment_magnitude": 31.0}, "randaugment_magnitude=31.0 must be at most 30"),
        ({"augment__randaugment_ops": ("rotat",)}, "unknown augmentation 'rotat': .*rotate"),
        ({"optimizer__name": "lamb"}, "unknown optimizer.name 'lamb': choose one of adam, adamw, sgd"),
        ({"optimizer__learning_rate": float("nan")}, "optimizer.learning_rate=nan must be a finite number"),
        ({"optimizer__name": "adam", "optimizer__weight_decay": 0.1}, "'adamw'"),
        ({"schedule__name": "step"}, "unknown schedule.name 'step': .*cosine"),
        ({"schedule__name": "rsqrt"}, "schedule.name='rsqrt' .*schedule.warmup_steps"),
        ({"loss": "hinge"}, "unknown loss 'hinge'"),
        ({"ema_decay": 1.0}, "ema_decay=1.0 must be below 1"),
        ({"total_epochs": 0.0}, "total_steps and total_epochs are both 0"),
        ({"batch_size": None}, "batch_size=None is of the wrong type"),
        ({"total_steps": True}, "total_steps=True is of the wrong type"),
        ({"preprocess__mean": ("a",)}, "preprocess.mean=.* is of the wrong type"),
        ({"model__patches": {"size": (2.0, 2.0)}}, "model.patches.size=.* is of the wrong type"),
        ({"augment__randaugment_layers": 1, "augment__randaugment_ops": ()}, "randaugment_ops is empty"),
    ],
)
def test_unusable_value_is_named_with_the_remedy(values, message):
    with pytest.raises(UserError, match=message) as error:
        validate(changed(**values))
    assert "\n" not in str(error.value)


def test_steps_count_where_given_else_epochs():
    assert in_steps(changed(total_epochs=2.5), "total", 10.0) == 25
    assert in_steps(changed(total_epochs=2.5, total_steps=7), "total", 10.0) == 7
    assert in_steps(get_config().schedule, "warmup", 10.0) == 0
    assert in_steps(changed(total_epochs=0.01), "total", 10.0) == 1


def test_a_changed_config_changes_no_other():
    config = get_config()
    config.model.patches.size = (4, 4)
    assert get_config().model.patches["size"] == (2, 2)


@pytest.mark.parametrize("key", flatten(get_config()))
def test_every_key_is_read_somewhere(key):
    """Groups handed over whole must be exactly what takes them; any other key must be named in the code."""
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
    files = [file for file in PACKAGE.glob("*.py") if file.stem not in ("config", "configfile")]
    code = "\n".join(file.read_text() for file in files)
    stem = re.sub("_(steps|epochs)$", "", leaf)
    section = re.escape(f"config.{group}" if group else "config")
    duration = rf'in_steps\({section}, "{stem}"'
    alias = "|o" if group == "optimizer" else ""  # as step.py shortens it
    assert re.search(rf"\b({section}{alias})\.{leaf}\b", code) or re.search(duration, code), (
        f"nothing reads {key}"
    )

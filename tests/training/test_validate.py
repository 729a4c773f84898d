"""Tests that values which no run can use are refused with a sentence."""

import pytest

from mlpmixer_flax import UserError
from mlpmixer_flax.config import get_config, resolve
from mlpmixer_flax.limits import LIMITS
from mlpmixer_flax.training.validate import example_values, validate


def changed(**values):
    config = get_config()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in values.items()})
    return config


def test_the_base_config_is_valid_with_and_without_keys_left_open():
    validate(get_config())
    validate(resolve(get_config(), {}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"batch_size": -3}, "batch_size=-3 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"model__hidden_dim": 0}, "model.hidden_dim=0 must be at least 1"),
        ({"model__patches": {"size": (0, 2)}}, r"model.patches.size=\(0, 2\) must be at least 1"),
        ({"model__patches": {"size": (3, 3)}}, "patch of 3x3 px does not divide an image of 8x8 px"),
        (
            {"preprocess__image_size_px": 1024},
            "1024x1024 px has 262,144 patches of 2x2 px, but more than 65,536",
        ),
        (
            {"resolutions_px": (8, 1024)},
            "1024x1024 px has 262,144 patches of 2x2 px, but more than 65,536 .*: choose another resolutions_px or model",
        ),
        ({"preprocess__image_size_px": 0}, "preprocess.image_size_px=0 must be at least 1"),
        ({"preprocess__std": (0.5, 0.0, 0.5)}, "preprocess.std=.* must be at least 0.0001"),
        ({"preprocess__interpolation": "nearest"}, "unknown preprocess.interpolation 'nearest': .*bicubic"),
        ({"augment__mixup_alpha": -0.1}, "augment.mixup_alpha=-0.1 must be at least 0"),
        ({"augment__erase_probability": 1.5}, "augment.erase_probability=1.5 must be at most 1"),
        ({"augment__randaugment_magnitude": 31.0}, "randaugment_magnitude=31.0 must be at most 30"),
        (
            {"augment__randaugment_ops": ("rotat",)},
            "randaugment_ops has an unknown op 'rotat': did you mean 'rotate'",
        ),
        ({"optimizer__name": "lamb"}, "unknown optimizer.name 'lamb': choose one of adam, adamw, muon, sgd"),
        ({"optimizer__learning_rate": float("nan")}, "optimizer.learning_rate=nan must be a number"),
        (
            {"optimizer__learning_rate": 0.01, "optimizer__weight_decay": 100.0},
            "learning_rate=0.01 times optimizer.weight_decay=100.0 must be below 1, because .*: lower one of them",
        ),
        (
            {"optimizer__name": "adam", "optimizer__weight_decay": 0.1},
            "optimizer.weight_decay=0.1 has no effect with 'adam': set optimizer.name to 'adamw', or",
        ),
        ({"schedule__name": "step"}, "unknown schedule.name 'step': .*cosine"),
        ({"schedule__name": "rsqrt"}, "schedule.name='rsqrt' .*schedule.warmup_steps"),
        ({"loss": "hinge"}, "unknown loss 'hinge'"),
        ({"ema_decay": 1.0}, "ema_decay=1.0 must be at most 0.999999, because"),
        (
            {"seed": 2**32},
            "seed=4294967296 must be at most 4294967295, because JAX uses 32 bits of it: change",
        ),
        ({"seed": 10**5000}, "seed=a number of 16,610 bits must be at most"),
        ({"batch_size": 10**20}, "batch_size=100000000000000000000 must be at most 16777216, because"),
        ({"model__hidden_dim": 10**12}, "model.hidden_dim=1000000000000 must be at most 131072, because"),
        ({"preprocess__image_size_px": 10**7}, "image_size_px=10000000 must be at most 4096, because"),
        ({"schedule__warmup_epochs": 1e308}, r"warmup_epochs=1e\+308 must be at most 1000000, because"),
        ({"optimizer__learning_rate": 1e-50}, "learning_rate=1e-50 must be at least 1e-37: change"),
        ({"optimizer__weight_decay": 1e300}, r"weight_decay=1e\+300 must be at most 10000, because"),
        ({"optimizer__clip_norm": 1e-320}, "clip_norm=1e-320 must be 0, or at least 1e-37, because float32"),
        ({"preprocess__std": (1e-320,)}, r"std=\(1e-320,\) must be at least 0.0001: change"),
        ({"preprocess__mean": (float("inf"),)}, r"mean=\(inf,\) must be at most 1000, because"),
        ({"dataset": ""}, "dataset is empty: give the name of one, such as 'digits'"),
        ({"total_epochs": 0.0}, "total_steps and total_epochs are both 0"),
        ({"batch_size": None}, "batch_size=None has the wrong type: give a value such as 64"),
        ({"total_steps": True}, "total_steps=True has the wrong type: give a value such as 0"),
        ({"model__gelu": "relu"}, "unknown model.gelu 'relu': choose one of tanh, erf"),
        ({"init_head": "drop"}, "unknown init_head 'drop': choose one of auto, keep, reset"),
        ({"optimizer__sam_rho": -0.1}, "optimizer.sam_rho=-0.1 must be at least 0"),
        (
            {"preprocess__mean": ("a",)},
            r"preprocess.mean=\('a',\) has the wrong type: give a value such as \(0.5,",
        ),
        (
            {"model__patches": {"size": (2.0, 2.0)}},
            "model.patches.size=.* has the wrong type: give a value such as",
        ),
        ({"reproducible": 6}, "reproducible=6 is not a power of 2: choose 8, or 0 to turn it off"),
        ({"mesh__fsdp": 0}, "mesh.fsdp=0 must be at least 1"),
        (
            {"reproducible": 8, "mesh__fsdp": 2},
            "reproducible=8 needs a copy of the state on every device, but mesh.fsdp=2: set one of them",
        ),
        ({"augment__randaugment_layers": 1, "augment__randaugment_ops": ()}, "randaugment_ops is empty"),
        (
            {"resolutions_px": (4, 16)},
            r"resolutions_px=\(4, 16\) lacks preprocess.image_size_px=8, .*: add 8, or",
        ),
        (
            {"resolutions_px": (8, 9)},
            "has 9, which patches of 2x2 px do not divide: give multiples of the patch",
        ),
        ({"resolutions_px": (8, 4, 4)}, r"resolutions_px=\(8, 4, 4\) has 4 twice: give each size once"),
        ({"resolutions_px": tuple(range(2, 36, 2))}, "resolutions_px has 17 sizes, .*: give at most 16"),
        ({"resolutions_px": (8, 0)}, r"resolutions_px=\(8, 0\) must be at least 1: change"),
        (
            {"resolutions_px": (8, 10**6)},
            r"resolutions_px=\(8, 1000000\) must be at most 4096, because larger",
        ),
        (
            {"resolutions_px": (8.0,)},
            r"resolutions_px=\(8.0,\) has the wrong type: .* such as \(16, 24, 32\)",
        ),
    ],
)
def test_an_unusable_value_is_named_with_the_remedy(values, message):
    with pytest.raises(UserError, match=message) as error:
        validate(changed(**values))
    assert "\n" not in str(error.value)


def test_every_number_of_a_config_has_limits_that_its_usual_value_obeys():
    numbers = {
        key
        for key, value in example_values().items()
        if isinstance(value[0] if isinstance(value, tuple) else value, (int, float))
        and not isinstance(value, bool)
    }
    assert LIMITS.keys() == numbers

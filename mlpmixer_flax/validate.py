"""The checks that a config must pass before anything is done with it."""

import math

from ml_collections import ConfigDict

from mlpmixer_flax import UserError
from mlpmixer_flax.config import RANDAUGMENT_OPS, flatten, get_config, resolve

# What a key that names something may name; `step`, `augment` and `models` hold a table with these keys.
CHOICES = {
    "init_head": ("auto", "keep", "reset"),
    "loss": ("softmax", "sigmoid"),
    "optimizer.name": ("adam", "adamw", "sgd"),
    "optimizer.accumulator_dtype": ("float32", "bfloat16"),
    "schedule.name": ("cosine", "linear", "constant", "rsqrt"),
    "model.gelu": ("tanh", "erf"),
    "model.dtype": ("float32", "bfloat16"),
    "preprocess.interpolation": ("bilinear", "bicubic"),
}

# What a number must be, beyond finite and, but for these, 0 or more.
_ANY_SIGN = {"preprocess.mean", "model.head_bias_init"}
_RANGES = (
    ("at least 1", lambda v: v >= 1, {
        "batch_size", "accumulation_steps", "log_every_steps", "keep_checkpoints", "preprocess.image_size_px",
        "model.patches.size", "model.hidden_dim", "model.num_blocks", "model.tokens_mlp_dim",
        "model.channels_mlp_dim",
    }),
    ("above 0", lambda v: v > 0, {
        "preprocess.crop_fraction", "preprocess.std", "augment.min_crop_area", "optimizer.learning_rate",
    }),
    ("at most 1", lambda v: v <= 1, {
        "preprocess.crop_fraction", "augment.min_crop_area", "augment.erase_probability",
        "augment.mix_probability", "augment.label_smoothing", "schedule.final_fraction",
    }),
    ("below 1", lambda v: v < 1, {
        "model.dropout_rate", "model.stochastic_depth_rate", "optimizer.momentum", "optimizer.b1",
        "optimizer.b2", "ema_decay",
    }),
    ("at most 30", lambda v: v <= 30, {"augment.randaugment_magnitude"}),
)  # fmt: skip


def validate(config: ConfigDict) -> None:
    """Raises UserError, naming the key, the value and the remedy, for what no run could use."""
    config = resolve(config, {})
    flat, base = flatten(config), flatten(resolve(get_config(), {}))
    for key, value in flat.items():
        if not _is_like(value, base[key]):
            raise UserError(f"{key}={value!r} is of the wrong type: something like {base[key]!r} is needed")
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, (int, float)):
                continue
            rules = [(text, holds) for text, holds, keys in _RANGES if key in keys]
            if key not in _ANY_SIGN:
                rules.append(("0 or more", lambda v: v >= 0))
            for text, holds in [("a finite number", math.isfinite), *rules]:
                if not holds(number):
                    raise UserError(f"{key}={value!r} must be {text}: change --config.{key}")
    for key, names in CHOICES.items():
        if flat[key] not in names:
            raise UserError(f"unknown {key} {flat[key]!r}: choose one of {', '.join(names)}")
    for name in config.augment.randaugment_ops:
        if name not in RANDAUGMENT_OPS:
            raise UserError(f"unknown augmentation {name!r}: choose from {', '.join(RANDAUGMENT_OPS)}")
    _validate_combinations(config)


def _is_like(value: object, base: object) -> bool:
    if isinstance(base, tuple):
        return isinstance(value, tuple) and all(_is_like(element, base[0]) for element in value)
    if isinstance(base, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is type(base)


def _validate_combinations(config: ConfigDict) -> None:
    size, patch = config.preprocess.image_size_px, config.model.patches["size"]
    if len(patch) != 2:
        raise UserError(f"model.patches.size={patch!r} must be two numbers of pixels: (height, width)")
    if size % patch[0] or size % patch[1]:
        raise UserError(
            f"a patch of {patch[0]}x{patch[1]} px does not divide an image of {size}x{size} px: "
            "choose another preprocess.image_size_px or model.patches.size"
        )
    if config.augment.randaugment_layers and not config.augment.randaugment_ops:
        raise UserError("augment.randaugment_ops is empty: name some, or set augment.randaugment_layers to 0")
    if not config.total_steps and not config.total_epochs:
        raise UserError("total_steps and total_epochs are both 0: set one, it is the length of the run")
    if config.optimizer.name == "adam" and config.optimizer.weight_decay:
        raise UserError(
            f"optimizer.weight_decay={config.optimizer.weight_decay} is decoupled, which 'adam' has not: "
            "set optimizer.name to 'adamw', or the decay to 0"
        )
    schedule = config.schedule
    if schedule.name == "rsqrt" and not (schedule.warmup_steps or schedule.warmup_epochs):
        raise UserError("schedule.name='rsqrt' starts where the warmup ends: set schedule.warmup_steps")

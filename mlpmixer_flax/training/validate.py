"""Checks a config before it is used."""

import math

from mlpmixer_flax import UserError
from mlpmixer_flax.config import INIT_HEADS, ConfigDict, flatten, get_config, resolve
from mlpmixer_flax.data.images import FITS, RESAMPLING
from mlpmixer_flax.data.randaugment import check_ops
from mlpmixer_flax.models import GELU, check_patch
from mlpmixer_flax.training.losses import LOSSES
from mlpmixer_flax.training.optimizer import DIRECTIONS, SCHEDULES

# Key -> its allowed names, from the tables that implement them
CHOICES = {
    "init_head": INIT_HEADS,
    "loss": tuple(LOSSES),
    "optimizer.name": tuple(DIRECTIONS),
    "optimizer.accumulator_dtype": ("float32", "bfloat16"),
    "schedule.name": tuple(SCHEDULES),
    "model.gelu": tuple(GELU),
    "model.dtype": ("float32", "bfloat16"),
    "preprocess.fit": FITS,
    "preprocess.interpolation": tuple(RESAMPLING),
}

# Every number must be finite, and 0 or more except for these keys.
_ANY_SIGN = {"preprocess.mean", "model.head_bias_init"}
# Further rules: (the words for the message, the check, the keys that it is for)
_RANGES = (
    ("at least 1", lambda v: v >= 1, {
        "batch_size", "accumulation_steps", "log_every_steps", "keep_checkpoints", "preprocess.image_size_px",
        "model.patches.size", "model.hidden_dim", "model.num_blocks", "model.tokens_mlp_dim",
        "model.channels_mlp_dim", "mesh.fsdp",
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
    """Checks the types and ranges of all values, and the combinations that no run can use.

    Keys may be left open.

    Raises:
      UserError: a value cannot be used; the message has the key, the value and what to do.
    """
    config = resolve(config, {})
    flat, base = flatten(config), flatten(resolve(get_config(), {}))
    for key, value in flat.items():
        if not _is_like(value, base[key]):
            raise UserError(f"{key}={value!r} has the wrong type: give a value such as {base[key]!r}")
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
    if config.augment.randaugment_layers or config.augment.randaugment_ops:
        check_ops(config.augment.randaugment_ops)
    _validate_combinations(config)


def _is_like(value: object, base: object) -> bool:
    """Returns whether a value has the type of the one in the base config; an int may stand for a float."""
    if isinstance(base, tuple):
        return isinstance(value, tuple) and all(_is_like(element, base[0]) for element in value)
    if isinstance(base, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is type(base)


def _validate_combinations(config: ConfigDict) -> None:
    size, patch = config.preprocess.image_size_px, config.model.patches["size"]
    if len(patch) != 2:
        raise UserError(f"model.patches.size={patch!r} must be two numbers: give (height, width) in pixels")
    check_patch(patch, (size, size))
    if not config.total_steps and not config.total_epochs:
        raise UserError("total_steps and total_epochs are both 0: set one of them to the length of the run")
    if config.optimizer.name == "adam" and config.optimizer.weight_decay:
        raise UserError(
            f"optimizer.weight_decay={config.optimizer.weight_decay} has no effect with 'adam': "
            "set optimizer.name to 'adamw', or optimizer.weight_decay to 0"
        )
    if config.reproducible.bit_count() > 1:
        raise UserError(
            f"reproducible={config.reproducible} is not a power of 2: choose 8, or 0 to turn it off"
        )
    if config.reproducible and config.mesh.fsdp > 1:
        raise UserError(
            f"reproducible={config.reproducible} needs a copy of the state on every device, but "
            f"mesh.fsdp={config.mesh.fsdp}: set one of them"
        )
    schedule = config.schedule
    if schedule.name == "rsqrt" and not (schedule.warmup_steps or schedule.warmup_epochs):
        raise UserError("schedule.name='rsqrt' needs a warmup: set schedule.warmup_steps to 1 or more")

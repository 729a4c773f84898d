"""Checks a config before it is used."""

from mlpmixer_flax import UserError
from mlpmixer_flax.config import INIT_HEADS, ConfigDict, flatten, get_config, resolve
from mlpmixer_flax.data.images import FITS, RESAMPLING
from mlpmixer_flax.data.randaugment import check_ops
from mlpmixer_flax.limits import check_limits, show
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
            raise UserError(f"{key}={show(value)} has the wrong type: give a value such as {base[key]!r}")
        try:
            check_limits(key, value)
        except UserError as error:
            raise UserError(f"{error}: change --config.{key}") from None
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

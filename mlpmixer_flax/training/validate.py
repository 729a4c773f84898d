"""Checks the values of a config: of a new one before it is used, and of one that a run directory has."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from mlpmixer_flax import UserError
from mlpmixer_flax.config import INIT_HEADS, ConfigDict, flatten, get_config, mixer_digits_config, resolve
from mlpmixer_flax.data.images import FITS, RESAMPLING
from mlpmixer_flax.data.randaugment import check_ops
from mlpmixer_flax.limits import check_limits, show
from mlpmixer_flax.models import GELU, check_patch
from mlpmixer_flax.remote import shown
from mlpmixer_flax.run_weights import BEST_BY
from mlpmixer_flax.rundir import KEYS_OF_A_RUN, has_updates, read_config
from mlpmixer_flax.text import listed, shorten
from mlpmixer_flax.training.class_weights import parse_weights
from mlpmixer_flax.training.losses import LOSSES
from mlpmixer_flax.training.optimizer import DIRECTIONS, SCHEDULES
from mlpmixer_flax.training.resolutions import check_resolutions
from mlpmixer_flax.training.tracker import TRACKERS

# Key -> its allowed names, from the tables that implement them
CHOICES = {
    "best_by": tuple(BEST_BY),
    "init_head": INIT_HEADS,
    "loss": tuple(LOSSES),
    "optimizer.name": tuple(DIRECTIONS),
    "optimizer.accumulator_dtype": ("float32", "bfloat16"),
    "schedule.name": tuple(SCHEDULES),
    "tracker": ("", *TRACKERS),
    "model.gelu": tuple(GELU),
    "model.dtype": ("float32", "bfloat16"),
    "preprocess.fit": FITS,
    "preprocess.interpolation": tuple(RESAMPLING),
}
# Keys that a stored config must have
_SIZES = (*(f"model.{key}" for key in flatten(mixer_digits_config)), "preprocess.image_size_px")


def validate(config: ConfigDict) -> None:
    """Checks the types and ranges of all values, and the combinations that no run can use.

    Keys may be left open.

    Raises:
      UserError: a value cannot be used; the message has the key, the value and what to do.
    """
    config = resolve(config, {})
    usual = example_values()
    for key, value in flatten(config).items():
        _check_type(key, value, usual[key])
        try:
            check_limits(key, value)
        except UserError as error:
            raise UserError(f"{error}: change --config.{key}") from None
        _check_choice(key, value)
    if config.augment.randaugment_layers or config.augment.randaugment_ops:
        check_ops(config.augment.randaugment_ops)
    _validate_combinations(config)


def example_values() -> dict[str, Any]:
    """Returns an example of the value of each key, by dotted key: the one of the base config, unless it is empty."""
    return {**flatten(resolve(get_config(), {})), "resolutions_px": (16, 24, 32)}


def check_channels(config: ConfigDict, channels: int, *, of: str) -> None:
    """Checks that a config has one mean and standard deviation, or one per channel of the images.

    Args:
      of: what the images belong to, for the message.

    Raises:
      UserError: it has another number of them.
    """
    for key in ("mean", "std"):
        values = config.preprocess[key]
        if len(values) not in (1, channels):
            raise UserError(
                f"preprocess.{key}={values} has {len(values)} values, but images of {of} have "
                f"{channels} channel{'s' * (channels > 1)}: give one value, or one per channel"
            )


def check_labels(config: ConfigDict, *, multi_label: bool) -> None:
    """Checks that a config suits images with one label each, or with several.

    Raises:
      UserError: it does not.
    """
    if not multi_label:
        if config.best_by == "mean_average_precision":
            raise UserError(
                f"best_by='mean_average_precision' is for images with several labels, and {config.dataset!r} has one label "
                "per image: use accuracy, balanced_accuracy or loss"
            )
        return
    unsuitable = {
        f"loss={config.loss!r} is": (config.loss != "sigmoid", "set --config.loss=sigmoid"),
        f"augment.label_smoothing={config.augment.label_smoothing} is": (
            config.augment.label_smoothing,
            "set it to 0",
        ),
        f"class_weights={show(config.class_weights)} are": (config.class_weights, "leave them out"),
        f"best_by={config.best_by!r} is": (
            config.best_by == "balanced_accuracy",
            "use mean_average_precision, accuracy or loss",
        ),
    }
    for what, (wrong, remedy) in unsuitable.items():
        if wrong:
            raise UserError(
                f"{what} for one label per image, but images of {config.dataset!r} may have several: {remedy}"
            )


def complete(stored: Mapping[str, Any], *, name: str) -> dict[str, Any]:
    """Returns the config of a run directory with all keys of the base config and no others; lists replace tuples.

    A run of an earlier version lacks keys; they get their values from the base config. Keys of a later version are
    left out, and printed, unless they may change what the model computes.

    Args:
      stored: as read from the file, which may be damaged.
      name: of the file, for messages.

    Raises:
      UserError: a value has the wrong type or is out of its range, a size of the model is missing, or the model has
        an unknown key.
    """
    base = flatten(resolve(get_config(), {}))
    given: dict[str, Any] = flatten_dict(dict(stored), sep=".")
    if missing := [key for key in _SIZES if key not in given]:
        raise UserError(f"{name} has no {missing[0]}: restore the file, or choose another run")
    if unknown := sorted(given.keys() - base.keys()):
        names = [shorten(key, 40) for key in unknown]
        if any(key.startswith(("model.", "preprocess.")) for key in unknown):
            raise UserError(
                f"{name} has keys that are not known to this version ({listed(names, 5)}): update the package"
            )
        print(f"{name}: not known to this version, and not used: {listed(names, 5)}")
    values = base | _known_values(given, name=name)
    side_px = values["preprocess.image_size_px"]
    try:
        check_patch(values["model.patches.size"], (side_px, side_px))
    except (UserError, ValueError):  # ValueError: not two numbers
        raise UserError(
            f"{name} is damaged (patches of {show(values['model.patches.size'])} px do not fit images of {side_px} px): "
            "restore the file, or choose another run"
        ) from None
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return unflatten_dict(plain, sep=".")


def read_stored(workdir: Path) -> dict[str, Any]:
    """Returns the config of the run that is to begin or continue in a directory, as plain data; {} if it begins.

    A run that ended before it had logged or saved anything, because memory was not enough for example, begins again,
    perhaps with another config. The config has the keys of the version of the package that wrote it.

    Raises:
      UserError: config.json cannot be read, or a value has the wrong type or is out of its range.
    """
    stored = read_config(workdir)
    _known_values(flatten_dict(stored, sep="."), name=f"{shown(workdir)}/config.json")
    return {} if stored.keys() >= KEYS_OF_A_RUN and not has_updates(workdir) else stored


def _known_values(given: Mapping[str, Any], *, name: str) -> dict[str, Any]:
    """Returns the values of the keys that this version knows, checked, by dotted key; tuples replace lists."""
    values = {}
    for key, usual in example_values().items():
        if key not in given:
            continue
        value = tuple(given[key]) if isinstance(given[key], list) else given[key]
        try:
            _check_type(key, value, usual)
            check_limits(key, value)
            _check_choice(key, value)
        except UserError as error:
            raise UserError(f"{name} is damaged ({error}): restore the file, or choose another run") from None
        values[key] = value
    return values


def _check_type(key: str, value: object, usual: object) -> None:
    if not _is_like(value, usual):
        raise UserError(f"{key}={show(value)} has the wrong type: give a value such as {usual!r}")


def _check_choice(key: str, value: object) -> None:
    if key == "dataset" and not value:
        raise UserError("dataset is empty: give the name of one, such as 'digits' or 'folder:photos'")
    if key in CHOICES and value not in CHOICES[key]:
        names = filter(None, CHOICES[key])  # "" stands for none of them
        raise UserError(f"unknown {key} {show(value)}: choose one of {', '.join(names)}")


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
    check_resolutions(config)
    if not config.total_steps and not config.total_epochs:
        raise UserError("total_steps and total_epochs are both 0: set one of them to the length of the run")
    if config.optimizer.name == "adam" and config.optimizer.weight_decay:
        raise UserError(
            f"optimizer.weight_decay={config.optimizer.weight_decay} has no effect with 'adam': "
            "set optimizer.name to 'adamw', or optimizer.weight_decay to 0"
        )
    o = config.optimizer
    if o.learning_rate * o.weight_decay >= 1:
        raise UserError(
            f"optimizer.learning_rate={o.learning_rate} times optimizer.weight_decay={o.weight_decay} must be below 1, because "
            "each update takes this share away from the weights: lower one of them"
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
    if config.early_stopping_evals and not (config.eval_every_steps or config.eval_every_epochs):
        raise UserError(
            f"early_stopping_evals={config.early_stopping_evals} needs evaluations during the run: set eval_every_epochs to 1"
        )
    parse_weights(config.class_weights)
    if config.class_weights and config.augment.label_smoothing == 1:
        raise UserError(
            f"augment.label_smoothing=1 leaves no class for class_weights={show(config.class_weights)} to weigh: set a lower value"
        )
    if config.distill_from and config.resolutions_px:
        raise UserError(
            f"resolutions_px={config.resolutions_px} cannot be used with distill_from, because a teacher has one size: set "
            "--config.resolutions_px= (empty)"
        )
    if config.distill_from and config.augment.label_smoothing:
        raise UserError(
            f"augment.label_smoothing={config.augment.label_smoothing} has no effect with distill_from, because the teacher's "
            "predictions replace the labels: set it to 0, or distill_from to nothing"
        )
    if config.distill_temperature != 1 and not config.distill_from:
        raise UserError(
            f"distill_temperature={config.distill_temperature} has no effect without a teacher: set distill_from, or "
            "distill_temperature to 1"
        )
    schedule = config.schedule
    if schedule.name == "rsqrt" and not (schedule.warmup_steps or schedule.warmup_epochs):
        raise UserError("schedule.name='rsqrt' needs a warmup: set schedule.warmup_steps to 1 or more")

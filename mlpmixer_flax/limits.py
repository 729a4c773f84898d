"""The smallest and the largest value of every number: in configs, metadata of weights, run directories and options."""

from typing import Any

from mlpmixer_flax import UserError
from mlpmixer_flax.text import shorten

_COUNT = "steps are counted with 32 bits"
_EPOCHS = "no run has so many epochs"
_SIDE = "larger images do not fit into memory"
_WIDTH = "wider models do not fit into memory"
_PROCESSES = "each of them is a process"
_SHARE = "it is a share or a probability"
_BELOW_1 = "closer to 1, float32 may round it to 1"
_USEFUL = "no training needs a larger value"

_LARGEST_COUNT = 2**24  # of what options count

# Key -> (smallest, largest, why it may not be larger)
LIMITS: dict[str, tuple[float, float, str]] = {
    "accumulation_steps": (0, 2**16, _USEFUL),
    "augment.crop_padding_px": (0, 2**12, _SIDE),
    "augment.cutmix_alpha": (0, 1e4, _USEFUL),
    "augment.erase_probability": (0, 1, _SHARE),
    "augment.label_smoothing": (0, 1, _SHARE),
    "augment.min_crop_area": (1e-4, 1, _SHARE),
    "augment.mix_probability": (0, 1, _SHARE),
    "augment.mixup_alpha": (0, 1e4, _USEFUL),
    "augment.randaugment_layers": (0, 16, _USEFUL),
    "augment.randaugment_magnitude": (0, 30, "the scale ends there"),
    "batch_size": (1, 2**24, "larger batches do not fit into memory"),
    "cache_bytes": (0, 2**60, "no machine has more memory"),
    "distill_temperature": (0.01, 1000, _USEFUL),
    "early_stopping_evals": (0, 2**31 - 1, _COUNT),
    "ema_decay": (0, 0.999999, _BELOW_1),
    "eval_every_epochs": (0, 1e6, _EPOCHS),
    "eval_every_steps": (0, 2**31 - 1, _COUNT),
    "keep_checkpoints": (1, 2**31 - 1, _COUNT),
    "log_every_steps": (1, 2**31 - 1, _COUNT),
    "mesh.fsdp": (1, 2**20, "no run has more devices"),
    "model.channels_mlp_dim": (1, 2**17, _WIDTH),
    "model.dropout_rate": (0, 0.99, "a higher rate leaves nothing to learn from"),
    "model.head_bias_init": (-1e4, 1e4, _USEFUL),
    "model.hidden_dim": (1, 2**17, _WIDTH),
    "model.num_blocks": (1, 2**10, "deeper models take hours to compile"),
    "model.patches.size": (1, 2**12, _SIDE),
    "model.stochastic_depth_rate": (0, 0.99, "a higher rate leaves nothing to learn from"),
    "model.tokens_mlp_dim": (1, 2**17, _WIDTH),
    "num_workers": (0, 2**10, _PROCESSES),
    "optimizer.b1": (0, 0.999999, _BELOW_1),
    "optimizer.b2": (0, 0.999999, _BELOW_1),
    "optimizer.clip_norm": (0, 1e9, _USEFUL),
    "optimizer.learning_rate": (1e-37, 1e6, _USEFUL),
    "optimizer.momentum": (0, 0.999999, _BELOW_1),
    "optimizer.sam_rho": (0, 1e4, _USEFUL),
    "optimizer.weight_decay": (0, 1e4, _USEFUL),
    "preprocess.crop_fraction": (0.01, 1, _SHARE),
    "preprocess.image_size_px": (1, 2**12, _SIDE),
    "preprocess.mean": (-1e3, 1e3, "pixels are from 0 to 1"),
    "preprocess.std": (1e-4, 1e3, "pixels are from 0 to 1"),
    "reproducible": (0, 2**16, "a batch has no more chunks"),
    "resolutions_px": (1, 2**12, _SIDE),
    "save_every_epochs": (0, 1e6, _EPOCHS),
    "save_every_steps": (0, 2**31 - 1, _COUNT),
    "schedule.final_fraction": (0, 1, _SHARE),
    "schedule.warmup_epochs": (0, 1e6, _EPOCHS),
    "schedule.warmup_steps": (0, 2**31 - 1, _COUNT),
    "seed": (0, 2**32 - 1, "JAX uses 32 bits of it"),
    "total_epochs": (0, 1e6, _EPOCHS),
    "total_steps": (0, 2**31 - 1, _COUNT),
}
_SMALLEST = 1e-37  # of all values except 0: in float32, smaller ones become 0


def check_limits(key: str, value: Any, *, name: str = "") -> None:
    """Checks a number, or each number of a tuple or list; values that are no numbers have no limits.

    `name` is what the user gave it as, for the message; "" = the key.

    Raises:
      UserError: a number is not finite, or too small or too large for this key.
    """
    if key not in LIMITS:
        return
    low, high, reason = LIMITS[key]
    for number in value if isinstance(value, (tuple, list)) else (value,):
        if not low <= number <= high:  # also if it is NaN
            limit = f"at least {low:.12g}" if number < low else f"at most {high:.12g}, because {reason}"
        elif number and abs(number) < _SMALLEST:
            limit = f"0, or at least {_SMALLEST:g}, because float32 would make it 0"
        else:
            continue
        if number != number:
            limit = "a number"
        raise UserError(f"{name or key}={show(value)} must be {limit}")


def show(value: Any, length: int = 60) -> str:
    """Returns a value for a message; long ones are cut, because a number may have 100,000 digits."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length():,} bits"
    return shorten(repr(value), length)


def check_positive(**counts: int) -> None:
    """Raises UserError if a count, given by its name, is below 1 or so large that it must be a mistake."""
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name}={show(count)} must be at least 1")
        if count > _LARGEST_COUNT:
            raise UserError(
                f"{name}={show(count)} must be at most {_LARGEST_COUNT:,}, because more do not fit into memory"
            )

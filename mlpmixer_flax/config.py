"""Every knob of a run with its unit and meaning, and the Mixer sizes.

A config file under `configs/` is a short diff over `get_config()`; on the command line
`--config.optimizer.learning_rate=0.01` changes one key of it.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from mlpmixer_flax import UserError


def _mixer(patch_px, hidden_dim, num_blocks, tokens_mlp_dim, channels_mlp_dim) -> FrozenConfigDict:
    return FrozenConfigDict(
        {
            "patches": {"size": (patch_px, patch_px)},
            "hidden_dim": hidden_dim,
            "num_blocks": num_blocks,
            "tokens_mlp_dim": tokens_mlp_dim,
            "channels_mlp_dim": channels_mlp_dim,
        }
    )


# The paper's sizes (arXiv 2105.01601, Table 1); S/8 is published by Google without standing in the table.
mixer_s8_config = _mixer(8, 512, 8, 256, 2048)
mixer_s16_config = _mixer(16, 512, 8, 256, 2048)
mixer_s32_config = _mixer(32, 512, 8, 256, 2048)
mixer_b16_config = _mixer(16, 768, 12, 384, 3072)
mixer_b32_config = _mixer(32, 768, 12, 384, 3072)
mixer_l16_config = _mixer(16, 1024, 24, 512, 4096)
mixer_l32_config = _mixer(32, 1024, 24, 512, 4096)
mixer_h14_config = _mixer(14, 1280, 32, 640, 5120)

# Small ones for images of 8 to 32 px.
mixer_digits_config = _mixer(2, 64, 3, 32, 128)
mixer_mnist_config = _mixer(7, 128, 3, 64, 256)
mixer_nano4_config = _mixer(4, 128, 8, 128, 256)
mixer_tiny4_config = _mixer(4, 256, 12, 128, 1024)

RANDAUGMENT_OPS = (
    "auto_contrast equalize invert rotate posterize solarize solarize_add color contrast brightness "
    "sharpness shear_x shear_y translate_x translate_y"
).split()

INIT_HEADS = ("auto", "keep", "reset")  # what becomes of the head of the init_from weights

# What a config may leave open, as "" or (): such a key follows the weights of init_from; without any it is this.
LEFT_OPEN = {
    "model.gelu": "tanh",
    "preprocess.interpolation": "bilinear",
    "preprocess.mean": (0.5,),
    "preprocess.std": (0.5,),
}


def get_config() -> ConfigDict:
    """The base config: every key there is, locked against others; trains on the embedded digits.

    A duration has a `_steps` key (completed updates) and an `_epochs` key (passes over the training
    split); `_steps` counts where it is above 0. The keys of LEFT_OPEN follow the weights of `init_from`.
    """
    config = ConfigDict()
    config.seed = 0  # initial weights, order of the data, augmentation, dropout

    # Data
    config.dataset = "digits"  # "digits" (embedded), "folder:PATH", a TFDS name: "cifar10", "cifar10:3.0.2"
    config.skip_bad_images = False  # leave out images of a folder that cannot be used; else no run starts
    config.data_dir = ""  # TFDS directory; "" = $TFDS_DATA_DIR, else ~/tensorflow_datasets
    config.train_split = "train"  # TFDS split syntax: "train[:90%]"
    config.test_split = "test"  # scored every `eval_every`
    config.batch_size = 64  # images an update, over all devices
    config.accumulation_steps = 1  # passes an update: less memory, same result but for dropout's draws
    config.cache_bytes = 4 * 1024**3  # a split that decodes to no more is held in memory, others are streamed
    config.num_workers = 0  # processes that decode a streamed split; 0 = threads of this one

    # From stored pixels to the model's input, in training and ever after (saved with the run)
    config.preprocess = ConfigDict()
    config.preprocess.image_size_px = 8  # side of the model's square input
    config.preprocess.crop_fraction = 1.0  # share of the side that the central crop at test time keeps
    # These three and model.gelu: "" and () = as the weights of init_from have it, else "bilinear", 0.5, 0.5, "tanh"
    config.preprocess.interpolation = ""  # "bilinear" or "bicubic", when an image is resized
    config.preprocess.mean = ()  # subtracted from pixels in [0, 1]; one value, or one a channel
    config.preprocess.std = ()  # then divided by; 0.5 and 0.5 give [-1, 1]

    # Augmentation of training images, in this order; as written here all of it is off
    config.augment = ConfigDict()
    config.augment.crop_padding_px = 0  # zeros around the image before a random crop of its size
    config.augment.min_crop_area = 1.0  # least share of the area a random resized crop keeps; 1 = off
    config.augment.flip = False  # mirror left-right half the time
    config.augment.randaugment_layers = 0  # ops in a row, each drawn from the next list; 0 = off
    config.augment.randaugment_ops = tuple(RANDAUGMENT_OPS)
    config.augment.randaugment_magnitude = 10.0  # strength of the ops, 0 to 30
    config.augment.erase_probability = 0.0  # chance that a rectangle becomes noise
    config.augment.mixup_alpha = 0.0  # images blended with weight Beta(alpha, alpha); 0 = off
    config.augment.cutmix_alpha = 0.0  # rectangles swapped, of area Beta(alpha, alpha); 0 = off
    config.augment.mix_probability = 1.0  # share of images that mixup or CutMix touches
    config.augment.label_smoothing = 0.0  # share of the label spread over all classes

    # Model: the fields of models.MlpMixer
    config.model = ConfigDict(mixer_digits_config.to_dict())
    config.model.gelu = ""  # "tanh" as in Google's weights, "erf" as in timm's own
    config.model.dropout_rate = 0.0  # inside both MLPs
    config.model.stochastic_depth_rate = 0.0  # of skipping the last block; linearly to 0 at the first
    config.model.head_bias_init = 0.0  # -6.9 with the sigmoid loss
    config.model.dtype = "float32"  # "bfloat16" = mixed precision: computes so, keeps float32 parameters
    config.model.remat = False  # recompute blocks in the backward pass: less memory, a third slower

    # Fine-tuning
    config.init_from = ""  # weights to start from: "imagenet21k/Mixer-B_16", a file, URL or run; "" = random
    config.init_head = "auto"  # "keep" or "reset" their head; "auto" = keep it if its classes are the data's
    config.freeze = ""  # "all_but_head" = linear probe; or layers: "stem,MixerBlock_0"; "" = all learn

    # Optimisation
    config.loss = "softmax"  # or "sigmoid": one cross-entropy a class
    config.total_epochs = 30.0  # length of the run
    config.total_steps = 0
    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # or "adam", "sgd" (with momentum)
    config.optimizer.learning_rate = 3e-3  # highest, after warmup
    config.optimizer.weight_decay = 0.0  # decoupled, times the learning rate, on kernels only
    config.optimizer.clip_norm = 1.0  # largest global norm of the gradient; 0 = off
    config.optimizer.momentum = 0.9  # sgd
    config.optimizer.b1 = 0.9  # adam, adamw
    config.optimizer.b2 = 0.999  # adam, adamw
    config.optimizer.accumulator_dtype = "float32"  # of momentum and Adam's first moment; or "bfloat16"
    config.optimizer.sam_rho = (
        0.0  # sharpness-aware: gradient taken this far uphill, in twice the time; 0 = off
    )
    config.schedule = ConfigDict()
    config.schedule.name = "cosine"  # or "linear", "constant", "rsqrt" (1 / sqrt(step))
    config.schedule.warmup_epochs = 0.0  # linear, from 0
    config.schedule.warmup_steps = 0
    config.schedule.final_fraction = 0.0  # of the learning rate, where cosine and linear end
    config.ema_decay = 0.0  # moving average of the weights, evaluated instead of them; 0 = off

    # Intervals; 0 steps and 0 epochs = only at the end, which is always evaluated, logged and saved
    config.log_every_steps = 50
    config.eval_every_epochs = 1.0
    config.eval_every_steps = 0
    config.save_every_epochs = 1.0
    config.save_every_steps = 0
    config.keep_checkpoints = 2  # newest ones kept, beside the best
    return config.lock()


def get_pretraining_config() -> ConfigDict:
    """What pre-training on ImageNet and ImageNet-21k shares for every size (paper, Table 4)."""
    config = get_config()
    config.dataset = "imagenet2012"
    config.test_split = "validation"
    config.batch_size = 4096
    config.total_epochs = 300.0
    config.num_workers = 16
    config.preprocess.image_size_px = 224
    config.preprocess.crop_fraction = 0.875
    config.augment.min_crop_area = 0.05
    config.augment.flip = True
    config.augment.randaugment_layers = 2
    config.augment.randaugment_magnitude = 15.0
    config.augment.mixup_alpha = 0.5
    config.model.stochastic_depth_rate = 0.1
    config.model.dtype = "bfloat16"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.1  # times the learning rate: 1e-4
    config.schedule.name = "linear"
    config.schedule.warmup_steps = 10_000
    return config


def get_finetuning_config() -> ConfigDict:
    """What fine-tuning published weights has in common: the recipe of google-research/vision_transformer."""
    config = get_config()
    config.batch_size = 512
    config.total_steps = 10_000
    config.preprocess.image_size_px = 224
    config.augment.min_crop_area = 0.05
    config.augment.flip = True
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.03
    config.optimizer.accumulator_dtype = "bfloat16"
    config.schedule.warmup_steps = 500
    config.eval_every_steps = 500
    config.save_every_steps = 1_000
    return config


def resolve(config: ConfigDict, origin: Mapping[str, Any]) -> ConfigDict:
    """A copy with nothing left open: "" and () become as in `origin` (dotted key -> value), else LEFT_OPEN."""
    config = ConfigDict(config.to_dict())
    for key, default in LEFT_OPEN.items():
        if is_left_open(config, key):
            value = origin.get(key, default)
            try:
                config.update_from_flattened_dict({key: value})
            except (TypeError, ValueError):
                raise UserError(
                    f"{key}={value!r}, as the weights have it, is of the wrong type: set it"
                ) from None
    return config.lock()


def is_left_open(config: ConfigDict, key: str) -> bool:
    """Whether the key, in dotted form, is still to be decided."""
    return key in LEFT_OPEN and flatten(config)[key] in ("", ())


def in_steps(section: ConfigDict, name: str, steps_per_epoch: float) -> int:
    """A duration of a config section in updates: `<name>_steps`, or `<name>_epochs` where that is 0.

    0 only where both are: any part of an epoch is at least one step.
    """
    steps, epochs = section[f"{name}_steps"], section[f"{name}_epochs"]
    return steps or (max(round(epochs * steps_per_epoch), 1) if epochs else 0)


def flatten(config: ConfigDict) -> dict[str, object]:
    """Dotted key -> value, for every leaf of a config."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat.update({f"{key}.{inner}": leaf for inner, leaf in flatten(value).items()})
        else:
            flat[key] = value
    return flat

"""Defines every key of a run's config, with its unit and meaning, and the Mixer sizes.

A config file in `configs/` calls `get_config()` and changes some values; on the command line,
`--config.optimizer.learning_rate=0.01` changes one key.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import ml_collections

from mlpmixer_flax import UserError

if TYPE_CHECKING:

    class ConfigDict(ml_collections.ConfigDict):
        """For type checkers: values have any type, where ml_collections lets them infer a wrong one."""

        def __getattr__(self, attribute: str) -> Any: ...

        def __getitem__(self, key: str) -> Any: ...

        def lock(self) -> Self: ...

    class FrozenConfigDict(ml_collections.FrozenConfigDict):
        """The same for configs that cannot be changed."""

        def __getattr__(self, attribute: str) -> Any: ...
else:
    from ml_collections import ConfigDict, FrozenConfigDict


def _mixer(
    patch_px: int, hidden_dim: int, num_blocks: int, tokens_mlp_dim: int, channels_mlp_dim: int
) -> FrozenConfigDict:
    return FrozenConfigDict(
        {
            "patches": {"size": (patch_px, patch_px)},
            "hidden_dim": hidden_dim,
            "num_blocks": num_blocks,
            "tokens_mlp_dim": tokens_mlp_dim,
            "channels_mlp_dim": channels_mlp_dim,
        }
    )


# The sizes of the paper (arXiv 2105.01601, Table 1), and S/8, which Google published but the table lacks
mixer_s8_config = _mixer(8, 512, 8, 256, 2048)
mixer_s16_config = _mixer(16, 512, 8, 256, 2048)
mixer_s32_config = _mixer(32, 512, 8, 256, 2048)
mixer_b16_config = _mixer(16, 768, 12, 384, 3072)
mixer_b32_config = _mixer(32, 768, 12, 384, 3072)
mixer_l16_config = _mixer(16, 1024, 24, 512, 4096)
mixer_l32_config = _mixer(32, 1024, 24, 512, 4096)
mixer_h14_config = _mixer(14, 1280, 32, 640, 5120)

# Small sizes for images of 8 to 64 px
mixer_digits_config = _mixer(2, 64, 3, 32, 128)
mixer_mnist_config = _mixer(7, 128, 3, 64, 256)
mixer_nano4_config = _mixer(4, 128, 8, 128, 256)
mixer_folder_config = _mixer(8, 128, 4, 64, 256)
mixer_tiny4_config = _mixer(4, 256, 12, 128, 1024)

RANDAUGMENT_OPS = (
    "auto_contrast equalize invert rotate posterize solarize solarize_add color contrast brightness "
    "sharpness shear_x shear_y translate_x translate_y"
).split()

INIT_HEADS = ("auto", "keep", "reset")  # what to do with the head of the init_from weights

# The keys that a config may leave open, with the value "" or (). They then follow the weights of init_from.
# If there are no such weights, or the weights do not say, the keys get these values.
LEFT_OPEN = {
    "model.gelu": "tanh",
    "preprocess.fit": "crop",
    "preprocess.interpolation": "bilinear",
    "preprocess.mean": (0.5,),
    "preprocess.std": (0.5,),
}

# Keys that change no update: a run may be continued with other values of them. With other values of
# accumulation_steps, mesh.fsdp and model.remat, updates differ by rounding.
CHANGE_NO_UPDATE = (
    "data_dir",
    "accumulation_steps",
    "mesh.fsdp",
    "cache_bytes",
    "num_workers",
    "model.remat",
    "log_every_steps",
    "eval_every_epochs",
    "eval_every_steps",
    "save_every_epochs",
    "save_every_steps",
    "keep_checkpoints",
    "best_by",
    "early_stopping_evals",
    "tracker",
)
LENGTH = ("total_epochs", "total_steps")  # may change too: `training.continuing` says what happens then


def get_config() -> ConfigDict:
    """Returns the base config: it has every key, is locked against others, and trains on the included digits.

    Most durations have two keys: `_steps` (completed updates) and `_epochs` (passes over the training split).
    The `_steps` key is used if it is above 0. The keys of LEFT_OPEN follow the weights of `init_from`.
    """
    config = ConfigDict()
    config.seed = 0  # for the initial weights, the order of the data, augmentation and dropout

    # Data
    config.dataset = "digits"  # "digits" (included), "folder:PATH" (may be remote), "table:labels.csv", or a TFDS name: "mnist"
    config.skip_bad_images = False  # leave out unusable images, and count them; False = stop with an error
    config.data_dir = ""  # TFDS directory, may be remote; "" = $TFDS_DATA_DIR, else ~/tensorflow_datasets
    config.train_split = "train"  # the split to train on, in TFDS's syntax: "train[:90%]"
    config.test_split = "test"  # the split to evaluate on, as often as the eval_every keys say
    config.batch_size = 64  # images per update, over all devices
    config.accumulation_steps = 0  # microbatches per update, to save memory; 0 = for speed (GPU, TPU: 1)
    config.reproducible = 0  # chunks per batch, for the same bits on 1 to so many devices: 8 or 16; 0 = off
    config.cache_bytes = 4 * 1024**3  # decoded size of the largest split kept in memory; others are streamed
    config.num_workers = 0  # processes that decode a streamed split; 0 = threads of this process

    # Devices: the batch is divided over all of them
    config.mesh = ConfigDict()
    config.mesh.fsdp = (
        1  # devices that share one copy of parameters, optimizer state and EMA; 1 = copies on all
    )

    # Preprocessing: from stored pixels to the model's input, in training and afterwards (stored with the run)
    config.preprocess = ConfigDict()
    config.preprocess.image_size_px = 8  # side of the model's square input, in pixels
    config.preprocess.crop_fraction = 1.0  # share of each side that the central crop keeps at test time
    # These four and model.gelu: "" or () = as the weights of init_from; else "crop", "bilinear", 0.5, 0.5 and "tanh"
    config.preprocess.fit = ""  # how images become square: "crop", "pad" (with gray) or "stretch"
    config.preprocess.interpolation = ""  # "bilinear" or "bicubic", used when an image is resized
    config.preprocess.mean = ()  # is subtracted from pixels in [0, 1]; one value, or one per channel
    config.preprocess.std = ()  # then divides them; mean 0.5 and std 0.5 give [-1, 1]

    # Several resolutions with one model: each update has images of one of these sizes
    config.resolutions_px = ()  # sides in pixels, with image_size_px among them: (16, 24, 32, 48); () = only image_size_px

    # Augmentation of training images, applied in this order (photos of different sizes: min_crop_area first); all off by default
    config.augment = ConfigDict()
    config.augment.crop_padding_px = 0  # pixels of zeros around the image before a random crop to its size
    config.augment.min_crop_area = 1.0  # smallest share of the area that a random resized crop keeps; 1 = off
    config.augment.flip = False  # mirror left to right with probability 0.5
    config.augment.randaugment_layers = 0  # ops per image, one after another, each drawn at random; 0 = off
    config.augment.randaugment_ops = tuple(RANDAUGMENT_OPS)  # the ops to draw from
    config.augment.randaugment_magnitude = 10.0  # strength of the ops, from 0 to 30
    config.augment.erase_probability = 0.0  # probability that a rectangle of an image becomes noise
    config.augment.mixup_alpha = 0.0  # blend two images, with a weight from Beta(alpha, alpha); 0 = off
    config.augment.cutmix_alpha = 0.0  # swap rectangles, with an area share from Beta(alpha, alpha); 0 = off
    config.augment.mix_probability = 1.0  # share of images that mixup or CutMix changes
    config.augment.label_smoothing = 0.0  # share of each label that is spread evenly over all classes

    # Model: the fields of models.MlpMixer
    config.model = ConfigDict(mixer_digits_config.to_dict())
    config.model.gelu = ""  # "tanh" as in Google's weights, or "erf" as in timm's own
    config.model.dropout_rate = 0.0  # inside both MLPs of every block
    config.model.stochastic_depth_rate = (
        0.0  # probability of dropping a branch of the last block; falls linearly to 0 at the first
    )
    config.model.head_bias_init = 0.0  # initial bias of the head; -6.9 suits the sigmoid loss
    config.model.dtype = "float32"  # or "bfloat16" = mixed precision: computes in it, parameters are float32
    config.model.remat = False  # compute blocks again in the backward pass: less memory, a third slower

    # Fine-tuning
    config.init_from = ""  # weights to start from: "imagenet21k/Mixer-B_16", a file, URL or run; "" = random
    config.init_head = "auto"  # "keep" or "reset" their head; "auto" = keep it if its classes are the data's
    config.freeze = (
        ""  # layers that do not learn: "stem,MixerBlock_0"; "all_but_head" = linear probe; "" = none
    )

    # Distillation: learn the predictions of a larger model for the same augmented images, instead of the labels
    config.distill_from = ""  # the teacher: any name of weights with a head, as for init_from; "" = off
    config.distill_temperature = 1.0  # divides the logits of both; above 1, improbable classes count more

    # Optimisation
    config.loss = "softmax"  # or "sigmoid": one binary cross-entropy per class
    config.class_weights = ""  # "balanced", or "rare=5,usual=0.5" (others 1); scaled to average 1 over the training images; in the training loss only
    config.total_epochs = 30.0  # length of the run in epochs
    config.total_steps = 0  # length of the run in updates; 0 = total_epochs
    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # or "adam", "sgd" (with momentum), "muon" (in blocks, else AdamW)
    config.optimizer.learning_rate = 3e-3  # the highest one, after warmup
    config.optimizer.weight_decay = 0.0  # decoupled: multiplied by the learning rate; on kernels only
    config.optimizer.clip_norm = 1.0  # largest global norm of the gradient; 0 = off
    config.optimizer.momentum = 0.9  # for sgd and muon, which usually has 0.95
    config.optimizer.b1 = 0.9  # for adam, adamw, and AdamW beside muon
    config.optimizer.b2 = 0.999  # for adam, adamw, and AdamW beside muon
    config.optimizer.accumulator_dtype = "float32"  # or "bfloat16", for momentum and Adam's first moment
    config.optimizer.sam_rho = 0.0  # SAM: take the gradient this far uphill, in twice the time; 0 = off
    config.schedule = ConfigDict()
    config.schedule.name = "cosine"  # or "linear", "constant", "rsqrt" (1 / sqrt(step))
    config.schedule.warmup_epochs = 0.0  # length of the linear warmup from 0, in epochs
    config.schedule.warmup_steps = 0  # length of the warmup in updates; 0 = warmup_epochs
    config.schedule.final_fraction = 0.0  # share of the learning rate at which "cosine" and "linear" end
    config.ema_decay = 0.0  # decay of the weights' moving average (EMA), which is evaluated instead; 0 = off

    # Intervals: 0 steps and 0 epochs = only at the end; the end is always logged, evaluated and saved
    config.log_every_steps = 50  # updates from one line of training metrics to the next; at least 1
    config.eval_every_epochs = 1.0  # epochs from one evaluation to the next
    config.eval_every_steps = 0  # the same in updates; 0 = eval_every_epochs
    config.save_every_epochs = 1.0  # epochs from one checkpoint to the next; each best score saves one too
    config.save_every_steps = 0  # the same in updates; 0 = save_every_epochs
    config.keep_checkpoints = 2  # how many of the newest checkpoints to keep, besides the best one
    config.best_by = "accuracy"  # the score that decides which is the best: or "balanced_accuracy", "loss"; with several labels per image, "mean_average_precision"
    config.early_stopping_evals = 0  # end after so many evaluations without a better best_by score; 0 = off
    config.tracker = ""  # also send metrics to "wandb" or "trackio", if it is installed; "" = to neither
    return config.lock()


def get_pretraining_config() -> ConfigDict:
    """Returns what is common to all sizes in pre-training on ImageNet and ImageNet-21k (paper, Table 4)."""
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
    """Returns the recipe of google-research/vision_transformer for fine-tuning published weights."""
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
    """Returns a locked copy in which no key is left open.

    Args:
      origin: dotted key -> value, to use for "" and (); LEFT_OPEN has the values for keys that it lacks.

    Raises:
      UserError: a value of `origin` has the wrong type.
    """
    config = ConfigDict(config.to_dict())
    for key, default in LEFT_OPEN.items():
        if is_left_open(config, key):
            value = origin.get(key, default)
            try:
                config.update_from_flattened_dict({key: value})
            except (TypeError, ValueError, OverflowError):
                raise UserError(
                    f"the weights say {key}={value!r}, which has the wrong type: set --config.{key}"
                ) from None
    return config.lock()


def is_left_open(config: ConfigDict, key: str) -> bool:
    """Returns whether the config leaves a key (dotted) open."""
    return key in LEFT_OPEN and flatten(config)[key] in ("", ())


def in_steps(section: ConfigDict | Mapping[str, Any], name: str, steps_per_epoch: float) -> int:
    """Returns a duration of a config section in updates: `<name>_steps`, or `<name>_epochs` if that is 0.

    The result is 0 only if both are 0: the smallest part of an epoch is at least one update.
    """
    steps, epochs = section[f"{name}_steps"], section[f"{name}_epochs"]
    return steps or (max(round(epochs * steps_per_epoch), 1) if epochs else 0)


def flatten(config: ConfigDict | FrozenConfigDict) -> dict[str, Any]:
    """Returns dotted key -> value for every value of a config."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, (ConfigDict, FrozenConfigDict)):
            flat.update({f"{key}.{inner}": leaf for inner, leaf in flatten(value).items()})
        else:
            flat[key] = value
    return flat

"""Suggests the key of the config, or the option, that a user means by another name."""

import difflib
from collections.abc import Sequence

# The names that other programs have for our keys, and short forms
_OTHER_NAMES = {
    "accumulation_steps": "accum accum_iter accum_steps accumulate grad_accum gradient_accumulation "
    "gradient_accumulation_steps microbatches",
    "augment.crop_padding_px": "crop_padding padding",
    "augment.cutmix_alpha": "cutmix",
    "augment.erase_probability": "erasing random_erasing reprob",
    "augment.flip": "fliplr hflip horizontal_flip mirror random_flip",
    "augment.label_smoothing": "smoothing",
    "augment.min_crop_area": "crop_scale random_crop random_resized_crop scale",
    "augment.mixup_alpha": "mixup",
    "augment.randaugment_layers": "aa rand_aug rand_augment randaug randaugment",
    "batch_size": "batch batchsize bs images_per_batch train_batch train_batch_size",
    "best_by": "best_metric eval_metric metric_for_best_model monitor",
    "class_weights": "balanced class_weight",
    "data_dir": "tfds_data_dir tfds_dir",
    "dataset": "data data_path dataset_dir dataset_name folder image_folder path photos root train_dir",
    "distill_from": "distill distillation kd teacher teacher_model teacher_path",
    "distill_temperature": "kd_temperature tau temperature",
    "early_stopping_evals": "early_stop early_stopping early_stopping_patience patience",
    "ema_decay": "ema model_ema",
    "eval_every_epochs": "eval_every eval_freq eval_interval val_interval",
    "eval_every_steps": "eval_steps",
    "freeze": "frozen freeze_layers linear_probe",
    "init_from": "backbone finetune finetune_from from_pretrained init load model_name pretrained pretrained_weights "
    "weights",
    "keep_checkpoints": "keep max_checkpoints save_total_limit",
    "log_every_steps": "log_every log_freq log_interval log_steps print_freq",
    "loss": "criterion loss_fn",
    "model.channels_mlp_dim": "channel_dim channels_dim mlp_dim",
    "model.dropout_rate": "drop drop_rate dropout",
    "model.dtype": "amp bf16 bfloat16 compute_dtype fp16 half mixed_precision precision",
    "model.gelu": "act act_layer activation",
    "model.hidden_dim": "dim embed_dim hidden hidden_size width",
    "model.num_blocks": "blocks depth layers n_layers num_layers",
    "model.patches.size": "patch patch_size patches",
    "model.remat": "checkpointing grad_checkpointing gradient_checkpointing rematerialize",
    "model.stochastic_depth_rate": "drop_path drop_path_rate stochastic_depth",
    "model.tokens_mlp_dim": "token_dim tokens_dim",
    "num_workers": "j n_workers num_worker workers",
    "optimizer.clip_norm": "clip clip_grad clip_grad_norm grad_clip gradient_clip max_grad_norm",
    "optimizer.learning_rate": "alpha base_lr eta initial_lr learningrate lr lr0 max_lr peak_lr",
    "optimizer.name": "opt optim",
    "optimizer.sam_rho": "rho sam",
    "optimizer.weight_decay": "decay l2 wd weightdecay",
    "preprocess.crop_fraction": "crop crop_pct",
    "preprocess.image_size_px": "image_size img_size imgsz imsize input_size px res resolution size",
    "save_every_epochs": "save_every save_freq save_interval",
    "save_every_steps": "save_steps",
    "schedule.name": "lr_schedule lr_scheduler sched scheduler",
    "schedule.warmup_epochs": "warmup warmup_epoch",
    "seed": "random_seed random_state rng rng_seed",
    "skip_bad_images": "skip_bad skip_damaged",
    "test_split": "eval_split split_test val_split valid_split validation_split",
    "total_epochs": "epoch epochs max_epochs n_epochs num_epochs num_train_epochs",
    "total_steps": "iterations iters max_iters max_steps n_steps num_iterations num_steps num_train_steps "
    "num_training_steps steps train_steps training_steps",
    "train_split": "split split_train",
}
_ALIASES = {alias: key for key, aliases in _OTHER_NAMES.items() for alias in aliases.split()}
_WORKDIR = (
    "dir exp_dir log_dir logdir out out_dir outdir output output_dir run run_dir save_dir work_dir".split()
)


def find_key(name: str, keys: Sequence[str]) -> str | None:
    """Returns the dotted key that a name may stand for, such as "optimizer.lr" or "image-size"; None if unknown.

    Args:
      keys: the dotted keys of the config.
    """
    name = name.strip("-").replace("-", "_").casefold()
    leaf = name.rpartition(".")[2]
    by_leaf: dict[str, str] = {}
    for key in keys:
        by_leaf.setdefault(key.rpartition(".")[2], key)
    for found in (_ALIASES.get(name), by_leaf.get(leaf), _ALIASES.get(leaf)):
        if found in keys:
            return found
    if close := difflib.get_close_matches(name, keys, n=1, cutoff=0.75):
        return close[0]
    if close := difflib.get_close_matches(leaf, [*by_leaf, *_ALIASES], n=1, cutoff=0.7):
        return by_leaf.get(close[0]) or _ALIASES[close[0]]
    return None


def suggest_key(name: str, keys: Sequence[str]) -> str:
    """Returns the second half of the error about a key that the config does not have."""
    inside = [key for key in keys if key.startswith(f"{name}.")]
    if inside:  # the name of a section
        example = f"{name}.name" if f"{name}.name" in inside else inside[0]
        return f"it is a group of keys: change one of them, such as {example!r}"
    found = find_key(name, keys)
    return f"did you mean {found!r}?" if found else "mlpmixer_flax/config.py lists all keys"


def suggest_option(argument: str, keys: Sequence[str]) -> str:
    """Returns the second half of the error about an argument that is neither an option nor --config.KEY=VALUE."""
    name, equals, value = argument.partition("=")
    value = value if equals else "VALUE"
    if argument.startswith("-"):
        plain = name.strip("-").replace("-", "_").casefold()
        key = find_key(plain.removeprefix("config."), keys)
        if plain in _WORKDIR:
            return f"did you mean --workdir={value}?"
        if key:
            return f"did you mean --config.{key}={value}?"
    return "to change a key of the config, give --config.KEY=VALUE"

"""The published figures of MLP-Mixers, one row each: who reports what, and how we run it. Data only.

`reproduce.py` runs the rows and writes docs/reproduction.md. To add a figure, add a row. A figure has an address where it
can be read; where we did not find one, `source` says so.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlpmixer_flax.weights.catalog import PUBLISHED


@dataclass(frozen=True)
class Row:
    """A published figure, and the run of ours that stands beside it: a config to train, or weights to evaluate."""

    task: str
    source: str  # in Markdown
    accuracy: float  # as reported, of the test split (ImageNet: validation), in %
    reported: str  # what else is reported: parameters, length, time, hardware
    first: float = 0.0  # the reported accuracy after the first epoch, in %; 0 = none
    config: str = ""  # of the package; "" = `weights` are evaluated
    changes: Mapping[str, Any] = field(default_factory=dict)  # to the config: dotted key -> value
    weights: str = ""  # a name of PUBLISHED
    gpu: bool = False  # whether it takes days without one
    hours: float = 0.0  # on 2 cores; 0 = less than one, or not known
    remarks: str = ""  # how our run differs, and what is unclear about theirs


_S4 = {  # the sizes of Mixer-S for images of 32 px
    "model.patches.size": (4, 4),
    "model.hidden_dim": 512,
    "model.num_blocks": 8,
    "model.tokens_mlp_dim": 256,
    "model.channels_mlp_dim": 2048,
}

# omihub777: as far as we have it; they use the policies of AutoAugment where this has RandAugment
_OMIHUB = {
    "accumulation_steps": 1,
    "total_epochs": 300.0,
    "optimizer.name": "adam",
    "optimizer.learning_rate": 1e-3,
    "optimizer.weight_decay": 0.0,
    "optimizer.b2": 0.99,
    "optimizer.clip_norm": 0.0,
    "schedule.warmup_epochs": 5.0,
    "schedule.final_fraction": 1e-3,
    "augment.flip": False,
    "augment.randaugment_layers": 2,
    "augment.randaugment_magnitude": 6.0,
    "augment.cutmix_alpha": 1.0,
    "augment.mix_probability": 0.5,
    "augment.label_smoothing": 0.1,
}
# Source, accuracy, and what else is reported
_OMIHUB_REPORTED = (
    "[omihub777/MLP-Mixer-CIFAR](https://github.com/omihub777/MLP-Mixer-CIFAR), README",
    90.83,
    "0.67 M parameters, 300 epochs, 3 h 34 min on a P100",
)
_MODEL_ZOO = (
    "[pclubiitk/model-zoo](https://github.com/pclubiitk/model-zoo/tree/master/classification/MLP-Mixer_PyTorch), README",
    90.1,
    "6,782,858 parameters, 80 epochs, 2 h 28 min 43 s",
)

# MDMLP: ymls/cifar10_sgd.yml of their repository. The weight decay of PyTorch's SGD goes through the momentum, so it
# acts ten times as strongly as the same number here.
_MDMLP = {
    "accumulation_steps": 1,
    "total_epochs": 200.0,
    "augment.crop_padding_px": 0,
    "augment.min_crop_area": 0.75,
    "optimizer.name": "sgd",
    "optimizer.momentum": 0.9,
    "optimizer.learning_rate": 0.1,
    "optimizer.weight_decay": 1e-3,
    "optimizer.clip_norm": 0.0,
    "schedule.warmup_epochs": 10.0,
}
_MDMLP_SOURCE = "MDMLP, [arXiv 2205.14477](https://arxiv.org/abs/2205.14477), abstract"

_VT_SOURCE = (
    "[google-research/vision_transformer](https://github.com/google-research/vision_transformer), README, "
    '"Expected Mixer results"'
)
_VT_REMARKS = "They train on 98 % of the training images and leave out 272 test images; we use all of both."
_PAPER = "[arXiv 2105.01601](https://arxiv.org/abs/2105.01601)"
# Millions of parameters with 1,000 classes
_MILLIONS = {"s32": 19.1, "s16": 18.5, "s8": 20.6, "b32": 60.3, "b16": 59.9, "l16": 208.2}
_ON_IMAGENET = {  # the preset "imagenet2012" of vision_transformer's vit_jax/configs/common.py
    "dataset": "imagenet2012",
    "test_split": "validation",
    "total_steps": 20_000,
    "num_workers": 16,
}
_ON_IMAGENET_REMARKS = (
    "The recipe is google-research/vision_transformer's preset for ImageNet: 20,000 updates."
)

_TRAINED = {
    "mnist": Row(
        "MNIST from scratch, patches of 7 px, 3 blocks of 128 channels",
        "a Mixer in PyTorch; we did not find its address. YeongHyeon/MLP-Mixer-PyTorch reports 98.33 % "
        "([README](https://github.com/YeongHyeon/MLP-Mixer-PyTorch))",
        99.0,
        "about 99 % at the end",
        first=97.0,
        config="mnist.py",
    ),
    "class_project": Row(
        "CIFAR-10 from scratch in 10 epochs",
        "a class project; we did not find its address",
        55.62,
        "10 epochs of 8 minutes",
        config="nano_cifar10.py",
        changes={"total_epochs": 10.0},
        remarks="Their sizes are unknown to us; ours has 671,882 parameters.",
    ),
    "nano_cifar10": Row(
        "CIFAR-10 from scratch, 0.67 M parameters, for a CPU: 100 epochs without strong augmentation",
        *_OMIHUB_REPORTED,
        config="nano_cifar10.py",
        hours=4.0,
        remarks="A third of their epochs, with crops and mirror images only: see omihub777_nano for their recipe.",
    ),
    "omihub777_nano": Row(
        "CIFAR-10 from scratch, 0.67 M parameters, their recipe",
        *_OMIHUB_REPORTED,
        config="nano_cifar10.py",
        changes=_OMIHUB,
        gpu=True,
        remarks="The sizes are those of mixer_nano4, 671,882 parameters. RandAugment stands in for AutoAugment. Their decay of "
        "5e-5 is part of Adam's gradient; ours has none. Their code pads and crops twice, and mirrors no images.",
    ),
    "omihub777": Row(
        "the same with the sizes that their README gives: D_S 64, D_C 512",
        *_OMIHUB_REPORTED,
        config="nano_cifar10.py",
        changes={**_OMIHUB, "model.tokens_mlp_dim": 64, "model.channels_mlp_dim": 512},
        gpu=True,
        remarks="With these sizes a Mixer has 1,132,170 parameters, not 0.67 M. With the two exchanged (D_S 512, D_C 64), as where "
        "their code prints its summary, it has 673,418. So it is unclear which of them reached 90.83 %.",
    ),
    "model_zoo": Row(
        "CIFAR-10 from scratch, 6.78 M parameters, patches of 4 x 8 px, 80 epochs",
        *_MODEL_ZOO,
        config="cifar10.py",
        changes={
            "model.patches.size": (4, 8),
            "model.hidden_dim": 512,
            "model.num_blocks": 12,
            "model.tokens_mlp_dim": 512,
            "model.channels_mlp_dim": 512,
        },
        gpu=True,
        remarks="Theirs has no LayerNorm before the head, so ours has 1,024 parameters more: 6,783,882. The README gives neither "
        "learning rate nor hardware; their code has Adam, batches of 100, crops and mirror images. Ours is the recipe of cifar10.py.",
    ),
    "cifar10": Row(
        "the same task with the sizes of cifar10.py",
        *_MODEL_ZOO,
        config="cifar10.py",
        gpu=True,
        remarks="Ours has 6,533,642 parameters, and patches of 4 px.",
    ),
    "kentaroy47": Row(
        "CIFAR-10 from scratch, 500 epochs",
        "[kentaroy47/vision-transformers-cifar10](https://github.com/kentaroy47/vision-transformers-cifar10), README and "
        "[issue 19](https://github.com/kentaroy47/vision-transformers-cifar10/issues/19)",
        88.0,
        "500 epochs, batches of 2,048, Adam with 1e-3",
        config="cifar10.py",
        changes={
            **_S4,
            "model.num_blocks": 6,
            "model.channels_mlp_dim": 256,
            "model.stochastic_depth_rate": 0.0,
            "batch_size": 2048,
            "total_epochs": 500.0,
            "optimizer.name": "adam",
            "optimizer.weight_decay": 0.0,
            "optimizer.clip_norm": 0.0,
            "schedule.warmup_epochs": 0.0,
            "augment.cutmix_alpha": 0.0,
            "augment.label_smoothing": 0.0,
            "augment.randaugment_magnitude": 14.0,
            "ema_decay": 0.0,
        },
        gpu=True,
        remarks="A user of theirs reports in the issue that no run of his reached 88 %.",
    ),
    "mdmlp_mixer": Row(
        "CIFAR-10 from scratch, 17.1 M parameters: the Mixer to which MDMLP is compared",
        _MDMLP_SOURCE,
        85.45,
        "17.1 M parameters, no strong augmentation",
        config="nano_cifar10.py",
        changes={**_MDMLP, **_S4},
        gpu=True,
        remarks="The sizes of Mixer-S with patches of 4 px make 17.1 M parameters. The recipe is that of their repository "
        "([cifar10_sgd.yml](https://github.com/PhD-TianLv/MDMLP/blob/main/ymls/cifar10_sgd.yml)) without its color jitter.",
    ),
    "mdmlp": Row(
        "CIFAR-10 from scratch, 0.3 M parameters",
        _MDMLP_SOURCE,
        90.90,
        "0.3 M parameters, no strong augmentation",
        config="nano_cifar10.py",
        changes={
            **_MDMLP,
            "model.hidden_dim": 96,
            "model.tokens_mlp_dim": 64,
            "model.channels_mlp_dim": 144,
        },
        gpu=True,
        remarks="MDMLP is another architecture, which this package does not have. Ours is a Mixer with as many parameters, 298,602.",
    ),
    **{
        f"vt_{size}_{upstream}": Row(
            f"fine-tuning on CIFAR-10 at 224 px: Mixer-{size[0].upper()}/16, pre-trained on {name}",
            _VT_SOURCE,
            accuracy,
            f"10,000 updates of 512 images, {hours} h on four V100",
            config=f"{size}_cifar10.py",
            changes={"init_from": f"{upstream}/Mixer-{size[0].upper()}_16"},
            gpu=True,
            remarks=_VT_REMARKS,
        )
        for size, upstream, name, accuracy, hours in [
            ("b16", "imagenet1k", "ImageNet", 96.72, "3.0"),
            ("l16", "imagenet1k", "ImageNet", 96.59, "3.0"),
            ("b16", "imagenet21k", "ImageNet-21k", 96.82, "9.6"),
            ("l16", "imagenet21k", "ImageNet-21k", 98.34, "10.0"),
        ]
    },
    **{
        f"paper_{size}": Row(
            f"ImageNet from scratch: Mixer-{size[0].upper()}/16, 300 epochs",
            _PAPER,
            accuracy,
            f"{_MILLIONS[size]:g} M parameters, 300 epochs, batches of 4,096, on TPUs",
            config=f"{size}_imagenet.py",
            gpu=True,
        )
        for size, accuracy in [("b16", 76.44), ("l16", 71.76)]
    },
    **{
        f"paper_{size}_21k{suffix}": Row(
            f"fine-tuning on ImageNet at {px} px: Mixer-{size[0].upper()}/16, pre-trained on ImageNet-21k",
            _PAPER,
            accuracy,
            "pre-trained for 300 epochs",
            config=f"{size}_cifar10.py",
            changes={**_ON_IMAGENET, **more},
            gpu=True,
            remarks=_ON_IMAGENET_REMARKS,
        )
        for size, suffix, px, accuracy, more in [
            ("b16", "", 224, 80.64, {}),
            ("l16", "", 224, 82.89, {}),
            ("l16", "_448", 448, 84.15, {"preprocess.image_size_px": 448, "model.tokens_mlp_dim": 2048}),
        ]
    },
}


def _evaluated(name: str) -> tuple[str, Row]:
    """Returns the row in which published weights are scored on ImageNet's validation split, and its name."""
    published = PUBLISHED[name]
    timm = name.startswith("hf-hub:")
    group = f"timm_{name.partition('.')[2].partition('_')[0]}" if timm else name.partition("/")[0]
    source = {
        "imagenet1k": _PAPER,
        "sam": "[arXiv 2106.01548](https://arxiv.org/abs/2106.01548)",
        "gsam": "[arXiv 2203.08065](https://arxiv.org/abs/2203.08065)",
    }.get(
        group,
        "[timm](https://github.com/huggingface/pytorch-image-models/blob/main/results/results-imagenet.csv), "
        "results/results-imagenet.csv",
    )
    kind = f"Mixer-{published.size[0].upper()}/{published.size[1:]}"
    return f"{group}_{published.size}", Row(
        f"{kind} on ImageNet, weights `{name}` evaluated",
        source,
        float(published.top1),
        ", ".join(filter(None, [f"{_MILLIONS[published.size]:g} M parameters", published.note])),
        weights=name,
    )


# Weights with another number of classes have no accuracy on ImageNet until they are fine-tuned; the page names timm's.
ROWS: dict[str, Row] = _TRAINED | dict(
    _evaluated(name) for name, published in PUBLISHED.items() if published.num_classes == 1000
)

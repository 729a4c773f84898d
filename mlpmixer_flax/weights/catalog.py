"""Lists the published Mixer weights: where they are and how they were trained. Data only."""

from dataclasses import dataclass
from typing import Any

from mlpmixer_flax import config


@dataclass(frozen=True)
class Published:
    """One set of published weights, trained on images of 224 px."""

    url: str
    size: str  # of the model, as in mixer_<size>_config
    num_classes: int
    gelu: str = "tanh"
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    interpolation: str = "bilinear"
    size_mib: float | None = None  # of the file, to two decimals
    top1: str = ""  # accuracy on ImageNet-1k in %, as its authors report it
    note: str = ""

    @property
    def origin(self) -> dict[str, dict[str, Any]]:
        """Returns the sections `model` and `preprocess` of the config that the weights were trained with."""
        return {
            "model": {**getattr(config, f"mixer_{self.size}_config").to_dict(), "gelu": self.gelu},
            "preprocess": {
                "image_size_px": 224,
                "crop_fraction": 0.875,
                "interpolation": self.interpolation,
                "mean": self.mean,
                "std": self.std,
            },
        }


def _google(path: str, size: str, classes: int, size_mib: float, top1: str, note: str = "") -> Published:
    url = f"https://storage.googleapis.com/mixer_models/{path}.npz"
    return Published(url, size, classes, size_mib=size_mib, top1=top1, note=note)


def _timm(name: str, size: str, classes: int, top1: str = "", note: str = "", **trained) -> Published:
    return Published(f"hf-hub:timm/{name}", size, classes, top1=top1, note=note, **trained)


# Alibaba's weights were trained with timm: exact GELU (erf), pixels in [0, 1].
_MIIL = {"gelu": "erf", "mean": (0.0,), "std": (1.0,)}
# These are Google's own weights in timm's layout. They were trained with tanh GELU, so it stays tanh.
_GOOG = {"interpolation": "bicubic"}
_FROM_SCRATCH = (
    "trained on ImageNet-1k only, despite the name (timm pull request 651); accuracy with erf GELU"
)

_ROWS = [
    ("imagenet1k/Mixer-B_16", "b16", 1000, 228.47, "76.44"),
    ("imagenet1k/Mixer-L_16", "l16", 1000, 794.29, "71.76"),
    ("imagenet21k/Mixer-B_16", "b16", 21843, 289.61, "80.64", "after fine-tuning on ImageNet-1k"),
    (
        "imagenet21k/Mixer-L_16",
        "l16",
        21843,
        875.78,
        "82.89",
        "after fine-tuning on ImageNet-1k; 84.15 at 448 px",
    ),
    ("sam/Mixer-B_16", "b16", 1000, 228.47, "77.4"),
    ("sam/Mixer-B_32", "b32", 1000, 230.04, "72.4"),
    ("gsam/Mixer-B_16", "b16", 1000, 228.47, "77.8"),
    ("gsam/Mixer-B_32", "b32", 1000, 230.04, "73.6"),
    ("gsam/Mixer-S_8", "s8", 1000, 78.79, "76.8"),
    ("gsam/Mixer-S_16", "s16", 1000, 70.71, "75.0"),
    ("gsam/Mixer-S_32", "s32", 1000, 72.91, "68.6"),
]
_TIMM = [
    _timm("mixer_b16_224.miil_in21k_ft_in1k", "b16", 1000, "82.314", **_MIIL),
    _timm("mixer_b16_224.miil_in21k", "b16", 11221, **_MIIL),
    _timm("mixer_b16_224.goog_in21k_ft_in1k", "b16", 1000, "76.616", _FROM_SCRATCH, **_GOOG),
    _timm("mixer_l16_224.goog_in21k_ft_in1k", "l16", 1000, "72.084", _FROM_SCRATCH, **_GOOG),
    _timm("mixer_b16_224.goog_in21k", "b16", 21843, **_GOOG),
    _timm("mixer_l16_224.goog_in21k", "l16", 21843, **_GOOG),
]
# The name in init_from -> the weights.
PUBLISHED = {row[0]: _google(*row) for row in _ROWS} | {weights.url: weights for weights in _TIMM}

"""Fine-tune Mixer-B/16, pre-trained on ImageNet-21k at 224 px, on CIFAR-10 at 384 px.

    python -m mlpmixer_flax.train --config=configs/b16_cifar10_384.py --workdir=runs/b16_384

384 is no multiple of 224, so the token-mixing weights are resampled from 14x14 to 24x24 tokens: approximate, where
b16_cifar10_448.py is exact, but of any size (docs/weights.md has what that costs). Not measured by us yet.
"""

from mlpmixer_flax.config import get_finetuning_config, mixer_b16_config


def get_config():
    config = get_finetuning_config()
    config.dataset = "cifar10"  # travels with 32 px, and is enlarged on the device
    config.init_from = "imagenet21k/Mixer-B_16"
    config.model.update(mixer_b16_config)
    config.preprocess.image_size_px = 384
    return config

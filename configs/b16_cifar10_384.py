"""Fine-tune Mixer-B/16, pre-trained on ImageNet-21k at 224 px, on CIFAR-10 at 384 px.

    python -m mlpmixer_flax.train --config=configs/b16_cifar10_384.py --workdir=runs/b16_384

384 is not a multiple of 224, so the token-mixing weights are resampled from 14x14 to 24x24 tokens. That is
approximate but works for any size, while b16_cifar10_448.py is exact (docs/weights.md says how much accuracy
resampling costs). We have not measured it yet.
"""

from mlpmixer_flax.config import get_finetuning_config, mixer_b16_config


def get_config():
    config = get_finetuning_config()
    config.dataset = "cifar10"  # images have 32 px, and are enlarged on the device
    config.init_from = "imagenet21k/Mixer-B_16"
    config.model.update(mixer_b16_config)
    config.preprocess.image_size_px = 384
    return config

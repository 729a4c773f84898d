"""Fine-tune Mixer-B/16, pre-trained on ImageNet-21k, on CIFAR-10 at 224 px.

    python -m mlpmixer_flax.train --config=configs/b16_cifar10.py --workdir=runs/b16

This is the recipe of google-research/vision_transformer: SGD with momentum in bfloat16, 10,000 steps of 512
images. They report 96.82 % in 9.6 h on four V100 (trained on 98 % of the training images, and evaluated
without the last 272 test images). We have not measured it yet.
If a GPU or a TPU runs out of memory: add --config.accumulation_steps=8, then --config.model.dtype=bfloat16
"""

from mlpmixer_flax.config import get_finetuning_config, mixer_b16_config


def get_config():
    config = get_finetuning_config()
    config.dataset = "cifar10"  # images have 32 px, and are enlarged on the device
    config.init_from = "imagenet21k/Mixer-B_16"
    config.model.update(mixer_b16_config)
    return config

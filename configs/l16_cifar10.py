"""Fine-tune Mixer-L/16, pre-trained on ImageNet-21k, on CIFAR-10 at 224 px.

    python -m mlpmixer_flax.train --config=configs/l16_cifar10.py --workdir=runs/l16

The recipe of google-research/vision_transformer. They report 98.34 % in 10.0 h on four V100 (from 98 % of the training
images; their evaluation leaves out the last 272). Not measured by us yet.
Out of memory: add --config.accumulation_steps=16, then --config.model.dtype=bfloat16
"""

from mlpmixer_flax.config import get_finetuning_config, mixer_l16_config


def get_config():
    config = get_finetuning_config()
    config.dataset = "cifar10"  # travels with 32 px, and is enlarged on the device
    config.init_from = "imagenet21k/Mixer-L_16"
    config.model.update(mixer_l16_config)
    return config

"""Handwritten digits, 8 px, from scratch: the embedded dataset, no download.

python -m mlpmixer_flax.train --config=configs/digits.py --workdir=runs/digits
"""

from mlpmixer_flax.config import get_config as get_base_config


def get_config():
    config = get_base_config()  # which is this run, but for augmentation
    config.augment.crop_padding_px = 1
    config.optimizer.weight_decay = 0.1
    return config

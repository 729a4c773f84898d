"""Handwritten digits, 8 px, from scratch: the embedded dataset, no download.

python -m mlpmixer_flax.train --config=configs/digits.py --workdir=runs/digits
"""

from mlpmixer_flax.config import get_config as get_base_config


def get_config():
    config = get_base_config()
    config.augment.mixup_alpha = 0.2
    config.optimizer.weight_decay = 0.1
    return config

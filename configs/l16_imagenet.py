"""Train Mixer-L/16 on ImageNet-1k from scratch for 300 epochs, as in Table 4 of the paper (arXiv 2105.01601).

    python -m mlpmixer_flax.train --config=configs/l16_imagenet.py --workdir=runs/l16_imagenet

It needs the dataset `imagenet2012` as a TFDS directory in ArrayRecord format.
Google reports 71.76 % top-1 for its published weights of this size. We have not run it.
"""

from mlpmixer_flax.config import get_pretraining_config, mixer_l16_config


def get_config():
    config = get_pretraining_config()
    config.model.update(mixer_l16_config)
    return config

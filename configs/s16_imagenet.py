"""Train Mixer-S/16 on ImageNet-1k from scratch for 300 epochs, as in Table 4 of the paper (arXiv 2105.01601).

    python -m mlpmixer_flax.train --config=configs/s16_imagenet.py --workdir=runs/s16_imagenet

It needs the dataset `imagenet2012` as a TFDS directory in ArrayRecord format.
The paper gives no result for this size and dataset. We have not run it.
"""

from mlpmixer_flax.config import get_pretraining_config, mixer_s16_config


def get_config():
    config = get_pretraining_config()
    config.model.update(mixer_s16_config)
    return config

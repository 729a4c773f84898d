"""Pre-train Mixer-B/16 on ImageNet-21k for 300 epochs, as in Table 4 of the paper (arXiv 2105.01601).

    python -m mlpmixer_flax.train --config=configs/b16_imagenet21k.py --workdir=runs/b16_imagenet21k

TFDS cannot download ImageNet-21k: prepare a TFDS dataset from your copy, with the name `imagenet21k` and in
ArrayRecord format. The last 51,200 images are the test images. We have not run it.
"""

from mlpmixer_flax.config import get_pretraining_config, mixer_b16_config


def get_config():
    config = get_pretraining_config()
    config.dataset = "imagenet21k"
    config.train_split = "train[:-51200]"
    config.test_split = "train[-51200:]"
    config.augment.randaugment_magnitude = 10.0
    config.augment.mixup_alpha = 0.2
    config.model.update(mixer_b16_config)
    return config

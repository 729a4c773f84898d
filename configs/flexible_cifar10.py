"""Train one Mixer for images of 16, 24, 32, 48 and 64 px on CIFAR-10; it is stored as a model for 32 px.

    python -m mlpmixer_flax.train --config=configs/flexible_cifar10.py --workdir=runs/flexible

Each update has images of one of these sizes. On average they have 1.6 times the tokens of images of 32 px. To make
trained weights flexible instead, start from them, with a short run and a lower learning rate:

    python -m mlpmixer_flax.train --config=configs/flexible_cifar10.py --workdir=runs/made_flexible \\
        --config.init_from=runs/nano --config.total_epochs=3 --config.optimizer.learning_rate=1e-3

The 100 epochs are not measured yet. docs/resolutions.md has how good the model of nano_cifar10.py is after being made
flexible, and a smaller experiment from scratch.
"""

from mlpmixer_flax.config import get_config as get_base_config
from mlpmixer_flax.config import mixer_nano4_config


def get_config():
    config = get_base_config()
    config.dataset = "cifar10"
    config.batch_size = 128
    config.total_epochs = 100.0
    config.preprocess.image_size_px = 32
    config.preprocess.mean = (0.4914, 0.4822, 0.4465)
    config.preprocess.std = (0.2470, 0.2435, 0.2616)
    config.resolutions_px = (16, 24, 32, 48, 64)
    config.augment.crop_padding_px = 4
    config.augment.flip = True
    config.model.update(mixer_nano4_config)
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 0.05
    config.schedule.warmup_epochs = 1.0
    return config

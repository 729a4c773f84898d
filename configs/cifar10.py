"""Train a Mixer with 6.5 M parameters on CIFAR-10 (32 px) from scratch, for 80 epochs on a GPU.

    python -m mlpmixer_flax.train --config=configs/cifar10.py --workdir=runs/cifar10

We have not measured it yet.
"""

from mlpmixer_flax.config import get_config as get_base_config
from mlpmixer_flax.config import mixer_tiny4_config


def get_config():
    config = get_base_config()
    config.dataset = "cifar10"
    config.batch_size = 256
    config.total_epochs = 80.0
    config.preprocess.image_size_px = 32
    config.preprocess.mean = (0.4914, 0.4822, 0.4465)
    config.preprocess.std = (0.2470, 0.2435, 0.2616)
    config.augment.crop_padding_px = 4
    config.augment.flip = True
    config.augment.randaugment_layers = 2
    config.augment.randaugment_magnitude = 6.0
    config.augment.cutmix_alpha = 1.0
    config.augment.mix_probability = 0.5
    config.augment.label_smoothing = 0.1
    config.model.update(mixer_tiny4_config)
    config.model.stochastic_depth_rate = 0.1
    config.model.dtype = "bfloat16"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.1
    config.schedule.warmup_epochs = 5.0
    config.ema_decay = 0.999
    return config

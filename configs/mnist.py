"""Train a small Mixer on MNIST (28 px) from scratch.

    python -m mlpmixer_flax.train --config=configs/mnist.py --workdir=runs/mnist

Test accuracy 97.63 % after the first epoch and 99.29 % at the end (n = 1). The updates took 6.9 minutes on 2 cores of
an Intel Xeon with AMX, with jax 0.10.2 and flax 0.12.8:

    python benchmarks/reproduce.py mnist
"""

from mlpmixer_flax.config import get_config as get_base_config
from mlpmixer_flax.config import mixer_mnist_config


def get_config():
    config = get_base_config()
    config.dataset = "mnist"
    config.batch_size = 64
    config.total_epochs = 13.0
    config.preprocess.image_size_px = 28
    config.augment.crop_padding_px = 2
    config.model.update(mixer_mnist_config)
    config.optimizer.learning_rate = 3e-3
    config.optimizer.weight_decay = 0.05
    config.schedule.warmup_steps = 100
    config.ema_decay = 0.99
    return config

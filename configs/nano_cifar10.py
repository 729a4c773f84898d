"""Train a Mixer with 0.67 M parameters on CIFAR-10 (32 px) from scratch; it is small enough for a CPU.

    python -m mlpmixer_flax.train --config=configs/nano_cifar10.py --workdir=runs/nano

The optimizer is Muon, because it learned more than AdamW in 3 of the 100 epochs: 70.30 % of images held out from
training, AdamW at best 63.32 % (n = 1; `python benchmarks/optimizers.py nano --workdir=FOLDER`; docs/recipes.md has
the learning rates). Test accuracy on a JPEG copy of CIFAR-10 after all 100 epochs: 80.93 % (n = 1). The
updates took 5.4 hours on 2 cores of an AMD EPYC that had other work too, with jax 0.10.2 and flax 0.12.8. Alone, the
machine computes 378 images/s, so they would take 3.7 hours:

    python benchmarks/reproduce.py nano_cifar10

A run of 10 epochs (--config.total_epochs=10) ends close to that: 79.57 % (n = 1). Its updates took 33
minutes on 2 cores of an Intel Xeon with AMX that had other work too:

    python benchmarks/reproduce.py class_project
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
    config.augment.crop_padding_px = 4
    config.augment.flip = True
    config.model.update(mixer_nano4_config)
    config.optimizer.name = "muon"
    config.optimizer.momentum = 0.95
    config.optimizer.learning_rate = 8e-3
    config.optimizer.weight_decay = 0.05
    config.schedule.warmup_epochs = 1.0
    return config

"""Train a small Mixer on handwritten digits (8 px) from scratch; the dataset is included in the package.

    python -m mlpmixer_flax.train --config=configs/digits.py --workdir=runs/digits

Measured with --config.seed=0, 1 and 2: test accuracy 98.63, 98.08 and 98.08 %, mean 98.26 % (n = 3). A run took 11.2 to
16.9 s from process start to end (n = 6), with compiled programs from an earlier run, on 2 cores of an AMD EPYC, with
jax 0.10.2 and flax 0.12.8.
"""

from mlpmixer_flax.config import get_config as get_base_config


def get_config():
    config = get_base_config()
    config.augment.mixup_alpha = 0.2
    config.optimizer.weight_decay = 0.1
    # An epoch takes a fifth of a second: evaluating and saving after each would take as long as the updates.
    config.eval_every_epochs = 3.0
    config.save_every_epochs = 3.0
    return config

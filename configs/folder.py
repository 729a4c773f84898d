"""Train a small Mixer from scratch on your own photos, without any other file; it is small enough for a CPU.

    python -m mlpmixer_flax.train photos/ --workdir=runs/photos
    python -m mlpmixer_flax.predict --workdir=runs/photos new.jpg

The photos are photos/<class>/*.jpg, or photos/{train,val,test}/<class>/*.jpg, in any format that Pillow decodes by itself.
The command uses this config and first changes image size, model, batch size, number of epochs and how often the run
evaluates and saves, to suit the photos and the device; it prints these changes. To train with exactly the values
below, on the photos in photos/:

    python -m mlpmixer_flax.train --config=configs/folder.py --workdir=runs/photos

Measured (n = 1): 58.20 % of 1,000 test photos, by the best of the checkpoints (epoch 54 of 117, 60.84 % of the validation
photos; the last one had 59.36 %), after 41 min on 2 busy cores of an AMD EPYC, Python 3.11, jax 0.10.2. About 420 images/s
when nothing else ran. The photos are 4,300 of five animals with 32 px, 860 of each, from CIFAR-10 (JPEG copy):

    python benchmarks/cifar10_folder.py animals
    python -m mlpmixer_flax.train animals --workdir=runs/animals
    python -m mlpmixer_flax.evaluate --workdir=runs/animals --split=test

If a mirrored image may belong to another class, as with letters: add --config.augment.flip=false
"""

from mlpmixer_flax.config import get_config as get_base_config
from mlpmixer_flax.config import mixer_folder_config


def get_config():
    config = get_base_config()
    config.dataset = "folder:photos"
    config.test_split = "validation"
    config.batch_size = 64
    config.total_epochs = 100.0
    config.preprocess.image_size_px = 64
    config.augment.min_crop_area = 0.35
    config.augment.flip = True
    config.augment.mixup_alpha = 0.2
    config.model.update(mixer_folder_config)
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.05
    config.schedule.warmup_epochs = 5.0
    config.eval_every_epochs = 2.0
    config.save_every_epochs = 2.0
    return config

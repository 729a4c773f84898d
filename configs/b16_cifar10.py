"""Fine-tune Mixer-B/16, pre-trained on ImageNet-21k, on CIFAR-10 at 224 px.

    python -m mlpmixer_flax.train --config=configs/b16_cifar10.py --workdir=runs/b16

The recipe of google-research/vision_transformer: SGD with momentum in bfloat16, 10,000 steps of 512 images.
Loading published weights is still missing in this version, and the program says so. To try the recipe from
random weights add --config.init_from=
"""

from mlpmixer_flax.config import get_config as get_base_config
from mlpmixer_flax.config import mixer_b16_config


def get_config():
    config = get_base_config()
    config.dataset = "cifar10"
    config.init_from = "imagenet21k/Mixer-B_16"
    config.batch_size = 512
    config.total_steps = 10_000
    config.preprocess.image_size_px = 224  # enlarged on the device: images travel with 32 px
    config.augment.min_crop_area = 0.05
    config.augment.flip = True
    config.model.update(mixer_b16_config)
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.03
    config.optimizer.accumulator_dtype = "bfloat16"
    config.schedule.warmup_steps = 500
    config.eval_every_steps = 500
    config.save_every_steps = 1_000
    return config

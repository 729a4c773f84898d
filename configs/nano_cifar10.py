from mlpmixer_flax.config import get_config as base
from mlpmixer_flax.config import mixer_nano4_config


def get_config():
    config = base()
    config.dataset = "cifar10"
    config.batch_size = 128
    config.accumulation_steps = 8
    config.total_epochs = 100.0
    config.schedule.warmup_epochs = 1.0
    config.preprocess.image_size_px = 32
    config.preprocess.mean = (0.4914, 0.4822, 0.4465)
    config.preprocess.std = (0.2470, 0.2435, 0.2616)
    config.augment.crop_padding_px = 4
    config.augment.flip = True
    config.model.update(mixer_nano4_config)
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 0.05
    return config

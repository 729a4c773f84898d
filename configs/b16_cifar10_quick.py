"""Fine-tune Mixer-B/16 on CIFAR-10 at 224 px in only 100 steps.

    python -m mlpmixer_flax.train --config=configs/b16_cifar10_quick.py --workdir=runs/quick

For notebooks and for trying out a machine: it trains on 12,800 images and is evaluated on 1,000. We have not
measured it yet.
"""

from mlpmixer_flax.config import get_finetuning_config, mixer_b16_config


def get_config():
    config = get_finetuning_config()
    config.dataset = "cifar10"  # images have 32 px, and are enlarged on the device
    config.init_from = "imagenet21k/Mixer-B_16"
    config.model.update(mixer_b16_config)
    config.batch_size = 128
    config.total_steps = 100
    config.test_split = "test[:1000]"
    config.schedule.warmup_steps = 10
    config.model.dtype = "bfloat16"
    config.log_every_steps = 10
    return config

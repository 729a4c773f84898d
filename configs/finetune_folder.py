"""Fine-tune Mixer-B/16, pre-trained on ImageNet-21k, on your own photos at 224 px.

    python -m mlpmixer_flax.train --config=configs/finetune_folder.py --workdir=runs/photos
    python -m mlpmixer_flax.evaluate --workdir=runs/photos --split=test
    python -m mlpmixer_flax.predict --workdir=runs/photos new.jpg

The photos are photos/<class>/*.jpg, or photos/{train,val,test}/<class>/*.jpg, in any format that Pillow decodes by
itself. If they are in another folder, give it as the first word: train FOLDER --config=configs/finetune_folder.py. If
there is no val, about a fifth of each class in train is used instead. Each epoch ends with an evaluation on val, so the
test photos stay new to the model and to you. The config is made for a hundred to some ten thousand photos; if
you have fewer, increase --config.total_epochs. We have not measured it yet.
If a mirrored image may belong to another class, as with letters: add --config.augment.flip=false
If a GPU or a TPU runs out of memory: add --config.accumulation_steps=4 or 8, then --config.model.dtype=bfloat16
"""

from mlpmixer_flax.config import get_finetuning_config, mixer_b16_config


def get_config():
    config = get_finetuning_config()
    config.dataset = "folder:photos"
    config.test_split = "validation"
    config.init_from = "imagenet21k/Mixer-B_16"
    config.model.update(mixer_b16_config)
    config.batch_size = 64
    config.total_epochs = 20.0
    config.total_steps = 0
    config.optimizer.learning_rate = 0.01  # from the grid of the paper, 0.003 to 0.06
    config.schedule.warmup_epochs = 2.0
    config.schedule.warmup_steps = 0
    config.augment.min_crop_area = 0.3  # a smaller part of a photo may not show its class
    config.log_every_steps = 10
    config.eval_every_epochs = 1.0
    config.eval_every_steps = 0
    return config

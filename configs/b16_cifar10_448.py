"""Fine-tune Mixer-B/16, pre-trained on ImageNet-21k at 224 px, on CIFAR-10 at twice that resolution.

    python -m mlpmixer_flax.train --config=configs/b16_cifar10_448.py --workdir=runs/b16_448

This is the method of the paper (Appendix C): there are four times as many tokens, and the token-mixing MLPs
are four times as wide. They start as four copies of the published ones, one for each quarter of the image. We
have not measured it yet.
"""

from mlpmixer_flax.config import get_finetuning_config, mixer_b16_config


def get_config():
    config = get_finetuning_config()
    config.dataset = "cifar10"  # images have 32 px, and are enlarged on the device
    config.init_from = "imagenet21k/Mixer-B_16"
    config.model.update(mixer_b16_config)
    config.preprocess.image_size_px = 448
    config.model.tokens_mlp_dim = 4 * mixer_b16_config.tokens_mlp_dim
    return config

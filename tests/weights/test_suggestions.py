"""Names and addresses that people type or paste get the right suggestion."""

import pytest

from mlpmixer_flax import UserError
from mlpmixer_flax.weights.catalog import PUBLISHED
from mlpmixer_flax.weights.source import find

LIST = "python -m mlpmixer_flax.pretrained lists all names"
OTHERS = "another name that python -m mlpmixer_flax.pretrained lists"
B16 = f"did you mean imagenet1k/Mixer-B_16, imagenet21k/Mixer-B_16, sam/Mixer-B_16 or {OTHERS}?"
TIMM = "hf-hub:timm/mixer_b16_224"


def refusal(source):
    """Returns the one sentence with which a source is refused."""
    with pytest.raises(UserError) as caught:
        find(source)
    message = str(caught.value)
    assert source in message and "\n" not in message and len(message) < 400 + len(source)
    return message


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Mixer-B16", B16),
        ("mixer_b16", B16),
        ("B/16", B16),
        ("b16", B16),
        ("Mixer-B_16", B16),
        ("Mixer-B_16.npz", B16),
        ("google/mixer-b16", B16),
        ("imagenet/Mixer-B_16", B16),
        ("imagenet21k/Mixer-B16", "did you mean imagenet21k/Mixer-B_16?"),
        ("ImageNet-21k/mixer-b_16.npz", "did you mean imagenet21k/Mixer-B_16?"),
        ("imagenet21k/Mixer-L16", "did you mean imagenet21k/Mixer-L_16?"),
        ("imagenet21k/Mixer-S_16", "did you mean gsam/Mixer-S_16?"),
        ("S/8", "did you mean gsam/Mixer-S_8?"),
        ("gsam-b32", "did you mean gsam/Mixer-B_32?"),
        ("mixer_b16_224", f"did you mean {TIMM}.miil_in21k_ft_in1k, {TIMM}.miil_in21k, {TIMM}.goog_in21k_ft_in1k or {OTHERS}?"),
        ("mixer_b16_224.miil_in21k", f"did you mean {TIMM}.miil_in21k?"),
        ("mixer_b16_224_miil", f"did you mean {TIMM}.miil_in21k_ft_in1k or {TIMM}.miil_in21k?"),
        ("timm/mixer_b16_224.goog_in21k", f"did you mean {TIMM}.goog_in21k?"),
        ("timm/our_mixer", "did you mean hf-hub:timm/our_mixer?"),
        ("Mixer-L/32", f"no weights of Mixer-L/32 are published; {LIST}"),
        ("mixer_h14", f"no weights of Mixer-H/14 are published; {LIST}"),
        ("runs/b16", LIST),
        ("b16/best.npz", LIST),
        ("no/such/thing.npz", LIST),
        ("~nobody-at-all/w.npz", LIST),
        ("x" * 300, LIST),
    ],
)  # fmt: skip
def test_a_name_that_is_nothing_gets_the_published_names_that_it_may_mean(name, hint):
    assert refusal(name) == (
        f"no weights {name!r}: not a published name, file, folder, run directory or URL; {hint}"
    )


@pytest.mark.parametrize(
    ("address", "advice"),
    [
        ("gs://mixer_models/imagenet21k/Mixer-B_16.npz", "give its published name, imagenet21k/Mixer-B_16"),
        ("gs://mixer_models/imagenet21k/Mixer-B16.npz", "give its published name, imagenet21k/Mixer-B_16"),
        ("xyz://bucket/w.npz", "copy the file here and give its path, or give an https URL"),
        ("ftp://example.org/w.npz", "copy the file here and give its path, or give an https URL"),
        ("file:///data/w.npz", "give its path, /data/w.npz"),
        ("local-dir:/data/model", "give its path, /data/model"),
        ("https://huggingface.co/someone/mixer", "give hf-hub:someone/mixer"),
        ("https://huggingface.co/someone/mixer/", "give hf-hub:someone/mixer"),
        ("https://huggingface.co/someone/mixer?library=timm", "give hf-hub:someone/mixer"),
        ("https://huggingface.co/someone/mixer/tree/main", "give hf-hub:someone/mixer"),
        ("https://huggingface.co/someone/mixer/blob/v1.0/model.safetensors", "give hf-hub:someone/mixer@v1.0"),
        ("huggingface.co/someone/mixer", "give hf-hub:someone/mixer"),
        ("hf.co/someone/mixer", "give hf-hub:someone/mixer"),
        ("hf://someone/mixer", "give hf-hub:someone/mixer"),
    ],
)  # fmt: skip
def test_an_address_that_is_not_read_gets_what_to_give_instead(address, advice):
    assert refusal(address).startswith(f"{address} cannot be read here: {advice}")


def test_every_suggestion_for_a_size_is_of_that_size():
    for letter, patch in [("b", "16"), ("b", "32"), ("l", "16"), ("s", "8"), ("s", "16"), ("s", "32")]:
        message = refusal(f"mixer-{letter}/{patch}")
        named = [name for name in PUBLISHED if name in message]
        assert named and all(PUBLISHED[name].size == letter + patch for name in named)

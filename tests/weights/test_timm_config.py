"""What timm's config.json says of weights is used, or contradicted aloud, key by key."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlpmixer_flax import UserError
from mlpmixer_flax.inference.load import load
from mlpmixer_flax.weights.files import write_safetensors
from mlpmixer_flax.weights.source import describe, find

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ["ant", "bee", "cat", "dog", "emu", "fox", "gnu", "hen", "ibis", "jay"]

# As timm 1.0.31 wrote it for a Mixer of the golden file's sizes (save_for_hf)
WRITTEN = {
    "architecture": "mixer_s16_224",
    "num_classes": 10,
    "num_features": 32,
    "global_pool": "avg",
    "model_args": {"num_classes": 10, "in_chans": 3, "global_pool": "avg", "img_size": [32, 32]},
    "pretrained_cfg": {
        "tag": "untrained",
        "custom_load": False,
        "input_size": [3, 32, 32],
        "fixed_input_size": True,
        "interpolation": "bilinear",
        "crop_pct": 0.9,
        "crop_mode": "center",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "num_classes": 10,
        "pool_size": None,
        "first_conv": "stem.proj",
        "classifier": "head",
        "license": "apache-2.0",
    },
}
ORIGIN = {
    "model": {"gelu": "erf"},
    "preprocess": {
        "image_size_px": 32,
        "interpolation": "bilinear",
        "crop_fraction": 0.9,
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
    },
}


def changed(**changes):
    """Returns the config with changes: "model_args__img_size" is a key of model_args; ... removes a key."""
    config = copy.deepcopy(WRITTEN)
    for path, value in changes.items():
        section, _, key = path.rpartition("__")
        target = config.setdefault(section, {}) if section else config
        if value is ...:
            target.pop(key, None)
        else:
            target[key] = value
    return config


@pytest.fixture
def folder(tmp_path):
    """Returns a function that writes the golden weights with a config.json, and returns their folder."""

    def write(config, weights=GOLDEN / "timm_tiny.safetensors"):
        place = tmp_path / "model"
        place.mkdir(exist_ok=True)
        shutil.copy(weights, place / "model.safetensors")
        (place / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        return str(place)

    return write


def test_everything_that_timm_writes_is_used_without_a_note(folder):
    weights = find(folder(WRITTEN))
    assert weights.metadata == ORIGIN and weights.notes == ()
    model = load(folder(changed(label_names=NAMES)))
    assert model.class_names == tuple(NAMES) and model.module.gelu == "erf"
    assert model.preprocess == {**ORIGIN["preprocess"], "fit": "crop"}


def test_the_flat_layout_of_old_files_is_read_too(folder):
    flat = {"architecture": "mixer_s16_224", "num_features": 32, "labels": NAMES, **WRITTEN["pretrained_cfg"]}
    weights = find(folder(flat))
    assert weights.metadata == {**ORIGIN, "class_names": NAMES} and weights.notes == ()


@pytest.mark.parametrize(
    ("changes", "gelu"),
    [
        ({}, "erf"),
        ({"model_args__act_layer": "gelu"}, "erf"),
        ({"model_args__act_layer": "gelu_tanh"}, "tanh"),
        ({"model_args__act_layer": None}, "erf"),
        ({"model_args": None}, "erf"),
        ({"model_args": ...}, "erf"),
    ],
)
def test_the_gelu_is_that_of_timms_act_layer(folder, changes, gelu):
    assert describe(folder(changed(**changes)))["model"] == {"gelu": gelu}


@pytest.mark.parametrize(
    ("names", "class_names"),
    [
        (NAMES, NAMES),
        (dict(enumerate(NAMES)), NAMES),
        ({"3": "dog", "7": "hen"}, [*"012", "dog", *"456", "hen", *"89"]),  # numbers may be left out
        (["été", *NAMES[1:]], ["été", *NAMES[1:]]),
    ],
)
def test_label_names_are_the_class_names(folder, names, class_names):
    assert describe(folder(changed(label_names=names)))["class_names"] == class_names
    in_section = changed(pretrained_cfg__label_names=names)
    assert describe(folder(in_section))["class_names"] == class_names


# Changes of the config -> what the metadata has instead, and what a note says
CONTRADICTED = {
    "squash": (
        {"pretrained_cfg__crop_mode": "squash"}, {"fit": "stretch"}, "crop_mode='squash' is preprocess.fit='stretch' here",
    ),
    "border": (
        {"pretrained_cfg__crop_mode": "border"}, {"fit": "pad"}, "crop_mode='border' is preprocess.fit='pad' here (timm pads with the mean, not",
    ),
    "another crop": ({"pretrained_cfg__crop_mode": "zoom"}, {}, "crop_mode='zoom' is unknown; the centre of images"),
    "interpolation": (
        {"pretrained_cfg__interpolation": "lanczos"}, {"interpolation": "bicubic"},
        "interpolation='lanczos'; bicubic is used",
    ),
    "an old file's size": (
        {"model_args": ..., "pretrained_cfg__input_size": [3, 224, 224]}, {},
        "images of 224 px are stated, but the arrays take 32 px, which is used",
    ),
    "a number as size": ({"model_args__img_size": 64}, {}, "images of 64 px are stated, but the arrays take 32 px"),
    "channels": (
        {"model_args": ..., "pretrained_cfg__input_size": [1, 32, 32]}, {}, "1 channels are stated, but the arrays take 3",
    ),
    "mean": (
        {"pretrained_cfg__mean": ...}, {"mean": (0.485, 0.456, 0.406)}, "mean is not stated; timm's default is used",
    ),
    "std": ({"pretrained_cfg__std": None}, {"std": (0.229, 0.224, 0.225)}, "std is not stated; timm's default"),
    "means of two channels": (
        {"pretrained_cfg__mean": [0.2, 0.4]}, {"mean": (pytest.approx(0.3),)}, "does not fit 3 channels; its average 0.3",
    ),
    "too few names": ({"label_names": NAMES[:9]}, {}, "label_names has 9 names for 10 classes, and is not used"),
    "no list of names": ({"label_names": "abcdefghij"}, {}, "label_names has 10 names for 10 classes, and is not used"),
    "a wrong number": ({"label_names": {"10": "x"}}, {}, "label_names has 1 names for 10 classes, and is not used"),
    "test_input_size": (
        {"pretrained_cfg__test_input_size": [3, 64, 64]}, {}, "not used, although timm uses it: test_input_size=",
    ),
    "test_crop_pct": ({"pretrained_cfg__test_crop_pct": 0.5}, {}, "timm uses it: test_crop_pct=0.5"),
    "label_offset": ({"pretrained_cfg__label_offset": 1}, {}, "timm uses it: label_offset=1"),
    "another norm": ({"model_args__norm_layer": "rmsnorm"}, {}, "timm uses it: model_args.norm_layer='rmsnorm'"),
    "many": (
        {f"model_args__key{number}": "x" * 500 for number in range(100)}, {}, " and 94 more",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTED)
def test_what_is_not_used_is_said_in_one_bounded_note(folder, case):
    changes, instead, note = CONTRADICTED[case]
    weights = find(folder(changed(**changes)))
    assert weights.metadata == {**ORIGIN, "preprocess": {**ORIGIN["preprocess"], **instead}}
    (said,) = weights.notes
    assert said.startswith("config.json: ") and note in said and len(said) < 600


HARMLESS = {
    "single values": {"pretrained_cfg__mean": 0.5, "pretrained_cfg__std": [0.5]},
    "absent or null": {"pretrained_cfg__interpolation": None, "pretrained_cfg__crop_pct": ...},
    "training": {"model_args__drop_rate": 0.1, "model_args__drop_path_rate": 0.1, "model_args__nlhb": True},
    "told by the arrays": {
        "model_args__embed_dim": 32,
        "model_args__num_blocks": 3,
        "model_args__patch_size": 8,
    },
    "where it comes from": {
        "pretrained_cfg__hf_hub_id": "timm/",
        "pretrained_cfg__url": "https://x",
        "note": "hello",
    },
    "off": {"model_args__stem_norm": False, "pretrained_cfg__test_input_size": None},
    "descriptions": {"label_descriptions": {"cat": "a cat"}},
    "another architecture's name": {"architecture": "our_mixer"},
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_changes_no_result_is_not_mentioned(folder, case):
    assert find(folder(changed(**HARMLESS[case]))).notes == ()


# Changes of the config -> a part of the error
REFUSED = {
    "classes": (
        {"num_classes": 3},
        "num_classes=3, but in the arrays of .* it is 10, so the two do not belong",
    ),
    "features": ({"num_features": 512}, "num_features=512, but in the arrays of .* it is 32"),
    "embed_dim": ({"model_args__embed_dim": 64}, "embed_dim=64, but"),
    "num_blocks": ({"model_args__num_blocks": 12}, "num_blocks=12, but .* it is 3"),
    "patch_size": ({"model_args__patch_size": 16}, r"patch_size=\(16, 16\), but"),
    "pooling": ({"global_pool": "max", "model_args": ...}, "global_pool='max' is not the mean over tokens"),
    "no pooling": ({"model_args__global_pool": ""}, "global_pool='' is not the mean over tokens"),
    "activation": ({"model_args__act_layer": "silu"}, "act_layer='silu' is not a GELU"),
    "quick GELU": ({"model_args__act_layer": "quick_gelu"}, "'quick_gelu' is not a GELU"),
    "gMixer": ({"architecture": "gmixer_24_224"}, "'gmixer_24_224' is not an MLP-Mixer: give other weights"),
    "ResMLP": ({"architecture": "resmlp_12_224"}, "'resmlp_12_224' is not an MLP-Mixer"),
    "not square": ({"model_args__img_size": [32, 64]}, "images of 32x64 px are not square"),
    "crop above 1": ({"pretrained_cfg__crop_pct": 1.2}, "crop_pct=1.2 is not above 0 and at most 1"),
    "zero std": ({"pretrained_cfg__std": [0.5, 0.0, 0.5]}, "std=.* cannot be used"),
    "infinite mean": ({"pretrained_cfg__mean": float("inf")}, "mean=inf cannot be used"),
    "words": (
        {"pretrained_cfg__mean": "half"},
        "cannot be used .could not convert string to float: 'half'.: correct",
    ),
    "no section": ({"pretrained_cfg": 7}, "cannot be used"),
    "a wrong size": ({"model_args": ..., "pretrained_cfg__input_size": 224}, "cannot be used"),
    "label numbers": ({"label_names": {"first": "cat"}}, "cannot be used"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_contradicts_the_arrays_or_cannot_be_computed_is_refused(folder, case):
    changes, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as error:
        find(folder(changed(**changes)))
    assert "config.json" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"mixer"', '{"pretrained_cfg": ' * 50_000, "\udcff"])
def test_a_damaged_config_is_refused_in_a_sentence(folder, text):
    place = folder(WRITTEN)
    (Path(place) / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"config.json cannot be used \(.*\): correct it, or remove it"):
        find(place)


def test_the_config_of_another_program_is_said_not_to_be_used(folder):
    weights = find(folder({"model_type": "vit", "architectures": ["ViT"], "id2label": {"0": "cat"}}))
    assert weights.metadata["preprocess"]["mean"] == (0.5,) and "class_names" not in weights.metadata
    assert weights.notes[0] == "config.json beside the weights is not timm's, and is not used"
    assert "assumed from their layout: model.gelu=erf" in weights.notes[1]


def test_weights_without_a_head_may_say_so(folder, tmp_path):
    arrays = {
        name: array
        for name, array in load_file(GOLDEN / "timm_tiny.safetensors").items()
        if "head" not in name
    }
    save_file(arrays, tmp_path / "w.safetensors")
    config = changed(
        num_classes=0, pretrained_cfg__num_classes=0, model_args__num_classes=0, model_args__global_pool=""
    )
    weights = find(folder(config, tmp_path / "w.safetensors"))
    assert "head/kernel" not in weights.shapes and weights.metadata == ORIGIN and weights.notes == ()


def test_gray_weights_take_the_average_of_three_channels(folder, tmp_path):
    arrays = load_file(GOLDEN / "timm_tiny.safetensors")
    arrays["stem.proj.weight"] = arrays["stem.proj.weight"].sum(1, keepdims=True)
    save_file(arrays, tmp_path / "w.safetensors")
    model = load(folder(changed(model_args__in_chans=1), tmp_path / "w.safetensors"))
    assert model.channels == 1
    assert model.preprocess["mean"] == pytest.approx((0.2,)) and model.preprocess["std"] == pytest.approx(
        (0.5,)
    )
    assert model.predict([np.zeros((9, 9), np.uint8)])[0].top  # it computes


@pytest.mark.parametrize(
    ("changes", "gelu"),
    [
        ({}, "tanh"),
        ({"model_args": WRITTEN["model_args"]}, "erf"),
        ({"pretrained_cfg__tag": "miil_in21k_ft_in1k"}, "erf"),
        ({"num_classes": 10}, "erf"),
    ],
)
def test_googles_weights_keep_tanh_in_a_copy_of_timms_repository(folder, tmp_path, changes, gelu):
    """timm's own config.json has no model_args; a model that was fine-tuned with timm has them, or other classes."""
    copied = {"architecture": "mixer_b16_224", "num_classes": 1000, "model_args": ..., **changes}
    config = changed(**{"pretrained_cfg__tag": "goog_in21k_ft_in1k", **copied})
    arrays = load_file(GOLDEN / "timm_tiny.safetensors")
    if config["num_classes"] == 1000:
        arrays |= {"head.weight": np.zeros((1000, 32), np.float32), "head.bias": np.zeros(1000, np.float32)}
    save_file(arrays, tmp_path / "w.safetensors")
    weights = find(folder(config, tmp_path / "w.safetensors"))
    assert weights.metadata["model"]["gelu"] == gelu
    said = ["because these are the weights hf-hub:timm/mixer_b16_224.goog" in note for note in weights.notes]
    assert said == [True] * (gelu == "tanh")


def test_a_file_of_ours_is_believed_before_a_config_that_contradicts_it(folder, tmp_path):
    own = {
        "model": {"gelu": "tanh"},
        "preprocess": {
            "image_size_px": 32,
            "interpolation": "bilinear",
            "mean": [0.5],
            "std": [0.5, 0.5, 0.5],
        },
        "class_names": NAMES,
    }
    params = load(GOLDEN / "timm_tiny.safetensors").params
    write_safetensors(tmp_path / "w.safetensors", params, metadata=own)
    config = changed(label_names=NAMES[::-1], pretrained_cfg__std=[0.5])
    weights = find(folder(config, tmp_path / "w.safetensors"))
    assert weights.metadata["model"]["gelu"] == "tanh" and weights.metadata["class_names"] == NAMES
    assert weights.metadata["preprocess"] == {**own["preprocess"], "crop_fraction": 0.9}
    (note,) = weights.notes
    assert (
        "contradicts the config.json beside it, and is believed: model.gelu='tanh' instead of 'erf'" in note
    )
    assert "preprocess.mean=[0.5] instead of" in note and "other class_names" in note and "std" not in note

"""Weights that do not fit a model are refused with all that differs, and with what to change."""

import itertools

import jax
import numpy as np
import pytest
from tiny_mixers import adapt_params, complaint, mixer, published, random_params, shapes_of, tree_of


def test_everything_that_does_not_fit_is_listed_at_once():
    weights = shapes_of(published("l16", 224, num_classes=21843))
    message = complaint(weights, published("b32", 224), head="keep", name="L_16.npz")
    assert message == "\n  ".join(
        [
            "L_16.npz cannot be adapted to the model:",
            "model.patches.size is (32, 32), the weights have (16, 16): set it to (16, 16)",
            "model.hidden_dim is 768, the weights have 1024: set it to 1024",
            "model.num_blocks is 12, the weights have 24: set it to 24",
            "model.channels_mlp_dim is 3072, the weights have 4096: set it to 4096",
            "model.tokens_mlp_dim is 384, the weights have 512: set it to 512",
            "the head cannot be kept, since the weights have 21,843 classes and the model 1,000: "
            "set init_head to 'auto' or 'reset'",
            "MixerBlock_12..23 (12x): unexpected, not in the model",
            "MixerBlock_0..11/LayerNorm_0/bias (12x): weights (1024,), model (768,)",
            "MixerBlock_0..11/LayerNorm_0/scale (12x): weights (1024,), model (768,)",
            "MixerBlock_0..11/LayerNorm_1/bias (12x): weights (1024,), model (768,)",
            "MixerBlock_0..11/LayerNorm_1/scale (12x): weights (1024,), model (768,)",
            "MixerBlock_0..11/channel_mixing/Dense_0/bias (12x): weights (4096,), model (3072,)",
            "MixerBlock_0..11/channel_mixing/Dense_0/kernel (12x): weights (1024, 4096), model (768, 3072)",
            "MixerBlock_0..11/channel_mixing/Dense_1/bias (12x): weights (1024,), model (768,)",
            "MixerBlock_0..11/channel_mixing/Dense_1/kernel (12x): weights (4096, 1024), model (3072, 768)",
            "MixerBlock_0..11/token_mixing/Dense_0/bias (12x): weights (512,), model (384,)",
            "MixerBlock_0..11/token_mixing/Dense_0/kernel (12x): weights (196, 512), model (49, 384)",
            "MixerBlock_0..11/token_mixing/Dense_1/bias (12x): weights (196,), model (49,)",
            "and 5 lines more",
        ]
    )


def test_every_published_pair_that_does_not_fit_gives_less_than_25_lines():
    sizes = {name: published(name, 224) for name in ("s8", "s16", "b16", "b32", "l16", "h14")}
    for theirs, ours in itertools.permutations(sizes, 2):
        assert complaint(shapes_of(sizes[theirs]), sizes[ours]).count("\n") < 24, (theirs, ours)


@pytest.mark.parametrize(
    ("size_px", "tokens_mlp_dim", "sentence"),
    [
        (
            384,
            500,
            "these weights are for 196 tokens (14x14: 224 px /16) with tokens_mlp_dim 384, the model has "
            "576 tokens (24x24: 384 px /16) with 500: set model.tokens_mlp_dim to 384 (resampled), "
            "or to 384 and preprocess.image_size_px to 224 (unchanged)",
        ),
        (
            448,
            768,
            "these weights are for 196 tokens (14x14: 224 px /16) with tokens_mlp_dim 384, the model has "
            "784 tokens (28x28: 448 px /16) with 768: set model.tokens_mlp_dim to 1536 (exact) or "
            "384 (resampled), or to 384 and preprocess.image_size_px to 224 (unchanged)",
        ),
        (224, 500, "model.tokens_mlp_dim is 500, the weights have 384: set it to 384"),
    ],
)
def test_a_tokens_mlp_dim_that_does_not_suit_the_resolution_is_refused_with_those_that_do(
    size_px, tokens_mlp_dim, sentence
):
    like = published("b16", size_px, tokens_mlp_dim=tokens_mlp_dim)
    cause, first, *_ = complaint(shapes_of(published("b16", 224)), like).split("\n  ")[1:]
    assert cause == sentence
    assert first.startswith("MixerBlock_0..11/token_mixing/Dense_0/bias (12x): weights (384,), model (")


def test_rectangles_are_described_by_both_sides():
    tall = {"patches": {"size": (2, 8)}}
    weights = shapes_of(tree_of(mixer(**tall), (32, 32, 3)))
    message = complaint(weights, tree_of(mixer(**tall, tokens_mlp_dim=7), (32, 16, 3)), grid=(16, 2))
    assert (
        "64 tokens (16x4: 32 px /2x8) with tokens_mlp_dim 6, the model has 32 tokens (16x2: 32x16 px /2x8)"
        in message
    )


@pytest.mark.parametrize("source_grid", [(3, 5), (-4, -4), (0, 0), (16, 0)])
def test_a_grid_with_another_number_of_tokens_is_refused_in_one_sentence(source_grid):
    weights = shapes_of(tree_of(mixer(), (8, 8, 3)))
    message = complaint(weights, tree_of(mixer(), (16, 16, 3)), source_grid=source_grid)
    assert (
        f"16 tokens of the weights and 64 of the model do not match source_grid={source_grid} and grid=None"
        in message
    )


def test_tokens_that_form_no_square_matter_only_if_the_grid_changes():
    weights = random_params(mixer(), (4, 6, 3))
    adapted, _ = adapt_params(weights, tree_of(mixer(), (4, 6, 3)))
    jax.tree.map(np.testing.assert_array_equal, adapted, weights)
    assert "6 tokens of the weights" in complaint(shapes_of(weights), tree_of(mixer(), (8, 8, 3)))


@pytest.mark.parametrize(("theirs", "ours"), [(1, 3), (3, 4), (4, 1)])
def test_only_three_channels_can_become_one(theirs, ours):
    message = complaint(shapes_of(tree_of(mixer(), (8, 8, theirs))), tree_of(mixer(), (8, 8, ours)))
    assert f"the model takes {ours} channels, the weights {theirs}: choose other images or weights" in message
    assert f"stem/kernel: weights (2, 2, {theirs}, 8), model (2, 2, {ours}, 8)" in message


def test_parameters_of_one_side_only_or_of_another_shape_are_named():
    like = tree_of(mixer(num_blocks=7), (8, 8, 3))
    weights = shapes_of(like)
    for i in (0, 2, 5):
        weights[f"MixerBlock_{i}/LayerNorm_0/scale"] = (9,)
    for i in range(1, 4):
        del weights[f"MixerBlock_{i}/channel_mixing/Dense_1/bias"]
    del weights["pre_head_layer_norm/bias"], weights["stem/bias"], weights["stem/kernel"]
    weights["MixerBlock_6/gate"] = (2, 2)
    weights["cls"] = ()
    assert complaint(weights, like).split("\n  ")[1:] == [
        "MixerBlock_1..3/channel_mixing/Dense_1/bias (3x): missing in the weights",
        "pre_head_layer_norm/bias: missing in the weights",
        "stem: missing in the weights",
        "MixerBlock_6/gate: unexpected, not in the model",
        "cls: unexpected, not in the model",
        "MixerBlock_0,2,5/LayerNorm_0/scale (3x): weights (9,), model (8,)",
    ]


def test_a_block_with_another_grid_than_the_first_is_found():
    like = tree_of(mixer(), (16, 16, 3))
    weights = shapes_of(tree_of(mixer(), (8, 8, 3)))
    weights["MixerBlock_1/token_mixing/Dense_1/bias"] = (17,)
    assert complaint(weights, like).split("\n  ")[1:] == [
        "MixerBlock_1/token_mixing/Dense_1/bias: weights (17,), model (64,)"
    ]


def test_weights_of_another_architecture_are_refused():
    like = tree_of(mixer(), (8, 8, 3))
    for weights in (
        {},
        {"stem/kernel": ()},
        dict.fromkeys(shapes_of(like), ()),
        dict.fromkeys(shapes_of(like), (0,) * 4),
    ):
        assert "cannot be adapted to the model" in complaint(weights, like)
    assert complaint({f"x{i}y": (1,) for i in range(500)}, like).count("\n") < 24
    for names in (["x\ny"], ["x0", "x"], ["x", "x" + "1" * 5000], ["x٣", "x4"]):
        weights = shapes_of(like) | dict.fromkeys(names, (1,))
        assert "unexpected, not in the model" in complaint(weights, like)


def test_a_head_that_cannot_be_kept_and_an_unknown_choice_are_refused():
    like = tree_of(mixer(), (8, 8, 3))
    without = shapes_of(tree_of(mixer(0), (8, 8, 3)))
    assert complaint(without, like, head="keep", name="w.npz") == (
        "w.npz cannot be adapted to the model:\n"
        "  the head cannot be kept, since the weights have none: set init_head to 'auto' or 'reset'"
    )
    assert complaint(without, like, head="new") == "unknown init_head 'new': choose one of auto, keep, reset"

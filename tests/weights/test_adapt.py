"""Weights are adapted to a model exactly, approximately or not at all, and the user is told."""

import itertools
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mlpmixer_flax import UserError, config
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.weights.adapt import adapt

TINY = {
    "patches": {"size": (2, 2)},
    "hidden_dim": 8,
    "num_blocks": 2,
    "tokens_mlp_dim": 6,
    "channels_mlp_dim": 12,
}


def mixer(num_classes=3, **changes):
    return MlpMixer(num_classes=num_classes, **{**TINY, **changes})


def tree_of(model, image_shape):
    """Returns the model's parameters as shapes."""
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image_shape)))["params"]


def random_params(model, image_shape, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), tree_of(model, image_shape)
    )


def shapes_of(params):
    return {name: leaf.shape for name, leaf in flatten_dict(params, sep="/").items()}


def adapt_params(params, like, **options):
    flat = flatten_dict(params, sep="/")
    return adapt({name: leaf.shape for name, leaf in flat.items()}, flat.__getitem__, like, **options)


def features(params, images, **changes):
    return jax.jit(mixer(num_classes=0, **changes).apply)({"params": params}, images)


def complaint(shapes, like, **options):
    """Returns the message of the error, which must come before anything is read."""

    def read(name):
        pytest.fail(f"{name} was read although the weights don't fit")

    with pytest.raises(UserError) as error:
        adapt(shapes, read, like, **options)
    return str(error.value)


def published(name, size_px, num_classes=1000, **changes):
    fields = {**getattr(config, f"mixer_{name}_config").to_dict(), **changes}
    return tree_of(MlpMixer(num_classes=num_classes, **fields), (size_px, size_px, 3))


def test_weights_of_the_same_model_come_back_as_they_are():
    params = random_params(mixer(), (8, 8, 3))
    adapted, notes = adapt_params(params, tree_of(mixer(), (8, 8, 3)))
    jax.tree.map(np.testing.assert_array_equal, adapted, params)
    assert notes == ["head: kept, 3 classes"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "tiles"),
    [
        ((2, 2), (2, 2)),
        ((2, 2), (3, 3)),
        ((3, 3), (2, 3)),
        ((2, 3), (2, 2)),
        ((3, 1), (1, 2)),
        ((3, 2), (2, 3)),
    ],
)
def test_the_features_of_a_larger_image_are_the_mean_of_the_features_of_its_tiles(source, tiles):
    height, width = 2 * source[0], 2 * source[1]
    large = (height * tiles[0], width * tiles[1], 3)
    params = random_params(mixer(), (height, width, 3))
    wider = {"tokens_mlp_dim": TINY["tokens_mlp_dim"] * tiles[0] * tiles[1]}
    target = source[0] * tiles[0], source[1] * tiles[1]
    adapted, notes = adapt_params(params, tree_of(mixer(**wider), large), grid=target, source_grid=source)
    images = np.random.default_rng(1).normal(size=(2, *large)).astype(np.float32)
    parts = images.reshape(2, tiles[0], height, tiles[1], width, 3).swapaxes(2, 3)
    expected = features(params, parts.reshape(-1, height, width, 3)).reshape(2, -1, 8).mean(1)
    np.testing.assert_allclose(features(adapted, images, **wider), expected, rtol=0, atol=1e-5)
    # No feature shows this bias, because every LayerNorm removes it.
    ours, theirs = (tree["MixerBlock_1"]["token_mixing"]["Dense_1"]["bias"] for tree in (adapted, params))
    np.testing.assert_array_equal(ours.reshape(target), np.tile(theirs.reshape(source), tiles))
    assert notes == [
        f"token mixing: {source[0]}x{source[1]} to {target[0]}x{target[1]} tokens, "
        "exact for tiles (Appendix C)",
        "head: kept, 3 classes",
    ]


@pytest.mark.parametrize("target", [(8, 8), (6, 6), (3, 3), (5, 7), (1, 1)])
def test_equal_tokens_give_the_same_hidden_activations_on_any_grid(target):
    params = random_params(mixer(), (8, 8, 3))
    like = tree_of(mixer(), (2 * target[0], 2 * target[1], 3))
    adapted, notes = adapt_params(params, like, grid=target)
    assert notes[0] == f"token mixing: 4x4 to {target[0]}x{target[1]} tokens, resampled (approximate)"
    for block in ("MixerBlock_0", "MixerBlock_1"):
        ours, theirs = (tree[block]["token_mixing"] for tree in (adapted, params))
        sums = (mlp["Dense_0"]["kernel"].sum(0) for mlp in (ours, theirs))
        np.testing.assert_allclose(*sums, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(ours["Dense_0"]["bias"], theirs["Dense_0"]["bias"])


@pytest.mark.parametrize("target", [(8, 8), (3, 5)])
def test_an_image_of_one_colour_has_the_same_features_on_any_grid_if_token_mixing_adds_the_same_to_all(
    target,
):
    params = random_params(mixer(), (8, 8, 3))
    for block in ("MixerBlock_0", "MixerBlock_1"):
        for name, leaf in params[block]["token_mixing"]["Dense_1"].items():
            params[block]["token_mixing"]["Dense_1"][name] = np.repeat(leaf[..., :1], 16, axis=-1)
    shape = (2 * target[0], 2 * target[1], 3)
    adapted, _ = adapt_params(params, tree_of(mixer(), shape), grid=target)
    colour = np.array([0.3, -0.7, 0.1], np.float32)
    np.testing.assert_allclose(
        features(adapted, np.broadcast_to(colour, (1, *shape))),
        features(params, np.broadcast_to(colour, (1, 8, 8, 3))),
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize("target", [(8, 12), (3, 4), (6, 9)])
def test_resampled_weights_keep_their_place_in_the_image(target):
    """A hidden unit that reads or writes a top-to-bottom gradient does so on any grid."""
    params = random_params(mixer(), (8, 12, 3))
    ramp = np.repeat(np.arange(4) - 1.5, 6).astype(np.float32)  # 4x6 tokens in raster order
    mlp = params["MixerBlock_0"]["token_mixing"]
    mlp["Dense_0"]["kernel"][:, 0] = mlp["Dense_1"]["kernel"][0] = mlp["Dense_1"]["bias"][:] = ramp
    like = tree_of(mixer(), (2 * target[0], 2 * target[1], 3))
    adapted, _ = adapt_params(params, like, grid=target, source_grid=(4, 6))
    mlp = adapted["MixerBlock_0"]["token_mixing"]
    seen, written, bias = (
        array.reshape(target)
        for array in (mlp["Dense_0"]["kernel"][:, 0], mlp["Dense_1"]["kernel"][0], mlp["Dense_1"]["bias"])
    )
    for array in seen, written, bias:
        assert (array[: target[0] // 2] < 0).all()
        np.testing.assert_allclose(array, -array[::-1], rtol=0, atol=1e-5)
    for array in written, bias:
        np.testing.assert_allclose(array, array[:, :1].repeat(target[1], axis=1), rtol=0, atol=1e-5)


def test_a_smooth_image_is_mixed_almost_the_same_with_twice_the_tokens_per_side():
    """The resampled first layer gives on a smooth map what the old one gave on the smaller map."""
    params = random_params(mixer(), (16, 16, 3))
    adapted, _ = adapt_params(params, tree_of(mixer(), (32, 32, 3)))

    def hidden(tree, side):
        at = (np.arange(side) + 0.5) / side
        smooth = np.cos(np.pi * at)[:, None] + 0.5 * np.cos(2 * np.pi * at)
        mlp = tree["MixerBlock_0"]["token_mixing"]["Dense_0"]
        return smooth.ravel() @ mlp["kernel"]

    np.testing.assert_allclose(hidden(adapted, 16), hidden(params, 8), rtol=0.1, atol=0.1)


def test_a_grayscale_image_gives_what_it_gives_as_three_equal_channels():
    params = random_params(mixer(), (8, 8, 3))
    adapted, notes = adapt_params(params, tree_of(mixer(), (8, 8, 1)))
    gray = np.random.default_rng(1).normal(size=(2, 8, 8, 1)).astype(np.float32)
    np.testing.assert_allclose(
        features(adapted, gray), features(params, gray.repeat(3, axis=-1)), rtol=0, atol=1e-5
    )
    assert notes[0] == "stem: kernels summed over 3 channels for grayscale images"


@pytest.mark.parametrize(
    ("theirs", "ours", "options", "note"),
    [
        (3, 3, {}, "head: kept, 3 classes"),
        (3, 3, {"same_classes": True}, "head: kept, 3 classes"),
        (3, 3, {"same_classes": False, "head": "keep"}, "head: kept, 3 classes"),
        (
            3,
            3,
            {"same_classes": False},
            "head: new, since the weights' 3 classes have other names than the model's",
        ),
        (3, 3, {"head": "reset"}, "head: new, as asked for"),
        (21843, 3, {}, "head: new, since the weights have 21,843 classes and the model 3"),
        (0, 3, {}, "head: new, since the weights have none"),
        (3, 0, {}, None),
        (3, 0, {"head": "keep"}, None),
    ],
)
def test_head_is_kept_or_reset_and_a_reset_one_is_not_read(theirs, ours, options, note):
    params = random_params(mixer(theirs), (8, 8, 3))
    like = random_params(mixer(ours), (8, 8, 3), seed=1)
    reads = []

    def read(name):
        reads.append(name)
        return flatten_dict(params, sep="/")[name]

    adapted, notes = adapt(shapes_of(params), read, like, **options)
    kept = note is not None and "kept" in note
    assert notes == ([note] if note else [])
    expected = {name: layer for name, layer in params.items() if kept or name != "head"}
    if ours and not kept:
        expected["head"] = like["head"]
    jax.tree.map(np.testing.assert_array_equal, adapted, expected)
    assert sorted(reads) == sorted(name for name in shapes_of(params) if kept or not name.startswith("head/"))


def test_a_reset_head_is_zero_where_the_model_is_given_as_shapes():
    like = tree_of(mixer(5), (8, 8, 3))
    like["head"]["bias"] = jnp.full((5,), -6.9)
    adapted, _ = adapt_params(random_params(mixer(3), (8, 8, 3)), like)
    np.testing.assert_array_equal(adapted["head"]["kernel"], np.zeros((8, 5)))
    np.testing.assert_array_equal(adapted["head"]["bias"], np.full(5, -6.9, np.float32))
    assert {leaf.dtype for leaf in jax.tree.leaves(adapted)} == {np.dtype("float32")}
    assert {type(leaf) for leaf in jax.tree.leaves(adapted)} == {np.ndarray}


@pytest.mark.parametrize("tokens_mlp_dim", [6, 24])
def test_arrays_that_were_read_and_changed_do_not_stay_in_memory(tokens_mlp_dim):
    flat = flatten_dict(random_params(mixer(), (8, 8, 3)), sep="/")
    read_once, changed = set(), []

    def read(name):
        assert name not in read_once
        read_once.add(name)
        assert not any(array() is not None for array in changed), "an array read before is still in memory"
        array = flat[name].copy()
        if "token_mixing" in name and (tokens_mlp_dim > 6 or not name.endswith("Dense_0/bias")):
            changed.append(weakref.ref(array))
        return array

    adapt(
        {name: leaf.shape for name, leaf in flat.items()},
        read,
        tree_of(mixer(tokens_mlp_dim=tokens_mlp_dim), (16, 16, 3)),
    )
    assert read_once == flat.keys() and changed


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

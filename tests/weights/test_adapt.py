"""Weights are adapted to a model exactly or approximately, and the user is told."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_mixers import TINY, adapt_params, mixer, random_params, shapes_of, tree_of

from mlpmixer_flax.weights.adapt import adapt


def features(params, images, **changes):
    return jax.jit(mixer(num_classes=0, **changes).apply)({"params": params}, images)


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

"""Tests that the model is that of the paper: sizes, outputs of Google's and timm's code, symmetry, gradients."""

import json
from functools import partial
from pathlib import Path

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

from mlpmixer_flax import UserError, config
from mlpmixer_flax.dataloader import get_dataset_info
from mlpmixer_flax.models import MixerBlock, MlpMixer, _project_patches

pytestmark = pytest.mark.usefixtures("quick_to_compile")

GOLDEN = Path(__file__).parent / "golden"
TINY = {
    "patches": {"size": (4, 4)},
    "hidden_dim": 16,
    "num_blocks": 2,
    "tokens_mlp_dim": 8,
    "channels_mlp_dim": 24,
}


def normal(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape)


def random_params(model, images, seed=0):
    """Returns parameters without zeros: those of head and biases would hide errors in what they multiply."""
    params = jax.jit(model.init)(jax.random.key(seed), images)["params"]
    return jax.tree.map(lambda p: p + 0.2 * normal(p.size, p.shape), params)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count"),  # 1000 classes, 224 px: the paper's Table 1 and the published files
    [
        ("s8", 20_646_504),
        ("s16", 18_528_264),
        ("s32", 19_104_624),
        ("b16", 59_880_472),
        ("b32", 60_293_428),
        ("l16", 208_196_168),
        ("l32", 206_939_264),
        ("h14", 432_350_952),
    ],
)
def test_the_published_sizes_have_the_published_parameter_counts(name, count):
    model = MlpMixer(num_classes=1000, **getattr(config, f"mixer_{name}_config"))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    assert sum(p.size for p in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize(
    ("name", "size_px", "channels", "low", "high"),
    [("digits", 8, 1, 50_000, 60_000), ("mnist", 28, 1, 2e5, 4e5), ("nano4", 32, 3, 665_000, 675_000)]
    + [("tiny4", 32, 3, 6.4e6, 6.8e6)],
)
def test_the_small_sizes_have_the_parameter_counts_we_promise(name, size_px, channels, low, high):
    model = MlpMixer(num_classes=10, **getattr(config, f"mixer_{name}_config"))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size_px, size_px, channels)))
    assert low <= sum(p.size for p in jax.tree.leaves(shapes)) <= high


def golden_model(sizes, **changes):
    fields = {
        name: sizes[name] for name in ("hidden_dim", "num_blocks", "tokens_mlp_dim", "channels_mlp_dim")
    }
    patches = {"size": (sizes["patch_size"],) * 2}
    return MlpMixer(
        **{"num_classes": sizes["num_classes"], "gelu": sizes["gelu"], **fields, **changes}, patches=patches
    )


def google_golden():
    sizes = json.loads((GOLDEN / "google_tiny.json").read_text())
    weights = np.load(GOLDEN / "google_tiny.npz")
    params = unflatten_dict({name: weights[name] for name in weights.files}, sep="/")
    return sizes, params, np.load(GOLDEN / "google_tiny_io.npz")


def timm_golden():
    """Returns timm's weights in our tree: (out, in) kernels are transposed, NCHW images become NHWC."""
    sizes = json.loads((GOLDEN / "timm_tiny.json").read_text())
    places = [("stem.proj", "stem"), ("norm", "pre_head_layer_norm"), ("head", "head")]
    for i in range(sizes["num_blocks"]):
        for theirs, ours in (
            ("norm1", "LayerNorm_0"),
            ("norm2", "LayerNorm_1"),
            ("mlp_tokens.fc1", "token_mixing/Dense_0"),
            ("mlp_tokens.fc2", "token_mixing/Dense_1"),
            ("mlp_channels.fc1", "channel_mixing/Dense_0"),
            ("mlp_channels.fc2", "channel_mixing/Dense_1"),
        ):
            places.append((f"blocks.{i}.{theirs}", f"MixerBlock_{i}/{ours}"))
    weights = load_file(GOLDEN / "timm_tiny.safetensors")
    flat = {}
    for theirs, ours in places:
        weight = weights[f"{theirs}.weight"]
        flat[f"{ours}/bias"] = weights[f"{theirs}.bias"]
        flat[f"{ours}/{'kernel' if weight.ndim > 1 else 'scale'}"] = (
            weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T
        )
    io = dict(np.load(GOLDEN / "timm_tiny_io.npz"))
    io["images"] = io["images_nchw"].transpose(0, 2, 3, 1)
    return sizes, unflatten_dict(flat, sep="/"), io


@pytest.mark.parametrize("golden", [google_golden, timm_golden])
def test_logits_and_pre_logits_equal_those_of_the_original_code(golden):
    sizes, params, io = golden()
    images = io["images"]
    logits = golden_model(sizes).apply({"params": params}, images)
    features = golden_model(sizes, num_classes=0).apply({"params": params}, images)
    np.testing.assert_allclose(logits, io["logits"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(features, io["pre_logits"], rtol=0, atol=1e-5)
    other = {"tanh": "erf", "erf": "tanh"}[sizes["gelu"]]
    assert (
        np.abs(golden_model(sizes, gelu=other).apply({"params": params}, images) - io["logits"]).max() > 1e-5
    )


def test_the_parameter_tree_is_exactly_googles():
    sizes, params, io = google_golden()
    ours = golden_model(sizes).init(jax.random.key(0), io["images"])["params"]
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, params)


def test_bfloat16_is_close_and_keeps_float32_parameters_and_logits():
    sizes, params, io = google_golden()
    model = golden_model(sizes, dtype="bfloat16")
    logits = model.apply({"params": params}, io["images"])
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, io["logits"], rtol=0, atol=0.05)
    assert np.abs(logits - io["logits"]).max() > 1e-5  # it does compute in bfloat16
    for leaf in jax.tree.leaves(model.init(jax.random.key(0), io["images"])):
        assert leaf.dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_every_parameter_gets_a_gradient(remat):
    model, images = MlpMixer(num_classes=3, remat=remat, **TINY), normal(1, (4, 8, 8, 3))
    params = random_params(model, images)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(model.apply({"params": p}, images) ** 2)))(params)
    for name, grad in flatten_dict(grads, sep="/").items():
        # This bias shifts all channels of a token by the same amount, and every LayerNorm after it removes the
        # shift. So its gradient is zero except for rounding, in the original too.
        largest = float(jnp.abs(grad).max())
        assert largest < 1e-4 if name.endswith("token_mixing/Dense_1/bias") else largest > 1e-2, name


@pytest.mark.slow
def test_remat_changes_neither_parameters_nor_gradients():
    images = normal(1, (4, 8, 8, 3))
    plain, remat = (
        MlpMixer(num_classes=3, remat=flag, stochastic_depth_rate=0.3, **TINY) for flag in (False, True)
    )
    params = random_params(plain, images)
    chex.assert_trees_all_equal_shapes(params, remat.init(jax.random.key(0), images)["params"])

    def gradient(model):
        def loss(p):
            return jnp.sum(
                model.apply({"params": p}, images, train=True, rngs={"dropout": jax.random.key(3)}) ** 2
            )

        return jax.jit(jax.grad(loss))(params)

    chex.assert_trees_all_close(gradient(plain), gradient(remat), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_shuffling_patches_and_their_pixels_is_a_symmetry_of_the_weights():
    """§3.4 of the paper: shuffled input with weights shuffled likewise gives the same features."""
    model, images = MlpMixer(num_classes=0, **TINY), normal(1, (2, 8, 8, 3))
    params = random_params(model, images)
    rng = np.random.default_rng(0)
    tokens, pixels = rng.permutation(4), rng.permutation(16)

    def shuffle(x):  # (n, 8, 8, 3): patches in a new order, the pixels of each in one shared new order
        x = x.reshape(-1, 2, 4, 2, 4, 3).swapaxes(2, 3).reshape(-1, 4, 16, 3)[:, tokens][:, :, pixels]
        return x.reshape(-1, 2, 2, 4, 4, 3).swapaxes(2, 3).reshape(-1, 8, 8, 3)

    def shuffle_weights(path, p):
        name = "/".join(k.key for k in path)
        if name == "stem/kernel":
            return p.reshape(16, 3, -1)[pixels].reshape(p.shape)
        if name.endswith("token_mixing/Dense_0/kernel"):
            return p[tokens]
        if "token_mixing/Dense_1" in name:
            return p[..., tokens]
        return p

    shuffled = jax.tree_util.tree_map_with_path(shuffle_weights, params)
    before = model.apply({"params": params}, images)
    np.testing.assert_allclose(
        model.apply({"params": shuffled}, shuffle(images)), before, rtol=1e-4, atol=1e-4
    )
    assert np.abs(model.apply({"params": params}, shuffle(images)) - before).max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_rectangular_patches_and_any_number_of_channels(channels):
    model = MlpMixer(num_classes=3, **{**TINY, "patches": {"size": (2, 8)}})
    images = normal(1, (2, 8, 16, channels))
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    assert params["stem"]["kernel"].shape == (2, 8, channels, 16)
    assert params["MixerBlock_0"]["token_mixing"]["Dense_0"]["kernel"].shape == (4 * 2, 8)
    assert jax.eval_shape(model.apply, {"params": params}, images).shape == (2, 3)


@pytest.mark.parametrize("patch", [(4, 4), (2, 4)])
def test_the_stem_is_a_convolution_and_its_gradient_also_computed_as_a_product(patch):
    images, outgoing = normal(0, (3, 8, 12, 5)), normal(1, (3, 8 // patch[0], 12 // patch[1], 7))
    layer = partial(nn.Conv, 7, patch, strides=patch, padding="VALID")
    variables = layer().init(jax.random.key(2), images)

    def results(layer):
        computed, backward = jax.vjp(
            lambda variables, images: layer.apply(variables, images), variables, images
        )
        return computed, backward(outgoing)

    expected = results(layer())
    chex.assert_trees_all_close(results(layer(conv_general_dilated=_project_patches)), expected, atol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other devices convolve")
def test_on_a_cpu_no_layer_is_a_convolution_because_their_gradients_are_slow():
    model, images = MlpMixer(num_classes=3, **TINY), normal(0, (4, 8, 8, 3))

    def loss(params):
        parts = images.reshape(2, 2, 8, 8, 3)  # microbatches
        return jnp.sum(jax.lax.map(lambda part: model.apply({"params": params}, part), parts))

    program = jax.jit(jax.grad(loss)).lower(random_params(model, images)).compile().as_text()
    assert "dot(" in program and "convolution(" not in program


def test_a_patch_that_does_not_divide_the_image_is_refused():
    with pytest.raises(
        UserError, match="patch of 4x4 px does not divide an image of 8x10 px: choose another"
    ):
        MlpMixer(num_classes=3, **TINY).init(jax.random.key(0), jnp.zeros((1, 8, 10, 3)))


def test_an_unknown_gelu_is_refused():
    with pytest.raises(UserError, match="unknown gelu 'relu': choose one of tanh, erf"):
        MlpMixer(num_classes=3, gelu="relu", **TINY).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


@pytest.mark.slow
def test_the_head_starts_at_zero_with_the_bias_of_the_config():
    model = MlpMixer(num_classes=3, head_bias_init=-6.9, **TINY)
    logits, _ = model.init_with_output(jax.random.key(0), normal(1, (2, 8, 8, 3)))
    np.testing.assert_allclose(logits, -6.9, rtol=1e-6)


@pytest.mark.slow
def test_stochastic_depth_skips_whole_branches_and_keeps_the_expectation():
    block = MixerBlock(tokens_mlp_dim=8, channels_mlp_dim=8, stochastic_depth_rate=0.4)
    x = normal(1, (1, 4, 6))
    params = block.init(jax.random.key(0), x)["params"]
    # If kernels are 0 and biases are not, the branches are constant and add up independently.
    params = jax.tree_util.tree_map_with_path(
        lambda path, p: jnp.zeros_like(p) if path[-1].key == "kernel" else normal(p.size, p.shape), params
    )
    full = block.apply({"params": params}, x) - x
    added = jax.jit(jax.vmap(lambda k: block.apply({"params": params}, x, True, rngs={"dropout": k}) - x))(
        jax.random.split(jax.random.key(2), 4000)
    )
    np.testing.assert_allclose(added.mean(0), full, atol=5 * float(added.std()) / 4000**0.5)
    none = jnp.all(added == 0, axis=(1, 2, 3)).mean()
    np.testing.assert_allclose(none, 0.4**2, atol=0.03)  # both branches are skipped


def test_stochastic_depth_rises_linearly_from_0_to_the_rate():
    model = MlpMixer(num_classes=0, stochastic_depth_rate=0.2, **{**TINY, "num_blocks": 5})
    rates = []

    def note(call, args, kwargs, context):
        if isinstance(context.module, MixerBlock) and context.method_name == "__call__":
            rates.append(context.module.stochastic_depth_rate)
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    np.testing.assert_allclose(rates, [0, 0.05, 0.1, 0.15, 0.2])


@pytest.mark.slow
def test_dropout_acts_in_training_only():
    model, images = MlpMixer(num_classes=0, dropout_rate=0.5, **TINY), normal(1, (2, 8, 8, 3))
    params = random_params(model, images)
    still = model.apply({"params": params}, images)
    moved = [
        model.apply({"params": params}, images, train=True, rngs={"dropout": jax.random.key(i)})
        for i in (1, 2)
    ]
    assert not np.allclose(moved[0], moved[1]) and not np.allclose(moved[0], still)
    np.testing.assert_array_equal(still, MlpMixer(num_classes=0, **TINY).apply({"params": params}, images))


def test_a_size_of_the_config_and_the_classes_of_a_dataset_make_a_model():
    num_classes = get_dataset_info("digits", "train")["num_classes"]
    model = MlpMixer(num_classes=num_classes, **config.mixer_b16_config)
    assert model.num_classes == 10 and model.hidden_dim == 768

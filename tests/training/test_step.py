"""Compares the update with NumPy: gradients, freezing, EMA, accumulation and randomness."""

import math
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_updates import (
    CLASSES,
    DESCENT,
    MESH,
    MIXED,
    QUICK,
    SHIFTED,
    config_with,
    loss_by_hand,
    make_run,
    start,
    tiny_batch,
    tiny_model,
)

from mlpmixer_flax import UserError
from mlpmixer_flax.training.dropout import dropout_by_image
from mlpmixer_flax.training.losses import LOSSES
from mlpmixer_flax.training.optimizer import make_optimizer
from mlpmixer_flax.training.step import make_preview_step
from mlpmixer_flax.training.validate import CHOICES

pytestmark = pytest.mark.usefixtures("quick_to_compile")

# The update


@pytest.mark.slow
@pytest.mark.parametrize("loss", CHOICES["loss"])
def test_an_update_is_a_step_down_the_gradient_of_the_loss(loss):
    update, state = make_run(**DESCENT, loss=loss)
    batch = tiny_batch()
    model = tiny_model(config_with())
    images = np.float32(batch["image"]) / 127.5 - 1  # mean and std 0.5
    one_hot = np.eye(CLASSES, dtype=np.float32)[batch["label"]]

    @jax.jit
    def forward(params):
        def mean_loss(params):
            logits = model.apply({"params": params}, images)
            if loss == "softmax":
                return -jnp.sum(one_hot * jax.nn.log_softmax(logits)) / 8, logits
            return -jnp.sum(jax.nn.log_sigmoid((2 * one_hot - 1) * logits)) / 8, logits

        return jax.grad(mean_loss, has_aux=True)(params)

    grads, logits = forward(state.params)
    after, metrics = update(state, batch)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, jax.device_get(grads))
    chex.assert_trees_all_close(after.params, expected, rtol=1e-5, atol=1e-6)

    def norm(t):
        return math.sqrt(sum((np.float64(x) ** 2).sum() for x in jax.tree.leaves(t)))

    by_hand = {
        "loss": loss_by_hand(loss, np.float64(logits), one_hot).mean(),
        "accuracy": (np.argmax(logits, -1) == batch["label"]).mean(),
        "gradient_norm": norm(grads),
        "parameter_norm": norm(expected),
        "learning_rate": 0.1,
    }
    assert metrics.keys() == by_hand.keys()
    for name, value in by_hand.items():
        assert metrics[name].dtype == jnp.float32 and metrics[name].shape == ()
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    assert 0 < by_hand["accuracy"] < 1  # so that a constant would not pass


def test_a_sharpness_aware_update_takes_the_gradient_uphill_of_the_parameters():
    """Computes SAM by its formula (arXiv 2010.01412, eq. 2), with gradients from the plain update tested above."""
    update, state = make_run(**DESCENT, **{"optimizer.sam_rho": 0.3})
    plain_update, _ = make_run(**DESCENT)
    batch = tiny_batch()

    def gradient(params):  # from a plain update with learning rate 0.1
        after, _ = plain_update(state.replace(params=params), batch)
        return jax.tree.map(lambda p, q: (np.float64(p) - np.float64(q)) / 0.1, params, after.params)

    first = gradient(state.params)
    norm = math.sqrt(sum((x**2).sum() for x in jax.tree.leaves(first)))
    uphill = jax.tree.map(lambda p, g: np.float32(p + 0.3 * g / norm), state.params, first)
    second = gradient(uphill)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, second)
    after, metrics = update(state, batch)
    chex.assert_trees_all_close(after.params, jax.tree.map(np.float32, expected), rtol=0, atol=2e-5)
    plain, plain_metrics = plain_update(state, batch)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after.params, plain.params)
    assert max(jax.tree.leaves(moved)) > 1e-3  # not the plain update
    np.testing.assert_allclose(metrics["loss"], plain_metrics["loss"], rtol=1e-6)  # not the loss uphill


@pytest.mark.slow
@pytest.mark.parametrize(
    ("freeze", "learning"),
    [
        ("all_but_head", {"head"}),
        ("stem, MixerBlock_0", {"pre_head_layer_norm", "head"}),
        ("head", {"stem", "MixerBlock_0", "pre_head_layer_norm"}),
    ],
)
def test_frozen_layers_stay_and_the_others_change_as_usual(freeze, learning):
    decay = {"optimizer.name": "adamw", "optimizer.weight_decay": 0.1, "ema_decay": 0.9}
    update, state = make_run(**{**DESCENT, **decay}, freeze=freeze)
    free_update, free_state = make_run(**{**DESCENT, **decay})
    after, free = state, free_state
    for _ in range(2):
        after, _ = update(after, tiny_batch())
    free, _ = free_update(free, tiny_batch())
    once, _ = update(state, tiny_batch())
    assert set(state.params) == {"stem", "MixerBlock_0", "pre_head_layer_norm", "head"}
    for name, layer in state.params.items():
        if name in learning:
            assert all(jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), layer, after.params[name])))
            chex.assert_trees_all_close(once.params[name], free.params[name], rtol=1e-5, atol=1e-6)
        else:  # weight decay does not change them either
            chex.assert_trees_all_equal(after.params[name], layer)
            chex.assert_trees_all_close(after.ema[name], layer, rtol=1e-6)
    held = {leaf.shape for leaf in jax.tree.leaves(state.opt_state)}
    assert ((4, 4, 1, 8) in held) == ("stem" in learning)  # no moments for layers that do not learn


@pytest.mark.parametrize("freeze", ["haed", "stem,MixerBlock_0,pre_head_layer_norm,head"])
def test_layers_that_cannot_be_frozen_are_refused(freeze):
    message = (
        f"freeze='{freeze}' must be 'all_but_head' or some, but not all, of the layers stem, MixerBlock_0"
    )
    with pytest.raises(UserError, match=message):
        make_run(**DESCENT, freeze=freeze)


def test_the_ema_follows_its_formula_and_steps_count_up():
    values = {"ema_decay": 0.2, "optimizer.learning_rate": 1.0, "schedule.warmup_steps": 2}
    update, state = make_run(**{**DESCENT, **values, "optimizer.clip_norm": 0.2})
    expected, decays = state.params, []
    for step in range(4):
        before = state
        state, metrics = update(state, tiny_batch(seed=step))
        assert int(state.step) == step + 1 and state.step.dtype == jnp.int32
        np.testing.assert_allclose(metrics["learning_rate"], [0.0, 0.5, 1.0, 1.0][step])
        if step == 0:  # the warmup starts at 0
            chex.assert_trees_all_equal(state.params, before.params)
            # The reported norm is the one before clipping.
            unclipped, start = make_run(**DESCENT)
            norm = unclipped(start, tiny_batch())[1]["gradient_norm"]
            assert norm > 0.2
            np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-5)
        decays.append(min(0.2, (1 + step) / (10 + step)))
        expected = jax.tree.map(
            lambda e, p, d=decays[-1]: d * e + (1 - d) * np.float64(p),
            expected,
            jax.device_get(state.params),
        )
        chex.assert_trees_all_close(state.ema, expected, rtol=1e-5, atol=1e-6)
    assert decays[1] < decays[2] == 0.2  # both arguments of the minimum were tested
    assert state.eval_params is state.ema
    gap = jax.tree.map(lambda e, p: np.abs(e - p).max(), state.ema, state.params)
    assert max(jax.tree.leaves(gap)) > 1e-3


def test_without_an_ema_the_parameters_are_evaluated():
    update, state = make_run(**DESCENT)
    assert state.ema is None
    state, _ = update(state, tiny_batch())
    assert state.ema is None and state.eval_params is state.params


@cache
def initial_state(seed):
    config = config_with(**{"seed": seed, "ema_decay": 0.9, "model.head_bias_init": -6.9})
    optimizer, model = make_optimizer(config, lambda step: 0.1), tiny_model(config)
    return jax.jit(lambda: start(model, optimizer, config), compiler_options=QUICK)()


def test_the_initial_ema_equals_the_parameters_and_has_buffers_of_its_own():
    state = initial_state(1)
    chex.assert_trees_all_equal(state.ema, state.params)
    assert int(state.step) == 0
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(buffers)) == len(buffers)  # or the state could not be donated to the update


def test_initial_weights_depend_on_the_seed():
    one, other = (initial_state(seed).params["stem"]["kernel"] for seed in (1, 2))
    initial_state.cache_clear()
    np.testing.assert_array_equal(one, initial_state(1).params["stem"]["kernel"])
    assert np.abs(one - other).max() > 0.01


def test_the_head_bias_makes_the_sigmoid_loss_start_low():
    params = initial_state(1).params
    np.testing.assert_array_equal(params["head"]["bias"], np.float32([-6.9] * CLASSES))
    update, state = make_run(**DESCENT, loss="sigmoid")
    _, metrics = update(state.replace(params=params), tiny_batch())
    p = 1 / (1 + math.exp(6.9))
    np.testing.assert_allclose(metrics["loss"], -math.log(p) - 2 * math.log(1 - p), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("values", "microbatches"), [({}, (2, 4)), (MIXED, (2,))], ids=["plain", "mixed"])
def test_accumulated_microbatches_equal_the_whole_batch(values, microbatches):
    """Also with mixup and CutMix, which mix images of the whole batch, not only of one microbatch."""
    (whole, by_whole), *others = (
        update(state, tiny_batch())
        for update, state in [
            make_run(**DESCENT, **values),
            *(make_run(**DESCENT, **values, accumulation_steps=n) for n in microbatches),
        ]
    )
    for parts, by_parts in others:
        # The order of sums differs, so float32 rounding differs.
        chex.assert_trees_all_close(parts.params, whole.params, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(by_parts, by_whole, rtol=1e-5)
    assert by_whole["gradient_norm"] > 0.1


@pytest.mark.slow
def test_every_image_has_its_own_draws_of_dropout_also_in_microbatches():
    """All images are the same one, so that only the draws make their losses different."""
    values = {**DESCENT, "model.dropout_rate": 0.5}
    whole, state = make_run(**values)
    two, _ = make_run(**values, accumulation_steps=2)
    batch = {name: np.repeat(rows[:1], 8, axis=0) for name, rows in tiny_batch().items()}
    model, image = tiny_model(config_with(**values)), np.float32(batch["image"][:1]) / 127.5 - 1

    @partial(jax.jit, compiler_options=QUICK)
    def losses(params):
        def loss(key):
            with dropout_by_image(key[None]):
                logits = model.apply(
                    {"params": params}, image, train=True, rngs={"dropout": jax.random.key(0)}
                )
            return -jax.nn.log_softmax(logits)[0, batch["label"][0]]

        _, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(0), 0))
        return jnp.stack([loss(key) for key in jax.random.split(dropout_key, 8)])

    by_image = losses(state.params)
    assert len(set(by_image.tolist())) == 8
    (after, metrics), (after_two, by_two) = whole(state, batch), two(state, batch)
    np.testing.assert_allclose(metrics["loss"], np.mean(by_image), rtol=1e-5)
    np.testing.assert_allclose(by_two["loss"], metrics["loss"], rtol=1e-5)
    chex.assert_trees_all_close(after_two.params, after.params, rtol=1e-5, atol=1e-6)


# Randomness


@pytest.mark.slow
@pytest.mark.parametrize("values", [SHIFTED, {"model.dropout_rate": 0.5}], ids=["augment", "dropout"])
def test_randomness_is_a_function_of_seed_and_step(values):
    update, state = make_run(**DESCENT, **values)
    batch = tiny_batch()
    first, by_first = update(state, batch)
    again, by_again = update(state, batch)
    chex.assert_trees_all_equal((first, by_first), (again, by_again))

    def at_step(update, step):
        return float(update(state.replace(step=np.int32(step)), batch)[1]["loss"])

    losses = [at_step(update, step) for step in (0, 1, 2, 1_000_000)]
    if values is SHIFTED:  # both get their keys from the same key, so one recompilation is enough
        losses.append(at_step(make_run(**DESCENT, **values, seed=1)[0], 0))
    assert losses[0] == float(by_first["loss"])
    gaps = [abs(a - b) for i, a in enumerate(losses) for b in losses[:i]]
    assert min(gaps) > 1e-4


def test_the_preview_shows_the_images_that_the_first_update_sees():
    """The loss of these images is the loss that the first update reports."""
    update, state = make_run(**DESCENT, **SHIFTED)
    config, batch = config_with(**DESCENT, **SHIFTED), tiny_batch()
    images = jax.jit(make_preview_step(config, num_classes=CLASSES, mesh=MESH), compiler_options=QUICK)(batch)
    assert images.dtype == np.uint8 and not np.array_equal(images, batch["image"])

    @partial(jax.jit, compiler_options=QUICK)
    def loss(images):
        logits = tiny_model(config).apply({"params": state.params}, images)
        return LOSSES["softmax"].per_image(logits, jax.nn.one_hot(batch["label"], CLASSES)).mean()

    seen, unaugmented = (loss(np.float32(x) / 127.5 - 1) for x in (images, batch["image"]))
    np.testing.assert_allclose(update(state, batch)[1]["loss"], seen, rtol=1e-5)
    assert abs(seen - unaugmented) > 1e-3


def test_nothing_is_random_if_augmentation_and_dropout_are_off():
    update, state = make_run(**DESCENT)
    (a, by_a), (b, by_b) = (update(state.replace(step=np.int32(s)), tiny_batch()) for s in (0, 5))
    chex.assert_trees_all_equal((a.params, by_a), (b.params, by_b))


@pytest.mark.slow
def test_mixed_precision_keeps_parameters_and_optimizer_in_float32():
    update, state = make_run(**{"model.dtype": "bfloat16", "ema_decay": 0.9, "accumulation_steps": 2})
    exact, start = make_run(**DESCENT)
    after, metrics = update(state, tiny_batch())
    for leaf in jax.tree.leaves((after.params, after.ema, after.opt_state, metrics)):
        assert leaf.dtype == (jnp.float32 if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.int32)
    gap = abs(float(metrics["loss"]) - float(exact(start, tiny_batch())[1]["loss"]))
    assert 1e-5 < gap < 0.05  # it does compute in bfloat16, whose rounding is 0.4 %

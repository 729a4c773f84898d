"""Weights of classes: how they are read, scaled, and used in the loss."""

import jax
import numpy as np
import pytest
from made_folders import names, write
from tiny_updates import CLASSES, DESCENT, MESH, config_with, fill, log_softmax, start, tiny_batch, tiny_model

from mlpmixer_flax import UserError, dataloader
from mlpmixer_flax.data import augment
from mlpmixer_flax.training.class_weights import (
    describe_class_weights,
    parse_weights,
    unsmoothed,
    weights_of,
)
from mlpmixer_flax.training.optimizer import make_optimizer, make_schedule
from mlpmixer_flax.training.step import make_train_step
from mlpmixer_flax.training.validate import validate


def test_names_may_have_commas_and_equals_signs():
    assert parse_weights("cat=2,dog=0.5") == parse_weights(" cat = 2 , dog=.5,") == {"cat": 2, "dog": 0.5}
    assert parse_weights("great white shark, man-eater=3,a=b=1e-2") == {
        "great white shark, man-eater": 3,
        "a=b": 0.01,
    }
    assert parse_weights("") == parse_weights("balanced") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rare", "class_weights='rare' has no weight from 0 to 1,000,000 after '': give 'balanced', or"),
        ("cat=2,dog", "has no weight .* after 'cat=2,'"),
        ("cat=much", "has no weight"),
        ("cat=-1", "has no weight"),
        ("cat=nan", "has no weight"),
        ("cat=2e6", "has no weight"),
        ("=2", "has no weight"),
        (" =2", "has no weight"),
        pytest.param(" " * 100_000, "has no weight", id="many spaces"),
        ("cat=1,cat=2", "has 'cat' twice: give it once"),
        ("\x1b[31m", r"class_weights='\\x1b\[31m' has no weight"),
    ],
)
def test_a_text_that_is_no_table_of_weights_is_refused_before_the_data_is_read(text, message):
    with pytest.raises(UserError, match=message):
        validate(config_with(class_weights=text))


def test_without_labels_there_is_nothing_to_weigh():
    with pytest.raises(UserError, match="label_smoothing=1 leaves no class for class_weights='balanced' to"):
        validate(config_with(**{"class_weights": "balanced", "augment.label_smoothing": 1.0}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder with 6 images of cats, 3 of dogs and 1 of an emu."""
    root = tmp_path_factory.mktemp("pets")
    write(root, *names("train/cat", 6), *names("train/dog", 3), *names("train/emu", 1), "val/cat/0.png")
    return dataloader.open_examples(f"folder:{root}", "train")


PETS = ["cat", "dog", "emu"]


def test_balanced_weights_give_every_class_the_same_sum_and_images_the_average_1(folder):
    weights = weights_of("balanced", PETS, folder)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, [10 / 18, 10 / 9, 10 / 3], rtol=1e-6)
    assert np.mean(weights[folder.known_labels]) == pytest.approx(1)
    assert weights_of("", PETS, folder) is None


def test_a_table_is_scaled_to_the_average_1_and_other_classes_have_1_before(folder):
    weights = weights_of("emu=5,cat=0.5", PETS, folder)
    np.testing.assert_allclose(weights, np.float32([0.5, 1, 5]) * 10 / (3 + 3 + 5), rtol=1e-6)
    text = describe_class_weights(weights, PETS)
    assert text == "class weights in the training loss: emu: 4.545, dog: 0.9091, cat: 0.4545"


def test_a_class_without_images_has_no_weight(folder):
    np.testing.assert_allclose(weights_of("balanced", [*PETS, "fox"], folder)[3], 0)


def test_names_must_be_classes_and_images_must_weigh_something(folder):
    with pytest.raises(
        UserError, match="class_weights='cta=2' has 'cta', which is not a class: use names such as 'cat', "
    ):
        weights_of("cta=2", PETS, folder)
    with pytest.raises(UserError, match="gives all training images the weight 0"):
        weights_of("cat=0,dog=0,emu=0", PETS, folder)


def test_labels_of_a_streamed_dataset_are_counted_by_reading_its_records():
    streamed = dataloader.open_examples("digits", "train[:200]", cache_bytes=0)
    cached = dataloader.open_examples("digits", "train[:200]")
    assert streamed.known_labels is None and cached.known_labels is not None
    digits = [str(number) for number in range(10)]
    weights = weights_of("balanced", digits, streamed)
    np.testing.assert_array_equal(weights, weights_of("balanced", digits, cached))
    assert weights.std() > 0.05


# --- in the update

WEIGHTS = np.float32([0.2, 1.1, 2.5])


def test_an_image_counts_as_often_as_its_class_weighs(quick_to_compile):
    """Compares the loss, and the change of the head's bias, with their formulas: smoothed labels, microbatches."""
    config = config_with(**DESCENT, **{"augment.label_smoothing": 0.1, "accumulation_steps": 4})
    model, batch = tiny_model(config), tiny_batch()
    schedule = make_schedule(config, total_steps=10, warmup_steps=0)
    optimizer = make_optimizer(config, schedule)
    state = fill(jax.eval_shape(lambda: start(model, optimizer, config)))
    update = make_train_step(model, optimizer, schedule, config, mesh=MESH, class_weights=WEIGHTS)
    after, metrics = jax.jit(update)(state, batch)
    before, loss = state.params, float(metrics["loss"])
    logits = model.apply({"params": before}, np.float32(batch["image"]) / 127.5 - 1)
    log_p = log_softmax(np.float64(logits))
    labels = 0.9 * np.eye(CLASSES)[batch["label"]] + 0.1 / CLASSES
    each = WEIGHTS[batch["label"]]
    assert loss == pytest.approx(np.mean(each * -(labels * log_p).sum(1)), rel=1e-5)
    gradient = np.mean(each[:, None] * (np.exp(log_p) - labels), axis=0)
    np.testing.assert_allclose(
        after.params["head"]["bias"], before["head"]["bias"] - 0.1 * gradient, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_the_weight_of_a_mix_is_the_mean_of_its_images_whatever_the_smoothing(smoothing):
    vector = unsmoothed(WEIGHTS, smoothing=smoothing)
    labels = np.asarray(augment.smooth_labels(np.arange(CLASSES), CLASSES, smoothing=smoothing))
    np.testing.assert_allclose(labels @ vector, WEIGHTS, rtol=1e-4)
    mixed = 0.3 * labels[0] + 0.7 * labels[2]
    assert mixed @ vector == pytest.approx(0.3 * WEIGHTS[0] + 0.7 * WEIGHTS[2], rel=1e-4)

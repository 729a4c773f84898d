"""Compares the scores of a batch with NumPy."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from tiny_updates import (
    DESCENT,
    MESH,
    SHIFTED,
    config_with,
    log_softmax,
    loss_by_hand,
    make_run,
    tiny_batch,
    tiny_model,
)

from mlpmixer_flax.data import augment
from mlpmixer_flax.training.evaluation import make_eval_step

pytestmark = pytest.mark.usefixtures("quick_to_compile")


class FirstPixels(nn.Module):
    """Returns the first pixels of the image as logits, so that the scores can be computed by hand."""

    num_classes: int

    def __call__(self, images, *, train=False):
        return images.reshape(images.shape[0], -1)[:, : self.num_classes]


def score(logits, labels, mask, *, loss="softmax"):
    """Returns the sums of images whose pixels are these logits, integers from 0 to 255.

    Pixels are divided by 255, and then by the std of 1/255, so that they do not change.
    """
    n, classes = np.shape(logits)
    config = config_with(
        **{
            "preprocess.image_size_px": 3,
            "preprocess.mean": (0.0,),
            "preprocess.std": (1 / 255,),
            "loss": loss,
        }
    )
    images = np.full((n, 9), 255, np.uint8)
    images[:, :classes] = logits
    batch = {"image": images.reshape(n, 3, 3, 1), "label": np.int32(labels), "mask": np.array(mask)}
    return jax.device_get(jax.jit(make_eval_step(FirstPixels(classes), config, mesh=MESH))({}, batch))


def test_scores_are_sums_over_unmasked_rows_top1_and_top5_by_hand():
    logits = [
        [9, 1, 2, 3, 4, 5, 6],  # label 0: best
        [9, 1, 2, 3, 4, 5, 6],  # label 3: fifth
        [9, 1, 2, 3, 4, 5, 6],  # label 2: sixth
        [1, 8, 2, 3, 4, 5, 6],  # label 1: best
        [9, 1, 2, 3, 4, 5, 6],  # label 0, masked
        [0, 0, 0, 0, 0, 0, 200],  # label 0, masked: a loss of 200 that must not count
    ]
    labels, mask = [0, 3, 2, 1, 0, 0], [True] * 4 + [False] * 2
    sums = score(logits, labels, mask)
    losses = -log_softmax(np.float64(logits))[np.arange(6), labels]
    assert sums.keys() == {"loss", "accuracy", "accuracy_top5", "count", "class_accuracy", "class_count"}
    np.testing.assert_array_equal(sums.pop("class_accuracy"), [1, 1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(sums.pop("class_count"), [1, 1, 1, 1, 0, 0, 0])
    assert (sums["accuracy"], sums["accuracy_top5"], sums["count"]) == (2, 3, 4)
    np.testing.assert_allclose(sums["loss"], losses[:4].sum(), rtol=1e-5)
    assert all(value.dtype == np.float32 and value.shape == () for value in sums.values())


def test_scores_use_the_loss_of_the_config():
    logits, labels = [[3, 1, 2], [0, 4, 1]], [0, 2]
    one_hot = np.eye(3)[labels]
    sums = score(logits, labels, [True, True], loss="sigmoid")
    expected = loss_by_hand("sigmoid", np.float64(logits), one_hot).sum()
    np.testing.assert_allclose(sums["loss"], expected, rtol=1e-5)


@pytest.mark.parametrize("classes", [2, 4, 5])
def test_with_five_classes_or_fewer_all_images_are_in_the_top5(classes):
    logits = np.tile(np.arange(classes), (classes, 1))
    sums = score(logits, np.arange(classes), [True] * classes)
    assert (sums["accuracy"], sums["accuracy_top5"], sums["count"]) == (1, classes, classes)


def test_a_batch_of_padding_has_sums_of_0():
    sums = score([[1, 2], [3, 4]], [0, 0], [False, False])
    assert len(sums) == 6 and not any(value.any() for value in sums.values())


def test_evaluation_preprocesses_as_at_test_time_without_dropout_or_augmentation():
    values = {
        **SHIFTED,
        "preprocess.crop_fraction": 0.5,
        "preprocess.mean": (0.2,),
        "model.dropout_rate": 0.5,
        "model.stochastic_depth_rate": 0.5,
    }
    config = config_with(**values)
    model, batch = tiny_model(config), tiny_batch()
    params = make_run(**DESCENT)[1].params

    @jax.jit
    def by_hand(params):
        middle = np.float32(batch["image"][:, 2:6, 2:6])
        images = (augment.resize(middle, 8, "bilinear") / 255 - 0.2) / 0.5
        return model.apply({"params": params}, images)

    sums = jax.jit(make_eval_step(model, config, mesh=MESH))(params, batch)
    logits = np.float64(by_hand(params))
    np.testing.assert_allclose(
        sums["loss"], -log_softmax(logits)[np.arange(8), batch["label"]].sum(), rtol=1e-5
    )
    assert sums["accuracy"] == (logits.argmax(-1) == batch["label"]).sum()

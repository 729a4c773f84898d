"""Test-time flip: the mean of the logits of an image and its mirror image, in Python and in two programs."""

import csv
import dataclasses
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from mlpmixer_flax import evaluate, load, predict
from mlpmixer_flax.dataloader import open_examples


def test_logits_are_the_mean_over_an_image_and_its_mirror_image(digits_run):
    model, images = load(digits_run), open_examples("digits", "test[:20]").images
    plain, mirrored = (np.asarray(model.logits(model.params, x)) for x in (images, images[:, :, ::-1]))
    assert abs(plain - mirrored).max() > 1  # or the test would not test the flip
    flipped = np.asarray(dataclasses.replace(model, flip=True).logits(model.params, images))
    np.testing.assert_allclose(flipped, (plain + mirrored) / 2, atol=1e-5)


def test_evaluate_says_the_scores_with_flip_apart_from_the_plain_ones(digits_run, tmp_path, capsys):
    arguments = [f"--workdir={digits_run}", "--split=test[:100]", f"--output={tmp_path}", "--flip"]
    assert evaluate.main(arguments) == 0
    text = capsys.readouterr().out
    found = json.loads((tmp_path / "scores.json").read_text())
    examples = open_examples("digits", "test[:100]")
    parts = text.split("with --flip, from each image and its mirror image:")
    for flip, part, scores in zip((False, True), parts, (found, found["flip"]), strict=True):
        model = dataclasses.replace(load(digits_run), flip=flip)
        best = [prediction.top[0].label for prediction in model.predict(list(examples.images))]
        assert scores["accuracy"] == pytest.approx(np.mean(best == examples.labels))
        shown = float(re.search(r"top-1 accuracy +([\d.]+)%", part)[1])
        assert shown == pytest.approx(100 * scores["accuracy"], abs=0.01)
    assert found["flip"]["accuracy"] != found["accuracy"]
    assert "mistaken for" in parts[0]  # the rows per class are without the flip
    assert len(found["mistakes"]) == round(100 * (1 - found["accuracy"]))  # those without the flip


def test_predict_uses_the_flip(digits_run, tmp_path, capsys):
    image = open_examples("digits", "test[:1]").images[0, ..., 0]
    for name, pixels in {"a.png": image, "b.png": image[:, ::-1]}.items():
        Image.fromarray(pixels).save(tmp_path / name)
    shown = {}
    for flip in ([], ["--flip"]):
        assert predict.main([f"--workdir={digits_run}", "--csv", *flip, str(tmp_path)]) == 0
        rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
        shown[bool(flip)] = [[float(row["probability"]) for row in rows[5 * i :][:5]] for i in range(2)]
    assert shown[False][0] != pytest.approx(shown[False][1], rel=1e-2)
    assert shown[True][0] == pytest.approx(shown[True][1], rel=1e-4)

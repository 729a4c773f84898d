"""`import mlpmixer_flax as mf`: training, loading, predictions and features from Python."""

import dataclasses
import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_datasets import encode
from PIL import ExifTags, Image

import mlpmixer_flax as mf
from mlpmixer_flax.data import augment
from mlpmixer_flax.data.images import read_square
from mlpmixer_flax.export import export
from mlpmixer_flax.inference import inputs
from mlpmixer_flax.training.report import read_metrics

pytestmark = pytest.mark.usefixtures("quick_to_compile")

GOLDEN = Path(__file__).parent.parent / "golden"
PIXELS = np.random.default_rng(0).integers(0, 256, (7, 20, 26, 4), dtype=np.uint8)


@pytest.fixture(scope="module")
def model():
    """Returns a model for RGB images of 32 px, with 3 blocks, whose predictions differ between images."""
    return mf.load(GOLDEN / "google_tiny.npz")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Returns seven PNG files: RGB, as the model needs it."""
    folder = tmp_path_factory.mktemp("files")
    for number, pixels in enumerate(PIXELS):
        (folder / f"{number}.png").write_bytes(encode(pixels[..., :3]))
    return [str(folder / f"{number}.png") for number in range(len(PIXELS))]


# --- names


def test_every_public_name_exists_and_none_is_also_a_module():
    package = Path(mf.__file__).parent
    for name in mf.__all__:
        assert callable(getattr(mf, name))
        assert not (package / f"{name}.py").exists() and not (package / name).exists()
    assert mf.load.__module__ == "mlpmixer_flax.inference.load"
    assert mf.fit.__module__ == "mlpmixer_flax.training.loop"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        mf.nonsense  # noqa: B018


# --- training and loading


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns the directory of a tiny run, as text, and what `fit` returned."""
    changes = {
        "model": {"hidden_dim": 16, "num_blocks": 1},
        "total_steps": 4,
        "eval_every_steps": 2,
        "augment.mixup_alpha": 0.0,  # otherwise compiling takes seconds
        "ema_decay": 0.5,
    }
    workdir = str(tmp_path_factory.mktemp("runs") / "digits")
    return workdir, mf.fit(mf.load_config("digits.py", changes), workdir)


@pytest.mark.slow
def test_fit_returns_the_last_test_scores(run):
    workdir, scores = run
    last = [row for row in read_metrics(Path(workdir) / "metrics.jsonl") if "test/accuracy" in row][-1]
    assert last["step"] == 4 and scores["test/accuracy"] == last["test/accuracy"]
    assert scores["test/loss"] == last["test/loss"]


def test_a_run_and_its_exported_file_give_the_same_predictions_and_features(run, tmp_path, files):
    workdir, _ = run
    model = mf.load(workdir)
    assert (model.name, model.step, model.channels) == (workdir, 4, 1)
    export(model, tmp_path / "w.npz", format="npz")
    for source in (Path(workdir), tmp_path / "w.npz", str(tmp_path / "w.npz")):
        other = mf.load(source)
        assert other.predict(files) == model.predict(files)
        np.testing.assert_array_equal(other.features(files), model.features(files))
    assert mf.load(workdir, checkpoint="last").predict(files) != model.predict(files)


# --- predictions


def test_files_pillow_images_and_arrays_of_one_image_have_one_prediction(model, files, tmp_path):
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    encoded = {
        "rgb.png": encode(PIXELS[0, ..., :3]),
        "rgba.png": encode(PIXELS[1]),
        "gray.png": encode(PIXELS[2, ..., 0]),
        "16_bits.png": encode(PIXELS[3, ..., 0].astype(np.uint16) * 256),
        "turned.jpg": encode(PIXELS[4, ..., :3], "JPEG", exif=turned),
        "palette.gif": encode(PIXELS[5, ..., :3], "GIF"),
    }
    for name, content in encoded.items():
        (tmp_path / name).write_bytes(content)
    paths = [tmp_path / name for name in encoded]
    pillow_images = [Image.open(path) for path in paths]  # not read yet
    assert pillow_images[3].mode == "I;16"
    expected = model.predict(paths)
    assert [prediction.image for prediction in expected] == [str(path) for path in paths]
    assert len({prediction.top[0].probability for prediction in expected}) == len(paths)
    for images in ([str(path) for path in paths], list(encoded.values()), pillow_images, pillow_images):
        assert [prediction.top for prediction in model.predict(images)] == [p.top for p in expected]

    mixed = [str(paths[0]), paths[1], pillow_images[2], PIXELS[0, ..., :3], PIXELS[1], PIXELS[2, ..., 0]]
    found = model.predict([*mixed, PIXELS[2, ..., :1]], batch_size=7)
    same_batch = model.predict([*paths[:3], *paths[:3], paths[2]], batch_size=7)
    assert [prediction.top for prediction in found] == [prediction.top for prediction in same_batch]
    assert [prediction.image for prediction in found][1:4] == [str(paths[1]), "images[2]", "images[3]"]

    whole = model.predict(PIXELS[..., :3])
    assert [prediction.top for prediction in whole] == [prediction.top for prediction in model.predict(files)]


def test_top_classes_are_the_most_probable_ones_in_order(model, files):
    (every,) = model.predict(files[:1], top=99)
    assert [score.class_name for score in every.top] == [str(score.label) for score in every.top]
    probabilities = [score.probability for score in every.top]
    assert len(probabilities) == 10 and probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1)
    (best,) = model.predict(files[:1], top=3)
    assert [score.label for score in best.top] == [score.label for score in every.top[:3]]
    image = read_square(files[0], channels=3, size_px=32, crop_fraction=0.875, interpolation="bilinear")
    expected = jax.jit(lambda image: model.probabilities(model.params, image, cropped=True))(image[None])[0]
    found = [score.probability for score in sorted(every.top)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_one_image_is_a_list_of_one(model, files):
    file, rgb = files[0], PIXELS[0, ..., :3]
    ones = [
        file,
        Path(file),
        Path(file).read_bytes(),
        Image.fromarray(rgb),
        rgb,
        PIXELS[0],
        PIXELS[0, ..., 0],
    ]
    for image in [*ones, jnp.asarray(rgb)]:
        expected = model.predict([image])
        assert model.predict(image) == expected and list(model.predict_each(image)) == expected
        np.testing.assert_array_equal(model.features(image), model.features([image]))
    assert [prediction.image for prediction in model.predict(Path(file))] == [file]


def test_several_images_may_be_an_array_of_another_library_or_any_iterable(model, files):
    expected = [prediction.top for prediction in model.predict(files)]
    arrays = PIXELS[..., :3]
    for images in (
        jnp.asarray(arrays),
        list(jnp.asarray(arrays)),
        iter(files),
        tuple(files),
        np.array(files),
    ):
        assert [prediction.top for prediction in model.predict(images)] == expected
    assert {type(prediction.image) for prediction in model.predict(np.array(files))} == {str}
    with pytest.raises(mf.UserError, match="^images=None are not images: give a list of images$"):
        model.predict(None)


LEVELS = "give levels from 0 to 255 as uint8"
SHAPES = r"give \(h, w\), or \(h, w, c\) with 1, 3 or 4 channels, or several images as \(n, h, w, c\)"


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (PIXELS[0] / 255, rf"it has type float64: {LEVELS}, for example \(255 \* array\).round\(\).astype\('uint8'\)$"),
        (np.float32(PIXELS[0]), rf"it has type float32: {LEVELS}, for example array.round\(\).astype\('uint8'\)$"),
        (PIXELS[0] / 127.5 - 1, f"it has type float64: {LEVELS}$"),
        (np.full((9, 9), np.nan), f"it has type float64: {LEVELS}$"),
        (PIXELS[0].astype(np.uint16) * 257, f"it has type uint16: {LEVELS}$"),
        (PIXELS[0].astype(int), rf"it has type int64: {LEVELS}, for example array.astype\('uint8'\)$"),
        (PIXELS[0] > 127, rf"it has type bool: {LEVELS}, for example 255 \* array.astype\('uint8'\)$"),
        (jnp.asarray(PIXELS[0] / 255), f"it has type float32: {LEVELS}, for example"),
        (PIXELS[0, ..., :2], rf"it has shape \(20, 26, 2\): {SHAPES}$"),
        (PIXELS[0, ..., 0, None, None], rf"it has shape \(20, 26, 1, 1\): {SHAPES}$"),
        (PIXELS[0].transpose(2, 0, 1), rf"it has shape \(4, 20, 26\): {SHAPES}; if its channels come first, give "),
        (PIXELS[..., 0], rf"it has shape \(7, 20, 26\): {SHAPES}$"),
        (PIXELS[0, 0, 0], rf"it has shape \(4,\): {SHAPES}$"),
        (PIXELS[:0, ..., 0], rf"it has shape \(0, 20, 26\): {SHAPES}$"),
        (PIXELS[0, :0, :, :3], "an array uint8 .* is not an image"),
    ],
)  # fmt: skip
def test_an_array_that_is_no_image_is_refused_with_what_to_give(model, array, message):
    for method in (model.predict, model.features):
        with pytest.raises(mf.UserError, match=rf"^images\[0\]: {message}"):
            method([array])
        if array.ndim != 4 and array.ndim != 2:
            with pytest.raises(mf.UserError, match=rf"^images\[0\]: {message}"):
                method(array)
    if array.ndim == 3:
        with pytest.raises(mf.UserError, match=rf"^images\[0\]: {message}"):
            model.predict(np.stack([array, array]))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (PIXELS[..., :3] / 255, "the images are float64, not uint8: give levels from 0 to 255 as uint8"),
        (PIXELS[..., :3].astype(np.uint16), "the images are uint16, not uint8"),
        (PIXELS[0, ..., :3], r"the images have shape \(20, 26, 3\): give \(n, h, w, 3\)"),
        (PIXELS, r"the images have shape \(7, 20, 26, 4\): give \(n, h, w, 3\)"),
    ],
)
def test_the_pure_functions_refuse_what_would_give_another_class(model, images, message):
    features = model.features_of("pooled", cropped=False)
    for function in (
        model.logits,
        model.probabilities,
        lambda params, images: features(params, {"image": images}),
    ):
        with pytest.raises(mf.UserError, match=message):
            function(model.params, images)


@pytest.mark.parametrize(
    "url", ["xyz://bucket/cat.jpg", "https://example.org/cat.jpg", Path("https://example.org/cat.jpg")]
)
def test_urls_and_folders_are_refused(model, url, files, tmp_path):
    with pytest.raises(mf.UserError, match=f"^image '{url}' is a URL, and only local paths and those such"):
        model.predict([*files, url])
    with pytest.raises(mf.UserError, match=f"^image '{tmp_path}' is a folder: give the images in it$"):
        model.features([tmp_path])


def test_counts_below_one_are_refused(model, files):
    for arguments, message in [({"top": 0}, "top=0 must"), ({"batch_size": -1}, "batch_size=-1 must")]:
        with pytest.raises(mf.UserError, match=message):
            model.predict(files, **arguments)
    with pytest.raises(mf.UserError, match="batch_size=0 must"):
        model.features(files, batch_size=0)


@pytest.mark.parametrize("bad", [[], [0], [4], [0, 4], [1, 2, 3], [3, 4], [0, 1, 2, 3, 4]], ids=str)
def test_flaws_are_reported_in_order_and_other_images_are_predicted(model, files, bad):
    images = ["absent.png" if number in bad else file for number, file in enumerate(files[:5])]
    expected = model.predict(files[:5], batch_size=2)
    found = list(model.predict_each(images, batch_size=2))
    assert [prediction.image for prediction in found] == images
    for number, prediction in enumerate(found):
        if number in bad:
            assert prediction.top == () and prediction.flaw.startswith("image 'absent.png' cannot be used (")
        else:
            assert prediction == expected[number]


def test_no_images_have_no_predictions_and_no_features(model):
    assert model.predict([]) == [] and list(model.predict_each([])) == []
    with pytest.raises(mf.UserError, match="list of images is empty: give at least one"):
        model.features([])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("absent.png", "^image 'absent.png' cannot be used .*FileNotFoundError"),
        (b"no image", r"^images\[2\]: the image of 8 bytes cannot be used: it is a text file"),
        (PIXELS[0] / 255, r"^images\[2\]: it has type float64: give levels"),
        (PIXELS[0, ..., :2], r"^images\[2\]: it has shape \(20, 26, 2\): give .* 1, 3 or 4 channels"),
        (Image.new("F", (9, 8)), r"^images\[2\]: the Pillow image of 9x8 px cannot be used .* float32"),
        (None, r"^images\[2\]: image None cannot be used"),
    ],
)  # fmt: skip
def test_an_error_names_the_first_image_that_cannot_be_used(model, files, image, message):
    images = [*files[:2], image, files[3], "also_absent.png"]
    for method in (model.predict, model.features):
        for batch_size in (2, 32):
            with pytest.raises(mf.UserError, match=message) as error:
                method(images, batch_size=batch_size)
            assert "\n" not in str(error.value)
    flaws = [prediction.flaw for prediction in model.predict_each(images)]
    assert [bool(flaw) for flaw in flaws] == [False, False, True, False, True]


def test_images_are_read_as_they_are_needed(model, files, monkeypatch):
    read = []

    def counting(image, **options):
        read.append(image)
        return read_square(image, **options)

    monkeypatch.setattr(inputs, "read_square", counting)
    predictions = model.predict_each(files * 10, batch_size=2)
    assert next(predictions).image == files[0]
    # The first batch is done, the second one is computed, and the third one is read.
    assert len(read) <= 3 * inputs.rows_per_batch(2)
    assert len(list(predictions)) == 69 and len(read) == 70


def test_the_second_call_compiles_nothing(files, caplog):
    model = mf.load(GOLDEN / "google_tiny.npz")
    with jax.log_compiles():
        model.predict(files, batch_size=4)
        model.features(files, layer=1, batch_size=4)
    assert "ompiling" in caplog.text
    caplog.clear()
    with jax.log_compiles():
        model.predict(files[::-1], batch_size=4)
        model.features(files[::-1], layer=1, batch_size=4)
        list(model.predict_each(files[:4], batch_size=4))
    assert "ompil" not in caplog.text


# --- features


def change(model, **fields):
    """Returns the model with another module: `fields` are those of MlpMixer."""
    return dataclasses.replace(model, module=model.module.clone(**fields))


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"remat": True}, {"dtype": "bfloat16"}], ids=str)
def test_features_are_what_the_layers_of_the_module_compute(model, files, fields):
    model = change(model, **fields)
    images = np.stack([read_square(file, channels=3, size_px=32, crop_fraction=0.875, interpolation="bilinear") for file in files])  # fmt: skip
    prepared = augment.prepare(jnp.asarray(images), cropped=True, **model.preprocess)
    module = model.module.clone(num_classes=0, remat=False)

    @jax.jit
    def reference(params, prepared):
        return module.apply({"params": params}, prepared, capture_intermediates=True, mutable="intermediates")

    pooled, state = reference(model.params, prepared)
    close = {"atol": 0.1, "rtol": 0.02} if "dtype" in fields else {"atol": 1e-5, "rtol": 1e-5}
    found = model.features(files, batch_size=3)
    assert found.shape == (7, module.hidden_dim) and found.dtype == np.float32
    np.testing.assert_allclose(found, pooled, **close)
    tokens = model.features(files, layer="tokens")
    assert tokens.shape == (7, 16, module.hidden_dim) and tokens.dtype == np.float32
    np.testing.assert_allclose(tokens.mean(axis=1), model.features(files), atol=1e-6)
    for number in range(module.num_blocks):
        (expected,) = state["intermediates"][f"MixerBlock_{number}"]["__call__"]
        block = model.features(files, layer=number)
        assert block.dtype == np.float32
        np.testing.assert_allclose(block, np.asarray(expected, np.float32), **close)


def test_pooled_features_are_the_input_of_the_head(model, files):
    head = model.params["head"]
    logits = model.features(files) @ head["kernel"] + head["bias"]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    best = [prediction.top[0] for prediction in model.predict(files)]
    assert [score.label for score in best] == logits.argmax(axis=1).tolist()
    np.testing.assert_allclose([score.probability for score in best], probabilities.max(axis=1), rtol=1e-4)


@pytest.mark.parametrize("layer", ["head", "MixerBlock_0", -1, 3, 0.5, None])
def test_a_layer_that_does_not_exist_is_refused(model, files, layer):
    message = f"^layer={layer!r} does not exist: choose 'pooled', 'tokens' or a block from 0 to 2$"
    with pytest.raises(mf.UserError, match=message):
        model.features(files, layer=layer)


def test_a_pillow_image_may_be_given_many_times(model, files):
    content = io.BytesIO(encode(np.tile(PIXELS[0, ..., :3], (40, 40, 1)), "JPEG"))
    found = model.predict([Image.open(content)] * 8)
    assert len({prediction.top for prediction in found}) == 1

"""A trained model: a Linen module with weights, class names and preprocessing; it predicts images."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from mlpmixer_flax import UserError
from mlpmixer_flax.data import augment
from mlpmixer_flax.data.dataset import Dataset
from mlpmixer_flax.dataloader import Examples, open_examples
from mlpmixer_flax.inference.classes import in_words
from mlpmixer_flax.inference.forward import RowFunction, forward, on_all_devices
from mlpmixer_flax.inference.inputs import ImageBatches, Images
from mlpmixer_flax.limits import check_limits, check_positive, show
from mlpmixer_flax.models import MlpMixer, check_patch
from mlpmixer_flax.run_weights import sized
from mlpmixer_flax.training.losses import LOSSES
from mlpmixer_flax.training.optimizer import Params
from mlpmixer_flax.weights.tokens import grid_of, resampled, with_tokens


class _OwnSize(NamedTuple):
    """What a model that `Model.at_size` made remembers of the size that it was loaded with."""

    params: Params
    image_size_px: int
    scores: Mapping[str, Any]
    resolutions_px: tuple[int, ...]
    resampled: Params  # what `at_size` made of `params`


class Score(NamedTuple):
    """The probability of one class."""

    label: int  # number of the class, from 0
    class_name: str
    probability: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image, the most probable first, or why there are none."""

    image: str  # the file, or "images[3]" for an image that is not a file
    top: tuple[Score, ...]
    flaw: str = ""  # a sentence, if the image cannot be used; `top` is then empty


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model with its weights and everything needed to use it; `load` makes one."""

    name: str  # as the user gave it
    module: MlpMixer  # for your own JAX code: module.apply({"params": params}, images)
    params: Params = dataclasses.field(repr=False)  # a tree of float32 numpy arrays
    preprocess: Mapping[
        str, Any
    ]  # config.preprocess: image_size_px, crop_fraction, fit, interpolation, mean, std
    class_names: tuple[str, ...] = dataclasses.field(repr=False)  # by output of the head; "0", ... if unknown
    loss: str  # that the model was trained with, a key of LOSSES
    config: Mapping[str, Any] = dataclasses.field(repr=False)  # of the run, as plain data; {} for weights
    step: int | None = None  # of the run's checkpoint; None for weights
    multi_label: bool = False  # whether the run's images have several labels each; False for weights
    flip: bool = False  # logits are the mean of those of an image and of its mirror image; twice the work
    # Of an evaluation of these weights in training, by name ("test/accuracy"); {} if there was none
    scores: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    resolutions_px: tuple[int, ...] = ()  # the sizes that it was trained with; () = only its own
    # None at the size that it was loaded with
    _own: _OwnSize | None = dataclasses.field(default=None, repr=False)
    # Kept, so that the second call of `predict` or `features` compiles nothing.
    _compiled: dict[Any, RowFunction] = dataclasses.field(default_factory=dict, init=False, repr=False)

    @property
    def channels(self) -> int:
        """Number of channels of the model's images: 1 (gray), 3 (RGB) or 4 (RGBA)."""
        return self.params["stem"]["kernel"].shape[2]

    def at_size(self, size_px: int) -> "Model":
        """Returns the model for images of another size, with its token-mixing weights resampled.

        A model that was trained with `config.resolutions_px` is made for these sizes; another one loses accuracy.
        `scores` are those of this size, if the run measured them. The weights are always those of the own size,
        resampled once, so `model.at_size(4).at_size(8)` has those of `model.at_size(8)`.

        Raises:
          UserError: the size is no whole number, the patches of the model do not divide images of this size, or there
            would be too many.
        """
        if type(size_px) is not int:
            raise UserError(
                f"size_px={show(size_px)} has the wrong type: give a number of pixels, such as 32"
            )
        check_limits("preprocess.image_size_px", size_px, name="size_px")
        check_patch(self.module.patches["size"], (size_px, size_px), change="size_px")
        own = self._with_own_size()
        own_px, suffix = own.preprocess["image_size_px"], sized("", size_px)
        if size_px == own_px:
            return own
        params = with_tokens(own.params, resampled(grid_of(own.module, own_px), grid_of(own.module, size_px)))
        return dataclasses.replace(
            own,
            params=params,
            preprocess={**own.preprocess, "image_size_px": size_px},
            scores={
                name.removesuffix(suffix): score
                for name, score in own.scores.items()
                if name.endswith(suffix)
            },
            resolutions_px=(),
            _own=_OwnSize(own.params, own_px, own.scores, own.resolutions_px, params),
        )

    def _with_own_size(self) -> "Model":
        """Returns the model at the size that it was loaded with; fields that do not belong to a size stay as they are."""
        own = self._own
        if own is None or self.params is not own.resampled:  # or somebody has replaced the weights
            return self
        return dataclasses.replace(
            self,
            params=own.params,
            preprocess={**self.preprocess, "image_size_px": own.image_size_px},
            scores=own.scores,
            resolutions_px=own.resolutions_px,
            _own=None,
        )

    # --- images in, results out

    def predict(self, images: Images, *, top: int = 5, batch_size: int = 32) -> list[Prediction]:
        """Returns the most probable classes of each image, in the order of the images.

            (prediction,) = model.predict("cat.jpg")
            for prediction in model.predict(["cat.jpg", pillow_image, array]):
                print(prediction.top[0].class_name, prediction.top[0].probability)

        Args:
          images: one image or a list: files, the bytes of files, Pillow images, or arrays of uint8, (h, w) or
            (h, w, c); also one array (n, h, w, c). They may have any size and mode, and are cropped and resized
            as in evaluation; but for datasets of small images, evaluation resizes on the device, without rounding
            to uint8.
          top: how many classes to return; all if the model has fewer.
          batch_size: images per forward pass.

        Raises:
          UserError: an image cannot be used, or `top` or `batch_size` is below 1.
        """
        predictions = []
        for prediction in self.predict_each(images, top=top, batch_size=batch_size):
            if prediction.flaw:
                raise UserError(prediction.flaw)
            predictions.append(prediction)
        return predictions

    def predict_each(self, images: Images, *, top: int = 5, batch_size: int = 32) -> Iterator[Prediction]:
        """Yields predictions one after another, with a `flaw` and no classes for an image that cannot be used.

        Arguments and other errors are those of `predict`.
        """
        check_positive(top=top, batch_size=batch_size)
        batches = self._batches(images, batch_size)
        class_names = in_words(self.class_names)
        count = min(top, len(class_names))

        def most_probable(params, batch):
            probabilities = self.probabilities(params, batch["image"], cropped=True)
            probabilities, labels = jax.lax.top_k(probabilities, count)
            return {"labels": labels, "probabilities": probabilities}

        results = forward(self._compile(("top", count), most_probable), self.params, batches)
        rows = (zip(part["labels"].tolist(), part["probabilities"].tolist(), strict=True) for part in results)
        for number, (labels, probabilities) in enumerate(itertools.chain.from_iterable(rows)):
            flaw = batches.flaws.get(number, "")
            scores = map(Score, labels, [class_names[label] for label in labels], probabilities)
            yield Prediction(batches.names[number], () if flaw else tuple(scores), flaw)

    def features(self, images: Images, *, layer: str | int = "pooled", batch_size: int = 32) -> np.ndarray:
        """Returns what a layer computes for each image, as float32.

        Args:
          images: as for `predict`, at least one.
          layer: "pooled": the input of the head (pre-logits), (n, hidden_dim). "tokens": the final tokens,
            after the last LayerNorm, whose mean is "pooled": (n, tokens, hidden_dim). A number from 0: the
            output of that Mixer block, (n, tokens, hidden_dim). Tokens are in raster order.
          batch_size: images per forward pass.

        Raises:
          UserError: as `predict`; or there is no image, or the layer does not exist.
        """
        rows = []
        for row in self.features_each(images, layer=layer, batch_size=batch_size):
            if isinstance(row, str):
                raise UserError(row)
            rows.append(row)
        if not rows:
            raise UserError("the list of images is empty: give at least one image")
        return np.stack(rows)

    def features_each(
        self, images: Images, *, layer: str | int = "pooled", batch_size: int = 32
    ) -> Iterator[np.ndarray | str]:
        """Yields the features of one image after another; for an image that cannot be used, a sentence that says why.

        Arguments and other errors are those of `features`.
        """
        check_positive(batch_size=batch_size)
        function = self._compile(("features", layer), self.features_of(layer, cropped=True))
        batches = self._batches(images, batch_size)
        parts = (part["features"] for part in forward(function, self.params, batches))
        for number, row in enumerate(itertools.chain.from_iterable(parts)):
            yield batches.flaws[number] if number in batches.flaws else row

    def open(
        self, dataset: str | Dataset, split: str, *, data_dir: str = "", skip_bad_images: bool = False
    ) -> Examples:
        """Opens a split, in gray or colour as the model needs it; each image is decoded when it is read.

        Arguments and errors are those of `dataloader.open_examples`.
        """
        examples = open_examples(
            dataset,
            split,
            data_dir=data_dir,
            cache_bytes=0,
            image_size_px=self.preprocess["image_size_px"],
            crop_fraction=self.preprocess["crop_fraction"],
            interpolation=self.preprocess["interpolation"],
            fit=self.preprocess["fit"],
            skip_bad_images=skip_bad_images,
        )
        return dataclasses.replace(examples, image_shape=(*examples.image_shape[:2], self.channels))

    # --- pure functions, to be compiled by the caller

    def logits(self, params: Params, images: jax.Array, *, cropped: bool = False) -> jax.Array:
        """Returns float32 logits (n, classes) of uint8 images (n, h, w, c), prepared as in evaluation.

        The images are cropped and resized; with `cropped`, as in `Examples`, they are square crops already.

        Raises:
          UserError: the images have another type or shape.
        """
        prepared = self._prepare(images, cropped=cropped)
        logits = cast(jax.Array, self.module.apply({"params": params}, prepared))
        if not self.flip:
            return logits
        mirrored = cast(jax.Array, self.module.apply({"params": params}, prepared[:, :, ::-1]))
        return (logits + mirrored) / 2

    def probabilities(self, params: Params, images: jax.Array, *, cropped: bool = False) -> jax.Array:
        """Returns float32 probabilities (n, classes); the arguments are those of `logits`."""
        return LOSSES[self.loss].probabilities(self.logits(params, images, cropped=cropped))

    def features_of(self, layer: str | int, *, cropped: bool) -> RowFunction:
        """Returns the function (params, batch) -> {"features": float32 (n, ...)} for `forward`.

        `layer` is that of `features`, and `cropped` that of `logits`.

        Raises:
          UserError: the layer does not exist.
        """
        blocks = {number: f"MixerBlock_{number}" for number in range(self.module.num_blocks)}
        names = {"pooled": "", "tokens": "pre_head_layer_norm", **blocks}  # layer -> its name in the module
        if layer not in names:
            raise UserError(
                f"layer={layer!r} does not exist: choose 'pooled', 'tokens' or a block from 0 to {len(blocks) - 1}"
            )
        name = names[layer]
        module = self.module.clone(num_classes=0)

        def features(params, batch):
            pooled, state = module.apply(
                {"params": params},
                self._prepare(batch["image"], cropped=cropped),
                capture_intermediates=lambda inner, method: inner.name == name,
                mutable=["intermediates"],
            )
            found = state["intermediates"][name]["__call__"][0] if name else pooled
            return {"features": jnp.asarray(found, jnp.float32)}

        return features

    def _prepare(self, images: jax.Array, *, cropped: bool) -> jax.Array:
        if images.ndim != 4 or images.shape[3] != self.channels:
            raise UserError(f"the images have shape {images.shape}: give (n, h, w, {self.channels})")
        return augment.prepare(images, cropped=cropped, **self.preprocess)

    def _compile(self, key: tuple[str, int | str], function: RowFunction) -> RowFunction:
        if key not in self._compiled:
            self._compiled[key] = on_all_devices(function)
        return self._compiled[key]

    def _batches(self, images: Images, batch_size: int) -> ImageBatches:
        return ImageBatches(
            images,
            batch_size=batch_size,
            channels=self.channels,
            size_px=self.preprocess["image_size_px"],
            crop_fraction=self.preprocess["crop_fraction"],
            interpolation=self.preprocess["interpolation"],
            fit=self.preprocess["fit"],
        )

"""A trained model: a Linen module with weights, class names and preprocessing, and what it says about images."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from mlpmixer_flax import UserError
from mlpmixer_flax.data import augment
from mlpmixer_flax.data.images import read_square
from mlpmixer_flax.dataloader import Batch, Examples, open_examples
from mlpmixer_flax.inference.classes import in_words
from mlpmixer_flax.inference.forward import (
    RowFunction,
    check_positive,
    concatenate,
    forward,
    on_all_devices,
    rows_per_batch,
)
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.training.losses import LOSSES
from mlpmixer_flax.training.optimizer import Params

ImageLike = (
    str | os.PathLike | Image.Image | np.ndarray
)  # a file, a Pillow image, or uint8 (h, w) or (h, w, c)


class Score(NamedTuple):
    """The probability of one class."""

    label: int  # number of the class, from 0
    class_name: str
    probability: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image, the most probable first; or why there are none."""

    image: str  # the file, or "images[3]" for an image given as an object
    top: tuple[Score, ...]
    flaw: str = ""  # a sentence, if the image cannot be used; `top` is then empty


@dataclasses.dataclass(frozen=True)
class Model:
    """A model with its weights and everything needed to use it; `load` makes one."""

    name: str  # as the user gave it
    module: MlpMixer  # for one's own JAX code: module.apply({"params": params}, images)
    params: Params  # a tree of float32 numpy arrays
    preprocess: Mapping[str, Any]  # config.preprocess: image_size_px, crop_fraction, interpolation, mean, std
    class_names: tuple[str, ...]  # in the order of the head's outputs; "0", "1", ... if unknown
    loss: str  # that it was trained with, a key of LOSSES
    config: Mapping[str, Any]  # of the run, as plain data; {} for weights
    step: int | None = None  # of the run's checkpoint; None for weights
    # Compiled functions, so that a second call compiles nothing.
    _compiled: dict[Any, RowFunction] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def channels(self) -> int:
        """Number of channels of the model's images."""
        return self.params["stem"]["kernel"].shape[2]

    def predict(self, images: Sequence[ImageLike], *, top: int = 5, batch_size: int = 32) -> list[Prediction]:
        """Returns the most probable classes of each image, in the order of the images.

            for prediction in model.predict(["cat.jpg", pil_image, array]):
                print(prediction.top[0].class_name, prediction.top[0].probability)

        Args:
          images: files, Pillow images, or uint8 arrays (h, w) or (h, w, c); also one array (n, h, w, c). Images of
            any size and mode are converted as in evaluation.
          top: how many classes to return; all if the model has fewer.
          batch_size: images per forward pass.

        Raises:
          UserError: an image cannot be used, or `top` or `batch_size` is below 1.
        """
        predictions = list(self.predict_each(images, top=top, batch_size=batch_size))
        for prediction in predictions:
            if prediction.flaw:
                raise UserError(prediction.flaw)
        return predictions

    def predict_each(
        self, images: Sequence[ImageLike], *, top: int = 5, batch_size: int = 32
    ) -> Iterator[Prediction]:
        """Yields predictions one by one, as `predict`; an image that cannot be used has a `flaw` instead of classes."""
        check_positive(top=top, batch_size=batch_size)
        images = _as_list(images)
        class_names = in_words(self.class_names)
        count = min(top, len(class_names))

        def most_probable(params, batch):
            probabilities, labels = jax.lax.top_k(
                self.probabilities(params, batch["image"], cropped=True), count
            )
            return {"probabilities": probabilities, "labels": labels}

        function = self._compile(("top", count), most_probable)
        flaws: dict[int, str] = {}
        number = 0
        for rows in forward(function, self.params, self._batches(images, batch_size, flaws)):
            for labels, probabilities in zip(
                rows["labels"].tolist(), rows["probabilities"].tolist(), strict=True
            ):
                while number in flaws:
                    yield Prediction(_name(images, number), (), flaws[number])
                    number += 1
                names = [class_names[label] for label in labels]
                yield Prediction(_name(images, number), tuple(map(Score, labels, names, probabilities)))
                number += 1
        for flawed in range(number, len(images)):
            yield Prediction(_name(images, flawed), (), flaws[flawed])

    def features(
        self, images: Sequence[ImageLike], *, layer: str | int = "pooled", batch_size: int = 32
    ) -> np.ndarray:
        """Returns what a layer computes for each image, as float32.

        Args:
          images: as for `predict`.
          layer: "pooled": the input of the head (pre-logits), (n, hidden_dim). "tokens": the final tokens, after
            the last LayerNorm, whose mean is "pooled": (n, tokens, hidden_dim). A number from 0: the output of that
            Mixer block, (n, tokens, hidden_dim). Tokens are in raster order.
          batch_size: images per forward pass.

        Raises:
          UserError: an image cannot be used, the layer does not exist, or `batch_size` is below 1.
        """
        check_positive(batch_size=batch_size)
        images = _as_list(images)
        if not images:
            raise UserError("features needs at least one image: the list of images is empty")
        function = self._compile(("features", layer), self.features_of(layer, cropped=True))
        flaws: dict[int, str] = {}
        rows = concatenate(forward(function, self.params, self._batches(images, batch_size, flaws)))
        if flaws:
            raise UserError(flaws[min(flaws)])
        return rows["features"]

    def features_of(self, layer: str | int, *, cropped: bool) -> RowFunction:
        """Returns a function for `forward`, to rows "features"; `layer` is that of `features`.

        `cropped` is that of the examples: the host has cropped the images already.
        """
        blocks = range(self.module.num_blocks)
        if layer not in ("pooled", "tokens") and (isinstance(layer, str) or layer not in blocks):
            raise UserError(
                f"layer={layer!r} does not exist: choose 'pooled', 'tokens' or a block from 0 to {blocks[-1]}"
            )
        wanted = {"pooled": "", "tokens": "pre_head_layer_norm"}.get(layer, f"MixerBlock_{layer}")
        module = self.module.clone(num_classes=0, remat=False)

        def features(params, batch):
            pooled, state = module.apply(
                {"params": params},
                augment.prepare(batch["image"], cropped=cropped, **self.preprocess),
                capture_intermediates=lambda inner, method: inner.name == wanted,
                mutable=["intermediates"],
            )
            found = state["intermediates"][wanted]["__call__"][0] if wanted else pooled
            return {"features": found.astype("float32")}

        return features

    def logits(self, params: Params, images: jax.Array, *, cropped: bool = False) -> jax.Array:
        """Returns float32 logits (n, classes) of uint8 images (n, h, w, c); a pure function of params and images.

        `cropped` says that the images are square crops already, as `Examples.cropped`.
        """
        return self.module.apply(
            {"params": params}, augment.prepare(images, cropped=cropped, **self.preprocess)
        )

    def probabilities(self, params: Params, images: jax.Array, *, cropped: bool = False) -> jax.Array:
        """Returns float32 probabilities (n, classes); the arguments are those of `logits`."""
        return LOSSES[self.loss].probabilities(self.logits(params, images, cropped=cropped))

    def open(
        self, dataset: str, split: str, *, data_dir: str = "", skip_bad_images: bool = False
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
            skip_bad_images=skip_bad_images,
        )
        return dataclasses.replace(examples, image_shape=(*examples.image_shape[:2], self.channels))

    def _compile(self, key: tuple, function: RowFunction) -> RowFunction:
        if key not in self._compiled:
            self._compiled[key] = on_all_devices(function)
        return self._compiled[key]

    def _batches(
        self, images: Sequence[ImageLike], batch_size: int, flaws: dict[int, str]
    ) -> Iterator[Batch]:
        """Yields batches of square images; those that cannot be used are masked and go into `flaws` by number."""
        # All batches have one shape, so that one compilation serves them.
        size_px, rows = self.preprocess["image_size_px"], rows_per_batch(min(batch_size, len(images)) or 1)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            upcoming = pool.map(self._read, images[:rows])
            for start in range(0, len(images), rows):
                squares = list(upcoming)
                # Threads read the next batch while the device works on this one.
                upcoming = pool.map(self._read, images[start + rows : start + 2 * rows])
                batch = {
                    "image": np.zeros((rows, size_px, size_px, self.channels), np.uint8),
                    "label": np.zeros(rows, np.int32),
                    "mask": np.zeros(rows, bool),
                }
                for row, square in enumerate(squares):
                    if isinstance(square, UserError):
                        flaws[start + row] = str(square)
                    else:
                        batch["image"][row], batch["mask"][row] = square, True
                yield batch

    def _read(self, image: ImageLike) -> np.ndarray | UserError:
        try:
            return read_square(
                image,
                channels=self.channels,
                size_px=self.preprocess["image_size_px"],
                crop_fraction=self.preprocess["crop_fraction"],
                interpolation=self.preprocess["interpolation"],
            )
        except UserError as error:
            return error


def _as_list(images: Sequence[ImageLike]) -> list[ImageLike]:
    single = isinstance(images, (str, os.PathLike, Image.Image))
    if single or (isinstance(images, np.ndarray) and images.ndim != 4):
        raise UserError("images must be a list, or an array (n, h, w, c): write [image] for a single image")
    return list(images)


def _name(images: Sequence[ImageLike], number: int) -> str:
    image = images[number]
    return os.fspath(image) if isinstance(image, (str, os.PathLike)) else f"images[{number}]"

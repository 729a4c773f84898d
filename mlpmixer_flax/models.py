"""Defines MLP-Mixer (arXiv 2105.01601) in Linen, with the parameter names of Google's published weights."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mlpmixer_flax import UserError

# The original uses the tanh approximation, timm the exact function. Use the one the weights were trained with.
GELU = {"tanh": partial(jax.nn.gelu, approximate=True), "erf": partial(jax.nn.gelu, approximate=False)}
_MOST_PATCHES = 2**16  # of an image: 4096x4096 px in patches of 16x16 px


def check_patch(
    patch: tuple[int, int],
    image: tuple[int, int],
    *,
    change: str = "preprocess.image_size_px or model.patches.size",
) -> None:
    """Checks that a patch divides an image, and not into too many; both are (height, width) in pixels.

    `change` is what the user can change, for the message.

    Raises:
      UserError: it does not.
    """
    if image[0] % patch[0] or image[1] % patch[1]:
        raise UserError(
            f"a patch of {patch[0]}x{patch[1]} px does not divide an image of {image[0]}x{image[1]} px: "
            f"choose another {change}"
        )
    count = image[0] // patch[0] * (image[1] // patch[1])
    if count > _MOST_PATCHES:
        raise UserError(
            f"an image of {image[0]}x{image[1]} px has {count:,} patches of {patch[0]}x{patch[1]} px, but more than "
            f"{_MOST_PATCHES:,} do not fit into memory: choose another {change}"
        )


def _matmul(x: jax.Array, kernel: jax.Array, _: Any, precision: Any = None) -> jax.Array:
    """Multiplies (..., d) by (d, features) as one product of two matrices, for `nn.Dense(dot_general=...)`.

    The result is that of `lax.dot_general`, which Dense calls otherwise. But there the gradient of the kernel sums over
    several axes, and XLA computes such sums more slowly on a CPU: see docs/performance.md.
    """
    rows = x.reshape(-1, x.shape[-1])
    return jnp.dot(rows, kernel, precision=precision).reshape(*x.shape[:-1], -1)


def _project_patches(
    images: jax.Array, kernel: jax.Array, patch: tuple[int, int], padding: Any, **options: Any
) -> jax.Array:
    """Projects (n, height, width, channels) to (n, rows, columns, features), for `nn.Conv(conv_general_dilated=...)`.

    Except for rounding, the result is that of `lax.conv_general_dilated`, which Conv calls otherwise. On a CPU, patches
    are cut out and multiplied by one matrix: XLA computes the gradient of such a convolution slowly there, and very
    slowly in a loop over microbatches. See docs/performance.md.
    """

    def multiply(images: jax.Array, kernel: jax.Array) -> jax.Array:
        n, height, width, channels = images.shape
        rows, columns = height // patch[0], width // patch[1]
        patches = images.reshape(n, rows, patch[0], columns, patch[1], channels).swapaxes(2, 3)
        matrix = kernel.reshape(-1, kernel.shape[-1])
        tokens = jnp.dot(patches.reshape(-1, matrix.shape[0]), matrix, precision=options["precision"])
        return tokens.reshape(n, rows, columns, -1)

    def convolve(images: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(images, kernel, patch, padding, **options)

    return jax.lax.platform_dependent(images, kernel, cpu=multiply, default=convolve)


class MlpBlock(nn.Module):
    """Two dense layers with a GELU and dropout between them, over the last axis: (..., d) -> (..., d)."""

    mlp_dim: int
    gelu: str = "tanh"
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        Dense = partial(nn.Dense, dtype=self.dtype, dot_general=_matmul)
        y = GELU[self.gelu](Dense(self.mlp_dim)(x))
        y = nn.Dropout(self.dropout_rate, deterministic=not train)(y)
        return Dense(x.shape[-1])(y)


class MixerBlock(nn.Module):
    """Mixes tokens, then channels, each after a LayerNorm and with a skip connection (paper §2, Figure 1).

    Maps (n, tokens, channels) to the same shape. In training, each of the two branches is dropped with
    probability `stochastic_depth_rate`, independently per image. Branches that are kept are scaled up, so the
    expected value does not change (arXiv 1603.09382).
    """

    tokens_mlp_dim: int
    channels_mlp_dim: int
    gelu: str = "tanh"
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        # Dropout with one draw per image is stochastic depth.
        keep = nn.Dropout(self.stochastic_depth_rate, broadcast_dims=(1, 2), deterministic=not train)
        mlp = partial(MlpBlock, gelu=self.gelu, dropout_rate=self.dropout_rate, dtype=self.dtype)
        norm = partial(nn.LayerNorm, epsilon=1e-6, dtype=self.dtype)

        y = jnp.swapaxes(norm()(x), 1, 2)
        y = mlp(self.tokens_mlp_dim, name="token_mixing")(y, train=train)
        x = x + keep(jnp.swapaxes(y, 1, 2))
        y = norm()(x)
        return x + keep(mlp(self.channels_mlp_dim, name="channel_mixing")(y, train=train))


class MlpMixer(nn.Module):
    """MLP-Mixer: float images (n, height, width, any channels) -> float32 logits (n, num_classes).

    With `num_classes=0` there is no head, and the result is the pooled features, float32 (n, hidden_dim).
    Training (`train=True`) needs an rng named "dropout" if a rate is above 0.

    Raises:
      UserError: the patch does not divide the image, or `gelu` is unknown.
    """

    num_classes: int
    patches: Mapping[str, tuple[int, int]]  # {"size": (height, width)} in pixels
    hidden_dim: int  # channels of a token: C in the paper
    num_blocks: int  # Mixer blocks, one after another
    tokens_mlp_dim: int  # hidden width of the MLPs that mix tokens: D_S in the paper
    channels_mlp_dim: int  # hidden width of the MLPs that mix channels: D_C in the paper
    gelu: str = "tanh"  # a key of GELU
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0  # of the last block; falls linearly to 0 at the first (Table 4)
    head_bias_init: float = 0.0  # with -6.9, sigmoid probabilities start near 1/1000
    dtype: Any = jnp.float32  # of the computation; parameters are float32
    remat: bool = False  # compute each block again in the backward pass instead of storing it

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        dtype = jnp.dtype(self.dtype)
        height, width = self.patches["size"]
        patch = (height, width)
        check_patch(patch, (images.shape[1], images.shape[2]))
        if self.gelu not in GELU:
            raise UserError(f"unknown gelu {self.gelu!r}: choose one of {', '.join(GELU)}")

        Stem = partial(nn.Conv, strides=patch, padding="VALID", conv_general_dilated=_project_patches)
        x = Stem(self.hidden_dim, patch, dtype=dtype, name="stem")(images)
        x = x.reshape(x.shape[0], -1, self.hidden_dim)  # tokens in raster order
        Block = nn.remat(MixerBlock, static_argnums=(2,)) if self.remat else MixerBlock
        for i in range(self.num_blocks):
            x = Block(
                self.tokens_mlp_dim,
                self.channels_mlp_dim,
                gelu=self.gelu,
                dropout_rate=self.dropout_rate,
                stochastic_depth_rate=self.stochastic_depth_rate * i / max(self.num_blocks - 1, 1),
                dtype=dtype,
                name=f"MixerBlock_{i}",
            )(x, train)
        x = nn.LayerNorm(epsilon=1e-6, dtype=dtype, name="pre_head_layer_norm")(x)
        x = jnp.mean(x, axis=1, dtype=jnp.float32)
        if self.num_classes == 0:
            return x
        head = nn.Dense(
            self.num_classes,
            kernel_init=nn.initializers.zeros,
            bias_init=nn.initializers.constant(self.head_bias_init),
            name="head",
        )
        return head(x)

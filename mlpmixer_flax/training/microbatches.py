"""Decides in how many microbatches an update is computed."""

from jax.sharding import Mesh

from mlpmixer_flax.config import ConfigDict

# On a CPU, an update is fastest if the outputs of the dense layers for one microbatch need about this much memory. More
# does not fit into the caches, and is given back to the system after each update. See docs/performance.md.
_FAST_BYTES = 20 * 2**20
# Images of so many tokens may need more than that, because adding up the gradients of a large model takes time too.
_LARGE_MODEL_TOKENS = 1536


def microbatches_of(config: ConfigDict, *, batch_size: int, mesh: Mesh) -> int:
    """Returns in how many microbatches each device computes its images.

    That is `config.accumulation_steps`, or if it is 0, the number that makes an update fast: on a CPU, the number for
    which microbatches are about as large as the caches allow, otherwise 1. With `config.resolutions_px` it is the number
    for the model's own size.
    """
    if config.accumulation_steps:
        return config.accumulation_steps
    if mesh.devices.flat[0].platform != "cpu":
        return 1
    model, side = config.model, config.preprocess.image_size_px
    height, width = model.patches["size"]
    tokens = (side // height) * (side // width)
    outputs = model.hidden_dim * (model.tokens_mlp_dim + tokens)
    outputs += tokens * (model.channels_mlp_dim + model.hidden_dim)
    most = max(_FAST_BYTES // (4 * model.num_blocks * outputs), -(-_LARGE_MODEL_TOKENS // tokens))
    images = _images_together(config, batch_size, mesh)
    at_once = max(n for n in range(1, min(most, images) + 1) if images % n == 0)
    # Microbatches of less than half of the limit would be slower than the whole batch.
    return images // at_once if 2 * at_once >= most else 1


def describe_microbatches(config: ConfigDict, mesh: Mesh) -> str:
    """Returns what was chosen for speed, as a line; "" if nothing was."""
    microbatches = microbatches_of(config, batch_size=config.batch_size, mesh=mesh)
    if config.accumulation_steps or microbatches == 1:
        return ""
    images = _images_together(config, config.batch_size, mesh) // microbatches
    return f"for speed, {images} images at a time: accumulation_steps=1 switches this off"


def _images_together(config: ConfigDict, batch_size: int, mesh: Mesh) -> int:
    """Returns the images of a device, or of a chunk, which a device computes alone."""
    return batch_size // (config.reproducible or mesh.size)

"""Checks that the options and the devices of JAX suit a config."""

import jax

from mlpmixer_flax import UserError
from mlpmixer_flax.config import ConfigDict
from mlpmixer_flax.faults import start_devices
from mlpmixer_flax.training.reproducible import check_threads

# Options of JAX that change what training computes, or stop it; the value that they must have.
_JAX_OPTIONS = {
    # With other values of these four, random numbers are others.
    "jax_enable_x64": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_disable_jit": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
}


def check_jax() -> None:
    """Checks the options of JAX.

    Raises:
      UserError: one is set with which training fails or gives other results.
    """
    for option, allowed in _JAX_OPTIONS.items():
        value = getattr(jax.config, option, allowed)  # a release of JAX may lack one
        if value != allowed:
            raise UserError(
                f"{option}={value} is set, and training works with {allowed} only: unset the environment variable "
                f"{option.upper()}, or leave out your jax.config.update"
            )


def check_devices(config: ConfigDict, *, batch_size: int) -> None:
    """Checks that the devices can divide the state and a batch as the config says; starts them.

    Raises:
      UserError: they cannot, or cannot be started.
    """
    start_devices()
    fsdp, chunks, num_devices = config.mesh.fsdp, config.reproducible, jax.device_count()
    if num_devices % fsdp:
        raise UserError(
            f"mesh.fsdp={fsdp} does not divide the number of devices, which is {num_devices}: choose a divisor of it"
        )
    if chunks:
        check_threads(chunks)
        if chunks % num_devices:
            raise UserError(
                f"reproducible={chunks} cannot be divided by {num_devices} devices: use a number of devices that "
                "divides it"
            )
    microbatches = config.accumulation_steps
    parts = (chunks or num_devices) * (microbatches or 1)
    if batch_size % parts:
        dividing = f"reproducible={chunks}" if chunks else f"{num_devices} devices"
        dividing += f" x accumulation_steps={microbatches}" if microbatches else ""
        raise UserError(
            f"batch_size={batch_size} is not divisible by {dividing}: choose a multiple of {parts}"
        )

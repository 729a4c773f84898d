"""Measures how much memory an update needs and which config key saves most.

    python benchmarks/memory.py
    pip install "jax[tpu]" && python benchmarks/memory.py --tpu --config=configs/l16_cifar10.py

The figures come from the compiler; no update is run. The first command compiles for the device of this machine. The second
compiles for one chip of a TPU v5e, on a machine with or without one. The figures for remat and bfloat16 on a CPU are
valid for CPUs only: the compiler for CPUs ignores remat, and computes bfloat16 in float32.
Takes two minutes on 2 CPU cores; for the TPU three minutes per line, and more with remat. Results: docs/recipes.md
"""

import argparse
import os
from functools import partial

import jax
import numpy as np
from jax.experimental import topologies

from mlpmixer_flax.compilation_cache import compiled_anew
from mlpmixer_flax.config import ConfigDict, resolve
from mlpmixer_flax.ending import exit_status, leave
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.training import sharding
from mlpmixer_flax.training.configfile import load_config
from mlpmixer_flax.training.optimizer import make_optimizer, make_schedule
from mlpmixer_flax.training.step import init_state, make_train_step

NUM_CLASSES, IMAGE_PX = 10, 32  # of CIFAR-10; images travel to the device in their stored size
SETTINGS = (
    (),
    ("accumulation_steps=2",),
    ("accumulation_steps=4",),
    ("accumulation_steps=8",),
    ("model.remat=true",),
    ("model.dtype=bfloat16",),
    ("accumulation_steps=8", "model.remat=true", "model.dtype=bfloat16"),
)


def find_device(tpu: bool) -> jax.Device:
    """Returns the device to compile for: the first of this machine, or the description of a TPU v5e."""
    if not tpu:
        return jax.devices()[0]
    # There is no TPU: its metadata server must not be asked, and JAX must not start it.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    jax.config.update("jax_platforms", "cpu")
    return topologies.get_topology_desc("v5e:1x1", "tpu", chips_per_host_bounds=(1, 1, 1)).devices[0]


def measure(config: ConfigDict, device: jax.Device) -> tuple[int, int]:
    """Returns two numbers of bytes: for state and batch, and for the values that exist only during the update."""
    size_px, n = config.preprocess.image_size_px, config.batch_size
    model = MlpMixer(num_classes=NUM_CLASSES, **config.model.to_dict())
    schedule = make_schedule(
        config, total_steps=config.total_steps, warmup_steps=config.schedule.warmup_steps
    )
    optimizer = make_optimizer(config, schedule)
    init = partial(init_state, model=model, optimizer=optimizer, config=config)
    state = jax.eval_shape(partial(init, None, image_shape=(size_px, size_px, 3)))
    batch = {
        "image": np.zeros((n, IMAGE_PX, IMAGE_PX, 3), np.uint8),
        "label": np.zeros(n, np.int32),
        "mask": np.ones(n, bool),
    }
    mesh = sharding.make_mesh(devices=[device])
    on_device = sharding.replicated(mesh)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_device), (state, batch)
    )
    update = jax.jit(make_train_step(model, optimizer, schedule, config, mesh=mesh), donate_argnums=0)
    memory = update.lower(*shapes).compile().memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held, memory.temp_size_in_bytes


@compiled_anew()  # what is measured
def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", default="configs/b16_cifar10.py", help="config file (default: %(default)s)"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images per update (default: %(default)s)")
    parser.add_argument("--tpu", action="store_true", help="compile for a TPU v5e")
    arguments = parser.parse_args()
    device = find_device(arguments.tpu)
    print(
        f"{arguments.config}, batches of {arguments.batch_size}, {device.device_kind}, jax {jax.__version__}"
    )
    print("| changed | state and batch, MiB | during the update, MiB |", "|---|---|---|", sep="\n")
    for changed in SETTINGS:
        whole = (f"batch_size={arguments.batch_size}", "accumulation_steps=1")
        overrides = [f"--config.{change}" for change in (*whole, *changed)]
        config = resolve(load_config(arguments.config, overrides), {})
        held, temporary = (f"{size / 2**20:,.0f}" for size in measure(config, device))
        print(f"| {', '.join(changed) or 'nothing'} | {held} | {temporary} |", flush=True)


if __name__ == "__main__":
    leave(exit_status(main))

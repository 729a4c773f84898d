"""How much memory does an update take, and which knob saves most? The compiler is asked; nothing is run.

    python benchmarks/memory.py
    pip install "jax[tpu]" && python benchmarks/memory.py --tpu --config=configs/l16_cifar10.py

The first compiles for the device that is here, the second for one chip of a TPU v5e, which need not be here.
What the CPU's compiler says of remat and bfloat16 holds for CPUs only: it drops the one and computes in float32.
Two minutes on 2 CPU cores; for the TPU three minutes a line, and more with remat.
"""

import argparse
import os
from functools import partial

import jax
import numpy as np
from jax.experimental import topologies
from ml_collections import ConfigDict

from mlpmixer_flax.config import resolve
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.training.configfile import load_config
from mlpmixer_flax.training.optimizer import make_optimizer, make_schedule
from mlpmixer_flax.training.step import init_state, make_train_step

NUM_CLASSES, IMAGE_PX = 10, 32  # of CIFAR-10, as it travels
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
    if not tpu:
        return jax.devices()[0]
    # There is none to ask or to start.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    jax.config.update("jax_platforms", "cpu")
    return topologies.get_topology_desc("v5e:1x1", "tpu", chips_per_host_bounds=(1, 1, 1)).devices[0]


def measure(config: ConfigDict, device: jax.Device) -> tuple[int, int]:
    """Bytes that one update holds: of state and batch, and of what lives during the update only."""
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
    there = jax.sharding.SingleDeviceSharding(device)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), (state, batch))
    update = jax.jit(make_train_step(model, optimizer, schedule, config), donate_argnums=0)
    memory = update.lower(*shapes).compile().memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held, memory.temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/b16_cifar10.py")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--tpu", action="store_true", help="compile for a TPU v5e")
    arguments = parser.parse_args()
    device = find_device(arguments.tpu)
    print(
        f"{arguments.config}, batches of {arguments.batch_size}, {device.device_kind}, jax {jax.__version__}"
    )
    print("| changed | state and batch, MiB | during the update, MiB |", "|---|---|---|", sep="\n")
    for changed in SETTINGS:
        overrides = [f"--config.{change}" for change in (f"batch_size={arguments.batch_size}", *changed)]
        config = resolve(load_config(arguments.config, overrides), {})
        held, temporary = (f"{size / 2**20:,.0f}" for size in measure(config, device))
        print(f"| {', '.join(changed) or 'nothing'} | {held} | {temporary} |", flush=True)


if __name__ == "__main__":
    main()

"""Predicts speed and memory on a TPU v5e from what its compiler says; no TPU is needed.

    pip install "jax[tpu]"
    python benchmarks/tpu_compiler.py --config=configs/b16_imagenet.py --topology=v5e:1x1 --topology=v5e:2x4
    python benchmarks/tpu_compiler.py --step=augmentation
    python benchmarks/tpu_compiler.py --step=evaluation --blocks=2 --blocks=4

The compiler writes next to each operation how many cycles it expects. We add them up: a loop as often as it runs, and of
a conditional the slowest branch. The rest is assumed:

- 1.5 GHz, which fits the published 197 TFLOP/s; no operation waits for another, and a loop without a known count runs once;
- gathers, scatters and plain copies without an estimate cost nothing; the gathers and scatters are counted in a row;
- collectives move their bytes (all-reduces twice) over a chip's links at the published 200 GB/s in a pod of 256 chips, and
  at half of it in smaller slices, where the compiler lays one ring over two of the four links; nothing overlaps them.
  Collectives inside a fusion are not seen, so with mesh.fsdp only memory and cycles are right.

So these are predictions that help to compare two programs. Nobody has measured them. `--blocks` compiles models of so many
blocks (give two) and continues the line to the config's number of blocks: minutes, not an hour, on 2 CPU cores.
Results: docs/scaling.md
"""

import argparse
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from mlpmixer_flax.compilation_cache import compiled_anew
from mlpmixer_flax.config import ConfigDict, resolve
from mlpmixer_flax.data import augment
from mlpmixer_flax.ending import exit_status, leave
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.training import sharding
from mlpmixer_flax.training.configfile import load_config
from mlpmixer_flax.training.evaluation import make_eval_step
from mlpmixer_flax.training.optimizer import make_optimizer, make_schedule
from mlpmixer_flax.training.step import init_state, make_train_step

NUM_CLASSES, CHANNELS = 1000, 3  # of ImageNet
HERTZ, PEAK_FLOPS, LINK_BYTES = 1.5e9, 197e12, 200e9  # per second and chip, TPU v5e
STEPS = ("update", "evaluation", "augmentation")
# The first that is found in the name of an operation has its cycles.
PARTS = {
    "augmentation": r"/augment/",
    "token MLPs": r"token_mixing",
    "channel MLPs": r"channel_mixing",
    "LayerNorm": r"LayerNorm|layer_norm",
    "transpositions": r"MixerBlock_\d+.*transpose$",
    "stem and head": r"/(stem|head)/",
}
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}


@dataclass
class Costs:
    """What a compiled program costs on one device; cycles by part, collectives as kind -> count and bytes."""

    cycles: Counter[str] = field(default_factory=Counter)
    collectives: Counter[str] = field(default_factory=Counter)
    collective_bytes: Counter[str] = field(default_factory=Counter)
    copies: float = 0  # cycles of operations that only change a layout; also in `cycles`
    by_index: float = 0  # gathers and scatters, for which there are no cycles

    def add(self, other: "Costs", times: float = 1) -> None:
        for name in ("cycles", "collectives", "collective_bytes"):
            for key, value in getattr(other, name).items():
                getattr(self, name)[key] += times * value
        self.copies += times * other.copies
        self.by_index += times * other.by_index


def read_costs(text: str) -> Costs:
    """Returns the costs of the program in optimized HLO text."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            lines = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith("  "):
            lines.append(line)

    done: dict[str, Costs] = {}

    def of(name: str) -> Costs:
        if name not in done:
            done[name] = Costs()
            for line in computations.get(name, []):
                done[name].add(_operation(line))
                for inner, times in _calls(line, of, computations):
                    done[name].add(of(inner), times)
                if fused := re.search(r" fusion\(.*calls=%?([\w.\-]+)", line):
                    done[name].by_index += of(fused[1]).by_index
        return done[name]

    return of(entry)


def _calls(
    line: str, of: Callable[[str], Costs], computations: Mapping[str, list[str]]
) -> list[tuple[str, float]]:
    """Returns the computations that an operation runs, and how often; a fusion has the cycles of its content."""
    if loop := re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
        # A loop that JAX counts starts at 0 and ends with a comparison of its counter with a constant.
        condition = "\n".join(computations.get(loop[1], []))
        end = re.search(r"ROOT .* compare\(.*, (%?[\w.\-]+)\), direction=LT", condition)
        count = end and re.search(rf"{re.escape(end[1])} = \S+ constant\((\d+)\)", condition)
        return [(name, int(count[1]) if count else 1) for name in loop.groups()]
    if re.search(r" conditional\(", line):
        names = re.findall(r"(?:true|false)_computation=(%?[\w.\-]+)", line)
        if listed := re.search(r"branch_computations=\{([^}]*)\}", line):
            names = listed[1].split(", ")
        return [(max((name.lstrip("%") for name in names), key=lambda name: of(name).cycles.total()), 1)]
    if call := re.search(r" (?:call|async-start)\(.*(?:to_apply|calls)=%?([\w.\-]+)", line):
        return [(call[1], 1)]
    return []


def _operation(line: str) -> Costs:
    costs = Costs()
    name = re.search(r'op_name="([^"]*)"', line)
    part = next((part for part, words in PARTS.items() if name and re.search(words, name[1])), "rest")
    cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
    if cycles:
        costs.cycles[part] += int(cycles[1])
        if re.search(r"= \S+ copy\(|^ *(ROOT )?%?copy[\w.]* =", line):
            costs.copies += int(cycles[1])
    if re.search(r" (gather|scatter)\(", line):
        costs.by_index += 1
    if collective := re.search(rf"= (.*?) ({COLLECTIVES})(-start)?\(", line):
        shapes, kind, start = collective.groups()
        costs.collectives[kind] += 1
        # The start of a permute has the shape that it sends and the shape that it receives.
        sides = 2 if start and kind == "collective-permute" else 1
        costs.collective_bytes[kind] += _bytes(shapes) // sides
    return costs


def _bytes(shapes: str) -> int:
    total = 0
    for dtype, dimensions in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
        total += BYTES.get(dtype, 0) * math.prod(int(size) for size in dimensions.split(",") if size)
    return total


def compile_step(config: ConfigDict, step: str, mesh: jax.sharding.Mesh) -> jax.stages.Compiled:
    """Compiles the update, the evaluation or the augmentation of a config's global batch for the devices of a mesh."""
    size_px, n = config.preprocess.image_size_px, config.batch_size
    everywhere, rows = sharding.replicated(mesh), sharding.split_by_rows(mesh)

    batch = {
        "image": jax.ShapeDtypeStruct((n, size_px, size_px, CHANNELS), jnp.uint8, sharding=rows),
        "label": jax.ShapeDtypeStruct((n,), jnp.int32, sharding=rows),
        "mask": jax.ShapeDtypeStruct((n,), bool, sharding=rows),
    }
    if step == "augmentation":
        options = {"preprocess": config.preprocess.to_dict(), "num_classes": NUM_CLASSES}
        function = partial(augment.augment, cropped=True, **options, **dict(config.augment))
        key = jax.eval_shape(lambda: jax.random.key(0))
        return jax.jit(function, out_shardings=rows).lower(key, batch["image"], batch["label"]).compile()
    model = MlpMixer(num_classes=NUM_CLASSES, **config.model.to_dict())
    schedule = make_schedule(config, total_steps=100_000, warmup_steps=config.schedule.warmup_steps)
    optimizer = make_optimizer(config, schedule)
    init = partial(init_state, model=model, optimizer=optimizer, config=config)
    shapes = jax.eval_shape(partial(init, None, image_shape=(size_px, size_px, CHANNELS)))
    placements = sharding.state_placements(shapes, mesh)
    state = sharding.with_placements(shapes, placements)
    if step == "evaluation":
        score = jax.jit(make_eval_step(model, config, mesh=mesh, cropped=True), out_shardings=everywhere)
        return score.lower(state.eval_params, batch).compile()
    update = make_train_step(model, optimizer, schedule, config, mesh=mesh, cropped=True)
    update = jax.jit(update, donate_argnums=0, out_shardings=(placements, everywhere))
    return update.lower(state, batch).compile()


def measure(config: ConfigDict, step: str, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Returns the figures of one compiled step, on one device, by name."""
    started = time.process_time()
    compiled = compile_step(config, step, mesh)
    costs, memory = read_costs(compiled.as_text()), compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    figures = {f"cycles {part}": costs.cycles[part] for part in (*PARTS, "rest")}
    for kind in COLLECTIVES.split("|"):
        figures |= {f"count {kind}": costs.collectives[kind], f"bytes {kind}": costs.collective_bytes[kind]}
    return figures | {
        "cycles": costs.cycles.total(),
        "cycles of copies": costs.copies,
        "by index": costs.by_index,
        "held": held,
        "temporary": memory.temp_size_in_bytes,
        "flops": compiled.cost_analysis()["flops"],
        "compile seconds": time.process_time() - started,
    }


def continue_line(points: Mapping[int, Mapping[str, float]], blocks: int) -> dict[str, float]:
    """Returns the figures of a model of `blocks` blocks, on the line through those of two other numbers of blocks."""
    (few, low), (many, high) = sorted(points.items())
    return {key: low[key] + (high[key] - low[key]) * (blocks - few) / (many - few) for key in low}


def model_flops(config: ConfigDict) -> float:
    """Returns the FLOPs of one image's forward pass in matrix products."""
    model = config.model
    height, width = model.patches.size
    tokens = (config.preprocess.image_size_px // height) * (config.preprocess.image_size_px // width)
    block = 2 * tokens * model.hidden_dim * (model.tokens_mlp_dim + model.channels_mlp_dim)
    stem = tokens * height * width * CHANNELS * model.hidden_dim
    return 2 * (stem + model.num_blocks * block + model.hidden_dim * NUM_CLASSES)


def topology_mesh(name: str, *, fsdp: int = 1) -> jax.sharding.Mesh:
    """Returns the devices of a TPU topology, or of this machine for "cpu", as the mesh of a run."""
    if name == "cpu":
        return sharding.make_mesh(fsdp=fsdp)
    # There is no TPU: its metadata server must not be asked, and JAX must not start it.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    jax.config.update("jax_platforms", "cpu")
    options = {"chips_per_host_bounds": (1, 1, 1)} if name.endswith(":1x1") else {}
    devices = topologies.get_topology_desc(name, "tpu", **options).devices
    return sharding.make_mesh(fsdp=fsdp, devices=devices)


def rows_of(
    figures: Mapping[str, float], config: ConfigDict, step: str, devices: int
) -> list[tuple[str, str]]:
    """Returns (name, value) of what is printed."""
    compute = figures["cycles"] / HERTZ
    moved = sum(figures[f"bytes {kind}"] for kind in ("all-reduce", *COLLECTIVES.split("|")))
    links = moved / LINK_BYTES * (1 if devices == 256 else 2)
    rows = [
        ("million cycles", f"{figures['cycles'] / 1e6:,.1f}"),
        *((part, f"{figures[f'cycles {part}'] / 1e6:,.1f}") for part in (*PARTS, "rest")),
        ("copies, also in the above", f"{figures['cycles of copies'] / 1e6:,.1f}"),
        ("gathers and scatters, not in the above", f"{figures['by index']:.0f}"),
        ("state and batch, MiB", f"{figures['held'] / 2**20:,.0f}"),
        ("during the step, MiB", f"{figures['temporary'] / 2**20:,.0f}"),
        ("GFLOP, says the compiler", f"{figures['flops'] / 1e9:,.0f}"),
    ]
    for kind in COLLECTIVES.split("|"):
        if figures[f"count {kind}"]:
            value = f"{figures[f'count {kind}']:.0f}, {figures[f'bytes {kind}'] / 2**20:,.1f} MiB"
            rows.append((kind, value))
    if compute:
        rows += [
            ("images/s, all chips", f"{config.batch_size / (compute + links):,.0f}"),
            ("share of a single chip's speed", f"{compute / (compute + links):.1%}"),
        ]
        passes = {"update": 3, "evaluation": 1, "augmentation": 0}[step]
        needed = passes * model_flops(config) * config.batch_size / devices / PEAK_FLOPS
        rows.append(("share of peak", f"{needed / (compute + links):.1%}"))
    return [*rows, ("processor seconds of compilation", f"{figures['compile seconds']:,.0f}")]


@compiled_anew()  # what is measured
def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=raw)
    parser.add_argument("--config", default="configs/b16_imagenet.py", help="(default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the config, repeatable")
    parser.add_argument("--topology", action="append", help="repeatable, or cpu (default: v5e:1x1)")
    parser.add_argument("--step", choices=STEPS, default=STEPS[0], help="(default: %(default)s)")
    parser.add_argument("--images", type=int, default=128, help="images per chip (default: %(default)s)")
    parser.add_argument("--blocks", type=int, action="append", help="compile so many blocks; give it twice")
    arguments = parser.parse_args()
    if len(set(arguments.blocks or ())) not in (0, 2):
        parser.error("give --blocks twice, with two numbers, or not at all")
    for topology in arguments.topology or ["v5e:1x1"]:
        setting = [f"--config.{change}" for change in arguments.set]
        mesh = topology_mesh(topology, fsdp=load_config(arguments.config, setting).mesh.fsdp)
        changed = [*setting, f"--config.batch_size={arguments.images * mesh.size}"]
        config = resolve(load_config(arguments.config, changed), {})
        if arguments.blocks:
            points = {}
            for blocks in arguments.blocks:
                fewer = [*changed, f"--config.model.num_blocks={blocks}"]
                smaller = resolve(load_config(arguments.config, fewer), {})
                points[blocks] = measure(smaller, arguments.step, mesh)
            figures = continue_line(points, config.model.num_blocks)
        else:
            figures = measure(config, arguments.step, mesh)
        rows = rows_of(figures, config, arguments.step, mesh.size)
        print(f"| {arguments.step}, {arguments.images} images a chip | {topology} |\n|---|---|")
        print("\n".join(f"| {name} | {value} |" for name, value in rows), flush=True)


if __name__ == "__main__":
    leave(exit_status(main))

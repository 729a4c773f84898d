"""Measures the speed and memory of an update and of a forward pass; the only code that times them."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlpmixer_flax import UserError
from mlpmixer_flax.config import ConfigDict
from mlpmixer_flax.data import augment
from mlpmixer_flax.limits import check_limits
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.training import sharding
from mlpmixer_flax.training.devices import check_devices
from mlpmixer_flax.training.optimizer import Params, make_optimizer, make_schedule
from mlpmixer_flax.training.step import init_state, make_train_step
from mlpmixer_flax.training.table import count_macs
from mlpmixer_flax.training.validate import check_channels

KINDS = ("training", "inference")
_LONGEST_SECONDS = 86400
Run = Callable[[int], object]  # calls what is measured n times and waits for the last result


@dataclass(frozen=True)
class Row:
    """A line of the table; everything after `batch_size` is None if the program needs more memory than there is."""

    model: str
    kind: str  # one of KINDS
    batch_size: int
    images_per_second: float | None = None
    spread: float | None = None  # (slowest - fastest) / median of the repetitions
    tflops: float | None = None  # achieved, 10**12 useful operations per second
    share: float | None = None  # of the matrix-product rate
    memory_mib: float | None = None  # of the compiled program on one device
    compile_seconds: float | None = None


def time_calls(run: Run, *, seconds: float, repetitions: int = 5) -> list[float]:
    """Returns the seconds per call in each repetition, sorted; takes about `seconds`, or as long as each needs.

    Two calls come before, to warm up and to choose the number of calls per repetition.
    """
    run(1)
    started = time.perf_counter()
    run(1)
    calls = max(1, round(seconds / repetitions / (time.perf_counter() - started)))
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        run(calls)
        times.append((time.perf_counter() - started) / calls)
    return sorted(times)


def check_seconds(seconds: float) -> None:
    """Raises UserError if no measurement can take so long."""
    if not 0 < seconds <= _LONGEST_SECONDS:
        raise UserError(f"seconds={seconds} must be above 0 and at most {_LONGEST_SECONDS}, which is a day")


def make_row(
    model: str,
    kind: str,
    batch_size: int,
    times: list[float],
    *,
    macs: int,
    product_tflops: float,
    memory_mib: float | None = None,
    compile_seconds: float | None = None,
) -> Row:
    """Returns a line of the table.

    Args:
      times: from `time_calls`.
      macs: multiply-accumulates of a forward pass of one image.
      product_tflops: from `measure_product`.
    """
    median = statistics.median(times)
    tflops = batch_size * 2 * macs * (3 if kind == "training" else 1) / median / 1e12
    return Row(
        model=model,
        kind=kind,
        batch_size=batch_size,
        images_per_second=batch_size / median,
        spread=(times[-1] - times[0]) / median,
        tflops=tflops,
        share=tflops / product_tflops,
        memory_mib=memory_mib,
        compile_seconds=compile_seconds,
    )


HEADER = (
    f"{'model':<15}{'kind':<10}{'batch':>6}{'images/s':>10}{'spread':>8}{'TFLOP/s':>9}{'share':>6}{'MiB':>8}"
    f"{'compile':>8}"
)


def format_row(row: Row) -> str:
    """Returns a line of the table as text of 80 columns."""
    start = f"{row.model[:14]:<15}{row.kind:<10}{row.batch_size:>6}"
    if row.images_per_second is None:
        return f"{start}  out of memory"
    speed = (
        f"{row.images_per_second:,.0f}" if row.images_per_second >= 100 else f"{row.images_per_second:.3g}"
    )
    memory = "" if row.memory_mib is None else f"{row.memory_mib:,.0f}"
    compiling = "" if row.compile_seconds is None else f"{row.compile_seconds:.1f}"
    return f"{start}{speed:>10}{row.spread:>8.0%}{row.tflops:>9.3g}{row.share:>6.0%}{memory:>8}{compiling:>8}"


def measure_product(dtype: str, *, seconds: float) -> float:
    """Returns the rate of large matrix products on one device, in TFLOP/s: the best over some sizes."""
    best = 0.0
    for n in (1024, 2048, 4096, 8192, 16384):
        left, right = jnp.ones((n, n), dtype), jnp.full((n, n), 1 / n, dtype)

        @jax.jit
        def chain(left, right):
            # A chain, because single products may be faster to compute than to start.
            return jax.lax.fori_loop(0, 8, lambda _, x: x @ right, left)

        times = time_calls(partial(repeat, chain, left, right), seconds=seconds / 2)
        best = max(best, 8 * 2 * n**3 / times[0] / 1e12)
        if times[0] > seconds / 20:  # the next size takes eight times as long
            break
    return best


def repeat(function: Callable[..., Any], *arguments: Any) -> None:
    """Calls a JAX function with all arguments but the last one, which says how often; waits for the last result."""
    *inputs, calls = arguments
    result = None
    for _ in range(calls):
        result = function(*inputs)
    jax.block_until_ready(result)


def measure(
    name: str,
    config: ConfigDict,
    kind: str,
    batch_size: int,
    *,
    num_classes: int,
    product_tflops: float,
    seconds: float,
) -> Row:
    """Compiles and measures an update or a forward pass of a config's model, over all devices.

    Raises:
      UserError: as `check_measurable`.
    """
    size_px = config.preprocess.image_size_px
    try:
        started = time.perf_counter()
        prepared = prepare(config, kind, batch_size, num_classes=num_classes)
        compile_seconds = time.perf_counter() - started
        times = time_calls(prepared.run, seconds=seconds)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Row(name, kind, batch_size)
    return make_row(
        name,
        kind,
        batch_size,
        times,
        macs=count_macs(prepared.model, (size_px, size_px, 3), prepared.params),
        product_tflops=product_tflops * jax.device_count(),
        memory_mib=_memory_mib(prepared.program),
        compile_seconds=compile_seconds,
    )


@dataclass(frozen=True)
class Prepared:
    """A compiled update or forward pass, with everything it needs."""

    run: Run
    program: jax.stages.Compiled
    model: MlpMixer
    params: Params


def prepare(config: ConfigDict, kind: str, batch_size: int, *, num_classes: int) -> Prepared:
    """Compiles an update or a forward pass of a config's model, over all devices, on images of random numbers.

    Raises:
      UserError: as `check_measurable`.
    """
    check_measurable(config, kind, batch_size)
    mesh = sharding.make_mesh(fsdp=config.mesh.fsdp if kind == "training" else 1)
    size_px = config.preprocess.image_size_px
    model = MlpMixer(num_classes=num_classes, **config.model.to_dict())
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (batch_size, size_px, size_px, 3), np.uint8),
        "label": rng.integers(0, num_classes, batch_size, np.int32),
        "mask": np.ones(batch_size, bool),
    }
    make_run = {"training": _make_training, "inference": _make_inference}[kind]
    run, program, params = make_run(model, config, sharding.put_batch(batch, mesh), mesh)
    return Prepared(run, program, model, params)


def check_measurable(config: ConfigDict, kind: str, batch_size: int) -> None:
    """Checks that a config can be measured, on images with 3 channels.

    Raises:
      UserError: a batch is too large, or cannot be divided over the devices; in training, as `check_devices`; or as
        `check_channels`.
    """
    check_channels(config, 3, of="the benchmark")
    check_limits("batch_size", batch_size)
    if kind == "training":
        check_devices(config, batch_size=batch_size)
        return
    parts = jax.device_count()
    if batch_size % parts:
        raise UserError(f"batch_size={batch_size} is not divisible by {parts}: choose a multiple of {parts}")


def _memory_mib(program: jax.stages.Compiled) -> float | None:
    """Returns the memory of a compiled program on one device; None if the compiler does not report it."""
    memory = program.memory_analysis()
    if memory is None:
        return None
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return (held + memory.temp_size_in_bytes) / 2**20


def _make_training(model, config, batch, mesh):
    """Returns (function that runs n updates, the compiled update, parameters)."""
    # A warmup of epochs has an unknown number of steps; without any, rsqrt divides by zero.
    schedule = make_schedule(config, total_steps=10**6, warmup_steps=config.schedule.warmup_steps or 1)
    optimizer = make_optimizer(config, schedule)
    size_px = config.preprocess.image_size_px
    init = partial(
        init_state, None, model=model, optimizer=optimizer, config=config, image_shape=(size_px, size_px, 3)
    )
    placements = sharding.state_placements(jax.eval_shape(init), mesh)
    state = jax.jit(init, out_shardings=placements)()
    update = jax.jit(
        make_train_step(model, optimizer, schedule, config, mesh=mesh),
        donate_argnums=0,
        out_shardings=(placements, sharding.replicated(mesh)),
    )
    program = update.lower(state, batch).compile()

    def run(calls: int) -> None:
        nonlocal state
        for _ in range(calls):
            state, _ = program(state, batch)
        jax.block_until_ready(state)

    return run, program, state.params


def _make_inference(model, config, batch, mesh):
    """Returns (function that runs n forward passes, the compiled pass, parameters)."""
    size_px = config.preprocess.image_size_px
    everywhere = sharding.replicated(mesh)

    def infer(params, images):
        images = augment.prepare(images, cropped=False, **config.preprocess.to_dict())
        return model.apply({"params": params}, images)

    init = jax.jit(model.init, out_shardings=everywhere)
    params = init(jax.random.key(0), jnp.zeros((1, size_px, size_px, 3)))["params"]
    program = (
        jax.jit(infer, out_shardings=sharding.split_by_rows(mesh)).lower(params, batch["image"]).compile()
    )
    return partial(repeat, program, params, batch["image"]), program, params

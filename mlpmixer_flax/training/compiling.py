"""Compiles the functions of a run for its shapes and sizes, all at the same time."""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mlpmixer_flax.dataloader import TestBatches, TrainBatches
from mlpmixer_flax.training import sharding
from mlpmixer_flax.training.evaluation import EvalStep
from mlpmixer_flax.training.optimizer import Params
from mlpmixer_flax.training.setup import Setup, start_state
from mlpmixer_flax.training.signals import SIGNAL, agreeing
from mlpmixer_flax.training.step import CompiledUpdate, PreviewStep, TrainState, Update


@dataclass(frozen=True)
class Steps:
    """The compiled functions of a run, and the state from which it starts."""

    state: TrainState
    updates: Mapping[int, CompiledUpdate]  # by the side of the images in px
    eval_steps: Mapping[int, EvalStep]
    preview: PreviewStep | None  # None if the run continues


def compile_steps(setup: Setup, state: TrainState | None, *, params: Params | None) -> Steps:
    """Compiles all functions at the same time, for the shapes of this run; prints how long that took.

    If `state` is None, the run starts: the state is then created meanwhile, from `params`, as `start_state` does.
    """
    started = time.monotonic()
    everywhere, rows = sharding.replicated(setup.mesh), sharding.split_by_rows(setup.mesh)
    of_teacher = setup.teacher.place(setup.mesh) if setup.teacher else ()

    def batch_of(batches: TrainBatches | TestBatches) -> dict[str, jax.ShapeDtypeStruct]:
        examples, n = batches.examples, batches.batch_size
        labels = examples.as_array([])
        return {
            "image": jax.ShapeDtypeStruct((n, *examples.image_shape), jnp.uint8, sharding=rows),
            "label": jax.ShapeDtypeStruct((n, *labels.shape[1:]), labels.dtype, sharding=rows),
            "mask": jax.ShapeDtypeStruct((n,), bool, sharding=rows),
        }

    def compile_update(update: Update) -> CompiledUpdate:
        batch = batch_of(setup.train_batches)
        if jax.process_count() > 1:
            update = agreeing(update)
            batch[SIGNAL] = jax.ShapeDtypeStruct((jax.device_count(),), jnp.int32, sharding=rows)
        update = jax.jit(update, donate_argnums=0, out_shardings=(setup.placements, everywhere))
        compiled = update.lower(setup.like, batch, of_teacher).compile()
        return lambda state, batch: compiled(state, batch, of_teacher)

    def compile_eval_step(eval_step: EvalStep) -> EvalStep:
        compiled = jax.jit(eval_step, out_shardings=everywhere)
        return compiled.lower(setup.like.eval_params, batch_of(setup.test_batches)).compile()

    def compile_preview() -> PreviewStep:
        preview = jax.jit(setup.preview, out_shardings=everywhere)
        return preview.lower(batch_of(setup.train_batches)).compile()

    def start() -> TrainState:
        return start_state(setup, params) if state is None else state

    # The main thread only waits, so that Ctrl-C can interrupt it.
    with ThreadPoolExecutor() as pool:
        started_state = pool.submit(start)
        updates = {size_px: pool.submit(compile_update, each) for size_px, each in setup.updates.items()}
        eval_steps = {
            size_px: pool.submit(compile_eval_step, each) for size_px, each in setup.eval_steps.items()
        }
        preview = pool.submit(compile_preview) if state is None else None
    steps = Steps(
        started_state.result(),
        {size_px: update.result() for size_px, update in updates.items()},
        {size_px: each.result() for size_px, each in eval_steps.items()},
        preview and preview.result(),
    )
    print(f"compiled in {time.monotonic() - started:.1f} s (not counted in the speeds below)", flush=True)
    return steps

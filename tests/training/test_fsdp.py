"""Tests that a state divided over devices trains like one that every device has, in a process with eight CPU devices."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from several_processes import arguments, finish, start_all, state_at
from small_runs import DIVISIBLE, rows

from mlpmixer_flax.run_weights import read_weights

pytestmark = pytest.mark.slow

CHILD = """
import json, sys
from pathlib import Path
import jax, numpy as np
from mlpmixer_flax import fit, load_config
from mlpmixer_flax.training import sharding
from mlpmixer_flax.training.setup import make_setup, settle, start_state

out, found, VALUES = Path(sys.argv[1]), {}, json.loads(sys.argv[2])

def setup_of(**changes):
    values = {**VALUES, "total_steps": 20, **{key.replace("__", "."): value for key, value in changes.items()}}
    return make_setup(settle(load_config("digits.py", values), {}))

def rows_of(setup):
    return sharding.put_batch(setup.train_batches[0], setup.mesh)

# Placements, the bytes on each device, and which collectives the update has
for fsdp in (1, 2, 8):
    setup = setup_of(mesh__fsdp=fsdp, model__dtype="bfloat16", optimizer__name="adam", optimizer__weight_decay=0.0,
                     optimizer__sam_rho=0.0, accumulation_steps=1)
    state = start_state(setup, None)
    kernel = state.params["MixerBlock_0"]["channel_mixing"]["Dense_0"]["kernel"]
    update = jax.jit(setup.update, out_shardings=(setup.placements, sharding.replicated(setup.mesh)))
    lines = update.lower(state, rows_of(setup)).as_text().splitlines()
    types = lambda name: [line.split("->")[-1] for line in lines_of(name)]
    def lines_of(name):
        # the result of an operation with a region stands on the line that ends the region
        ends, inside = [], False
        for line in lines:
            inside = inside or f"stablehlo.{name}" in line
            if inside and "->" in line:
                ends.append(line)
                inside = False
        return ends
    found[str(fsdp)] = {
        "mesh": dict(setup.mesh.shape),
        "kernel": [kernel.shape, kernel.addressable_shards[0].data.shape],
        "bytes": [
            sum(shard.data.nbytes for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards
                if shard.device == device)
            for device in jax.devices()
        ],
        "collectives": {name: types(name) for name in ("all_gather", "reduce_scatter", "all_reduce")},
    }

# Given weights end in their parts
setup = setup_of(mesh__fsdp=8)
given = jax.tree.map(lambda x: np.random.default_rng(0).normal(size=x.shape).astype(np.float32), setup.like.params)
state = start_state(setup, given)
found["given weights"] = {
    "equal": all(np.array_equal(a, b) for tree in (state.params, state.ema)
                 for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(given), strict=True)),
    "placed": all(jax.tree.leaves(jax.tree.map(lambda x, like: x.sharding == like.sharding, state, setup.like))),
}

# Runs whose state is divided in another way at each start, and one that is not
def run(name, parts):
    for steps, fsdp in parts:
        values = {**VALUES, "total_steps": steps, "mesh.fsdp": fsdp}
        scores = fit(load_config("digits.py", values), out / name)
    return scores

found["scores"] = run("copies", [(30, 1)])
run("parts", [(10, 8), (20, 1)])
(out / "found.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    out = tmp_path_factory.mktemp("eight")
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(out), json.dumps(DIVISIBLE)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return out, json.loads((out / "found.json").read_text()), done.stdout


def test_kernels_are_divided_and_vectors_are_copied(eight):
    _, found, _ = eight
    assert [found[n]["mesh"] for n in "128"] == [
        {"data": 8, "fsdp": 1},
        {"data": 4, "fsdp": 2},
        {"data": 1, "fsdp": 8},
    ]
    assert [found[n]["kernel"][1] for n in "128"] == [[16, 32], [8, 32], [2, 32]]


def test_every_device_holds_its_part_of_the_state(eight):
    _, found, _ = eight
    vectors = 16 + 2 * (8 + 16) + 6 * 16 + 32 + 10  # not exact: fewer than these per copy
    whole = found["1"]["bytes"][0]
    for fsdp in (2, 8):
        held = found[str(fsdp)]["bytes"]
        assert len(set(held)) == 1
        # Parameters, EMA and two moments of Adam
        assert whole / fsdp < held[0] < whole / fsdp + 4 * 4 * vectors


def test_gradients_are_summed_in_float32_and_scattered(eight):
    _, found, _ = eight
    copies, parts = found["1"]["collectives"], found["8"]["collectives"]
    assert not copies["all_gather"] and not copies["reduce_scatter"] and copies["all_reduce"]
    # The kernels: four of the block, and head, of which each axis divisible by 8 is; the stem is frozen.
    assert len(parts["reduce_scatter"]) == 5 and len(parts["all_gather"]) == 6
    types = [
        kind for each in (copies, parts) for name in ("reduce_scatter", "all_reduce") for kind in each[name]
    ]
    assert all("f32" in kind and "bf16" not in kind for kind in types)


def test_given_weights_go_straight_to_their_parts(eight):
    assert eight[1]["given weights"] == {"equal": True, "placed": True}


@pytest.mark.long
@pytest.mark.slow
def test_a_divided_run_continues_with_copies_then_in_two_processes_and_equals_a_run_with_copies(eight):
    out, found, printed = eight
    assert "continuing with mesh.fsdp=1 (was 8), total_steps=20 (was 10); updates stay the same" in printed
    options = arguments({**DIVISIBLE, "total_steps": 30, "mesh.fsdp": 2})
    statuses, texts, errors = finish(start_all(2, "train", *options, f"--workdir={out / 'parts'}"))
    assert statuses == [0, 0], errors
    assert "continuing with mesh.fsdp=2 (was 1), total_steps=30 (was 20); updates stay the same" in texts[0]
    scores = rows(out / "parts")[-1]
    assert scores["step"] == 30 and scores["test/loss"] == pytest.approx(
        found["scores"]["test/loss"], rel=1e-4
    )
    parts, copies = state_at(out / "parts", 30), state_at(out / "copies", 30)
    assert parts.keys() == copies.keys() and len(parts) > 40
    for name in copies:  # sums over devices are rounded otherwise
        np.testing.assert_allclose(parts[name], copies[name], rtol=1e-3, atol=1e-5, err_msg=name)
    step, params = read_weights(out / "parts")  # as predict and export do, on one device
    assert step == 30
    np.testing.assert_array_equal(params["head"]["kernel"], parts["['params']['head']['kernel']"])

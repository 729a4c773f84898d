"""Tests that four devices give the results of one, in a process of its own: a flag at its start makes four CPUs."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.slow

CHILD = """
import json, sys
import jax, numpy as np
from mlpmixer_flax.config import get_config, resolve
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.training import sharding
from mlpmixer_flax.training.evaluation import evaluate, make_eval_step
from mlpmixer_flax.training.optimizer import make_optimizer, make_schedule
from mlpmixer_flax.training.step import init_state, make_train_step

out = sys.argv[1]
found, arrays = {}, {}
mesh, single = sharding.make_mesh(), sharding.make_mesh(devices=jax.devices()[:1])
found["devices"], found["axes"] = mesh.size, mesh.axis_names
everywhere, rows = sharding.replicated(mesh), sharding.split_by_rows(mesh)

rng = np.random.default_rng(0)
batch = {
    "image": rng.integers(0, 256, (8, 8, 8, 1), dtype=np.uint8),
    "label": rng.integers(0, 3, 8, dtype=np.int32),
    "mask": np.arange(8) < 7,
}
placed = sharding.put_batch(batch, mesh)
found["placements"] = {
    name: [
        (shard.device.id, shard.index[0].start, shard.index[0].stop,
         bool(np.array_equal(shard.data, batch[name][shard.index])))
        for shard in array.addressable_shards
    ]
    for name, array in placed.items()
}
found["types"] = {name: (list(a.shape), str(a.dtype)) for name, a in placed.items()}
try:
    sharding.put_batch({"label": np.zeros(6, np.int32)}, mesh)
    found["six rows"] = "placed"
except ValueError:
    found["six rows"] = "refused"

quick = {"xla_backend_optimization_level": 0}
for microbatches in (1, 2):
    config = get_config()
    config.update_from_flattened_dict({
        "model.patches.size": (4, 4), "model.hidden_dim": 8, "model.num_blocks": 1,
        "model.tokens_mlp_dim": 6, "model.channels_mlp_dim": 10,
        "augment.crop_padding_px": 1, "augment.flip": True,
        "augment.mixup_alpha": 0.5 if microbatches == 2 else 0.0,  # partners from other devices; slow to compile
        "optimizer.name": "sgd", "optimizer.learning_rate": 0.1, "optimizer.clip_norm": 0.0,
        "ema_decay": 0.9, "accumulation_steps": microbatches,
    })
    config = resolve(config, {})
    model = MlpMixer(num_classes=3, **config.model.to_dict())
    schedule = make_schedule(config, total_steps=10, warmup_steps=0)
    optimizer = make_optimizer(config, schedule)
    weights = np.float32([0.4, 3, 1])
    teacher = model if microbatches == 2 else None
    update, alone = (
        make_train_step(model, optimizer, schedule, config, mesh=each, class_weights=weights, teacher=teacher)
        for each in (mesh, single)
    )
    shapes = jax.eval_shape(
        lambda: init_state(None, model=model, optimizer=optimizer, config=config, image_shape=(8, 8, 1))
    )
    fill = np.random.default_rng(1)
    params = jax.tree.map(lambda p: fill.normal(0, 0.5, p.shape).astype(p.dtype), shapes.params)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes).replace(params=params, ema=params)
    taught = jax.tree.map(lambda p: fill.normal(0, 0.5, p.shape).astype(p.dtype), params) if teacher else ()

    one = jax.jit(alone, compiler_options=quick)(state, batch, taught)  # on the first device
    found["one device"] = len(one[1]["loss"].devices())
    jitted = jax.jit(update, donate_argnums=0, out_shardings=everywhere, compiler_options=quick)
    four = jitted(jax.device_put(state, everywhere), placed, jax.device_put(taught, everywhere))
    found["replicated"] = all(
        leaf.sharding.is_fully_replicated and len(leaf.devices()) == 4 for leaf in jax.tree.leaves(four)
    )
    found["copies equal"] = all(
        np.array_equal(leaf.addressable_shards[0].data, shard.data)
        for leaf in jax.tree.leaves(four) for shard in leaf.addressable_shards
    )
    for name, result in (("one", one), ("four", four)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(result):
            arrays[f"{microbatches}:{name}:{jax.tree_util.keystr(path)}"] = np.asarray(leaf)

score = jax.jit(make_eval_step(model, config, mesh=mesh), out_shardings=everywhere, compiler_options=quick)
found["scores of four"] = evaluate(score, params, [batch, batch], mesh=mesh)
score = jax.jit(make_eval_step(model, config, mesh=single), compiler_options=quick)
found["scores of one"] = evaluate(score, params, [batch, batch], mesh=single)

np.savez(out + "/arrays.npz", **arrays)
with open(out + "/found.json", "w") as file:
    json.dump(found, file)
"""


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    out = tmp_path_factory.mktemp("four")
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(out)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads((out / "found.json").read_text()), np.load(out / "arrays.npz")


def test_the_mesh_has_every_device(four):
    found, _ = four
    assert found["devices"] == 4 and found["axes"] == ["data", "fsdp"]


def test_a_batch_is_split_by_rows_in_order(four):
    found, _ = four
    assert found["types"] == {
        "image": [[8, 8, 8, 1], "uint8"],
        "label": [[8], "int32"],
        "mask": [[8], "bool"],
    }
    for name, shards in found["placements"].items():
        assert sorted(shards) == [[i, 2 * i, 2 * i + 2, True] for i in range(4)], name


def test_a_number_of_rows_not_divisible_by_the_devices_is_refused(four):
    assert four[0]["six rows"] == "refused"


@pytest.mark.parametrize("microbatches", [1, 2])
def test_an_update_on_four_devices_equals_one_on_a_single_device(four, microbatches):
    found, arrays = four
    assert found["one device"] == 1
    names = [
        name.removeprefix(f"{microbatches}:one:")
        for name in arrays.files
        if name.startswith(f"{microbatches}:one:")
    ]
    assert len(names) > 3 * 16  # parameters, EMA and momentum of the tiny Mixer, and metrics
    for name in names:
        # The order of sums differs, so float32 rounding differs.
        np.testing.assert_allclose(
            arrays[f"{microbatches}:four:{name}"],
            arrays[f"{microbatches}:one:{name}"],
            rtol=1e-5,
            atol=1e-6,
            err_msg=name,
        )
    assert arrays[f"{microbatches}:one:[1]['gradient_norm']"] > 0.1


def test_state_and_metrics_stay_replicated(four):
    found, _ = four
    assert found["replicated"] and found["copies equal"]


def test_scores_of_a_masked_batch_on_four_devices_equal_those_on_one(four):
    found, _ = four
    names = {"loss", "accuracy", "accuracy_top5", "balanced_accuracy"}
    assert found["scores of four"].keys() == names
    assert found["scores of four"] == pytest.approx(found["scores of one"], rel=1e-5)

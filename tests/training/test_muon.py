"""Muon for the matrices of the blocks: its formula, and whole runs with it."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from small_runs import DIVISIBLE

from mlpmixer_flax.config import get_config, resolve
from mlpmixer_flax.training.optimizer import make_optimizer


def tree(seed):
    rng = np.random.default_rng(seed)

    def leaf(*shape):
        return rng.normal(size=shape).astype(np.float32)

    def block():
        dense = {"Dense_0": {"kernel": leaf(6, 10), "bias": leaf(10)}}
        return {"LayerNorm_0": {"scale": leaf(6)}, "token_mixing": dense}

    return {
        "stem": {"kernel": leaf(2, 2, 1, 6), "bias": leaf(6)},
        "MixerBlock_0": block(),
        "MixerBlock_1": block(),
        "pre_head_layer_norm": {"scale": leaf(6), "bias": leaf(6)},
        "head": {"kernel": leaf(6, 3), "bias": leaf(3)},
    }


def updates_of(*gradients, **changes):
    """The updates after each gradient, at a learning rate of 1, with the parameters of seed 0."""
    config = get_config()
    config.update_from_flattened_dict(
        {"model.num_blocks": 2, "optimizer.clip_norm": 0.0}
        | {f"optimizer.{key}": value for key, value in changes.items()}
    )
    optimizer = make_optimizer(resolve(config, {}), lambda step: 1.0)
    params, found = tree(0), []
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        found.append(updates)
    return found


def test_muon_makes_the_matrices_of_the_blocks_orthogonal_and_leaves_the_rest_to_adamw():
    gradients = [tree(seed) for seed in (1, 2, 3)]
    muon = updates_of(*gradients, name="muon", momentum=0.9, weight_decay=0.2)
    adamw = updates_of(*gradients, name="adamw", weight_decay=0.2)
    first = np.zeros((6, 10))
    for step, (ours, theirs, gradient) in enumerate(zip(muon, adamw, gradients, strict=True), 1):
        kernel = "MixerBlock_1", "token_mixing", "Dense_0", "kernel"
        found, g, decayed = (
            np.float64(jax.tree.leaves(pick(x, kernel))[0]) for x in (ours, gradient, tree(0))
        )
        # Nesterov's momentum with the means corrected for their start at 0, as optax and its reference do
        first = 0.9 * first + 0.1 * g
        ahead = 0.9 * first / (1 - 0.9 ** (step + 1)) + 0.1 * g / (1 - 0.9**step)
        left, _, right = np.linalg.svd(ahead, full_matrices=False)
        direction = -(found + 0.2 * decayed)
        assert np.sqrt(np.mean(direction**2)) == pytest.approx(0.2, rel=1e-4)
        cosine = (direction * (left @ right)).sum() / np.linalg.norm(direction) / np.linalg.norm(left @ right)
        assert cosine > 0.97  # five iterations leave singular values between 0.7 and 1.2
        for layer in ("stem", "pre_head_layer_norm", "head"):
            jax.tree.map(np.testing.assert_array_equal, ours[layer], theirs[layer])
        for part in (("LayerNorm_0", "scale"), ("token_mixing", "Dense_0", "bias")):
            np.testing.assert_array_equal(
                pick(ours["MixerBlock_0"], part), pick(theirs["MixerBlock_0"], part)
            )


def pick(tree, path):
    for name in path:
        tree = tree[name]
    return tree


def test_a_gradient_of_zero_gives_no_update():
    """The head of a new model is 0, so the first gradient of all layers before it is."""
    zero = jax.tree.map(np.zeros_like, tree(1))
    (updates,) = updates_of(zero, name="muon")
    jax.tree.map(np.testing.assert_array_equal, updates, zero)


CHILD = """
import json, sys
import jax
from mlpmixer_flax import fit, load_config

jax.config.update("jax_disable_most_optimizations", True)  # compiling takes nearly all of the time
for workdir, changes in json.loads(sys.argv[1]):
    fit(load_config("digits.py", changes), workdir)
"""
VALUES = DIVISIBLE | {
    "model.dropout_rate": 0.0,
    "optimizer.sam_rho": 0.0,
    "optimizer.name": "muon",
    "total_steps": 6,
    "log_every_steps": 1,
    "eval_every_steps": 6,
    "save_every_steps": 3,
    "test_split": "test[:64]",
}


@pytest.mark.slow
@pytest.mark.long
def test_runs_with_muon_continue_and_are_divided_over_devices_like_others(tmp_path):
    """With frozen layers, EMA and microbatches; three updates in four parts, and after a restart three in two."""
    half = {"total_steps": 3, "eval_every_steps": 3, "mesh.fsdp": 4}
    jobs = [("whole", {}), ("divided", half), ("divided", {"mesh.fsdp": 2})]
    jobs = [(str(tmp_path / name), {**VALUES, **changes}) for name, changes in jobs]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(jobs)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]

    def losses(name):
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}

    whole = losses("whole")
    assert list(whole) == [1, 2, 3, 4, 5, 6] and whole[6] < whole[1] - 0.05
    assert losses("divided") == pytest.approx(whole, rel=1e-3)

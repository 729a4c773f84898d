"""Small runs, in this process and in others, and what they have written."""

import json
import re
import subprocess
import sys

import orbax.checkpoint as ocp
from faulty_machine import QUICK_TO_COMPILE

from mlpmixer_flax.train import main

# Everything random is on, so that a resumed run could get many things wrong.
SMALL = [
    "--config.model.hidden_dim=16",
    "--config.model.channels_mlp_dim=16",
    "--config.model.num_blocks=2",
    "--config.model.dropout_rate=0.1",
    "--config.model.stochastic_depth_rate=0.1",
    "--config.augment.mixup_alpha=0.5",
    "--config.ema_decay=0.9",
    "--config.log_every_steps=10",
]


def run_small(workdir, *arguments):
    return main(["--config=digits.py", f"--workdir={workdir}", *SMALL, *arguments])


def start_process(workdir, *arguments, env_changes=None, **options):
    command = [
        sys.executable,
        "-u",
        "-m",
        "mlpmixer_flax.train",
        "--config=digits.py",
        f"--workdir={workdir}",
    ]
    return subprocess.Popen(
        [*command, *SMALL, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=QUICK_TO_COMPILE | (env_changes or {}),
        **options,
    )


def read_until(process, pattern):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return lines
    raise AssertionError(f"ended with {process.wait()} before {pattern!r}:\n{''.join(lines)}")


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def last_state(workdir):
    steps = sorted(int(folder.name) for folder in (workdir / "checkpoints").iterdir())
    folder = (workdir / "checkpoints" / str(steps[-1])).absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder / "default") | checkpointer.restore(folder / "weights")


TINY = ["--config.total_steps=2", "--config.batch_size=8", "--config.preprocess.image_size_px=8"]
TINY += [f"--config.model.{key}=8" for key in ("hidden_dim", "channels_mlp_dim", "tokens_mlp_dim")]
TINY += [
    "--config.model.num_blocks=1",
    "--config.augment.min_crop_area=0.5",
    "--config.augment.mixup_alpha=0.0",
]

# A run whose state several devices can divide
DIVISIBLE = {
    "batch_size": 32,
    "accumulation_steps": 2,
    "freeze": "stem",
    "ema_decay": 0.9,
    "model.num_blocks": 1,
    "model.hidden_dim": 16,
    "model.tokens_mlp_dim": 8,
    "model.channels_mlp_dim": 32,
    "model.dropout_rate": 0.1,
    "augment.mixup_alpha": 0.0,
    "optimizer.sam_rho": 0.05,
    "optimizer.weight_decay": 0.1,
    # Not Adam: it makes full updates of parameters whose gradient is nothing but rounding.
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 0.03,
    "schedule.name": "constant",
    "eval_every_steps": 10,
    "save_every_steps": 10,
}

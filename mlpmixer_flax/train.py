"""Train a Mixer: python -m mlpmixer_flax.train --config=configs/digits.py

A config file describes one run. --config.KEY=VALUE changes a key of the config;
mlpmixer_flax/config.py explains all keys. Config, metrics and checkpoints are
written into the run directory, --workdir. To continue a run that was stopped,
repeat the command with the same --workdir.
"""

import argparse
import signal
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from mlpmixer_flax.cli import exit_status, make_parser
from mlpmixer_flax.training.configfile import load_config, shipped_configs
from mlpmixer_flax.training.loop import fit
from mlpmixer_flax.training.signals import Interrupted

train = fit  # the name that users of this module import


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the options of the program; exits with a message if they are wrong."""
    parser = make_parser(
        "train",
        __doc__,
        examples="  python -m mlpmixer_flax.train --config=configs/digits.py\n"
        "  python -m mlpmixer_flax.train --config=configs/mnist.py --workdir=runs/mnist \\\n"
        "      --config.total_epochs=3 --config.optimizer.learning_rate=1e-3\n"
        "configs of the package:\n"
        + textwrap.fill("  " + " ".join(shipped_configs()), 79, subsequent_indent="  "),
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="config file; those of the package are found by name"
    )
    parser.add_argument(
        "--workdir", type=Path, metavar="RUN", help="run directory (default: runs/CONFIG-TIME)"
    )
    arguments, arguments.overrides = parser.parse_known_args(argv)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program. Exit status: 0 done, 1 loss diverged, 2 unusable input, 128 + n stopped by signal n."""
    arguments = parse(argv)
    return exit_status(
        lambda: _run(arguments),
        interrupted="stopped at once; the run can continue from its newest checkpoint, if it has one",
    )


def _run(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    name = f"{Path(arguments.config).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    workdir = arguments.workdir or Path("runs") / name
    try:
        train(config, workdir)
    except Interrupted as stop:
        name = signal.Signals(stop.number).name
        print(
            f"{name}: saved step {stop.step}; the same command with --workdir={workdir} continues from there"
        )
        return 128 + stop.number
    return 0


if __name__ == "__main__":
    sys.exit(main())

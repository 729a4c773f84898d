"""Draws values of config keys: invalid ones must be refused with one sentence, valid ones must train for two steps.

    pip install hypothesis
    python benchmarks/reliability/config_values.py              # 500 of each, 40 minutes on 2 CPU cores
    python benchmarks/reliability/config_values.py --count=50

An invalid value must end with status 2 in less than 5 seconds, with one sentence that has the key or the value, and
nothing may be written. Ends with status 1 at the first value for which this is not so. Results: docs/reliability.md
"""

import argparse
import contextlib
import io
import os
import shutil
import tempfile
import time
from pathlib import Path

# Compiling takes nearly all of the time.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "0")  # no two runs are alike
os.environ.setdefault("NPROC", "2")  # threads, which reproducible=2 needs

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from printed import controls_terminal

from mlpmixer_flax.config import RANDAUGMENT_OPS, flatten, get_config, resolve
from mlpmixer_flax.limits import LIMITS
from mlpmixer_flax.train import main as train
from mlpmixer_flax.training.validate import CHOICES

BASE = flatten(resolve(get_config(), {}))
ANY_VALUE = ("data_dir",)  # not used for the digits, so no value of it is invalid
WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
NO_NUMBERS = [
    "cat",
    "None",
    "[1, 2",
    "1;2",
    "'",
    "()",
    "1e",
    "\x1b[31m",
    "True",
    "--1",
    "9" * 100_000,
    "1" + "0" * 400,
    "1" + "0" * 5000,
]


# --- invalid values


def outside(low: float, high: float, *, whole: bool) -> st.SearchStrategy[str]:
    """Returns numbers that are not in a range, as text."""
    far = [10**20, -(10**20), 2**63, 2**32, "nan", "inf", "-inf", "1e308", "-1e308"]
    if whole:
        near = st.one_of(st.integers(high + 1, 2**70), st.integers(-(2**70), low - 1))
        return st.one_of(near, st.sampled_from([*far, "1.5", "1e3"])).map(str)
    above = st.floats(min_value=high, exclude_min=True, allow_nan=False)
    below = st.floats(max_value=low, exclude_max=True, allow_nan=False)
    return st.one_of(above, below, st.sampled_from([*far, 1e-320, -1e-320])).map(str)


def is_valid(text: str, low: float, high: float, *, whole: bool) -> bool:
    try:
        number = int(text) if whole else float(text)
    except ValueError:
        return False
    return low <= number <= high and (number == 0 or abs(number) >= 1e-37)


@st.composite
def invalid(draw) -> tuple[str, str]:
    """Returns a key and a text that no run can use as its value."""
    key = draw(st.sampled_from([key for key in BASE if key not in ANY_VALUE]))
    usual = BASE[key]
    number = (usual or (1,))[0] if isinstance(usual, tuple) else usual  # an empty one is of whole numbers
    if isinstance(usual, bool):
        text = draw(WORDS.filter(lambda word: word.lower() not in ("true", "false", "1", "0")))
    elif key in LIMITS:
        low, high, _ = LIMITS[key]
        whole = isinstance(number, int)
        numbers = outside(low, high, whole=whole)
        text = draw(st.one_of(numbers, st.sampled_from(NO_NUMBERS)))
        if is_valid(text, low, high, whole=whole):
            text = "nan"
        if isinstance(usual, tuple) and text == "()":
            text = "cat"  # such a key may be left open
    elif key in CHOICES:
        text = draw(WORDS.filter(lambda word: word not in CHOICES[key]))
    else:
        text = "no such " + draw(WORDS)
    return key, text


def check_invalid(key: str, text: str) -> None:
    folder = Path(tempfile.mkdtemp())
    workdir = folder / "run"
    out, err = io.StringIO(), io.StringIO()
    started = time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = train(["--config=digits.py", f"--workdir={workdir}", f"--config.{key}={text}"])
    seconds, said = time.monotonic() - started, err.getvalue()
    assert status == 2, (status, said, out.getvalue())
    assert said.startswith("error: ") and said.count("\n") == 1 and not controls_terminal(said), said
    assert len(said) < 800, said
    assert key.rpartition(".")[2] in said or repr(text)[1:20] in said, said
    assert seconds < 5, seconds
    assert not os.listdir(folder)
    folder.rmdir()


# --- valid values


def real(low: float, high: float) -> st.SearchStrategy[float]:
    """Returns numbers with six decimals; float32 would make very small ones 0."""
    return st.floats(low, high).map(lambda number: round(number, 6))


VALID = {
    "seed": st.integers(0, 2**32 - 1),
    "cache_bytes": st.sampled_from([0, 4 * 1024**3]),
    "skip_bad_images": st.booleans(),
    "train_split": st.sampled_from(["train[:64]", "train[10:90]", "train[50%:55%]"]),
    "test_split": st.sampled_from(["test[:8]", "test[-20:]", "train[:30]"]),
    "preprocess.crop_fraction": real(0.01, 1),
    "preprocess.fit": st.sampled_from(["", "crop", "pad", "stretch"]),
    "preprocess.interpolation": st.sampled_from(["", "bilinear", "bicubic"]),
    "preprocess.mean": real(-2, 2),
    "preprocess.std": real(1e-4, 10),
    "augment.crop_padding_px": st.integers(0, 4),
    "augment.min_crop_area": real(1e-4, 1),
    "augment.flip": st.booleans(),
    "augment.randaugment_layers": st.sampled_from([0, 0, 1]),
    "augment.randaugment_ops": st.lists(st.sampled_from(RANDAUGMENT_OPS), min_size=1, max_size=2).map(
        ",".join
    ),
    "augment.randaugment_magnitude": real(0, 30),
    "augment.erase_probability": real(0, 1),
    "augment.mixup_alpha": st.sampled_from([0.0, 0.2, 1.0, 1e4]),
    "augment.cutmix_alpha": st.sampled_from([0.0, 1.0]),
    "augment.mix_probability": real(0, 1),
    "augment.label_smoothing": real(0, 0.99),
    "model.hidden_dim": st.integers(1, 24),
    "model.num_blocks": st.integers(1, 3),
    "model.tokens_mlp_dim": st.integers(1, 24),
    "model.channels_mlp_dim": st.integers(1, 24),
    "model.gelu": st.sampled_from(["", "tanh", "erf"]),
    "model.dropout_rate": st.sampled_from([0.0, 0.5, 0.99]),
    "model.stochastic_depth_rate": st.sampled_from([0.0, 0.5, 0.99]),
    "model.head_bias_init": real(-10, 10),
    "model.dtype": st.sampled_from(["float32", "bfloat16"]),
    "model.remat": st.booleans(),
    "freeze": st.sampled_from(["", "", "", "stem", "all_but_head"]),
    "loss": st.sampled_from(["softmax", "sigmoid"]),
    "class_weights": st.sampled_from(["", "balanced", "3=5,7=0.5"]),
    "best_by": st.sampled_from(["accuracy", "balanced_accuracy", "loss"]),
    "optimizer.name": st.sampled_from(["adamw", "sgd", "muon"]),
    "optimizer.learning_rate": st.sampled_from([1e-37, 1e-3, 0.1, 10.0]),
    "optimizer.clip_norm": st.sampled_from([0.0, 1e-3, 1.0, 1e9]),
    "optimizer.momentum": real(0, 0.99),
    "optimizer.b1": real(0, 0.99),
    "optimizer.b2": real(0, 0.999),
    "optimizer.accumulator_dtype": st.sampled_from(["float32", "bfloat16"]),
    "optimizer.sam_rho": st.sampled_from([0.0, 0.0, 0.05]),
    "schedule.name": st.sampled_from(["cosine", "linear", "constant", "rsqrt"]),
    "schedule.warmup_steps": st.integers(1, 100),
    "schedule.final_fraction": real(0, 1),
    "ema_decay": st.sampled_from([0.0, 0.9, 0.999999]),
    "log_every_steps": st.integers(1, 3),
    "eval_every_epochs": st.sampled_from([0.0, 0.5, 1e6]),
    "eval_every_steps": st.integers(0, 3),
    "save_every_epochs": st.sampled_from([0.0, 0.5, 1e6]),
    "save_every_steps": st.integers(0, 3),
    "keep_checkpoints": st.integers(1, 3),
}


@st.composite
def valid(draw) -> dict[str, object]:
    """Returns values of all keys that do not depend on the machine, for a run of two steps on a few digits."""
    microbatches, patch = draw(st.sampled_from([0, 0, 1, 2])), draw(st.integers(1, 4))
    chunks = draw(st.sampled_from([0, 0, 0, 2]))
    drawn = {key: draw(values) for key, values in VALID.items()}
    evaluated = drawn["eval_every_steps"] or drawn["eval_every_epochs"]
    return drawn | {
        "total_steps": 2,
        "early_stopping_evals": draw(st.integers(0, 2)) if evaluated else 0,
        "reproducible": chunks,
        "accumulation_steps": microbatches,
        "batch_size": max(microbatches, 1) * max(chunks, 1) * draw(st.integers(1, 4)),
        "model.patches.size": (patch, patch),
        # Times the learning rate, it must be below 1.
        "optimizer.weight_decay": draw(st.sampled_from([0.0, 1e-4, 0.9]))
        / max(drawn["optimizer.learning_rate"], 1e-3),
        "preprocess.image_size_px": patch * draw(st.integers(1, 4)),
    }


def check_valid(values: dict[str, object]) -> None:
    folder = tempfile.mkdtemp()
    arguments = [f"--config.{key}={value}" for key, value in values.items()]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = train(["--config=digits.py", f"--workdir={folder}/run", *arguments])
    diverged = "is nan at step" in err.getvalue() or "is inf at step" in err.getvalue()
    assert status == 0 or (status == 1 and diverged), (status, err.getvalue())
    shutil.rmtree(folder)


def run_all(
    name: str, check, strategy, count: int, *, first: int, phases: tuple[Phase, ...] = tuple(Phase)
) -> None:
    """Runs a check for this many drawn values, and raises its error; `first` is the seed."""
    done, started = 0, time.monotonic()
    print(f"{name} values:", flush=True)
    if not count:
        return

    @seed(first)
    @settings(
        max_examples=count,
        phases=phases,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(strategy)
    def one(value):
        nonlocal done
        check(*value) if isinstance(value, tuple) else check(value)
        done += 1
        if done % 20 == 0:
            print(f"  {done} of {count}", flush=True)

    one()
    print(f"{name}: {count:,} tried, none failed, {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=500, help="values of each kind (default: 500)")
    parser.add_argument("--invalid", type=int, help="another number of invalid values")
    parser.add_argument("--seed", type=int, default=0, help="another number draws other values (default: 0)")
    options = parser.parse_args()
    of_invalid = options.count if options.invalid is None else options.invalid
    run_all("invalid", check_invalid, invalid(), of_invalid, first=options.seed)
    # To make a valid value that fails simpler takes minutes.
    run_all("valid", check_valid, valid(), options.count, first=options.seed, phases=(Phase.generate,))


if __name__ == "__main__":
    main()

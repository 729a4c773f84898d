"""The table of a model: numbers of the paper, correct sums, and the program that prints it."""

import contextlib
import io
import math
import re
import subprocess
import sys
from functools import cache, partial

import jax
import jax.numpy as jnp
import pytest

from mlpmixer_flax import config
from mlpmixer_flax.config import get_config
from mlpmixer_flax.models import MlpMixer
from mlpmixer_flax.run_weights import read_weights
from mlpmixer_flax.summary import main
from mlpmixer_flax.train import train
from mlpmixer_flax.training.configfile import load_config
from mlpmixer_flax.training.optimizer import make_optimizer
from mlpmixer_flax.training.table import summarize
from mlpmixer_flax.weights.files import write_npz

TINY = {
    "patches": {"size": (4, 2)},
    "hidden_dim": 10,
    "num_blocks": 2,
    "tokens_mlp_dim": 6,
    "channels_mlp_dim": 14,
}

B16 = 59_880_472  # parameters with 1000 classes


def table(model, image_shape, **optimizer):
    """Returns the lines of the table, and the shapes of the parameters."""
    base = get_config()
    base.optimizer.update(optimizer)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image_shape)))["params"]
    opt_state = jax.eval_shape(make_optimizer(base, lambda step: 0.1).init, params)
    return summarize(model, image_shape, params=params, opt_state=opt_state).splitlines(), params


@cache
def published(name):
    model = MlpMixer(num_classes=1000, **getattr(config, f"mixer_{name}_config"))
    return table(model, (224, 224, 3))[0]


def numbers(lines, column):
    """Returns a column of the table by module name; a part is named MODULE/PART."""
    found, outer = {}, None
    for line in lines[1:-2]:
        name, *values = re.split(r"\s{2,}", line.strip())
        outer = outer if line.startswith(" ") else name
        value = values[("output", "parameters", "MACs").index(column)]
        found[name if outer == name else f"{outer}/{name}"] = value
    return found if column == "output" else {key: int(v.replace(",", "")) for key, v in found.items()}


def total(lines, column):
    """Returns the sum of a column over all modules; a line "11 more, each" counts 11 times."""
    found = {name: value for name, value in numbers(lines, column).items() if "/" not in name}
    return sum(
        value * int(name.split()[0]) if name.endswith("more, each") else value
        for name, value in found.items()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gmacs"),  # from timm, results/benchmark-infer-amp-nchw-pt110-cu113-rtx3090.csv
    [("s32", 1.0), ("s16", 3.79), ("b32", 3.24), ("b16", 12.62), ("l32", 11.27), ("l16", 44.6)],
)
def test_macs_equal_those_of_timm_which_add_five_per_element_of_layer_norm(name, gmacs):
    lines = published(name)
    # The counter that timm uses, fvcore, counts 5 operations per element of an affine LayerNorm; ours counts none.
    num_blocks = getattr(config, f"mixer_{name}_config")["num_blocks"]
    elements = math.prod(map(int, numbers(lines, "output")["pre_head_layer_norm"].split("x")))
    norms = 5 * (2 * num_blocks + 1) * elements
    assert round((total(lines, "MACs") + norms) / 1e9, 1 if name == "l16" else 2) == gmacs


@pytest.mark.parametrize("name", ["s32", "b16", "l16", "h14"])
def test_total_macs_equal_the_sum_of_the_table_and_the_formula(name):
    lines = published(name)
    size = getattr(config, f"mixer_{name}_config")
    (patch, _), hidden, blocks = size["patches"]["size"], size["hidden_dim"], size["num_blocks"]
    tokens = (224 // patch) ** 2
    in_block = 2 * hidden * tokens * (size["tokens_mlp_dim"] + size["channels_mlp_dim"])
    macs = tokens * patch**2 * 3 * hidden + blocks * in_block + hidden * 1000
    assert total(lines, "MACs") == macs
    assert lines[-1] == f"{macs / 1e9:.3g} GMACs per image of 224x224x3"
    if name == "h14":  # timm has no H/14
        assert f"{macs / 1e9:.1f}" == "121.0"


def test_b16_has_the_published_parameters_and_fits_80_columns():
    lines = published("b16")
    mib = 4 * B16 / 2**20
    assert lines[-2] == (
        # Adam has two moments, and two counters of 4 bytes
        f"total: 59,880,472 parameters ({mib:.1f} MiB), optimizer state {2 * mib:.1f} MiB,"
    )
    assert total(lines, "parameters") == B16
    assert max(map(len, lines)) <= 80
    assert max(map(len, published("h14"))) <= 80
    outputs = numbers(lines, "output")
    assert list(outputs) == [
        "stem",
        "MixerBlock_0",
        "MixerBlock_0/LayerNorm_0",
        "MixerBlock_0/token_mixing",
        "MixerBlock_0/LayerNorm_1",
        "MixerBlock_0/channel_mixing",
        "11 more, each",
        "pre_head_layer_norm",
        "head",
    ]
    assert outputs["stem"] == "14x14x768" and outputs["MixerBlock_0/token_mixing"] == "768x196"
    assert outputs["MixerBlock_0/channel_mixing"] == "196x768" and outputs["head"] == "1000"


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
@pytest.mark.parametrize("num_classes", [0, 5])
def test_every_line_equals_the_formula(num_blocks, num_classes):
    tokens, hidden, token_mlp, channel_mlp, patch = 4 * 6, 10, 6, 14, 4 * 2 * 3
    lines, params = table(
        MlpMixer(num_classes=num_classes, **{**TINY, "num_blocks": num_blocks}), (16, 12, 3)
    )
    token_macs, channel_macs = 2 * hidden * tokens * token_mlp, 2 * tokens * hidden * channel_mlp
    token_count = 2 * tokens * token_mlp + token_mlp + tokens
    channel_count = 2 * hidden * channel_mlp + channel_mlp + hidden
    block = (2 * 2 * hidden + token_count + channel_count, token_macs + channel_macs)
    expected = {
        "stem": (patch * hidden + hidden, tokens * patch * hidden),
        "MixerBlock_0": block,
        "MixerBlock_0/LayerNorm_0": (2 * hidden, 0),
        "MixerBlock_0/token_mixing": (token_count, token_macs),
        "MixerBlock_0/LayerNorm_1": (2 * hidden, 0),
        "MixerBlock_0/channel_mixing": (channel_count, channel_macs),
        f"{num_blocks - 1} more, each": block,
        "pre_head_layer_norm": (2 * hidden, 0),
        "head": (hidden * num_classes + num_classes, hidden * num_classes),
    }
    if num_blocks == 1:
        del expected["0 more, each"]
    if num_classes == 0:
        del expected["head"]
    counts, macs = numbers(lines, "parameters"), numbers(lines, "MACs")
    assert {name: (counts[name], macs[name]) for name in counts} == expected
    count = sum(p.size for p in jax.tree.leaves(params))
    assert total(lines, "parameters") == count
    assert lines[-2].startswith(f"total: {count:,} parameters (")
    assert lines[-1] == f"{total(lines, 'MACs') / 1e9:.3g} GMACs per image of 16x12x3"


def test_dropout_stochastic_depth_remat_and_dtype_change_no_line():
    make = partial(MlpMixer, num_classes=5, **TINY)
    plain, _ = table(make(), (8, 8, 3))
    loaded, _ = table(
        make(dropout_rate=0.1, stochastic_depth_rate=0.1, remat=True, dtype="bfloat16"), (8, 8, 3)
    )
    assert loaded == plain


@pytest.mark.parametrize(
    ("optimizer", "per_parameter"),  # bytes
    [
        ({"name": "adamw"}, 8),
        ({"name": "adamw", "accumulator_dtype": "bfloat16"}, 6),
        ({"name": "sgd"}, 4),
        ({"name": "sgd", "accumulator_dtype": "bfloat16"}, 2),
    ],
)
def test_optimizer_state_is_counted_in_bytes(optimizer, per_parameter):
    wide = {**TINY, "hidden_dim": 300, "channels_mlp_dim": 2000}
    lines, params = table(MlpMixer(num_classes=5, **wide), (8, 8, 3), **optimizer)
    count = sum(p.size for p in jax.tree.leaves(params))
    mib = f"{count * per_parameter / 2**20:.1f}"
    assert lines[-2].endswith(f"({count * 4 / 2**20:.1f} MiB), optimizer state {mib} MiB,")


# --- the program

SMALL = ["--config.model.num_blocks=2", "--config.model.hidden_dim=16", "--config.freeze=stem"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns a run of two steps, and what it printed."""
    workdir, output = tmp_path_factory.mktemp("runs") / "run", io.StringIO()
    with contextlib.redirect_stdout(output):
        train(load_config("digits.py", [*SMALL, "--config.total_steps=2"]), workdir)
    return workdir, output.getvalue()


def printed(capsys, *arguments):
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_a_run_prints_the_table_of_its_config_and_has_the_same_table_later(run, capsys):
    workdir, output = run
    of_config = printed(capsys, "--config=digits.py", *SMALL)
    assert output.startswith(of_config)
    assert printed(capsys, f"--workdir={workdir}") == of_config


@pytest.mark.slow
def test_weights_have_the_table_of_their_run_without_the_optimizer(run, tmp_path, capsys):
    workdir, output = run
    write_npz(tmp_path / "weights.npz", read_weights(workdir)[1], metadata={})
    of_file = printed(capsys, f"--weights={tmp_path}/weights.npz")
    assert of_file == printed(capsys, f"--weights={workdir}")
    assert output.startswith(of_file.replace("MiB),", "MiB), optimizer state 0.1 MiB,"))


@pytest.mark.parametrize(
    ("name", "num_classes"),
    [("imagenet21k/Mixer-B_16", 21843), ("hf-hub:timm/mixer_b16_224.miil_in21k", 11221)],
)
def test_published_weights_are_summarized_without_a_download(
    name, num_classes, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("MLPMIXER_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    out = printed(capsys, f"--weights={name}")
    count = B16 + (num_classes - 1000) * 769
    assert out.splitlines()[-2] == f"total: {count:,} parameters ({4 * count / 2**20:.1f} MiB),"
    assert out.splitlines()[-1] == "12.6 GMACs per image of 224x224x3"
    assert not list(tmp_path.iterdir())


def test_a_config_needs_no_dataset_if_the_number_of_classes_is_given(capsys):
    arguments = ["--config=b16_imagenet21k.py", "--config.data_dir=nowhere"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: without --num_classes the dataset is needed, but dataset 'imagenet21k' is"
    )
    out = printed(capsys, *arguments, "--num_classes=21843")
    assert f"total: {B16 + 20_843 * 769:,} parameters" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=digits.py", "--num_classes=0"], "error: num_classes=0 must be at least 1"),
        (["--config=digits.py", "--config.model.hiden_dim=8"], "error: the config has no key"),
        (["--weights=imagenet1k/Mixer-B_17"], "error: no weights 'imagenet1k/Mixer-B_17'"),
        (["--workdir=nowhere"], "error: no run in nowhere"),
        (["--config="], "error: config file  does not exist"),
        (
            ["--config=digits.py", "--num_clases=5"],
            "error: cannot use '--num_clases=5': did you mean --num_classes=5?\n",
        ),
        (
            ["--config=digits.py", "--lr=5"],
            "error: cannot use '--lr=5': did you mean --config.optimizer.learning_rate=5?\n",
        ),
        (
            ["--workdir=r", "--checkpoint=best"],
            "error: cannot use '--checkpoint=best': --help lists all options\n",
        ),
        (
            ["--config=digits.py", "--config.dataset=digit"],
            "error: without --num_classes the dataset is needed, but dataset 'digit' is unknown: did you mean",
        ),
    ],
)
def test_an_error_is_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1
    assert error.count("?") <= 1  # one suggestion


@pytest.mark.parametrize("extra", ["--config.model.num_blocks=2", "--num_classes=5"])
def test_options_for_configs_are_refused_for_weights(extra, capsys):
    assert main(["--weights=imagenet1k/Mixer-B_16", extra]) == 2
    assert capsys.readouterr().err == f"error: {extra} has no meaning without --config: remove it\n"


def test_the_program_starts_and_its_help_fits_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    command = [sys.executable, "-m", "mlpmixer_flax.summary", "--help"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "configs/b16_cifar10.py" in out and max(map(len, out.splitlines())) <= 80

"""The costs that benchmarks/tpu_compiler.py reads from a compiled program."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "tpu_compiler.py"
CONFIG = SCRIPT.parent.parent / "configs" / "cifar10.py"

# As the compiler for TPUs writes it, shortened.
PROGRAM = """HloModule jit_update, is_scheduled=true

%fused (p: f32[8]) -> f32[8] {
  ROOT %gather.1 = f32[8]{0} gather(%p, %i), metadata={op_name="jit(f)/gather"}, backend_config={"estimated_cycles":"9"}
}

%small (p: f32[8]) -> f32[8] {
  ROOT %add.1 = f32[8]{0} add(%p, %p), metadata={op_name="jit(f)/augment/add"}, backend_config={"estimated_cycles":"5"}
}

%large (p: f32[8]) -> f32[8] {
  ROOT %add.2 = f32[8]{0} add(%p, %p), metadata={op_name="jit(f)/augment/add"}, backend_config={"estimated_cycles":"7"}
}

%body (p: f32[8]) -> f32[8] {
  %both = f32[8]{0} conditional(%c, %p, %p), branch_computations={%small, %large}
  %fusion.2 = f32[8]{0} fusion(%both), kind=kCustom, calls=%fused, backend_config={"estimated_cycles":"100"}
  %all-reduce.1 = (f32[8,2]{1,0:T(8,128)}, bf16[4]{0}) all-reduce(%p, %q), to_apply=%sum
}

%test (p: f32[8]) -> pred[] {
  %constant.7 = s32[]{:T(128)} constant(3)
  %all-reduce.2 = u32[]{:T(128)} all-reduce(%r), to_apply=%sum
  ROOT %lt.1 = pred[]{:T(512)} compare(%counter, %constant.7), direction=LT, metadata={op_name="jit(f)/while/cond/lt"}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %while.1 = f32[8]{0} while(%p), condition=%test, body=%body
  %send.1 = (f32[6]{0}, f32[6]{0}) collective-permute-start(%while.1), channel_id=3
  %copy.1 = f32[8]{0} copy(%while.1), metadata={op_name="jit(f)/MixerBlock_3/transpose"}, backend_config={"estimated_cycles":"11"}
  ROOT %dot = f32[8]{0} fusion(%copy.1), calls=%x, metadata={op_name="jit(f)/MixerBlock_3/token_mixing/dot"}, backend_config={"estimated_cycles":"13"}
}
"""


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


def test_loops_count_as_often_as_they_run_and_conditionals_by_their_slowest_branch(script):
    costs = script["read_costs"](PROGRAM)
    assert costs.cycles == {"augmentation": 3 * 7, "rest": 3 * 100, "transpositions": 11, "token MLPs": 13}
    assert costs.copies == 11 and costs.by_index == 3
    assert costs.collectives == {"all-reduce": 3 + 3, "collective-permute": 1}
    assert costs.collective_bytes == {"all-reduce": 3 * (8 * 2 * 4 + 4 * 2 + 4), "collective-permute": 6 * 4}


def test_a_line_through_two_sizes(script):
    points = {2: {"cycles": 30.0}, 4: {"cycles": 50.0}}
    assert script["continue_line"](points, 12) == {"cycles": 130.0}


def test_flops_of_the_paper(script):
    from mlpmixer_flax import load_config

    for name, gmacs in (("s16", 3.79), ("b16", 12.62), ("l16", 44.6)):
        config = load_config(SCRIPT.parent.parent / "configs" / f"{name}_imagenet.py")
        assert script["model_flops"](config) / 2e9 == pytest.approx(gmacs, rel=0.005)


@pytest.mark.long
@pytest.mark.slow
def test_two_cpu_devices_add_their_gradients(script):
    """Pins the case that every machine can compile: data-parallel training of a small model."""
    options = [f"--config={CONFIG}", "--topology=cpu", "--images=4"]
    options += ["--set=model.num_blocks=1", "--set=augment.randaugment_layers=0"]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = dict(line.strip("| ").split(" | ") for line in done.stdout.splitlines() if " | " in line)
    count, size = rows["all-reduce"].split(", ")
    # The state has the parameters four times: with the two moments of AdamW and the EMA.
    parameters_mib = float(rows["state and batch, MiB"]) / 4
    assert int(count) > 0 and float(size.removesuffix(" MiB")) == pytest.approx(parameters_mib, abs=0.2)
    assert int(rows["gathers and scatters, not in the above"]) > 0
    assert float(rows["million cycles"]) == 0  # a compiler for CPUs writes no cycles

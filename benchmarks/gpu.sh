#!/usr/bin/env bash
# Measures everything that this project wants to know of a GPU, in under 25 minutes, and writes one folder of results.
#
#   benchmarks/gpu.sh RESULTS            on a machine with a GPU
#   benchmarks/gpu.sh RESULTS --tiny     shrunken, on any machine: tries that every part works
#
# RESULTS gets *.txt (what each part printed) and *.json (the figures). A part that fails does not stop the others; the exit
# status is 1 if any failed, or if some had no time any more. Parts that need what is not installed (torch and timm, a prepared
# CIFAR-10) are skipped, and say so. Install first: pip install ".[cuda,test]" torch==2.13.0 timm
set -uo pipefail
results=${1:?give a folder for the results: benchmarks/gpu.sh RESULTS}
tiny=${2:-}
cd "$(dirname "$0")/.."
mkdir -p "$results"
results=$(cd "$results" && pwd)
runs=$(mktemp -d "$results/runs-XXXX") # new ones each time: a finished run is not run again
all_seconds=1500 failed=0

part() { # name, limit in seconds, command ...
  local name=$1 limit=$2 started=$SECONDS left=$((all_seconds - SECONDS))
  shift 2
  [ "$left" -gt 0 ] || { failed=1; echo "== $name skipped: the $all_seconds seconds for all parts are over"; return; }
  [ "$limit" -lt "$left" ] || limit=$left
  echo "== $name: $*"
  timeout "$limit" "$@" 2>&1 | tee "$results/$name.txt"
  local status=${PIPESTATUS[0]}
  [ "$status" = 0 ] || { failed=1; echo "== $name failed with status $status"; }
  echo "== $name took $((SECONDS - started)) s"
}
have() { python -c "import $1" 2>/dev/null; }
has_data() { python -c "from mlpmixer_flax import get_dataset_info; get_dataset_info('$1')" 2>/dev/null; }

if [ "$tiny" = --tiny ]; then
  seconds=0.5 small=2 medium=2 large=2 models="s32" timm_models="s32" steps=3 log_steps=1 epochs=1 memory_batch=8 tests="tests/training/test_intervals.py"
else
  seconds=4 small=256,512,1024 medium=128,256,512 large=64,128,256 models="" timm_models="" steps=300 log_steps=50 epochs=80 memory_batch=256
  tests="tests/test_models.py tests/training/test_step.py tests/data/test_augment.py tests/data/test_randaugment.py"
fi

nvidia-smi 2>/dev/null | tee "$results/nvidia-smi.txt"
for pair in "s16 $small" "b16 $medium" "l16 $large"; do
  read -r name sizes <<<"$pair"
  part "ours_$name" 240 python -m mlpmixer_flax.benchmark --model="${models:-$name}" --batch_size="$sizes" \
    --seconds="$seconds" --json="$results/ours_$name.json"
  if have timm; then
    part "timm_$name" 300 python benchmarks/timm_speed.py --model="${timm_models:-$name}" --batch_size="$sizes" \
      --seconds="$seconds" --json="$results/timm_$name.json"
  else
    echo "== timm_$name skipped: torch and timm are not installed"
  fi
  [ "$tiny" = --tiny ] && break
done

memory=(--config=configs/b16_imagenet.py --kind=training --seconds="$seconds" --config.augment.randaugment_layers=0)
[ "$tiny" = --tiny ] && memory+=(--config.model.num_blocks=1 --config.preprocess.image_size_px=32)
for change in "" --config.accumulation_steps=4 --config.model.remat=true --config.model.dtype=float32 \
  "--config.accumulation_steps=4 --config.model.remat=true"; do
  # shellcheck disable=SC2086  # several changes
  part "memory$(echo "$change" | tr -c 'a-z0-9\n' _)" 120 python -m mlpmixer_flax.benchmark "${memory[@]}" $change \
    --batch_size="$memory_batch" --json="$results/memory$(echo "$change" | tr -c 'a-z0-9\n' _).json"
done
# shellcheck disable=SC2086
part tests 300 python -m pytest -q -n 0 $tests

if has_data cifar10; then
  # From random weights: the speed is that of fine-tuning.
  fine=(--config=configs/b16_cifar10.py --config.init_from= --config.total_steps="$steps" --config.model.dtype=bfloat16
    --config.batch_size="${medium%%,*}" --config.log_every_steps="$log_steps" --config.eval_every_steps=0)
  if [ "$tiny" = --tiny ]; then
    fine+=(--config.model.num_blocks=1 --config.train_split='train[:8]' --config.test_split='test[:8]')
    short=(--config.train_split='train[:128]' --config.test_split='test[:128]' --config.batch_size=16)
  else
    short=()
  fi
  part finetuning 300 python -m mlpmixer_flax.train "${fine[@]}" --workdir="$runs/finetuning"
  part finetuning_step 120 python -m mlpmixer_flax.benchmark "${fine[@]}" --kind=training --num_classes=10 \
    --seconds="$seconds" --json="$results/finetuning_step.json"
  part finetuning_share 20 python - "$runs/finetuning/metrics.jsonl" "$results/finetuning_step.json" <<'END'
import json, statistics, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
# The first one has the start of the readers in it.
run = statistics.median([row["images_per_second"] for row in rows if "images_per_second" in row][1:])
step = json.load(open(sys.argv[2]))["rows"][0]["images_per_second"]
print(f"fine-tuning, end to end: {run:,.0f} images/s, {run / step:.1%} of {step:,.0f} of the step alone")
END
  part nano 300 python -m mlpmixer_flax.train --config=configs/nano_cifar10.py --config.accumulation_steps=1 \
    --config.total_epochs="$epochs" "${short[@]}" --workdir="$runs/nano"
  part cifar10 600 python -m mlpmixer_flax.train --config=configs/cifar10.py --config.total_epochs="$epochs" "${short[@]}" \
    --workdir="$runs/cifar10"
else
  echo "== finetuning, nano and cifar10 skipped: cifar10 is not prepared (set TFDS_DATA_DIR)"
fi
echo "results: $results"
exit "$failed"

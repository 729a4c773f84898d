#!/usr/bin/env bash
# Runs the tests with the oldest and with the newest dependencies that pyproject.toml allows.
#
#   tools/try_versions.sh oldest    Python 3.11, every direct dependency at its floor
#   tools/try_versions.sh newest    Python 3.13, every dependency at its newest release
#   tools/try_versions.sh           both
#
# Further arguments go to pytest: tools/try_versions.sh newest -m "not slow". Needs both Pythons on the PATH; installs
# into a temporary directory.
set -euo pipefail
cd "$(dirname "$0")/.."

which=both
case "${1:-}" in oldest | newest | both) which=$1; shift ;; esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/uv" && "$work/uv/bin/pip" install --quiet uv

try() { # name, Python, resolution, pytest's arguments
  local environment="$work/$1"
  "$work/uv/bin/uv" venv --quiet --no-python-downloads --python "$2" "$environment"
  VIRTUAL_ENV="$environment" "$work/uv/bin/uv" pip install --quiet --resolution "$3" -e ".[test]"
  echo "== $1: Python $2"
  VIRTUAL_ENV="$environment" "$work/uv/bin/uv" pip list 2>/dev/null | grep -E "^(jax|flax|optax|orbax-checkpoint|grain|numpy|tensorflow-datasets|huggingface-hub) "
  "$environment/bin/python" -m pytest -q "${@:4}"
}

[ "$which" = newest ] || try oldest 3.11 lowest-direct "$@"
[ "$which" = oldest ] || try newest 3.13 highest "$@"

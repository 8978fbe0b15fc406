#!/usr/bin/env bash
# Run the tests of the control plane under other versions of Python: bash tests/other_pythons.sh FOLDER VERSION...
#
# For each version that this machine has, the built wheel is installed without torch, whose builds are large and come
# late for new versions, into an environment in FOLDER. Tests that need torch are skipped, and say so. A version that
# is nowhere is named and left out; the script fails if none was there, or if a test fails.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$1
shift
packages=(numpy xxhash 'lmdb>=3.0,<4' zstandard msgspec typer rich pytest hypothesis prometheus-client matplotlib 'setuptools>=77')

# Print the path of an interpreter of a version: on PATH, of pyenv, or of uv.
interpreter() {
  local candidate
  for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1"*/bin/python; do
    if "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  command -v uv >/dev/null && uv python find --no-python-downloads "$1" 2>/dev/null
}

tried=0
status=0
for version in "$@"; do
  if ! python=$(interpreter "$version"); then
    echo "Python $version: not on this machine, left out"
    continue
  fi
  tried=$((tried + 1))
  environment="$(mkdir -p "$folder" && cd "$folder" && pwd)/python$version"
  "$python" -m venv "$environment"
  "$environment/bin/python" -m pip install -qq --disable-pip-version-check ${PIP_OPTIONS:-} "${packages[@]}"
  installed="$environment/installed"  # apart: a test installs tierkv in its own way
  rm -rf "$installed" "$environment/examples"
  "$environment/bin/python" -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation \
    --target "$installed" .
  (
    cd "$environment"
    export PYTHONPATH="$installed"
    bin/python -m tierkv --version
    bin/python -m tierkv metrics daemon >/dev/null
    bin/python -m tierkv examples --write examples >/dev/null
    bin/python -m compileall -q "$installed"
  )
  echo "$("$environment/bin/python" -V): tests/test_*.py"
  "$environment/bin/python" -m pytest -q -p no:cacheprovider tests/test_*.py || status=1
done
[ "$tried" -gt 0 ] && exit "$status"
echo "none of these versions is on this machine: $*"
exit 1

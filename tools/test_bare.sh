#!/usr/bin/env bash
# The tests that touch data, commands and training, in a clone of HEAD with nothing beside it and MMC_DATA unset; then those of
# the layer and of foreign models without the native library, as the pure Python package runs.
# tools/test_bare.sh PYTHON WORKERS [pytest arguments; files among them replace the list below]
set -euo pipefail
python=$1 workers=$2
shift 2
root=$(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse --show-toplevel)
changed=$(git -C "$root" status --porcelain | wc -l)
if [ "$changed" -gt 0 ]; then
  echo "test-bare: $changed uncommitted changes are not in the clone of HEAD"
fi

folder=$(mktemp -d "${TMPDIR:-/tmp}/mmc-fast-bare.XXXXXX")
trap 'rm -rf "$folder"' EXIT
git clone --quiet --no-hardlinks --no-checkout "$root" "$folder/checkout"
cd "$folder/checkout"
git checkout --quiet --detach "$(git -C "$root" rev-parse HEAD)"
cp "$root"/mmc_fast/*.so mmc_fast/ 2> /dev/null || echo "test-bare: no native library was built, so the clone has none"

unset MMC_DATA
export PYTHONPATH=$PWD  # the clone comes before what is installed, in tests that start processes elsewhere too
"$python" -c '
import pathlib, mmc_fast
found = pathlib.Path(mmc_fast.__file__).resolve().parents[1]
assert found == pathlib.Path.cwd().resolve(), f"test-bare: mmc_fast comes from {found}, not from the clone"'

files=()
case " $* " in
  *" tests/"*) ;;
  *)
    for path in tests/cli tests/experiments tests/test_repository.py; do
      if [ -e "$path" ]; then files+=("$path"); fi
    done
    ;;
esac
"$python" -m pytest -q -n "$workers" -m "not slow" -p no:cacheprovider "${files[@]}" "$@"
if [ ${#files[@]} -gt 0 ]; then
  rm -f mmc_fast/*.so
  "$python" -m pytest -q -n "$workers" -m "not slow" -p no:cacheprovider tests/nn tests/agop tests/integrations tests/ops/ebr
fi

#!/usr/bin/env bash
# Every file of dist/ in a clean environment of its own, with no compiler in reach: tools/wheel_test.sh PYTHON.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$1
torch=$("$python" -c "import importlib.metadata as m; print('torch==' + m.version('torch'))")
shopt -s nullglob
files=(dist/*.whl dist/*.tar.gz)
if [ ${#files[@]} -eq 0 ]; then echo "dist/ is empty; run: make wheel" >&2; exit 1; fi

for file in "${files[@]}"; do
  case "$file" in
    *-none-any.whl | *.tar.gz) native=no ;;
    *) native=yes ;;
  esac
  place=$(mktemp -d)
  trap 'rm -rf "$place"' EXIT
  "$python" -m venv "$place/env"
  clean=(env -i HOME="$HOME" PATH="$place/env/bin")  # the environment's own programs and nothing else
  for name in PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_CONFIG_FILE PIP_TRUSTED_HOST SSL_CERT_FILE; do
    if [ -n "${!name:-}" ]; then clean+=("$name=${!name}"); fi
  done
  "${clean[@]}" python -m pip install --quiet --disable-pip-version-check "$torch" "$(pwd)/$file[cli]"
  (cd "$place" && "${clean[@]}" NATIVE=$native python - <<'CODE'
import os
import shutil

import torch
from torch import nn

import mmc_fast
from mmc_fast.nn import EBRHead
from mmc_fast.ops import native

assert not any(map(shutil.which, ("cc", "c++", "g++", "gcc", "clang"))), "a compiler is in reach"
module, reason = native.load()
assert (module is not None) == (os.environ["NATIVE"] == "yes"), reason
head = EBRHead([16, 12], latent_dim=8, hidden_dim=32, psi_dims=(8,))
out = head([torch.randn(64, 16), torch.randn(64, 12)], reversal=0.1)
(out.discrimination_loss + out.reconstruction_loss).backward()
fusion, x = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 3)), torch.randn(500, 12)
jacobians = torch.func.vmap(torch.func.jacrev(fusion))(x)
error = (mmc_fast.agop(fusion, x) - torch.einsum("nco,ncp->op", jacobians, jacobians)).norm() / jacobians.norm()
assert error < 1e-4, error
ran = next(row.backend for row in mmc_fast.explain("ebr_step", *out.recovered) if row.usable)
print(f"mmc-fast {mmc_fast.__version__}: AGOP right, EBR step by {ran}")
assert (ran == "cpp") == (os.environ["NATIVE"] == "yes")
CODE
  )
  "${clean[@]}" mmc-fast --version
  echo "ok: $file"
  rm -rf "$place"
done

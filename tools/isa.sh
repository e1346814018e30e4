#!/usr/bin/env bash
# The tests of the torch-free core on processors that are not here, emulated by qemu-user: without AVX-512, without AVX2, and
# 64-bit Arm, for which they are cross-compiled where a compiler is.
# tools/isa.sh FOLDER [--if-possible]   FOLDER holds a built mmc_core_test
set -euo pipefail
folder=$1
how="needs qemu-x86_64; install it: apt-get install qemu-user (Debian, Ubuntu), dnf install qemu-user (Fedora)"
if [ "$(uname -s)-$(uname -m)" != Linux-x86_64 ]; then
  echo "SKIPPED isa: emulates x86-64 on x86-64 Linux only, this is $(uname -s) $(uname -m)"
  exit 0
fi
if ! command -v qemu-x86_64 > /dev/null; then
  if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    echo "installing qemu-user"
    (apt-get update -qq && apt-get install -y -qq --no-install-recommends qemu-user) > /dev/null 2>&1 || true
  fi
fi
if ! command -v qemu-x86_64 > /dev/null; then
  if [ "${2:-}" = --if-possible ]; then
    echo "SKIPPED isa: $how"
    exit 0
  fi
  echo "isa: $how" >&2
  exit 1
fi
run() {  # processor, instruction sets that it must offer to the core
  local found
  found=$(qemu-x86_64 -cpu "$1" "$folder/mmc_core_test" 2> /dev/null) || { echo "$found"; echo "isa: FAILED on $1" >&2; exit 1; }
  echo "$1: $found"
  grep -qx "instruction sets: $2" <<< "$found" || { echo "isa: $1 was expected to offer: $2" >&2; exit 1; }
}
run Nehalem "amx_emulated base"
run Haswell "amx_emulated base avx2"

if ! command -v aarch64-linux-gnu-g++ qemu-aarch64 > /dev/null; then
  echo "SKIPPED isa aarch64: needs a cross compiler; install it: apt-get install g++-aarch64-linux-gnu (Debian, Ubuntu)"
  exit 0
fi
cmake -S . -B "$folder-aarch64" -DCMAKE_BUILD_TYPE=Release -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DMMC_WITH_CUDA=0 > /dev/null
cmake --build "$folder-aarch64" --target mmc_core_test --parallel 2 > /dev/null
found=$(qemu-aarch64 -L /usr/aarch64-linux-gnu "$folder-aarch64/mmc_core_test") || { echo "$found"; echo "isa: FAILED on aarch64" >&2; exit 1; }
echo "aarch64: $found"
grep -qx "instruction sets: amx_emulated base" <<< "$found" || { echo "isa: aarch64 was expected to offer: amx_emulated base" >&2; exit 1; }

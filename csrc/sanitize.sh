#!/usr/bin/env bash
# The engine's tests with the extension built for AddressSanitizer and UndefinedBehaviorSanitizer, then for
# ThreadSanitizer. Builds go to build/sanitize-*; the installed extension stays as it is. Any report is a failure.
# usage: csrc/sanitize.sh PYTHON [address|thread] [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$1
which=${2:-address thread}
shift $(($# < 2 ? $# : 2))
cxx=${CXX:-g++}

for name in $which; do
  sanitizers=$name
  [ "$name" = address ] && sanitizers=address,undefined
  folder=$PWD/build/sanitize-$name
  cmake -S csrc -B "$folder" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_COMPILER="$cxx" \
    -DPython_EXECUTABLE="$python" -DOPENMIMO_SANITIZE="$sanitizers" >/dev/null
  cmake --build "$folder"
  # The runtime library comes before Python, and libstdc++ with it, so that it finds the real __cxa_throw.
  library=$([ "$name" = address ] && echo libasan.so || echo libtsan.so)
  echo "== $sanitizers"
  # Reports go past pytest, which would keep them. Python itself keeps memory until its end. PyTorch and
  # tokenizers are not instrumented, so they have one thread.
  LD_PRELOAD="$("$cxx" -print-file-name="$library") $("$cxx" -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 TSAN_OPTIONS=exitcode=66 \
    OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false OPENMIMO_NATIVE_FOLDER="$folder" \
    "$python" -m pytest -q -p no:cacheprovider --capture=sys tests/unit/engine "$@"
done

#!/usr/bin/env bash
# Builds in place, tests, measures and tunes on a machine with a GPU, torch and (for the CUDA kernels) nvcc, without a
# network, within 9 minutes:
#
#     benchmarks/run_on_gpu.sh OUT_DIR [STAGE ...]
#
# OUT_DIR gets results.jsonl (a line as soon as it is measured), results.json, report.md, roofline.png, log.txt and the
# table of tiles. With stages, only those run. A stage may take its share of the time and what those before it left. The
# report is built from the lines there are, whatever happens; `benchmarks/choose.py OUT_DIR/results.json` makes of them
# the table of what the CUDA kernels are chosen for.
#
# PYTHON: the interpreter that has torch (python3). R1KERNELS_CUDA_ARCHS: what nvcc compiles for, that of this GPU if not
# given. R1KERNELS_GPU_REHEARSAL=1: small shapes on the CPU.
set -uo pipefail

# Seconds of each stage; 540 altogether, of which 20 are for the report. What needs no extension comes first, while it is
# built; then the most valuable.
STAGES=(build ceilings linear check step logits tests memcheck racecheck step-tiles tune rest)
declare -A SECONDS_OF=(
    [build]=5 [ceilings]=15 [linear]=70 [check]=50 [step]=80 [logits]=80 [tests]=85 [memcheck]=30 [racecheck]=30
    [step-tiles]=30 [tune]=25 [rest]=20
)
REPORT=20

if [ $# -lt 1 ]; then
    sed -n '2,14s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
OUT=$(cd "$1" && pwd)
shift
[ $# -gt 0 ] && STAGES=("$@")
for stage in "${STAGES[@]}"; do
    [ -n "${SECONDS_OF[$stage]:-}" ] || { echo "unknown stage $stage, expected: ${!SECONDS_OF[*]}" >&2; exit 2; }
done
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python3}
LOG=$OUT/log.txt
export PYTHONPATH=$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # what torch asks for in deterministic mode, which the tests run under
where=() only=() no_compile=()
if [ -n "${R1KERNELS_GPU_REHEARSAL:-}" ]; then
    where=(--device cpu) only=(--small) no_compile=(--no-compile)
fi
SECONDS=0 granted=0 failed=() child='' build=''

report() {
    trap - EXIT INT TERM
    for pid in $child $build; do kill "$pid" 2>/dev/null; done
    timeout -k 5 "$REPORT" "$PYTHON" -m gpu report --out "$OUT" "${where[@]}" "${only[@]}" 2>&1 | tee -a "$LOG"
    echo "${#failed[@]} stages failed${failed[*]:+: ${failed[*]}}; $SECONDS s" | tee -a "$LOG"
    [ "${#failed[@]}" -eq 0 ] || exit 1
    exit 0
}
trap report EXIT
trap 'failed+=(interrupted); exit 1' INT TERM

# limited COMMAND: within the time that has been granted. In the background, for bash attends to signals only in wait.
limited() {
    local left=$((granted - SECONDS)) status
    [ "$left" -le 0 ] && return 124
    timeout -k 5 "$left" "$@" >>"$LOG" 2>&1 &
    child=$!
    wait "$child"
    status=$?
    child=''
    return "$status"
}

# measure GROUP: goes on in a new process where a fault lost the device to the last one (75), or a signal ended it.
measure() {
    local status=75
    while { [ "$status" -eq 75 ] || [ "$status" -gt 128 ]; } && [ "$SECONDS" -lt "$granted" ]; do
        limited "$PYTHON" -m gpu "$1" --out "$OUT" --seconds $((granted - SECONDS - 5)) \
            "${where[@]}" "${only[@]}" "${no_compile[@]}"
        status=$?
    done
    return "$status"
}

# build: one architecture, that of the device, and no CUDA where the CPU rehearses.
build() {
    local archs
    if [ -n "${R1KERNELS_GPU_REHEARSAL:-}" ]; then
        "$PYTHON" -c 'import torch, r1kernels._C' 2>/dev/null && return 0
        export R1KERNELS_CUDA=${R1KERNELS_CUDA:-0}
    elif [ -z "${R1KERNELS_CUDA_ARCHS:-}" ]; then
        archs=$("$PYTHON" -c 'import torch; a, b = torch.cuda.get_device_capability()
print({9: "90a", 10: "100", 12: "120"}.get(a, f"{a}{b}"))') && export R1KERNELS_CUDA_ARCHS=$archs
    fi
    command -v nvcc >/dev/null || export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
    exec timeout -k 5 240 "$PYTHON" setup.py -q build_ext --inplace
}

# built: what became of the build, once it has ended.
built() {
    [ -n "$build" ] || return 0
    wait "$build" || { echo "the extension was not built: see above" >>"$LOG"; failed+=(build); }
    build=''
    "$PYTHON" -m r1kernels >>"$LOG" 2>&1
}

sanitizer() {
    local kernels status=0
    command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer: left out" >>"$LOG"; return 3; }
    for kernels in cuda triton; do
        limited env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
            --print-limit 20 "$PYTHON" -m gpu.sanitize --kernels "$kernels" "${where[@]}" || status=$?
    done
    return "$status"
}

stage() {
    case $1 in
    build) # goes on behind the first measurements
        build >>"$LOG" 2>&1 &
        build=$!
        ;;
    ceilings | linear | rest) measure "$1" ;;
    check)
        built
        limited "$PYTHON" -m gpu check --out "$OUT" "${where[@]}"
        ;;
    step | logits | step-tiles)
        built
        measure "$1"
        ;;
    tests)
        built
        if ! "$PYTHON" -c 'import pytest' 2>>"$LOG"; then
            echo "no pytest: tests left out" >>"$LOG"
            return 3
        fi
        limited "$PYTHON" -m pytest -q -m gpu -W default -p no:cacheprovider tests/gpu/test_gpu_*.py
        ;;
    tune)
        limited "$PYTHON" benchmarks/tune.py --out "$OUT" --seconds $((granted - SECONDS - 10)) \
            "${where[@]}" "${only[@]}"
        ;;
    memcheck | racecheck)
        built
        sanitizer "$1"
        ;;
    esac
}

for name in "${STAGES[@]}"; do
    begin=$SECONDS granted=$((granted + SECONDS_OF[$name]))
    echo "== $name" | tee -a "$LOG"
    stage "$name"
    status=$?
    case $status in
    0) said="done" ;;
    3) said="left out (see log.txt)" && failed+=("$name") ;;
    124 | 137) said="out of time" && failed+=("$name") ;;
    *) said="failed ($status)" && failed+=("$name") ;;
    esac
    echo "== $name: $said, $((SECONDS - begin)) s" | tee -a "$LOG"
done
built

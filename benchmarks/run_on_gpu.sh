#!/usr/bin/env bash
# Builds in place, tests, measures and tunes on a machine with a GPU and torch, without a network, within 9 minutes:
#
#     benchmarks/run_on_gpu.sh OUT_DIR [STAGE ...]
#
# OUT_DIR gets results.jsonl (a line as soon as it is measured), results.json, report.md, roofline.png, log.txt and the
# table of tiles. With stages, only those run. A stage may take its share of the time and what those before it left. The
# report is built from the lines there are, whatever happens.
#
# PYTHON: the interpreter that has torch (python3). R1KERNELS_GPU_REHEARSAL=1: small shapes on the CPU.
set -uo pipefail

# Seconds of each stage, most valuable first; 540 altogether, of which 20 are for the report.
STAGES=(build check ceilings logits linear tests tune memcheck racecheck rest)
declare -A SECONDS_OF=(
    [build]=15 [check]=45 [ceilings]=20 [logits]=110 [linear]=110 [tests]=100 [tune]=35 [memcheck]=30 [racecheck]=25
    [rest]=30
)
REPORT=20

if [ $# -lt 1 ]; then
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
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

# built: what became of the build, once it has ended.
built() {
    [ -n "$build" ] || return 0
    wait "$build" || { echo "the extension was not built: see above" >>"$LOG"; failed+=(build); }
    build=''
}

sanitizer() {
    command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer: left out" >>"$LOG"; return 3; }
    limited env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 20 \
        "$PYTHON" -m gpu.sanitize "${where[@]}"
}

stage() {
    case $1 in
    build) # goes on behind the measurements: none of them needs the CPU's kernels
        timeout -k 5 240 "$PYTHON" setup.py -q build_ext --inplace >>"$LOG" 2>&1 &
        build=$!
        limited "$PYTHON" -m r1kernels
        ;;
    check) limited "$PYTHON" -m gpu check --out "$OUT" "${where[@]}" ;;
    ceilings | logits | linear | rest) measure "$1" ;;
    tests)
        built
        if ! "$PYTHON" -c 'import pytest' 2>>"$LOG"; then
            echo "no pytest: tests left out" >>"$LOG"
            return 3
        fi
        limited "$PYTHON" -m pytest -q -m gpu -W default -p no:cacheprovider tests/test_gpu_*.py
        ;;
    tune)
        limited "$PYTHON" benchmarks/tune.py --out "$OUT" --seconds $((granted - SECONDS - 10)) \
            "${where[@]}" "${only[@]}"
        ;;
    memcheck | racecheck) sanitizer "$1" ;;
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

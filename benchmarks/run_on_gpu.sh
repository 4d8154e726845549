#!/usr/bin/env bash
# Builds in place, measures, tests and tunes on a machine with a GPU, torch and (for the CUDA kernels) nvcc, without a
# network:
#
#     benchmarks/run_on_gpu.sh OUT [--seconds N] [--resume DIR] [STAGE ...]
#
# All of it takes N seconds at most (570), of which each stage has a share. What is most telling comes first. OUT gets
# results.jsonl (a line as soon as it is measured), results.json and report.md (after each case), log.txt, stages.tsv,
# roofline.png and the table of tiles. `benchmarks/choose.py OUT/results.json` makes of them the table of what the CUDA
# kernels are chosen for.
#
# The same command again goes on: first with the stages that failed or were cut off, then with those that have not run.
# --resume DIR takes over what an earlier command left in DIR, where OUT is empty. With stages, only those run.
#
# PYTHON: the interpreter that has torch (python3). R1KERNELS_CUDA_ARCHS: what nvcc compiles for, by default this GPU.
# R1KERNELS_PREBUILT=1: r1kernels/_C.abi3.so was built elsewhere; it is used if it loads and serves this GPU.
# PEERS: a folder of wheels of other libraries, and of .tar.xz files of unpacked wheels (xz halves large ones). Make it
# with `pip download --no-deps -d PEERS NAME==VERSION`, for the Python of the machine with the GPU: liger-kernel, trl,
# datasets, dill, multiprocess, verl, cut-cross-entropy, quack-kernels, nvidia-cutlass-dsl and its libs-base, libs-core
# and libs-cu13, apache-tvm-ffi, torch-c-dlpack-ext.
# R1KERNELS_GPU_REHEARSAL=1: small shapes on the CPU.
set -uo pipefail

# Seconds of each stage where all of them run; REPORT is left for the last report.
STAGES=(
    ceilings launches kernels step head tests-step racecheck
    peers losses tests memcheck logits scoring check rest tune
)
declare -A SHARE=(
    [ceilings]=15 [launches]=15 [kernels]=40 [step]=45 [head]=45 [tests-step]=35 [racecheck]=25
    [peers]=100 [losses]=45 [tests]=50 [memcheck]=25 [logits]=40 [scoring]=25 [check]=15 [rest]=20 [tune]=15
)
REPORT=15 BUILD=300
WITHOUT_EXTENSION=" ceilings head " # these run while it is built
WITH_PEERS=" peers losses logits scoring rest "

usage() {
    sed -n '2,24s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

folder() { # of results: made if it is missing
    mkdir -p "$1" && (cd "$1" && pwd)
}

[ $# -gt 0 ] || usage
OUT=$(folder "$1") || exit 2
shift
seconds=570 resume='' chosen=()
while [ $# -gt 0 ]; do
    case $1 in
    --seconds | --resume)
        [ $# -gt 1 ] || usage
        [ "$1" = --seconds ] && seconds=$2 || resume=$2
        shift
        ;;
    *)
        [ -n "${SHARE[$1]:-}" ] || { echo "unknown stage $1, expected: ${STAGES[*]}" >&2; exit 2; }
        chosen+=("$1")
        ;;
    esac
    shift
done
if ! [[ $seconds =~ ^[0-9]+$ && $seconds -gt $REPORT ]]; then
    echo "--seconds is $seconds, expected a number above $REPORT" >&2
    exit 2
fi
if [ -n "$resume" ]; then
    [ -d "$resume" ] || { echo "--resume is $resume, expected a folder of results" >&2; exit 2; }
    [ -e "$OUT/results.jsonl" ] || find "$resume" -maxdepth 1 -type f -exec cp -n --no-preserve=mode {} "$OUT" \;
fi
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python3} LOG=$OUT/log.txt STATE=$OUT/stages.tsv
touch "$STATE"
R1KERNELS_GPU_COMMAND=$(($(cut -f4 "$STATE" | sort -n | tail -1) + 1))
export R1KERNELS_GPU_COMMAND PYTHONUNBUFFERED=1 PYTHONPATH=$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}
export CUBLAS_WORKSPACE_CONFIG=:4096:8 # torch asks for it in deterministic mode, which the tests use
where=() only=() no_compile=()
if [ -n "${R1KERNELS_GPU_REHEARSAL:-}" ]; then
    where=(--device cpu) only=(--small) no_compile=(--no-compile)
fi
SECONDS=0 granted=0 failed=() child='' build='' installing='' site=''

# note STAGE STATUS SECONDS: the last line of a stage counts.
note() { printf '%s\t%s\t%s\t%s\n' "$1" "$2" "$3" "$R1KERNELS_GPU_COMMAND" >>"$STATE"; }

status_of() { awk -F'\t' -v stage="$1" '$1 == stage { status = $2 } END { print status }' "$STATE"; }

# plan: the stages to run, those that an earlier command began in vain first.
plan() {
    local stage again=() fresh=()
    for stage in "${STAGES[@]}"; do
        case $(status_of "$stage") in
        '') fresh+=("$stage") ;;
        done | 'left out') ;;
        *) again+=("$stage") ;;
        esac
    done
    echo "${again[@]}" "${fresh[@]}"
}

report() {
    trap - EXIT INT TERM
    for pid in $child $build $installing; do kill "$pid" 2>/dev/null; done
    timeout -k 5 "$REPORT" "$PYTHON" -m gpu report --out "$OUT" "${where[@]}" "${only[@]}" 2>&1 | tee -a "$LOG"
    [ -z "$site" ] || rm -rf "${site%/*}"
    echo "${#failed[@]} stages failed${failed[*]:+: ${failed[*]}}; $SECONDS s" | tee -a "$LOG"
    [ "${#failed[@]}" -eq 0 ] || exit 1
    exit 0
}
trap report EXIT
trap 'failed+=(interrupted); exit 1' INT TERM

# limited COMMAND: within the time that has been granted. In the background: bash handles signals only in wait.
limited() {
    local left=$((granted - SECONDS)) status
    [ "$left" -gt 0 ] || return 124
    timeout -k 5 "$left" "$@" >>"$LOG" 2>&1 &
    child=$!
    wait "$child"
    status=$?
    child=''
    return "$status"
}

# measure GROUP: starts a new process if a fault lost the device (75) or a signal ended the last one.
measure() {
    local status=75
    while [ "$status" -eq 75 ] || { [ "$status" -gt 128 ] && [ "$status" -ne 137 ]; }; do
        [ "$SECONDS" -lt "$granted" ] || return 124
        limited "$PYTHON" -m gpu "$1" --out "$OUT" --seconds $((granted - SECONDS - 5)) \
            "${where[@]}" "${only[@]}" "${no_compile[@]}"
        status=$?
    done
    return "$status"
}

# built_elsewhere: whether there is an extension that serves this machine.
built_elsewhere() {
    if [ -n "${R1KERNELS_GPU_REHEARSAL:-}" ]; then
        "$PYTHON" -c 'import torch, r1kernels._C' 2>/dev/null
    else
        [ -n "${R1KERNELS_PREBUILT:-}" ] &&
            "$PYTHON" -c 'from r1kernels import _library; raise SystemExit(_library.cuda_missing("cuda") or 0)'
    fi
}

# build: one architecture, that of the device, and no CUDA where the CPU rehearses.
build() {
    local archs
    built_elsewhere && return 0
    if [ -n "${R1KERNELS_GPU_REHEARSAL:-}" ]; then
        export R1KERNELS_CUDA=${R1KERNELS_CUDA:-0}
    elif [ -z "${R1KERNELS_CUDA_ARCHS:-}" ]; then
        archs=$("$PYTHON" -c 'import torch; a, b = torch.cuda.get_device_capability()
print({9: "90a", 10: "100", 12: "120"}.get(a, f"{a}{b}"))') && export R1KERNELS_CUDA_ARCHS=$archs
    fi
    command -v nvcc >/dev/null || export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
    exec timeout -k 5 "$BUILD" "$PYTHON" setup.py -q build_ext --inplace
}

# built: the result of the build, once it has ended.
built() {
    [ -n "$build" ] || return 0
    wait "$build" || { echo "the extension was not built: see above" >>"$LOG"; failed+=(build); }
    build=''
    "$PYTHON" -m r1kernels >>"$LOG" 2>&1
}

# install_peers FOLDER: one by one, for a wheel that does not fit this Python stops the others of its command. QuACK
# recognises other packages by a folder of the name site-packages.
install_peers() {
    local file status=0
    mkdir -p "$1"
    for file in "$PEERS"/*.whl; do
        "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --find-links "$PEERS" --target "$1" "$file" ||
            status=1
    done
    for file in "$PEERS"/*.tar.xz; do
        [ ! -e "$file" ] || tar -xJf "$file" -C "$1" || status=1
    done
    return "$status"
}

# with_peers: adds the folder and what its .pth files name.
with_peers() {
    local added
    [ -n "$installing" ] || return 0
    wait "$installing" || echo "not all peers were installed: see above" >>"$LOG"
    installing=''
    added=$("$PYTHON" -c 'import site, sys; old = {*sys.path}; site.addsitedir(sys.argv[1])
print(":".join(path for path in sys.path if path not in old))' "$site")
    export PYTHONPATH=$PYTHONPATH:$added
}

sanitizer() { # TOOL ARGUMENTS-OF-GPU.SANITIZE
    local tool=$1
    shift
    limited env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
        --print-limit 20 "$PYTHON" -m gpu.sanitize "$@" "${where[@]}"
}

tests() {
    if ! "$PYTHON" -c 'import pytest' 2>>"$LOG"; then
        echo "no pytest: tests left out" >>"$LOG"
        return 3
    fi
    limited "$PYTHON" -m pytest -q -raP -m gpu -W default -p no:cacheprovider "$@"
}

others() { # tests of GPUs, less those of tests-step
    ls tests/gpu/test_gpu_*.py | grep -v -e _step.py -e _execution.py
}

stage() {
    case $1 in
    launches | check) limited "$PYTHON" -m gpu "$1" --out "$OUT" "${where[@]}" "${only[@]}" ;;
    tests-step) tests tests/gpu/test_gpu_step.py tests/gpu/test_gpu_execution.py ;;
    tests) tests $(others) ;;
    tune)
        limited "$PYTHON" benchmarks/tune.py --out "$OUT" --seconds $((granted - SECONDS - 10)) \
            "${where[@]}" "${only[@]}"
        ;;
    racecheck | memcheck)
        if ! command -v compute-sanitizer >/dev/null; then
            echo "no compute-sanitizer: left out" >>"$LOG"
            return 3
        fi
        sanitizer "$1" --step 4096 || return
        [ "$1" = racecheck ] || { sanitizer "$1" --kernels cuda && sanitizer "$1" --kernels triton; }
        ;;
    *) measure "$1" ;;
    esac
}

# next: sets `name` to the first stage that need not wait for the build, or to the first of all after the build.
next() {
    local i
    if [ -n "$build" ] && kill -0 "$build" 2>/dev/null; then
        for i in "${!pending[@]}"; do
            [[ $WITHOUT_EXTENSION == *" ${pending[$i]} "* ]] || continue
            name=${pending[$i]}
            unset "pending[$i]"
            return
        done
    fi
    built
    for i in "${!pending[@]}"; do
        name=${pending[$i]}
        unset "pending[$i]"
        return
    done
}

run() {
    local begin=$SECONDS size=0 status said
    [ "$granted" -ge "$SECONDS" ] || granted=$SECONDS # the build was waited for
    granted=$((granted + SHARE[$name] * (seconds - REPORT) / shares))
    [ "$granted" -le $((seconds - REPORT)) ] || granted=$((seconds - REPORT))
    [[ $WITH_PEERS != *" $name "* ]] || with_peers
    echo "== $name" | tee -a "$LOG"
    note "$name" "cut off" 0
    size=$(stat -c %s "$LOG")
    stage "$name"
    status=$?
    case $status in
    0) said="done" ;;
    3) said="left out" ;;
    124 | 137) said="out of time" ;;
    *) said="failed ($status)" ;;
    esac
    [ "$said" = "done" ] || failed+=("$name")
    note "$name" "$said" $((SECONDS - begin))
    tail -c +$((size + 1)) "$LOG" | tail -n 12 | cut -c 1-160
    echo "== $name: $said, $((SECONDS - begin)) s" | tee -a "$LOG"
}

pending=("${chosen[@]}")
[ "${#pending[@]}" -gt 0 ] || read -r -a pending <<<"$(plan)"
[ "${#pending[@]}" -gt 0 ] || exit # with the report
shares=0
for name in "${pending[@]}"; do shares=$((shares + SHARE[$name])); done
build >>"$LOG" 2>&1 &
build=$!
if [ -n "${PEERS:-}" ]; then
    site=$(mktemp -d)/site-packages
    install_peers "$site" >>"$LOG" 2>&1 &
    installing=$!
fi
while [ "${#pending[@]}" -gt 0 ]; do
    next
    run
done

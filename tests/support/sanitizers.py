"""Builds the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer, and runs tests on them.

    python tests/support/sanitizers.py [--short] [PYTEST_ARGUMENT ...]

The copy of the package that it builds is in build/sanitize; the extension in r1kernels/ does not change. The process
ends with an error at the first access out of bounds, use after free, or undefined operation. `--short` is for work on a
kernel: it compiles the sources once, without the wider instruction sets, and runs only the tests with any input and
those of bad arguments. The kernels' widest vectors and the products of bfloat16 are not checked then.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "sanitize"
FLAGS = (  # Python's own -fwrapv would define an overflow of signed numbers, so that it is no error
    "-fno-wrapv", "-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize-recover=all",
)
# Any input to every operation, operators called with bad arguments, and every instruction set at edges of its blocks.
TESTS = (
    "hardening/test_any_logits.py", "hardening/test_any_losses.py", "hardening/test_any_head.py",
    "kernels/test_raw_operators.py", "kernels/test_top_k.py", "kernels/test_gemm_precision.py",
    "kernels/test_shifted_gradient.py", "kernels/test_token_stats_edges.py", "kernels/test_divergence_edges.py",
    "losses/test_policy_loss_edges.py", "linear/test_linear_support.py",
)
SHORT = TESTS[:4]
# The reference has no kernels, and a compiled program calls the same ones.
LEFT_OUT = ("-k", "not reference and not compile")


def libraries() -> list[str]:
    """The paths of the sanitizers' libraries, which come with the compiler."""
    found = []
    for name in ("libasan.so", "libubsan.so"):
        path = subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        if not Path(path).is_absolute():
            raise FileNotFoundError(f"{name} is not installed; expected it beside g++ (Debian: package libgcc-12-dev)")
        found.append(path)
    return found


def environment() -> dict[str, str]:
    """The variables of a Python process that loads the instrumented extension.

    Python and torch free little at their end, so leaks are not looked for.
    """
    return {
        **os.environ, "LD_PRELOAD": " ".join(libraries()), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER),
        "PYTHONSAFEPATH": "1", "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }


def build(short: bool) -> None:
    """Compiles what has changed, and copies the package to `FOLDER`."""
    variables = {**os.environ, "R1KERNELS_CUDA": "0", "R1KERNELS_CXXFLAGS": " ".join(FLAGS),
                 "R1KERNELS_PORTABLE": str(int(short))}
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(FOLDER), "--build-temp", "build/temp"]
    subprocess.run(command, check=True, cwd=ROOT, env=variables)
    extension = FOLDER / "r1kernels" / "_C.abi3.so"
    if b"__asan_report" not in extension.read_bytes() or b"__ubsan_handle" not in extension.read_bytes():
        raise RuntimeError(f"{extension} is not instrumented; delete {FOLDER} and build it again")


def main(arguments: list[str]) -> int:
    if short := arguments[:1] == ["--short"]:
        arguments = arguments[1:]
    build(short)
    loaded = subprocess.check_output(
        [sys.executable, "-c", "import r1kernels._library as l; print(l.extension and l.extension.__file__)"],
        text=True, env=environment(), cwd=ROOT,
    ).strip()
    if not loaded.startswith(str(FOLDER)):
        raise RuntimeError(f"the extension is {loaded}; expected that of {FOLDER}")
    tests = arguments or [*(str(ROOT / "tests" / name) for name in (SHORT if short else TESTS)), *LEFT_OUT]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", *tests]  # -s: reports
    return subprocess.run(command, env=environment(), cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

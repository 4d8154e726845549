"""The kernels' logarithm against long double, on every instruction set, compiled as the extension is."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from backends import host_code

from r1kernels import _library

pytestmark = host_code

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
}
# Those with bf16 in their names do not differ from avx512 here.
ISAS = [isa for isa in _library.extension.cpu_isas() if "bf16" not in isa] if _library.extension else []

# Prints the largest errors, in units of one rounding of the result, over f in (-1, 2^120); then what inf and NaN give.
PROGRAM = r"""
#include <cmath>
#include <cstdio>
#include "cpu/vec_log.h"
using namespace r1k::R1K_ISA;

long double gap_of(long double f) {
  if (std::fabs(f) > 1e-2L) return f - std::log1p(f);
  long double sum = 0, power = f;
  for (int n = 2; n < 12; ++n) sum += (n % 2 ? -1 : 1) * (power *= f) / n;
  return sum;
}

int main() {
  long double worst_log = 0, worst_gap = 0;
  auto probe = [&](float f) {
    if (!(f > -0.999999f) || f == 0 || std::fabs(f) < 1e-18f) return;
    VecF x = broadcast(f);
    Log1p got = log1p_of(x, x + 1.0f);
    // The rounding of 1 + f is part of the argument where f alone does not decide.
    long double exact = std::log1p((long double)f), gap = gap_of(f);
    long double argument = std::fabs(f) > 0.29f ? std::ldexp(1.0L, -24) : 0;  // relative error of 1 + f
    long double unit_log = std::ldexp(std::fabs(exact), -24) + argument;
    long double unit_gap = std::ldexp(gap, -24) + argument;
    worst_log = std::fmax(worst_log, std::fabs(got.log[0] - exact) / unit_log);
    worst_gap = std::fmax(worst_gap, std::fabs(got.gap[0] - gap) / unit_gap);
  };
  for (uint32_t bits = 0x00800000; bits < 0x7c000000; bits += 4001) {
    float f = bit_cast<float>(bits);
    probe(f);
    if (f < 1) probe(-f);
  }
  VecF inf = broadcast(INFINITY), nan = broadcast(NAN);
  printf("%Lf %Lf %f %f\n", worst_log, worst_gap, log1p_of(inf, inf).log[0], log1p_of(nan, nan).log[0]);
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which builds the extension too")
@pytest.mark.parametrize("isa", ISAS)
def test_logarithms_are_within_a_few_roundings(isa: str, tmp_path: Path) -> None:
    source, program = tmp_path / "log.cpp", tmp_path / "log"
    source.write_text(PROGRAM)
    flags = FLAGS[isa] if platform.machine().lower() in ("x86_64", "amd64") else []
    subprocess.run(
        ["g++", "-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=off", *flags, f"-DR1K_ISA={isa}", f"-I{CSRC}",
         source, "-o", program],
        check=True,
    )
    log, gap, of_inf, of_nan = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    assert float(log) <= 4 and float(gap) <= 4
    assert of_inf == "inf" and of_nan in ("nan", "-nan")

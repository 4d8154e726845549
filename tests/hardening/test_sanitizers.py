"""The flags and options of `make sanitize` stop a process at an error: shown on small faulty programs."""

import subprocess
from pathlib import Path

import pytest
import sanitizers
from backends import host_code

pytestmark = host_code

PROGRAM = """
#include <cstdlib>
#include <limits>
int main(int count, char**) {
  float* values = new float[3 + count]{};
  int index = count + %s;
  float read = values[index];
  delete[] values;
  int sum = std::numeric_limits<int>::max() - %s;
  sum += count;
  float wide = %s;
  return read == 0 && sum > 0 && static_cast<int>(wide * count) >= 0 ? 0 : 3;
}
"""


@pytest.mark.parametrize(("values", "error"), [
    (("1", "1", "1e9f"), ""),
    (("3", "1", "1e9f"), "heap-buffer-overflow"),
    (("1", "0", "1e9f"), "signed integer overflow"),
    (("1", "1", "1e10f"), "is outside the range of representable values"),
])
def test_an_error_ends_the_process(values: tuple[str, str, str], error: str, tmp_path: Path) -> None:
    source, program = tmp_path / "faulty.cpp", tmp_path / "faulty"
    source.write_text(PROGRAM % values)
    subprocess.run(["g++", "-fwrapv", *sanitizers.FLAGS, str(source), "-o", str(program)], check=True)
    variables = {name: value for name, value in sanitizers.environment().items() if name != "LD_PRELOAD"}
    completed = subprocess.run([str(program)], capture_output=True, text=True, env=variables)
    assert (completed.returncode != 0) == bool(error), completed.stderr
    assert error in completed.stderr


def test_the_tests_to_run_exist() -> None:
    assert not [name for name in sanitizers.TESTS if not (sanitizers.ROOT / "tests" / name).exists()]

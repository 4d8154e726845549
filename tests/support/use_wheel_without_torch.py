"""Uses an installed wheel on a Python that has no torch: a program, for an environment without pytest.

    python use_wheel_without_torch.py FOLDER_OF_TORCH'S_LIBRARIES

The libraries do not know Python, so those of another Python's torch serve. Loading the extension beside them shows that
this Python can load it and call its functions. The operators themselves need torch, and are not called.
"""

import ctypes
import importlib
import importlib.util
import sys
from pathlib import Path

import r1kernels

LIBRARIES = ("libtorch_cpu.so", "libtorch.so")


def main() -> None:
    assert importlib.util.find_spec("torch") is None, "this program is for an environment without torch"
    assert "site-packages" in r1kernels.__file__, r1kernels.__file__
    assert {"grpo_loss", "objectives", *r1kernels.__all__} <= set(dir(r1kernels))
    try:
        r1kernels.grpo_loss  # noqa: B018
    except ModuleNotFoundError as error:
        assert error.name == "torch", error
    else:
        raise AssertionError("r1kernels.grpo_loss was loaded without torch")

    rewards = r1kernels.rewards
    completions = ["<think>1</think> <answer>1/2</answer>", "<answer>0.6</answer>"]
    assert rewards.accuracy(completions, answer=["0.5", "0.5"]) == [1.0, 0.0]
    assert rewards.format(completions) == [1.0, 0.0]

    for name in LIBRARIES:
        ctypes.CDLL(str(Path(sys.argv[1], name)), ctypes.RTLD_GLOBAL)
    extension = importlib.import_module("r1kernels._C")
    assert extension.cpu_isa() in extension.cpu_isas()
    assert isinstance(extension.cuda_missing(0), str)
    print(f"extension loaded: {extension.cpu_isa()}, {' '.join(extension.cuda_architectures()) or 'no CUDA kernels'}")


if __name__ == "__main__":
    main()

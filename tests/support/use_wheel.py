"""Uses an installed wheel on the CPU, and compares it with plain PyTorch: a program, for an environment without pytest.

    python use_wheel.py

It prints the version of torch, the architectures of the CUDA kernels, and why these cannot run here.
"""

import torch

import r1kernels
from r1kernels import _library

torch.manual_seed(0)
LOGITS = torch.randn(2, 3, 257)
HIDDEN, WEIGHT = torch.randn(2, 3, 8), torch.randn(257, 8)
TOKEN_IDS = torch.randint(257, (2, 3))
POLICY = {
    "advantages": torch.tensor([1.0, -1.0]),
    "old_logprobs": torch.randn(2, 3) - 5,
    "ref_logprobs": torch.randn(2, 3) - 5,
    "objective": r1kernels.objectives.dapo(kl_coef=0.1, entropy_coef=0.01),
}


def of_logits(logits: torch.Tensor) -> torch.Tensor:
    return r1kernels.grpo_loss(logits, TOKEN_IDS, **POLICY).loss


def of_hidden(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return r1kernels.linear_grpo_loss(hidden, weight, TOKEN_IDS, **POLICY).loss


def main() -> None:
    assert _library.extension is not None, _library.extension_error
    assert "site-packages" in _library.extension.__file__, _library.extension.__file__
    for loss_of, inputs in ((of_logits, (LOGITS,)), (of_hidden, (HIDDEN, WEIGHT))):
        for dtype in (torch.float32, torch.bfloat16):
            results = []
            for implementation in ("cpu", "reference"):
                leaves = [value.clone().to(dtype).requires_grad_() for value in inputs]
                with r1kernels.backend(implementation):
                    loss = loss_of(*leaves)
                    loss.backward()
                results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
            slack = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-3}
            for kernel, reference in zip(*results, strict=True):
                torch.testing.assert_close(kernel, reference, **slack)
    print(torch.__version__)
    print(*_library.extension.cuda_architectures())
    print(_library.extension.cuda_missing(0))


if __name__ == "__main__":
    main()

"""Whether one compiled graph serves all values of a Python number, and whether its results are those of eager mode."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

VALUES = [0.5 + 0.1 * step for step in range(12)]


def check(loss_of: Callable[[Tensor, float], Tensor], source: Tensor) -> None:
    """Compiles `loss_of(source, number)`, forward and backward. The first number may be a constant of its graph."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss_of, fullgraph=True, backend=counter)
    with torch._dynamo.config.patch(recompile_limit=2):
        for number in VALUES:
            results = []
            for function in (compiled, loss_of):
                leaf = source.clone().requires_grad_()
                loss = function(leaf, number)
                results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
            torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)
    assert counter.frame_count <= 2

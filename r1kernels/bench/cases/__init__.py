"""The cases by name, in the order in which they are measured. A case is a function of the setting that yields tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from r1kernels.bench.cases import advantages, busy, distillation, hidden, logits, policy_head, tokens
from r1kernels.bench.tasks import Setting, Task

Case = Callable[[Setting], Iterator[Task]]
CASES: dict[str, Case] = {
    name: case
    for module in (policy_head, logits, hidden, distillation, tokens, advantages, busy)
    for name, case in module.CASES.items()
}

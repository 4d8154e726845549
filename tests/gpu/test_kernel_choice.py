"""The table of operators whose CUDA kernels were measured to be faster than Triton's, and how it is read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from r1kernels import _choice
from r1kernels._choice import cuda_is_faster

BF16, FP32 = torch.bfloat16, torch.float32
Write = Callable[[Any], Path]


def measured(ratio: float, vocab: int | None = 151_936, dtype: str | None = "bfloat16", tokens: int = 8192) -> Any:
    return {"dtype": dtype, "vocab": vocab, "tokens": tokens, "ratio": ratio}


def of_device(**operators: list[Any]) -> Any:
    return {"NVIDIA H200": {"measured": {"driver": "580"}, "operators": operators}}


def forget() -> None:
    _choice.load.cache_clear()
    cuda_is_faster.cache_clear()


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes another table and has it read."""
    path = tmp_path / "table.json"

    def write(content: Any) -> Path:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        monkeypatch.setattr(_choice, "TABLE", path)
        forget()
        return path

    yield write
    forget()


def test_nothing_measured_is_never_faster(table: Write) -> None:
    table({})
    assert not cuda_is_faster("token_stats", "NVIDIA H200", BF16, 151_936)
    assert not cuda_is_faster("policy_loss", "NVIDIA H200", None, None)


def test_faster_where_it_was_measured_to_be(table: Write) -> None:
    table(of_device(token_stats=[measured(1.2), measured(0.9, dtype="float32")], policy_loss=[measured(3, None, None)]))
    assert cuda_is_faster("token_stats", "NVIDIA H200", BF16, 151_936)
    assert not cuda_is_faster("token_stats", "NVIDIA H200", FP32, 151_936)
    assert cuda_is_faster("policy_loss", "NVIDIA H200", None, None)
    assert cuda_is_faster("policy_loss", "NVIDIA H200", FP32, 512)  # whatever its tokens are
    # Another device, operator, dtype; no logits where they were measured.
    assert not cuda_is_faster("token_stats", "NVIDIA H100", BF16, 151_936)
    assert not cuda_is_faster("token_stats_backward", "NVIDIA H200", BF16, 151_936)
    assert not cuda_is_faster("token_stats", "NVIDIA H200", torch.float16, 151_936)
    assert not cuda_is_faster("token_stats", "NVIDIA H200", None, None)


def test_equally_fast_is_not_faster(table: Write) -> None:
    table(of_device(token_stats=[measured(1.0)]))
    assert not cuda_is_faster("token_stats", "NVIDIA H200", BF16, 151_936)


def test_the_nearest_vocabulary_decides_up_to_a_factor_of_two(table: Write) -> None:
    table(of_device(token_stats=[measured(1.2, 32_000), measured(0.8, 64_000), measured(1.5, 256_000)]))
    expected = {15_999: False, 16_000: True, 45_254: True, 45_255: False, 127_999: False, 128_001: True,
                512_000: True, 512_001: False, 1: False, 0: False}
    assert {vocab: cuda_is_faster("token_stats", "NVIDIA H200", BF16, vocab) for vocab in expected} == expected


def test_few_rows_and_many_must_both_be_faster(table: Write) -> None:
    table(of_device(token_stats=[measured(1.2), measured(0.99, tokens=256)]))
    assert not cuda_is_faster("token_stats", "NVIDIA H200", BF16, 151_936)


@pytest.mark.parametrize("content", [
    "", "{", "[]", '{"NVIDIA H200": {}}', '{"NVIDIA H200": {"operators": []}}',
    of_device(token_stats=[{"dtype": "bfloat16"}]), of_device(token_stats=[measured(1.2) | {"more": 1}]),
    of_device(token_stats=[measured("fast")]), of_device(token_stats=[measured(1.2, "many")]),
    of_device(token_stats=[measured(1.2, dtype=16)]), of_device(token_stats=3),
])
def test_a_table_that_cannot_be_read_is_named(table: Write, content: Any) -> None:
    path = table(content)
    with pytest.raises(RuntimeError, match=str(path)):
        cuda_is_faster("token_stats", "NVIDIA H200", BF16, 151_936)


def test_a_missing_table_is_named(table: Write) -> None:
    path = table({})
    path.unlink()
    with pytest.raises(RuntimeError, match=str(path)):
        cuda_is_faster("token_stats", "NVIDIA H200", BF16, 151_936)


def test_the_table_is_read_once(table: Write) -> None:
    path = table(of_device(token_stats=[measured(1.2)]))
    assert cuda_is_faster("token_stats", "NVIDIA H200", BF16, 151_936)
    path.unlink()
    assert cuda_is_faster("token_stats", "NVIDIA H200", BF16, 128_256)


def test_the_table_of_this_repository_tells_what_it_was_measured_with() -> None:
    _choice.load(_choice.TABLE)
    for device, entry in json.loads(_choice.TABLE.read_text()).items():
        assert device and entry["measured"]
        assert all(hasattr(torch.ops.r1kernels, operator) for operator in entry["operators"])


def test_the_question_does_not_touch_a_device() -> None:
    program = (
        "import torch; from r1kernels import _choice; torch.cuda = None;"
        "print(_choice.cuda_is_faster('token_stats', 'NVIDIA H200', torch.bfloat16, 151936))"
    )
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert completed.stdout.strip() in ("True", "False"), completed.stderr

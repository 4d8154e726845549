"""The engine of `r1kernels bench`: what is checked, timed, left out and saved."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import SMALL, a_task, no_peer, small_engine, square
from torch import Tensor

import r1kernels
from r1kernels import testing
from r1kernels.bench import clock, eager, machine, peers
from r1kernels.bench.cases import CASES
from r1kernels.bench.engine import Engine
from r1kernels.bench.peers import Peer
from r1kernels.bench.tasks import OURS, SIZES, Problem, Setting, Task, results
from r1kernels.bench.turns import LEAST, in_turns, rounds_of

# Public functions that compute nothing of a loss.
NO_OPERATIONS = {"backend", "has_fast_bf16", "linear_loss_bytes", "release_workspace"}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "load", no_peer)


@pytest.fixture
def engine() -> Engine:
    return small_engine()


def left_out(engine: Engine) -> dict[str, str]:
    return {entry["what"].split(" (")[0]: entry["why"] for entry in engine.results.left_out()}


# ---- cases ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_every_public_operation_is_measured(size: str) -> None:
    setting = Setting(torch.device("cpu"), size)
    tasks = [task for case in CASES.values() for task in case(setting)]
    operations = {name for name in r1kernels.__all__ if inspect.isfunction(getattr(r1kernels, name))} - NO_OPERATIONS
    assert {task.op for task in tasks} == operations
    assert all(OURS in task.functions and task.bytes_moved and task.bytes[OURS] > 0 for task in tasks)
    series = {task.series for task in tasks} - {None}
    assert series == {"vocabulary", "tokens", "active"}


def test_every_case_is_right(alone: None, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every task of the small size is checked, and ours has a row."""
    monkeypatch.setattr(clock.HostClock, "peak_extra_bytes", lambda self, run: 0)
    monkeypatch.setattr(clock.HostClock, "seconds", lambda self, run, calls: 1.0)
    for name, case in CASES.items():
        for task in case(SMALL):
            found = {row["implementation"] for row in engine.measure(task)}
            assert {OURS, *task.functions} <= found, (name, task.title, engine.results.left_out())
    assert not engine.trouble


# ---- what is left out -----------------------------------------------------------------------------------------


def wrong_values(x: Tensor) -> Tensor:
    return x * x * 1.01


def wrong_gradient(x: Tensor) -> Tensor:
    return x.detach() * x * 1.0


def wrong_last_row(x: Tensor) -> Tensor:
    return torch.cat([x[:-1] * x[:-1], x[-1:] * x[-1:] * 1.1])


def nan(x: Tensor) -> Tensor:
    return x * x * float("nan")


@pytest.mark.parametrize("wrong", [wrong_values, wrong_gradient, wrong_last_row, nan])
def test_a_peer_with_a_wrong_result_gets_no_time(wrong: Callable[..., Tensor], engine: Engine) -> None:
    rows = engine.measure(a_task(peers=[Peer("other", lambda: wrong), Peer("right", lambda: square)]))
    assert {row["implementation"] for row in rows} == {OURS, peers.EAGER, "right"}
    assert "wrong result" in left_out(engine)["other"] and not engine.trouble


def test_a_peer_that_does_not_run_is_replaced(engine: Engine) -> None:
    """Not one with a wrong result."""
    def fails(x: Tensor) -> Tensor:
        raise ValueError("no such shape")

    plain = Peer("other, not compiled", lambda: square)
    rows = engine.measure(a_task(peers=[Peer("other", lambda: fails, otherwise=plain)]))
    assert [row["implementation"] for row in rows] == [OURS, peers.EAGER, "other, not compiled"]
    assert "no such shape" in left_out(engine)["other"]
    assert len(engine.measure(a_task(peers=[Peer("other", lambda: nan, otherwise=plain)]))) == 2


def test_small_sizes_compile_at_one_shape_only(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    peer = Peer("other", lambda: square, compiles=True, otherwise=Peer("other, not compiled", lambda: square))
    last = [engine.measure(a_task(peers=[peer], compiled=compiled, series=series))[2]["implementation"]
            for compiled, series in ((False, "vocabulary"), (True, None), (True, "vocabulary"))]
    assert last == ["other, not compiled", "other, not compiled", "other"]
    assert "--size small" in left_out(engine)["other"]


def test_a_wrong_result_of_ours_is_a_failure(engine: Engine) -> None:
    assert engine.measure(a_task(functions={OURS: wrong_values, peers.EAGER: square})) == []
    assert engine.trouble and "wrong result" in left_out(engine)[OURS]


def off(of_value: float, of_gradient: float) -> Callable[..., Tensor]:
    """A mean of squares with relative errors, as a loss has a value and a gradient."""

    def loss(x: Tensor) -> Tensor:
        exact = (x.float() * x.float()).mean()
        moving = (exact - exact.detach()) * (1 + of_gradient)
        return exact.detach() * (1 + of_value) + moving

    return loss


def a_loss(**changes: Any) -> Task:
    """The mean of squares of bfloat16 numbers."""
    def make() -> Problem:
        return Problem({"x": torch.linspace(-2, 2, 64).reshape(16, 4).bfloat16()}, ("x",))

    return a_task(dtype=torch.bfloat16, make=make, exact=lambda x: (x * x).mean(), **changes)


@pytest.mark.parametrize(("wrong", "said"), [(off(0.009, 0), "output 0"), (off(0, 0.015), "gradient of x")])
def test_ours_is_held_to_the_exact_result(wrong: Callable[..., Tensor], said: str, engine: Engine) -> None:
    """Other libraries may round their logits to bfloat16. Their tolerance is not ours, and ours is no yardstick."""
    assert engine.measure(a_loss(functions={OURS: wrong, peers.EAGER: off(0, 0)})) == []
    assert engine.trouble and said in left_out(engine)[OURS]
    rows = engine.measure(a_loss(functions={OURS: off(0, 0), peers.EAGER: wrong}))
    assert [row["implementation"] for row in rows] == [OURS, peers.EAGER]
    assert rows[0]["max_error"] < rows[0]["tolerance"] < rows[1]["max_error"] < rows[1]["tolerance"] == 0.05


def test_presets_are_checked_against_the_oracle(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = testing.policy_loss

    def moved(objective: Any, **inputs: Any) -> Any:
        found = oracle(objective, **inputs)
        return found._replace(loss=found.loss._replace(value=found.loss.value * 1.001))

    task = next(task for task in CASES["policy_loss"](SMALL) if task.variant == "r1")
    assert [row["implementation"] for row in engine.measure(task)] == [OURS]
    monkeypatch.setattr(testing, "policy_loss", moved)
    assert engine.measure(task) == [] and "output 0" in left_out(engine)[OURS]


def test_a_reference_for_which_float64_is_too_large(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_bytes", lambda device: 100 << 30)
    dtypes = []

    def exact(x: Tensor) -> Tensor:
        dtypes.append(x.dtype)
        return x * x

    task = a_task(exact=exact, functions={OURS: square}, bytes={OURS: 1 << 20, peers.EAGER: 20 << 30})
    for available in (100 << 30, 35 << 30, 25 << 30):
        monkeypatch.setattr(machine, "available_bytes", lambda device, bytes=available: bytes)
        engine.measure(task)
    assert dtypes == [torch.float64, torch.float32]
    assert {"all implementations", "a reference in float64, instead of float32"} <= set(left_out(engine))


@pytest.mark.parametrize(("error", "said"), [
    (MemoryError(), "out of memory"), (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "out of memory"),
    (ValueError("no such shape"), "no such shape"),
])
def test_an_error_of_a_peer_stops_nothing(error: Exception, said: str, engine: Engine) -> None:
    def fails(x: Tensor) -> Tensor:
        raise error

    rows = engine.measure(a_task(peers=[Peer("other", lambda: fails)]))
    assert {row["implementation"] for row in rows} == {OURS, peers.EAGER}
    assert said in left_out(engine)["other"]


def test_an_error_while_times_are_taken_leaves_the_task_out(engine: Engine) -> None:
    def no_room(problem: Problem) -> Callable[[], object]:
        raise RuntimeError("can't allocate memory")

    assert engine.measure(a_task(ceilings={"ceiling: copy": no_room})) == []
    assert "out of memory" in left_out(engine)["all implementations"] and not engine.trouble
    assert len(engine.measure(a_task())) == 2


def test_peers_that_are_absent_or_need_a_gpu(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.DISTRIBUTIONS, "other", "no-such-distribution")
    others = [Peer("other", lambda: square), Peer("gpu", lambda: square, only_cuda=True)]
    assert len(engine.measure(a_task(peers=others))) == 2
    assert "pip install no-such-distribution" in left_out(engine)["other"] and "CUDA" in left_out(engine)["gpu"]


def test_only_libraries_whose_import_works_are_listed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Any:
        raise ImportError("another version of torch")

    for name, distribution in {"broken": "pytest", "right": "torch"}.items():
        monkeypatch.setitem(peers.DISTRIBUTIONS, name, distribution)
    engine.measure(a_task(peers=[Peer("broken", fails), Peer("right", lambda: square)]))
    assert set(engine.results.about["peers"]) == {"torch"} and "another version" in left_out(engine)["broken"]


def test_more_memory_than_there_is(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An estimate is enough: the candidate is never called."""
    monkeypatch.setattr(machine, "available_bytes", lambda device: 100 << 30)
    monkeypatch.setattr(machine, "memory_bytes", lambda device: 100 << 30)

    def never(x: Tensor) -> Tensor:
        raise AssertionError("called")

    task = a_task(functions={OURS: square, "other": never}, bytes={OURS: 1 << 20, "other": 200 << 30})
    assert [row["implementation"] for row in engine.measure(task)] == [OURS]
    assert "250.0 GiB" in left_out(engine)["other"]
    assert engine.measure(a_task(make=never, input_bytes=50 << 30)) == []
    assert "187.5 GiB" in left_out(engine)["all implementations"]


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    for name, text in {"memory.max": 1000, "memory.current": 700, "memory.stat": "anon 5\ninactive_file 200\n"}.items():
        (tmp_path / name).write_text(str(text))
    assert machine.available_bytes(SMALL.device) == 1000 - 700 + 200
    assert machine.memory_bytes(SMALL.device) == 1000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.available_bytes(SMALL.device) != 500


def test_without_a_compiler_torch_compile_is_left_out_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: Any) -> Any:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", lambda function, **_: broken)
    monkeypatch.setattr(torch._dynamo, "reset", lambda: None)
    engine.setting = Setting(SMALL.device, "small", compiled=True)
    for _ in range(2):
        rows = engine.measure(a_task(compiled=True))
        assert {row["implementation"] for row in rows} == {OURS, peers.EAGER}
    assert "C++ compiler" in left_out(engine)[peers.COMPILED] and len(left_out(engine)) == 1


def test_without_proc_there_is_no_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "CLEAR", tmp_path / "absent" / "clear_refs")
    host = clock.HostClock()
    assert "clear_refs" in host.no_memory and host.peak_extra_bytes(lambda: None) is None


@pytest.mark.skipif(bool(clock.HostClock().no_memory), reason="the system does not tell the peak of memory")
def test_the_peak_is_that_of_the_call() -> None:
    size = 64 << 20
    found = clock.HostClock().peak_extra_bytes(lambda: torch.ones(size // 4).sum())
    assert 0.9 * size < found < 1.5 * size


# ---- rounds, and what others are ----------------------------------------------------------------------------------


def test_after_the_deadline_the_least_rounds_are_enough(engine: Engine) -> None:
    engine.seconds, engine.deadline = 100.0, 0.0
    assert {row["rounds"] for row in engine.measure(a_task())} == {3}


def test_rounds_of_slow_candidates(engine: Engine) -> None:
    """At least 3, and fewer only where one run takes more than 10 s."""
    engine.seconds, engine.least_rounds = 0.0, 5
    times = engine._in_turns(dict.fromkeys("abc", lambda: None), {"a": 0.1, "b": 9.0, "c": 11.0})
    assert {name: len(taken) for name, taken in times.items()} == {"a": 5, "b": 3, "c": 2}


def test_candidates_take_turns_within_the_time() -> None:
    """The slow one in few rounds, unless all turns are short."""
    costs = {"a": 0.02, "b": 0.03, "slow": 0.9}
    assert rounds_of(costs, seconds=0.5) == {"a": 10, "b": 10, "slow": LEAST}
    assert rounds_of(costs, seconds=0.5, least=20) == {"a": 20, "b": 20, "slow": LEAST}
    assert rounds_of({"a": 0.01, "b": 0.09}, seconds=1.0, slow_from=0.1) == {"a": 10, "b": 10}
    log: list[str] = []
    turns = {name: lambda name=name: log.append(name) or float(len(log)) for name in "abc"}
    assert in_turns(turns, {"a": 3, "b": 1, "c": 2}) == {"a": [1, 4, 6], "b": [2], "c": [3, 5]}
    assert log == ["a", "b", "c", "a", "c", "a"]


def test_pass_at_k_in_plain_torch_is_that_of_all_subsets() -> None:
    rewards = torch.randint(0, 3, (6, 7), generator=testing.generator(0)).double()
    rewards[0], rewards[1], rewards[1, 2] = 0.1, 0.1, 0.0
    exact = testing.pass_at_k_advantages(rewards.flatten(), torch.arange(6).repeat_interleave(7), 3)
    torch.testing.assert_close(eager.pass_at_k_advantages(3)(rewards), exact.view(6, 7), rtol=1e-9, atol=1e-12)
    assert not eager.pass_at_k_advantages(3)(rewards)[0].any()


def test_metrics_of_plain_torch_and_ours_are_the_same() -> None:
    """An entropy is computed by both or by none of them."""
    task = next(CASES["grpo_loss"](SMALL))
    with_entropy = {name: len(results(function, task.make(), task.passes)) for name, function in task.functions.items()}
    assert with_entropy == {OURS: 3, peers.EAGER: 3}


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_the_head_of_trl_computes_an_entropy_only_where_it_is_asked_for() -> None:
    task = next(CASES["linear_token_logprobs"](SMALL))
    inputs = task.make().inputs
    assert peers.trl_head(())(**inputs)[1] is None and peers.trl_head()(**inputs)[1] is not None
    (peer,) = (peer for peer in task.all_peers() if peer.implementation == peers.TRL)
    assert peer.load()(**inputs)[1] is None

"""The emulator that the CUDA kernels are tested with: right kernels work in every order, and mistakes are noticed."""

import ctypes
import functools
import re
import shutil
from collections.abc import Callable

import cuda_emulation
import numpy as np
import pytest
import torch

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which builds the extension too")

# Those of emulated_kernels.cu, in order.
MISTAKES = (
    "none", "no_sync_block", "divergent_shuffle", "lanes_that_leave", "different_operations", "past_the_end",
    "misaligned16", "no_wait", "no_barrier_fence", "misaligned_copy", "copy_past_the_end", "arrives_twice", "no_expect",
    "refills_too_early", "loads_over_stores", "no_init", "overwrites_barrier", "one_does_not_arrive",
    "no_sync_at_start", "leaves_early", "waits_for_its_block_only", "no_sync_grid", "leaves_grid", "checks",
    "reads_past_the_end", "no_wait_for_kernel",
)
BLOCKS, THREADS, CHUNKS = 3, 96, 20


class Kernels:
    """The kernels of emulated_kernels.cu on numpy arrays: each gives its result, or raises RuntimeError."""

    def __init__(self, watched: bool) -> None:
        self.library = cuda_emulation.library_of(cuda_emulation.SUPPORT / "emulated_kernels.cu", watched)
        self.library.r1k_emulator_seed.argtypes = [ctypes.c_uint64]
        self.library.r1k_emulator_properties.argtypes = [ctypes.c_int] * 3 + [ctypes.c_size_t]
        self.properties()

    def properties(self, major: int = 9, processors: int = 4, shared: int = 227 * 1024) -> None:
        self.library.r1k_emulator_properties(major, 0, processors, shared)

    def seed(self, seed: int) -> None:
        self.library.r1k_emulator_seed(seed)

    def run(self, name: str, *args: object) -> None:
        function = getattr(self.library, f"run_{name}")
        function.restype = ctypes.c_char_p
        arrays = [ctypes.c_void_p(each.ctypes.data) if isinstance(each, np.ndarray) else each for each in args]
        message = function(*arrays).decode()
        if message:
            raise RuntimeError(message)

    # ---- each with the number that every entry of its result is to be divided by

    def sum_blocks(self, mistake: str = "none", threads: int = THREADS, shared: int | None = None) -> np.ndarray:
        x = np.arange(1000, dtype=np.float32) % 17
        out = np.full(BLOCKS, np.nan, dtype=np.float32)
        shared = threads // 32 * 4 if shared is None else shared
        self.run("sum_blocks", x, out, ctypes.c_int64(x.size), BLOCKS, threads, ctypes.c_int64(shared),
                 MISTAKES.index(mistake))
        return out.sum() - x.sum()

    def double_chunks(self, mistake: str = "none", threads: int = THREADS) -> np.ndarray:
        x = aligned(np.arange(CHUNKS * 64, dtype=np.float32))
        out = aligned(np.full_like(x, np.nan))
        self.run("double_chunks", x, out, CHUNKS, BLOCKS, threads, MISTAKES.index(mistake))
        return out - 2 * x

    def exchange(self, mistake: str = "none", cluster: int = 4) -> np.ndarray:
        x = np.arange(3 * cluster, dtype=np.float32) + 1
        out = np.full_like(x, np.nan)
        self.run("exchange", x, out, x.size, cluster, MISTAKES.index(mistake))
        sums = x.reshape(3, cluster) @ (2 * np.arange(1, cluster + 1, dtype=np.float32))
        return out - np.repeat(sums, cluster)

    def sum_grid(self, mistake: str = "none") -> np.ndarray:
        x = np.arange(8, dtype=np.float32)
        parts, out = np.full_like(x, np.nan), np.full_like(x, np.nan)
        self.run("sum_grid", x, parts, out, x.size, MISTAKES.index(mistake))
        return out - x.sum()

    def overlap(self, mistake: str = "none") -> np.ndarray:
        x = np.arange(64, dtype=np.float32)
        out = np.full_like(x, np.nan)
        self.run("overlap", x, out, x.size // 32, MISTAKES.index(mistake))
        return out - (2 * x + 1)


def aligned(values: np.ndarray) -> np.ndarray:
    """A copy that starts at a multiple of 16 bytes."""
    memory = np.empty(values.size + 4, dtype=values.dtype)
    start = -memory.ctypes.data % 16 // values.itemsize
    result = memory[start : start + values.size]
    result[:] = values
    return result


@functools.cache
def compiled(watched: bool) -> Kernels:
    return Kernels(watched)


@pytest.fixture
def kernels() -> Kernels:
    """Watched, as those of the library are."""
    result = compiled(watched=True)
    result.properties()
    return result


@pytest.fixture
def unwatched() -> Kernels:
    result = compiled(watched=False)
    result.properties()
    return result


# ---- right kernels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sum_blocks", "double_chunks", "exchange", "sum_grid", "overlap"])
def test_right_kernels_give_right_numbers_in_every_order(kernels: Kernels, unwatched: Kernels, name: str) -> None:
    for seed in range(100):
        for each in (kernels, unwatched):
            each.seed(seed)
            assert np.all(getattr(each, name)() == 0), seed


@pytest.mark.parametrize("cluster", [1, 2, 8])
def test_clusters(kernels: Kernels, cluster: int) -> None:
    kernels.properties(processors=cluster)
    for seed in range(30):
        kernels.seed(seed)
        assert np.all(kernels.exchange(cluster=cluster) == 0)


@pytest.mark.parametrize("threads", [64, 1024])
def test_blocks_of_any_size(kernels: Kernels, threads: int) -> None:
    assert np.all(kernels.sum_blocks(threads=threads) == 0) and np.all(kernels.double_chunks(threads=threads) == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_rounded_as_torch_rounds_them(kernels: Kernels, dtype: torch.dtype) -> None:
    random = np.random.default_rng(0)
    bits = random.integers(0, 2**32, 1 << 16, dtype=np.uint32)
    bits[: 1 << 15] = np.float32(random.normal(size=1 << 15) * 10.0 ** random.integers(-8, 6, 1 << 15)).view(np.uint32)
    bits[1 << 14 : 1 << 15] &= 0xFFFFF000  # ties among them
    x = bits.view(np.float32)
    x[:6] = [np.inf, -np.inf, np.nan, 65519.99, 65520, -0.0]
    out = np.empty_like(x)
    kernels.run("convert", x, out, x.size, [torch.float32, torch.bfloat16, torch.float16].index(dtype))
    expected = torch.from_numpy(x).to(dtype).float()
    assert torch.equal(torch.from_numpy(out).nan_to_num(nan=1.5), expected.nan_to_num(nan=1.5))
    assert torch.equal(torch.from_numpy(out).isnan(), expected.isnan())


def test_a_seed_gives_one_order_and_seeds_give_many(unwatched: Kernels) -> None:
    def order(seed: int) -> tuple[int, ...]:
        count, places = np.zeros(1, dtype=np.int32), np.zeros(6, dtype=np.int32)
        unwatched.seed(seed)
        unwatched.run("order", count, places, 2, 3)
        return tuple(places)

    assert len({order(seed) for seed in range(200)}) > 100
    assert order(7) == order(7)


# ---- mistakes ----------------------------------------------------------------------------------------------


def outcomes(kernels: Kernels, run: Callable[[], np.ndarray], seeds: int = 6) -> list[str]:
    """Of each seed: "right", "wrong" or what was raised."""
    found = []
    for seed in range(seeds):
        kernels.seed(seed)
        try:
            found.append("right" if np.all(run() == 0) else "wrong")
        except RuntimeError as error:
            found.append(str(error))
    return found


AND = " and, not ordered before it, "
RACE = f"race in (shared|global) memory.*{AND}"


@pytest.mark.parametrize(
    "name, mistake, message",
    [
        ("sum_blocks", "divergent_shuffle", "shuffle_xor"),
        ("sum_blocks", "lanes_that_leave", r"lanes? of (its|the) warp"),
        ("sum_blocks", "different_operations", r"(sync_warp while|shuffle_xor while)"),
        ("sum_blocks", "past_the_end", "a write of 4 bytes at offset 12 of 12 bytes of shared memory"),
        ("sum_blocks", "misaligned16", "load_streaming at an address that is not aligned"),
        ("sum_blocks", "checks", "^r1kernels: block 1 is not welcome$"),
        ("double_chunks", "no_barrier_fence", "fence_barrier_init"),
        ("double_chunks", "misaligned_copy", "bulk_load of 256 bytes.* must be multiples of 16"),
        ("double_chunks", "copy_past_the_end", "bulk_load of 256 bytes at offset"),
        ("double_chunks", "arrives_twice", "more than 1 arrivals in a phase"),
        ("double_chunks", "leaves_early", "does not wait for a bulk_load into its shared memory before it ends"),
        ("double_chunks", "no_init", "uninitialised barrier at offset"),
        ("double_chunks", "overwrites_barrier", "overwritten"),
        ("double_chunks", "one_does_not_arrive", "deadlock"),
        ("exchange", "waits_for_its_block_only", "barrier_wait_cluster"),
        ("sum_grid", "leaves_grid", "sync_grid"),
        # Seen because accesses are watched: most orders give right numbers.
        ("sum_blocks", "no_sync_block", RACE + "a (read|write) by thread"),
        ("sum_blocks", "reads_past_the_end", "a read of 4 bytes at offset 12 of 12 bytes of shared memory"),
        ("double_chunks", "no_wait", RACE),
        ("double_chunks", "refills_too_early", RACE + "a (bulk_load|read)|next phase has ended|deadlock"),
        ("double_chunks", "loads_over_stores", "bulk_load into shared memory .* after a write by thread 0 of block"),
        ("double_chunks", "no_expect", f"a bulk_load of block.*{AND}|{AND}a bulk_load of block"),
        ("exchange", "no_sync_at_start", "nothing tells this thread that it has begun|may not have begun|uninit"),
        ("exchange", "leaves_early", "which writes to its shared memory, before it ends|which has ended"),
        ("overlap", "no_wait_for_kernel", RACE + "one by a kernel before this one"),
        ("sum_grid", "no_sync_grid", RACE + "a (read|write) by thread [05] of block"),
    ],
)
def test_mistakes_that_every_order_shows(kernels: Kernels, name: str, mistake: str, message: str) -> None:
    for outcome in outcomes(kernels, lambda: getattr(kernels, name)(mistake)):
        assert re.search(message, outcome)


@pytest.mark.parametrize(
    "name, mistake",
    [
        ("sum_blocks", "no_sync_block"), ("double_chunks", "no_wait"), ("double_chunks", "refills_too_early"),
        ("double_chunks", "no_expect"), ("double_chunks", "leaves_early"), ("exchange", "no_sync_at_start"),
        ("exchange", "leaves_early"), ("sum_grid", "no_sync_grid"),
    ],
)
def test_mistakes_that_some_orders_show_without_watching(unwatched: Kernels, name: str, mistake: str) -> None:
    found = outcomes(unwatched, lambda: getattr(unwatched, name)(mistake), 30)
    assert sum(outcome != "right" for outcome in found) >= 3, found


def test_a_load_into_a_slot_that_others_still_read_is_a_race(kernels: Kernels) -> None:
    found = outcomes(kernels, lambda: kernels.double_chunks("refills_too_early"))
    assert any(re.search(f"a bulk_load of block .*{AND}a read by thread", outcome) for outcome in found), found


def test_a_deadlock_names_what_everybody_waits_for(kernels: Kernels) -> None:
    # Barrier k of block k lacks an arrival. Blocks run together, or one at a time, and then the first is stuck.
    waits = re.compile(
        rf"{THREADS} threads at barrier_wait for parity 0 of the barrier at offset (\d+)"
        r" \(1 of 2 arrivals and 0 bytes to come\) in block (\d)"
    )
    together = 0
    for message in outcomes(kernels, lambda: kernels.double_chunks("one_does_not_arrive")):
        found = waits.findall(message)
        assert "deadlock: " in message and len(found) in (1, BLOCKS)
        assert all(int(offset) == 768 + 8 * int(block) for offset, block in found)
        together += len(found) == BLOCKS
    assert together > 0


def test_writes_past_the_end_are_noticed_without_watching(unwatched: Kernels) -> None:
    with pytest.raises(RuntimeError, match=r"block \d has written 0 bytes past the end of its 12 bytes"):
        unwatched.sum_blocks("past_the_end")


@pytest.mark.skipif(shutil.which("addr2line") is None, reason="needs addr2line")
def test_errors_name_the_lines_of_both_accesses(kernels: Kernels) -> None:
    with pytest.raises(RuntimeError, match="race") as error:
        kernels.sum_blocks("no_sync_block")
    source = (cuda_emulation.SUPPORT / "emulated_kernels.cu").read_text().splitlines()
    lines = {source[int(number) - 1].strip() for number in re.findall(r"emulated_kernels.cu:(\d+)", str(error.value))}
    assert any("parts[warp_id()] = sum" in line for line in lines) and any("parts[lane_id()]" in line for line in lines)


def test_launches_that_no_device_takes(kernels: Kernels) -> None:
    with pytest.raises(RuntimeError, match="232449 bytes of shared memory"):
        kernels.sum_blocks(shared=227 * 1024 + 1)
    with pytest.raises(RuntimeError, match="1056 threads"):
        kernels.sum_blocks(threads=1056)
    with pytest.raises(RuntimeError, match="27 blocks in clusters of 9"):
        kernels.exchange(cluster=9)
    kernels.properties(processors=1)
    with pytest.raises(RuntimeError, match="8 blocks cannot run at once"):
        kernels.sum_grid()
    kernels.properties(major=8)
    with pytest.raises(RuntimeError, match="clusters of 4"):
        kernels.exchange()
    with pytest.raises(RuntimeError, match="on sm_8x"):
        kernels.double_chunks()


def test_how_many_clusters_run_at_once(kernels: Kernels) -> None:
    at_once = kernels.library.clusters_at_once
    assert at_once(2, ctypes.c_int64(200 * 1024)) == 2 and at_once(2, ctypes.c_int64(1024)) == 4
    assert at_once(8, ctypes.c_int64(200 * 1024)) == 0 and at_once(2, ctypes.c_int64(228 * 1024)) == 0
    kernels.properties(major=8)
    assert at_once(2, ctypes.c_int64(1024)) == 0

// What hopper.cuh names but for its copies: barriers, clusters.
#include <cstring>
#include <string>

#include "machine.h"

namespace r1k {
namespace gpu {
namespace emulator {
namespace {

constexpr int64_t kMostBytes = (1 << 20) - 1;  // a barrier counts so far
constexpr int kMostArrivals = (1 << 20) - 1;
constexpr uint64_t kMark = 0x5ba441e45ba441e4u;

Block& peer(const char* what, const void* p, size_t bytes, int rank) {
  need_hopper(what);
  machine.maybe_yield();
  const Block& mine = *machine.self().block;
  if (rank < 0 || rank >= machine.shape.cluster) fail(std::string(what) + " to rank " + std::to_string(rank));
  if (!mine.holds(p, bytes)) fail(std::string(what) + " at an address that is not in shared memory");
  Block& block = *mine.unit->blocks[rank];
  const std::string whom = " to block " + std::to_string(block.index);
  if (!block.begun) fail(what + whom + ", which may not have begun: sync_cluster comes first");
  if (block.ended()) fail(what + whom + ", which has ended");
  if (races.watched) races.visit(block, what);
  return block;
}

}  // namespace

void need_hopper(const char* what) {
  const int major = machine.properties.major;
  if (major < 9 || major >= 12) fail(std::string(what) + " on sm_" + std::to_string(major) + "x: the kernel traps");
}

BarrierState& state_of(Block& block, uint64_t* barrier, const char* what) {
  const auto found = block.barriers.find(barrier);
  if (found == block.barriers.end()) {
    fail(std::string(what) + " of an uninitialised barrier at " + block.place_of(barrier));
  }
  uint64_t mark;
  std::memcpy(&mark, barrier, sizeof(mark));
  if (mark != kMark) fail(std::string(what) + " of a barrier at " + block.place_of(barrier) + " that was overwritten");
  if (races.watched && machine.in_fiber()) {
    races.touch_barrier(found->second.initialised, std::string(what) + " of the barrier at " + block.place_of(barrier));
  }
  return found->second;
}

void end_phase_if_complete(BarrierState& state) {
  if (state.pending != 0 || state.bytes != 0) return;
  ++state.phase;
  state.pending = state.count;
  state.remote_before = state.remote;
  state.remote = false;
  if (races.watched) state.released = end_phase(state.arrived, state.number, state.phase);
  for (Fiber* fiber : state.waiting) machine.make_ready(fiber);
  state.waiting.clear();
}

void expect_bytes(Block& block, uint64_t* barrier, BarrierState& state, int64_t bytes) {
  state.bytes += bytes;
  if (state.bytes > kMostBytes || state.bytes < -kMostBytes) {
    fail("the barrier at " + block.place_of(barrier) + " cannot count " + std::to_string(state.bytes) + " bytes");
  }
}

void barrier_init(uint64_t* barrier, int arrivals) {
  need_hopper("barrier_init");
  Fiber& fiber = machine.self();
  Block& block = *fiber.block;
  if (!block.holds(barrier, sizeof(*barrier)) || reinterpret_cast<uintptr_t>(barrier) % 8 != 0) {
    fail("barrier_init at " + block.place_of(barrier) + ": not 8 aligned bytes of shared memory");
  }
  if (arrivals < 1 || arrivals > kMostArrivals) fail("barrier_init for " + std::to_string(arrivals) + " arrivals");
  if (block.barriers.count(barrier)) fail("a second barrier_init at " + block.place_of(barrier));
  BarrierState state = {};
  state.count = state.pending = arrivals;
  state.initialiser = &fiber;
  state.number = block.unit->barriers++;
  state.initialised = races.access(Access::ordinary, fiber.past.thread, fiber.past.step, nullptr);
  std::memcpy(barrier, &kMark, sizeof(kMark));
  block.barriers.emplace(barrier, state);
  machine.maybe_yield();
}

void fence_barrier_init() {
  need_hopper("fence_barrier_init");
  Fiber& fiber = machine.self();
  for (auto& barrier : fiber.block->barriers) {
    if (barrier.second.initialiser == &fiber) barrier.second.fenced = true;
  }
  machine.maybe_yield();
}

void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  need_hopper("barrier_expect");
  machine.maybe_yield();
  Block& block = *machine.self().block;
  BarrierState& state = state_of(block, barrier, "barrier_expect");
  expect_bytes(block, barrier, state, bytes);
  if (state.pending == 0) {
    fail("more than " + std::to_string(state.count) + " arrivals in a phase of the barrier at " +
         block.place_of(barrier));
  }
  if (races.watched) give(machine.self().past, state.arrived);
  --state.pending;
  end_phase_if_complete(state);
  machine.maybe_yield();
}

void barrier_wait(uint64_t* barrier, int parity, bool of_cluster) {
  const char* what = of_cluster ? "barrier_wait_cluster" : "barrier_wait";
  need_hopper(what);
  machine.maybe_yield();
  Fiber& fiber = machine.self();
  BarrierState& state = state_of(*fiber.block, barrier, what);
  if (parity != 0 && parity != 1) fail(std::string(what) + " for parity " + std::to_string(parity));
  if (static_cast<int>(state.phase % 2) == parity) {
    fiber.barrier = barrier;
    fiber.argument = parity;
    const uint64_t phase = state.phase;
    state.waiting.push_back(&fiber);
    wait_at(At::barrier_wait);
    if (state.phase != phase + 1) {
      fail(std::string(what) + " at " + fiber.block->place_of(barrier) +
           ": the next phase has ended before this thread saw the end of the one it waits for");
    }
  }
  if (races.watched) take(fiber.past, state.released);
  if (state.remote_before && !of_cluster) {
    fail("barrier_wait at " + fiber.block->place_of(barrier) +
         " for arrivals from other blocks: that takes barrier_wait_cluster");
  }
}

std::string describe_wait(const Fiber& fiber) {
  if (fiber.at != At::barrier_wait) return describe(fiber.at);
  const BarrierState& state = fiber.block->barriers.at(fiber.barrier);
  return "barrier_wait for parity " + std::to_string(fiber.argument) + " of the barrier at " +
         fiber.block->place_of(fiber.barrier) + " (" + std::to_string(state.pending) + " of " +
         std::to_string(state.count) + " arrivals and " + std::to_string(state.bytes) + " bytes to come)";
}

// ---- clusters ----------------------------------------------------------------------------------------------

int cluster_rank() {
  need_hopper("cluster_rank");
  return machine.self().block->rank;
}

int cluster_blocks() {
  need_hopper("cluster_blocks");
  return machine.shape.cluster;
}

void remote_send(void* p, int rank, const void* value, size_t bytes, uint64_t* barrier) {
  Block& mine = *machine.self().block;
  Block& block = peer("remote_send", p, bytes, rank);
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail("remote_send to an address that is not aligned");
  unsigned char* const there = block.shared + mine.offset_of(p);
  if (races.watched) races.touch_remote(block, there, bytes);
  std::memcpy(there, value, bytes);

  peer("remote_send", barrier, sizeof(*barrier), rank);
  const auto its_barrier = reinterpret_cast<uint64_t*>(block.shared + mine.offset_of(barrier));
  BarrierState& state = state_of(block, its_barrier, "remote_send");
  if (!state.fenced) fail("remote_send on a barrier that no fence_barrier_init has made known to it");
  state.remote |= &block != &mine;
  if (races.watched) give(machine.self().past, state.arrived);
  expect_bytes(block, its_barrier, state, -static_cast<int64_t>(bytes));
  end_phase_if_complete(state);
  machine.maybe_yield();
}

// ---- launches that overlap ---------------------------------------------------------------------------------

void wait_for_previous_kernel() { machine.self().past.previous = 1; }

}  // namespace emulator
}  // namespace gpu
}  // namespace r1k

// What hopper.cuh names: barriers, bulk copies, clusters.
#include <algorithm>
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

void wait_at(At at) {
  machine.self().at = at;
  machine.suspend();
}

std::string text(uint64_t number) { return std::to_string(number); }

void need_hopper(const char* what) {
  if (machine.properties.major < 9) fail(std::string(what) + " on a device before sm_90: the kernel traps");
}

// Whether [p, p + bytes) is in the block's shared memory.
bool in_shared(const Block& block, const void* p, size_t bytes) {
  const auto begin = static_cast<const unsigned char*>(p);
  return begin >= block.shared && begin + bytes <= block.shared + machine.shape.shared;
}

size_t offset_of(const Block& block, const void* p) { return static_cast<const unsigned char*>(p) - block.shared; }

std::string place_of(const Block& block, const void* p) { return "offset " + text(offset_of(block, p)); }

// ---- barriers ----------------------------------------------------------------------------------------------

BarrierState& state_of(Block& block, uint64_t* barrier, const char* what) {
  const auto found = block.barriers.find(barrier);
  if (found == block.barriers.end()) {
    fail(std::string(what) + " of an uninitialised barrier at " + place_of(block, barrier));
  }
  uint64_t mark;
  std::memcpy(&mark, barrier, sizeof(mark));
  if (mark != kMark) fail(std::string(what) + " of a barrier at " + place_of(block, barrier) + " that was overwritten");
  if (races.watched && machine.in_fiber()) {
    races.touch_barrier(found->second.initialised, std::string(what) + " of the barrier at " + place_of(block, barrier));
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
    fail("the barrier at " + place_of(block, barrier) + " cannot count " + std::to_string(state.bytes) + " bytes");
  }
}

void arrive(Block& block, uint64_t* barrier, BarrierState& state) {
  if (state.pending == 0) {
    fail("more than " + text(state.count) + " arrivals in a phase of the barrier at " + place_of(block, barrier));
  }
  if (races.watched) give(machine.self().past, state.arrived);
  --state.pending;
  end_phase_if_complete(state);
}

// ---- copies ------------------------------------------------------------------------------------------------

void check_copy(const char* what, const Block& block, const void* shared, const void* global, uint32_t bytes) {
  need_hopper(what);
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0 ||
      bytes % 16 != 0) {
    fail(std::string(what) + " of " + text(bytes) + " bytes, shared memory at " + place_of(block, shared) +
         ", global memory " + text(reinterpret_cast<uintptr_t>(global) % 16) +
         " bytes past a multiple of 16: all must be multiples of 16");
  }
  if (!in_shared(block, shared, bytes)) {
    fail(std::string(what) + " of " + text(bytes) + " bytes at " + place_of(block, shared) + " of " +
         text(machine.shape.shared) + " bytes of shared memory");
  }
}

// A copy on its way that has to do with this part of shared memory.
const Copy* under_way(const Block& block, const unsigned char* shared, uint32_t bytes, bool reads_too) {
  for (const Copy& copy : machine.copies) {
    if (copy.block == &block && (copy.kind == Copy::load || (reads_too && copy.kind == Copy::store_read)) &&
        copy.shared < shared + bytes && shared < copy.shared + copy.bytes) {
      return &copy;
    }
  }
  return nullptr;
}

// What bulk copies see of shared memory from here on.
void learn(Block& block, const unsigned char* shared, uint32_t bytes) {
  const size_t offset = offset_of(block, shared);
  std::memcpy(block.known.data() + offset, shared, bytes);
  for (size_t k = offset / 16; k < (offset + bytes) / 16; ++k) block.known_at[k] = block.fences;
}

// Ordinary stores since the last copy there, and no fence by anybody.
bool unknown_to_copies(const Block& block, const unsigned char* shared, uint32_t bytes) {
  const size_t offset = offset_of(block, shared);
  for (size_t k = offset; k < offset + bytes; k += 16) {
    if (block.known_at[k / 16] == block.fences && std::memcmp(block.known.data() + k, block.shared + k, 16) != 0) {
      return true;
    }
  }
  return false;
}

void open_group(Fiber& fiber) {
  fiber.open = std::make_shared<StoreGroup>();
  fiber.open->number = static_cast<uint32_t>(fiber.groups.size()) + 1;
}

bool stores_read(const Fiber& fiber, int pending) {
  const int count = static_cast<int>(fiber.groups.size()) - pending;
  for (int k = 0; k < count; ++k) {
    if (fiber.groups[k]->unread != 0) return false;
  }
  return true;
}

bool stores_done(const Fiber& fiber) {
  return std::all_of(fiber.groups.begin(), fiber.groups.end(),
                     [](const auto& group) { return group->unread == 0 && group->unwritten == 0; });
}

void wake_waiting(Fiber& fiber) {
  if ((fiber.at == At::stores_read && stores_read(fiber, fiber.argument)) ||
      (fiber.at == At::stores_done && stores_done(fiber))) {
    machine.make_ready(&fiber);
  }
}

Block& peer(const char* what, const void* p, size_t bytes, int rank) {
  need_hopper(what);
  machine.maybe_yield();
  const Block& mine = *machine.self().block;
  if (rank < 0 || rank >= machine.shape.cluster) fail(std::string(what) + " to rank " + std::to_string(rank));
  if (!in_shared(mine, p, bytes)) fail(std::string(what) + " at an address that is not in shared memory");
  Block& block = *mine.unit->blocks[rank];
  const std::string whom = " to block " + std::to_string(block.index);
  if (!block.begun) fail(what + whom + ", which may not have begun: sync_cluster comes first");
  if (block.ended()) fail(what + whom + ", which has ended");
  if (races.watched) races.visit(block, what);
  return block;
}

}  // namespace

void barrier_init(uint64_t* barrier, int arrivals) {
  need_hopper("barrier_init");
  Fiber& fiber = machine.self();
  Block& block = *fiber.block;
  if (!in_shared(block, barrier, sizeof(*barrier)) || reinterpret_cast<uintptr_t>(barrier) % 8 != 0) {
    fail("barrier_init at " + place_of(block, barrier) + ": not 8 aligned bytes of shared memory");
  }
  if (arrivals < 1 || arrivals > kMostArrivals) fail("barrier_init for " + std::to_string(arrivals) + " arrivals");
  if (block.barriers.count(barrier)) fail("a second barrier_init at " + place_of(block, barrier));
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
  arrive(block, barrier, state);
  machine.maybe_yield();
}

void barrier_arrive(uint64_t* barrier) {
  need_hopper("barrier_arrive");
  machine.maybe_yield();
  Block& block = *machine.self().block;
  arrive(block, barrier, state_of(block, barrier, "barrier_arrive"));
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
      fail(std::string(what) + " at " + place_of(*fiber.block, barrier) +
           ": the next phase has ended before this thread saw the end of the one it waits for");
    }
  }
  if (races.watched) take(fiber.past, state.released);
  if (state.remote_before && !of_cluster) {
    fail("barrier_wait at " + place_of(*fiber.block, barrier) +
         " for arrivals from other blocks: that takes barrier_wait_cluster");
  }
}

void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  machine.maybe_yield();
  Block& block = *machine.self().block;
  check_copy("bulk_load", block, shared, global, bytes);
  const BarrierState& state = state_of(block, barrier, "bulk_load");
  if (!state.fenced) fail("bulk_load on a barrier that no fence_barrier_init has made known to it");
  const auto to = static_cast<unsigned char*>(shared);
  if (const Copy* other = under_way(block, to, bytes, true)) {
    fail("bulk_load into shared memory at " + place_of(block, to) + " while a " +
         (other->kind == Copy::load ? "bulk_load into it is on its way" : "bulk_store still reads it"));
  }
  if (races.watched) races.load(block, to, global, bytes, state.number, state.phase);
  Copy copy = {};
  copy.kind = Copy::load;
  copy.block = &block;
  copy.shared = to;
  copy.global = static_cast<unsigned char*>(const_cast<void*>(global));
  copy.bytes = bytes;
  copy.barrier = barrier;
  if (machine.chance(128)) copy.data.assign(copy.global, copy.global + bytes);
  machine.copies.push_back(std::move(copy));
  std::memset(to, kPoison, bytes);
  machine.maybe_yield();
}

void bulk_store(void* global, const void* shared, uint32_t bytes) {
  machine.maybe_yield();
  Fiber& fiber = machine.self();
  Block& block = *fiber.block;
  check_copy("bulk_store", block, shared, global, bytes);
  const auto from = static_cast<unsigned char*>(const_cast<void*>(shared));
  if (under_way(block, from, bytes, false)) {
    fail("bulk_store of shared memory at " + place_of(block, from) + " while a bulk_load into it is on its way");
  }
  if (!fiber.open) open_group(fiber);
  if (races.watched) {
    races.store(block, global, from, bytes, fiber.open->number);
  } else if (unknown_to_copies(block, from, bytes)) {
    fail("bulk_store of shared memory at " + place_of(block, from) + ", written without fence_for_bulk");
  }
  learn(block, from, bytes);
  ++fiber.open->unread;
  ++fiber.open->unwritten;
  Copy copy = {};
  copy.kind = Copy::store_read;
  copy.block = &block;
  copy.shared = from;
  copy.global = static_cast<unsigned char*>(global);
  copy.bytes = bytes;
  copy.group = fiber.open;
  copy.fiber = &fiber;
  machine.copies.push_back(std::move(copy));
  machine.maybe_yield();
}

void complete_one_copy() {
  std::vector<Copy>& copies = machine.copies;
  std::swap(copies[machine.random() % copies.size()], copies.back());
  Copy copy = std::move(copies.back());
  copies.pop_back();
  Block& block = *copy.block;
  if (copy.kind == Copy::load) {
    std::memcpy(copy.shared, copy.data.empty() ? copy.global : copy.data.data(), copy.bytes);
    learn(block, copy.shared, copy.bytes);
    BarrierState& state = state_of(block, copy.barrier, "a bulk copy's end");
    expect_bytes(block, copy.barrier, state, -static_cast<int64_t>(copy.bytes));
    end_phase_if_complete(state);
  } else if (copy.kind == Copy::store_read) {
    copy.data.assign(copy.shared, copy.shared + copy.bytes);
    --copy.group->unread;
    Fiber& fiber = *copy.fiber;
    copy.kind = Copy::store_write;
    copies.push_back(std::move(copy));
    wake_waiting(fiber);
  } else {
    std::memcpy(copy.global, copy.data.data(), copy.bytes);
    --copy.group->unwritten;
    wake_waiting(*copy.fiber);
  }
}

void commit_stores() {
  need_hopper("commit_stores");
  Fiber& fiber = machine.self();
  if (!fiber.open) open_group(fiber);  // an empty group counts as well
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open = nullptr;
  machine.maybe_yield();
}

void wait_stores_read(int pending) {
  need_hopper("wait_stores_read");
  Fiber& fiber = machine.self();
  const int count = static_cast<int>(fiber.groups.size()) - pending;
  for (int k = 0; k < count; ++k) fiber.groups[k]->waited = true;
  fiber.argument = pending;
  if (!stores_read(fiber, pending)) wait_at(At::stores_read);
  fiber.past.stores_read = std::max(fiber.past.stores_read, static_cast<uint32_t>(std::max(count, 0)));
}

void wait_stores_done() {
  need_hopper("wait_stores_done");
  Fiber& fiber = machine.self();
  for (const auto& group : fiber.groups) group->waited = true;
  if (!stores_done(fiber)) wait_at(At::stores_done);
  fiber.past.stores_read = fiber.past.stores_done = static_cast<uint32_t>(fiber.groups.size());
}

void fence_for_bulk() {
  need_hopper("fence_for_bulk");
  ++machine.self().block->fences;
  fence(machine.self().past);
  machine.maybe_yield();
}

void check_stores_waited(const Fiber& fiber) {
  if (fiber.open) fail("a thread ends with bulk stores that it has not committed");
  for (const auto& group : fiber.groups) {
    if (!group->waited && group->unread + group->unwritten > 0) {
      fail("a thread ends without waiting until its bulk stores have read shared memory");
    }
  }
}

std::string describe_wait(const Fiber& fiber) {
  if (fiber.at != At::barrier_wait) return describe(fiber.at);
  const BarrierState& state = fiber.block->barriers.at(fiber.barrier);
  return "barrier_wait for parity " + std::to_string(fiber.argument) + " of the barrier at " +
         place_of(*fiber.block, fiber.barrier) + " (" + std::to_string(state.pending) + " of " +
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

void remote_write(void* p, int rank, const void* value, size_t bytes) {
  Block& block = peer("remote_store", p, bytes, rank);
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail("remote_store at an address that is not aligned");
  unsigned char* const there = block.shared + offset_of(*machine.self().block, p);
  if (races.watched) races.touch_remote(block, there, bytes);
  std::memcpy(there, value, bytes);
  machine.maybe_yield();
}

void remote_arrive(uint64_t* barrier, int rank) {
  Block& mine = *machine.self().block;
  Block& block = peer("remote_arrive", barrier, sizeof(*barrier), rank);
  const auto there = reinterpret_cast<uint64_t*>(block.shared + offset_of(mine, barrier));
  BarrierState& state = state_of(block, there, "remote_arrive");
  if (!state.fenced) fail("remote_arrive on a barrier that no fence_barrier_init has made known to it");
  state.remote |= &block != &mine;
  arrive(block, there, state);
  machine.maybe_yield();
}

}  // namespace emulator
}  // namespace gpu
}  // namespace r1k

// The bulk copies of hopper.cuh: they take place at random times, or when somebody cannot wait any longer.
#include <algorithm>
#include <cstring>
#include <string>

#include "machine.h"

namespace r1k {
namespace gpu {
namespace emulator {
namespace {

void check_copy(const char* what, const Block& block, const void* shared, const void* global, uint32_t bytes) {
  need_hopper(what);
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0 ||
      bytes % 16 != 0) {
    fail(std::string(what) + " of " + std::to_string(bytes) + " bytes, shared memory at " + block.place_of(shared) +
         ", global memory " + std::to_string(reinterpret_cast<uintptr_t>(global) % 16) +
         " bytes past a multiple of 16: all must be multiples of 16");
  }
  if (!block.holds(shared, bytes)) {
    fail(std::string(what) + " of " + std::to_string(bytes) + " bytes at " + block.place_of(shared) + " of " +
         std::to_string(machine.shape.shared) + " bytes of shared memory");
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
  const size_t offset = block.offset_of(shared);
  std::memcpy(block.known.data() + offset, shared, bytes);
  for (size_t k = offset / 16; k < (offset + bytes) / 16; ++k) block.known_at[k] = block.fences;
}

// Ordinary stores since the last copy there, and no fence by anybody.
bool unknown_to_copies(const Block& block, const unsigned char* shared, uint32_t bytes) {
  const size_t offset = block.offset_of(shared);
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

}  // namespace

void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  machine.maybe_yield();
  Block& block = *machine.self().block;
  check_copy("bulk_load", block, shared, global, bytes);
  const BarrierState& state = state_of(block, barrier, "bulk_load");
  if (!state.fenced) fail("bulk_load on a barrier that no fence_barrier_init has made known to it");
  const auto to = static_cast<unsigned char*>(shared);
  if (const Copy* other = under_way(block, to, bytes, true)) {
    fail("bulk_load into shared memory at " + block.place_of(to) + " while a " +
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
    fail("bulk_store of shared memory at " + block.place_of(from) + " while a bulk_load into it is on its way");
  }
  if (!fiber.open) open_group(fiber);
  if (races.watched) {
    races.store(block, global, from, bytes, fiber.open->number);
  } else if (unknown_to_copies(block, from, bytes)) {
    fail("bulk_store of shared memory at " + block.place_of(from) + ", written without fence_for_bulk");
  }
  learn(block, from, bytes);
  ++fiber.open->copies;
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
    if (!group->waited && group->copies > 0) {
      fail("a thread ends without waiting until its bulk stores have read shared memory");
    }
  }
}

}  // namespace emulator
}  // namespace gpu
}  // namespace r1k

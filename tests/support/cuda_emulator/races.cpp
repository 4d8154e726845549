#include "races.h"

#include <algorithm>

#include "machine.h"
#include "source.h"

namespace r1k {
namespace gpu {
namespace emulator {

Races races;

namespace {

constexpr size_t kCell = 16;       // bytes
constexpr size_t kMostReads = 8;   // of the same memory, that are remembered

std::string thread_name(uint32_t thread, uint32_t block) {
  return "thread " + std::to_string(thread % places.threads_of_block) + " of block " + std::to_string(block);
}

std::string name_of(const Access& access, bool write) {
  std::string name;
  switch (access.kind) {
    case Access::load: name = "a bulk_load of block " + std::to_string(access.block); break;
    default: name = std::string(write ? "a write" : "a read") + " by " + thread_name(access.who, access.block);
  }
  const std::string line = access.code == 0 ? "" : line_of(reinterpret_cast<const char*>(&races) + access.code);
  return line.empty() ? name : name + " (" + line + ")";
}

}  // namespace

// With `overlap`, kernels before this one may still run: what they did is not over.
void Races::begin_launch(bool overlap) {
  era_of_launch_ = ++era_;
  recent_ = {};
  if (!overlap) pages_.clear();
}

Access Races::access(Access::Kind kind, uint32_t who, uint32_t when, const void* code) const {
  const Fiber& fiber = machine.self();
  const intptr_t from_here = reinterpret_cast<intptr_t>(code) - reinterpret_cast<intptr_t>(&races);
  return {kind, who, when, fiber.past.operations, static_cast<uint32_t>(fiber.block->index), era_,
          code == nullptr ? 0 : static_cast<int32_t>(from_here)};
}

// Whether the running fiber knows that an access is over.
bool Races::over(const Access& access, bool was_read) const {
  if (access.kind == Access::none) return true;
  if (access.era < era_of_launch_) return machine.self().past.knows_previous();
  if (access.era < era_) return true;
  const Fiber& fiber = machine.self();
  const uint32_t first = static_cast<uint32_t>(fiber.block->index - fiber.block->rank);
  if (access.block - first >= static_cast<uint32_t>(machine.shape.cluster)) return false;  // of another cluster
  const Past& past = fiber.past;
  switch (access.kind) {
    case Access::load: return past.knows_phase(access.who, access.when);
    default:
      return past.knows_step(access.who, access.when) ||
             (was_read && past.knows_operations_of(access.who, access.operations));
  }
}

std::string Races::name_of(Place place) const {
  if (place.block == nullptr) return "global memory at " + std::to_string(place.address);
  const uintptr_t offset = place.address - reinterpret_cast<uintptr_t>(place.block->shared);
  return "shared memory of block " + std::to_string(place.block->index) + " at offset " + std::to_string(offset);
}

Cell& Races::cell(Place place) {
  if (place.block != nullptr) {
    return place.block->cells[(place.address - reinterpret_cast<uintptr_t>(place.block->shared)) / kCell];
  }
  const uintptr_t number = place.address / kCell, page = number / kPage;
  auto& recent = recent_[page % kRecent];
  if (recent.second == nullptr || recent.first != page) {
    std::unique_ptr<Page>& memory = pages_[page];
    if (!memory) memory = std::make_unique<Page>();
    recent = {page, memory.get()};
  }
  return (*recent.second)[number % kPage];
}

void Races::add_read(History& history, const Access& access) {
  const auto replaces = [&](const Access& read) {
    return (read.kind == access.kind && read.who == access.who && read.block == access.block) || over(read, true);
  };
  if (replaces(history.read)) {
    history.read = access;
    return;
  }
  for (Access& read : history.more_reads) {
    if (replaces(read)) {
      read = access;
      return;
    }
  }
  if (history.more_reads.size() < kMostReads) {
    history.more_reads.push_back(access);
  } else {
    history.more_reads[machine.random() % kMostReads] = access;
  }
}

void Races::look(History& history, Place place, const Access& access, bool writes) {
  const auto check = [&](const Access& other, bool wrote) {
    if (over(other, !wrote)) return;
    const bool earlier = other.era < era_of_launch_;
    machine.fail("race in " + name_of(place) + ": " + emulator::name_of(access, writes) +
                 " and, not ordered before it, " +
                 (earlier ? "one by a kernel before this one: wait_for_previous_kernel comes first"
                          : emulator::name_of(other, wrote)));
  };
  check(history.write, true);
  if (access.kind == Access::load && history.write.kind == Access::ordinary && place.block != nullptr) {
    machine.fail("bulk_load into " + name_of(place) + " after " + emulator::name_of(history.write, true) +
                 ": without a fence a bulk copy is not ordered after a thread's stores");
  }
  if (!writes) {
    add_read(history, access);
    return;
  }
  check(history.read, false);
  for (const Access& read : history.more_reads) check(read, false);
  history.read.kind = Access::none;
  history.more_reads.clear();
  history.write = access;
}

// At most to the end of the cell.
void Races::look(Cell& cell, Place place, size_t bytes, const Access& access, bool writes) {
  if (bytes == kCell && !cell.parts) {
    look(cell.whole, place, access, writes);
    return;
  }
  if (!cell.parts) {
    cell.parts = std::make_unique<std::array<History, Cell::kParts>>();
    cell.parts->fill(cell.whole);
  }
  constexpr size_t kPart = kCell / Cell::kParts;
  const size_t begin = place.address % kCell;
  for (size_t k = begin / kPart; k <= (begin + bytes - 1) / kPart; ++k) {
    look((*cell.parts)[k], {place.address - begin + k * kPart, place.block}, access, writes);
  }
  if (bytes == kCell && writes) {
    cell.whole = {access, {}, {}};
    cell.parts = nullptr;
  }
}

void Races::look(Place place, size_t bytes, const Access& access, bool writes) {
  const uintptr_t end = place.address + bytes;
  while (place.address < end) {
    const uintptr_t next = std::min(end, place.address / kCell * kCell + kCell);
    look(cell(place), place, next - place.address, access, writes);
    place.address = next;
  }
}

void Races::touch(const void* p, size_t bytes, bool writes, const void* code) {
  const Fiber& fiber = machine.self();
  const auto address = reinterpret_cast<uintptr_t>(p), stack = reinterpret_cast<uintptr_t>(fiber.stack.base);
  if (address - stack < Stack::kBytes || address - ignored_.first < ignored_.second || bytes == 0) return;
  const Access access = this->access(Access::ordinary, fiber.past.thread, fiber.past.step, code);
  Block& block = *fiber.block;
  const auto shared = reinterpret_cast<uintptr_t>(block.shared);
  const size_t size = machine.shape.shared;
  if (address - (shared - kGuard) < size + 2 * kGuard) {
    if (address < shared || address - shared + bytes > size) {
      machine.fail(std::string(writes ? "a write" : "a read") + " of " + std::to_string(bytes) + " bytes at offset " +
                   std::to_string(static_cast<intptr_t>(address - shared)) + " of " + std::to_string(size) +
                   " bytes of shared memory");
    }
    look({address, &block}, bytes, access, writes);
  } else {
    look({address, nullptr}, bytes, access, writes);
  }
}

void Races::visit(Block& block, const char* what) {
  const Past& past = machine.self().past;
  if (&block == machine.self().block) return;
  const uint32_t first = block.rank * places.threads_of_block, end = first + machine.shape.threads;
  uint32_t thread = first;
  while (thread < end && !past.knows_step(thread, 1)) ++thread;
  if (thread == end) {
    machine.fail(std::string(what) + " to block " + std::to_string(block.index) +
                 ", and nothing tells this thread that it has begun");
  }
  block.visits[past.thread] = access(Access::ordinary, past.thread, past.step, nullptr);
}

void Races::touch_remote(Block& block, const void* p, size_t bytes) {
  const Past& past = machine.self().past;
  const Access access = this->access(Access::ordinary, past.thread, past.step, nullptr);
  look({reinterpret_cast<uintptr_t>(p), &block}, bytes, access, true);
}

void Races::touch_barrier(const Access& initialised, const std::string& barrier) {
  if (!over(initialised, false)) {
    machine.fail(barrier + ", and nothing orders that after its initialisation by " +
                 thread_name(initialised.who, initialised.block));
  }
}

void Races::load(Block& block, const void* shared, const void* global, uint32_t bytes, uint32_t barrier,
                 uint64_t phase) {
  const Access copy = access(Access::load, barrier, static_cast<uint32_t>(phase) + 1, nullptr);
  block.loads[barrier] = copy.when;
  look({reinterpret_cast<uintptr_t>(global), nullptr}, bytes, copy, false);
  look({reinterpret_cast<uintptr_t>(shared), &block}, bytes, copy, true);
}

void Races::end_block(const Block& block) {
  const std::string name = "block " + std::to_string(block.index);
  for (const auto& visit : block.visits) {
    if (block.gone.knows(places.step(visit.first)) < visit.second.when) {
      machine.fail(name + " does not wait for " + thread_name(visit.first, visit.second.block) +
                   ", which writes to its shared memory, before it ends");
    }
  }
  for (const auto& load : block.loads) {
    if (block.gone.knows(places.phases(load.first)) < load.second) {
      machine.fail(name + " does not wait for a bulk_load into its shared memory before it ends");
    }
  }
}

}  // namespace emulator
}  // namespace gpu
}  // namespace r1k

// ---- what -fsanitize=thread calls ----------------------------------------------------------------------------

namespace {

inline void touch(const void* p, size_t bytes, bool writes, const void* code) {
  using namespace r1k::gpu::emulator;
  if (machine.in_fiber()) races.touch(p, bytes, writes, code);
}

}  // namespace

#define R1K_TOUCH(name, writes, bytes) \
  void __tsan_##name(void* p) { touch(p, bytes, writes, __builtin_return_address(0)); }
#define R1K_TOUCHES(bytes)                       \
  R1K_TOUCH(read##bytes, false, bytes)           \
  R1K_TOUCH(write##bytes, true, bytes)           \
  R1K_TOUCH(unaligned_read##bytes, false, bytes) \
  R1K_TOUCH(unaligned_write##bytes, true, bytes) \
  R1K_TOUCH(volatile_read##bytes, false, bytes)  \
  R1K_TOUCH(volatile_write##bytes, true, bytes)

// Of the host's part of those sources: static variables, shared pointers.
#define R1K_ATOMICS(bits)                                                                                     \
  uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* p, int) {                          \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                              \
  }                                                                                                           \
  void __tsan_atomic##bits##_store(volatile uint##bits##_t* p, uint##bits##_t value, int) {                   \
    __atomic_store_n(p, value, __ATOMIC_SEQ_CST);                                                             \
  }                                                                                                           \
  uint##bits##_t __tsan_atomic##bits##_fetch_add(volatile uint##bits##_t* p, uint##bits##_t value, int) {     \
    return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST);                                                    \
  }                                                                                                           \
  uint##bits##_t __tsan_atomic##bits##_fetch_sub(volatile uint##bits##_t* p, uint##bits##_t value, int) {     \
    return __atomic_fetch_sub(p, value, __ATOMIC_SEQ_CST);                                                    \
  }

extern "C" {
R1K_ATOMICS(8)
R1K_ATOMICS(32)
R1K_ATOMICS(64)
R1K_TOUCHES(1)
R1K_TOUCHES(2)
R1K_TOUCHES(4)
R1K_TOUCHES(8)
R1K_TOUCHES(16)
void __tsan_read_range(void* p, size_t bytes) { touch(p, bytes, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t bytes) { touch(p, bytes, true, __builtin_return_address(0)); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_init() { r1k::gpu::emulator::races.watched = true; }
}

#include "races.h"

#include <algorithm>

#include "machine.h"
#include "source.h"

namespace r1k {
namespace gpu {
namespace emulator {

Races races;

namespace {

constexpr size_t kMostReads = 32;  // of a granule, that are remembered

std::string thread_name(uint32_t thread, uint32_t block) {
  return "thread " + std::to_string(thread % machine.shape.threads) + " of block " + std::to_string(block);
}

std::string name_of(const Access& access, bool write) {
  std::string name;
  switch (access.kind) {
    case Access::load: name = "a bulk_load of block " + std::to_string(access.block); break;
    case Access::store: name = "a bulk_store of " + thread_name(access.who, access.block); break;
    default: name = std::string(write ? "a write" : "a read") + " by " + thread_name(access.who, access.block);
  }
  const std::string line = access.code == 0 ? "" : line_of(reinterpret_cast<const char*>(&races) + access.code);
  return line.empty() ? name : name + " (" + line + ")";
}

}  // namespace

void Races::begin_launch() {
  era_ = 0;
  pages_.clear();
  last_ = nullptr;
}

Access Races::access(Access::Kind kind, uint32_t who, uint32_t when, const void* code) const {
  const Fiber& fiber = machine.self();
  const intptr_t from_here = reinterpret_cast<intptr_t>(code) - reinterpret_cast<intptr_t>(&races);
  return {kind, who, when, fiber.past.operations, static_cast<uint32_t>(fiber.block->index), era_,
          code == nullptr ? 0 : static_cast<int32_t>(from_here)};
}

// Whether the running fiber knows that an access is over.
bool Races::over(const Access& access, bool was_read) const {
  if (access.kind == Access::none || access.era < era_) return true;
  const Fiber& fiber = machine.self();
  const uint32_t first = static_cast<uint32_t>(fiber.block->index - fiber.block->rank);
  if (access.block - first >= static_cast<uint32_t>(machine.shape.cluster)) return false;  // of another cluster
  const Past& past = fiber.past;
  switch (access.kind) {
    case Access::load: return past.knows(phases_of(access.who)) >= access.when;
    case Access::store:
      return past.knows(was_read ? stores_read_of(access.who) : stores_done_of(access.who)) >= access.when;
    default:
      return past.knows(step_of(access.who)) >= access.when ||
             (was_read && past.knows(operations_of(warp_of(access.who))) > access.operations);
  }
}

void Races::add_read(Granule& granule, const Access& access) {
  const auto replaces = [&](const Access& read) {
    return (read.kind == access.kind && read.who == access.who && read.block == access.block) || over(read, true);
  };
  if (replaces(granule.read)) {
    granule.read = access;
    return;
  }
  if (!granule.more_reads) granule.more_reads = std::make_unique<std::vector<Access>>();
  std::vector<Access>& reads = *granule.more_reads;
  for (Access& read : reads) {
    if (replaces(read)) {
      read = access;
      return;
    }
  }
  if (reads.size() < kMostReads) {
    reads.push_back(access);
  } else {
    reads[machine.random() % kMostReads] = access;
  }
}

void Races::look(Granule& granule, const Access& access, bool writes, const Block* block, uintptr_t address) {
  const auto check = [&](const Access& other, bool wrote) {
    if (over(other, !wrote)) return;
    std::string where = "global memory at " + std::to_string(address);
    if (block != nullptr) {
      where = "shared memory of block " + std::to_string(block->index) + " at offset " +
              std::to_string(address - reinterpret_cast<uintptr_t>(block->shared));
    }
    machine.fail("race in " + where + ": " + name_of(access, writes) + " and, not ordered before it, " +
                 name_of(other, wrote));
  };
  check(granule.write, true);
  if (!writes) {
    add_read(granule, access);
    return;
  }
  check(granule.read, false);
  granule.read.kind = Access::none;
  if (granule.more_reads) {
    for (const Access& read : *granule.more_reads) check(read, false);
    granule.more_reads = nullptr;
  }
  granule.write = access;
}

Granule& Races::global(uintptr_t granule) {
  const uintptr_t page = granule / kPage;
  if (last_ == nullptr || page != last_page_) {
    std::unique_ptr<Granule[]>& memory = pages_[page];
    if (!memory) memory = std::make_unique<Granule[]>(kPage);
    last_page_ = page;
    last_ = memory.get();
  }
  return last_[granule % kPage];
}

void Races::touch(const void* p, size_t bytes, bool writes, const void* code) {
  const Fiber& fiber = machine.self();
  const auto address = reinterpret_cast<uintptr_t>(p), stack = reinterpret_cast<uintptr_t>(fiber.stack.base);
  if (address - stack < Stack::kBytes || bytes == 0) return;
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
    for (uintptr_t k = (address - shared) / 2; k <= (address - shared + bytes - 1) / 2; ++k) {
      look(block.granules[k], access, writes, &block, shared + 2 * k);
    }
  } else {
    for (uintptr_t k = address / 2; k <= (address + bytes - 1) / 2; ++k) {
      look(global(k), access, writes, nullptr, 2 * k);
    }
  }
}

void Races::visit(Block& block, const char* what) {
  const Past& past = machine.self().past;
  if (&block == machine.self().block) return;
  const uint32_t first = block.rank * machine.shape.threads, end = first + machine.shape.threads;
  uint32_t thread = first;
  while (thread < end && past.knows(step_of(thread)) == 0) ++thread;
  if (thread == end) {
    machine.fail(std::string(what) + " to block " + std::to_string(block.index) +
                 ", and nothing tells this thread that it has begun");
  }
  block.visits[past.thread] = access(Access::ordinary, past.thread, past.step, nullptr);
}

void Races::touch_remote(Block& block, const void* p, size_t bytes) {
  const Past& past = machine.self().past;
  const Access access = this->access(Access::ordinary, past.thread, past.step, nullptr);
  const size_t offset = static_cast<const unsigned char*>(p) - block.shared;
  for (size_t k = offset / 2; k < (offset + bytes) / 2; ++k) {
    look(block.granules[k], access, true, &block, reinterpret_cast<uintptr_t>(block.shared) + 2 * k);
  }
}

void Races::touch_barrier(const Access& initialised, const std::string& barrier) {
  if (!over(initialised, false)) {
    machine.fail(barrier + ", and nothing orders that after its initialisation by " +
                 thread_name(initialised.who, initialised.block));
  }
}

// Copies do not see ordinary stores by themselves.
void Races::check_fenced(const Access& write, const char* what, uintptr_t offset) const {
  if (write.kind == Access::ordinary && write.era == era_ &&
      machine.self().past.knows(fenced_of(write.who)) < write.when) {
    machine.fail(std::string(what) + " at offset " + std::to_string(offset) + " of shared memory without " +
                 "fence_for_bulk after " + name_of(write, true));
  }
}

void Races::load(Block& block, const void* shared, const void* global_memory, uint32_t bytes, uint32_t barrier,
                 uint64_t phase) {
  const Access copy = access(Access::load, barrier, static_cast<uint32_t>(phase) + 1, nullptr);
  block.loads[barrier] = copy.when;
  const auto to = reinterpret_cast<uintptr_t>(shared), from = reinterpret_cast<uintptr_t>(global_memory);
  const uintptr_t offset = to - reinterpret_cast<uintptr_t>(block.shared);
  for (uint32_t k = 0; k < bytes / 2; ++k) {
    Granule& granule = block.granules[offset / 2 + k];
    look(global(from / 2 + k), copy, false, nullptr, from + 2 * k);
    const Access before = granule.write;
    look(granule, copy, true, &block, to + 2 * k);
    check_fenced(before, "bulk_load", offset + 2 * k);
  }
}

void Races::store(Block& block, const void* global_memory, const void* shared, uint32_t bytes, uint32_t group) {
  const Access copy = access(Access::store, machine.self().past.thread, group, nullptr);
  const auto to = reinterpret_cast<uintptr_t>(global_memory), from = reinterpret_cast<uintptr_t>(shared);
  const uintptr_t offset = from - reinterpret_cast<uintptr_t>(block.shared);
  for (uint32_t k = 0; k < bytes / 2; ++k) {
    Granule& granule = block.granules[offset / 2 + k];
    look(granule, copy, false, &block, from + 2 * k);
    check_fenced(granule.write, "bulk_store", offset + 2 * k);
    look(global(to / 2 + k), copy, true, nullptr, to + 2 * k);
  }
}

void Races::end_block(const Block& block) {
  const std::string name = "block " + std::to_string(block.index);
  for (const auto& visit : block.visits) {
    if (block.gone.knows(step_of(visit.first)) < visit.second.when) {
      machine.fail(name + " does not wait for " + thread_name(visit.first, visit.second.block) +
                   ", which writes to its shared memory, before it ends");
    }
  }
  for (const auto& load : block.loads) {
    if (block.gone.knows(phases_of(load.first)) < load.second) {
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

// The bulk copies of hopper.cuh: they take place at random times, or when somebody cannot wait any longer.
#include <cstring>
#include <string>

#include "machine.h"

namespace r1k {
namespace gpu {
namespace emulator {

void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  need_hopper("bulk_load");
  machine.maybe_yield();
  Block& block = *machine.self().block;
  const auto to = static_cast<unsigned char*>(shared);
  const std::string what = "bulk_load of " + std::to_string(bytes) + " bytes";
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0 ||
      bytes % 16 != 0) {
    fail(what + ", shared memory at " + block.place_of(to) + ", global memory " +
         std::to_string(reinterpret_cast<uintptr_t>(global) % 16) +
         " bytes past a multiple of 16: all must be multiples of 16");
  }
  if (!block.holds(to, bytes)) {
    fail(what + " at " + block.place_of(to) + " of " + std::to_string(machine.shape.shared) +
         " bytes of shared memory");
  }
  const BarrierState& state = state_of(block, barrier, "bulk_load");
  if (!state.fenced) fail("bulk_load on a barrier that no fence_barrier_init has made known to it");
  for (const Copy& other : machine.copies) {
    if (other.block == &block && other.shared < to + bytes && to < other.shared + other.bytes) {
      fail("bulk_load into shared memory at " + block.place_of(to) + " while a bulk_load into it is on its way");
    }
  }
  if (races.watched) races.load(block, to, global, bytes, state.number, state.phase);
  Copy copy = {&block, to, static_cast<const unsigned char*>(global), bytes, barrier, {}};
  if (machine.chance(128)) copy.data.assign(copy.global, copy.global + bytes);
  machine.copies.push_back(std::move(copy));
  std::memset(to, kPoison, bytes);
  machine.maybe_yield();
}

void complete_one_copy() {
  std::vector<Copy>& copies = machine.copies;
  std::swap(copies[machine.random() % copies.size()], copies.back());
  const Copy copy = std::move(copies.back());
  copies.pop_back();
  std::memcpy(copy.shared, copy.data.empty() ? copy.global : copy.data.data(), copy.bytes);
  BarrierState& state = state_of(*copy.block, copy.barrier, "a bulk copy's end");
  expect_bytes(*copy.block, copy.barrier, state, -static_cast<int64_t>(copy.bytes));
  end_phase_if_complete(state);
}

}  // namespace emulator
}  // namespace gpu
}  // namespace r1k

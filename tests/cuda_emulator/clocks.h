// What threads know of each other's progress: the memory model of CUDA, as vector clocks.
//
// A thread counts its steps.  A step ends where the thread hands on what it knows: its own numbers and those that others
// have handed on to it.  sync_warp, sync_block, sync_cluster and sync_grid hand on between all that take part, a barrier
// from those that arrive to those that wait.  Shuffles and ballots are counted for themselves: they tell that a lane's
// reads are over, but do not show its stores to others.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace r1k {
namespace gpu {
namespace emulator {

struct Fiber;

// For all threads of a cluster: steps, steps before a fence_for_bulk, groups of bulk stores that have left shared memory
// and that are in global memory; for all warps: shuffles and ballots; for all barriers: phases that are over.
using Numbers = std::vector<uint32_t>;
using Knowledge = std::shared_ptr<const Numbers>;  // grows by being replaced

// Where those are.
uint32_t step_of(uint32_t thread);
uint32_t fenced_of(uint32_t thread);
uint32_t stores_read_of(uint32_t thread);
uint32_t stores_done_of(uint32_t thread);
uint32_t operations_of(uint32_t warp);
uint32_t phases_of(uint32_t barrier);
uint32_t warp_of(uint32_t thread);

struct Past {
  uint32_t thread, warp;  // numbers in the cluster
  uint32_t step, fenced, stores_read, stores_done, operations;
  Knowledge known;  // of the others

  uint32_t knows(uint32_t where) const;
};

// What many threads hand on, each at its time.
struct Gathering {
  std::shared_ptr<Numbers> numbers;
  Knowledge last;  // is in `numbers`

  uint32_t knows(uint32_t where) const;
};

void begin_past(Past& past, uint32_t thread);
void meet(const std::vector<Fiber*>& fibers);  // all know what any of them knows
void give(Past& past, Gathering& gathering);
void take(Past& past, const Knowledge& known);
void fence(Past& past);
// What those that wait for the end of a phase take.
Knowledge end_phase(Gathering& gathering, uint32_t barrier, uint64_t phases);

}  // namespace emulator
}  // namespace gpu
}  // namespace r1k

// What threads know of each other's progress: the memory model of CUDA, as vector clocks.
//
// A thread counts its steps.  A step ends where the thread hands on what it knows: its own numbers and those that
// others have handed on to it.  sync_warp, sync_block, sync_cluster and sync_grid hand on between all that take part,
// a barrier from those that arrive to those that wait.  Shuffles and ballots are counted for themselves: they tell that
// a lane's reads are over, but do not show its stores to others.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace r1k {
namespace gpu {
namespace emulator {

struct Fiber;

// Of a cluster: numbers of its threads, warps and barriers, kind after kind.  Only grows, by being replaced.
using Numbers = std::vector<uint32_t>;
using Knowledge = std::shared_ptr<const Numbers>;

// Where they are.  A block's threads are numbered from a multiple of 32.
struct Places {
  uint32_t threads_of_block, threads, warps;

  uint32_t step(uint32_t thread) const { return thread; }
  uint32_t operations(uint32_t warp) const { return threads + warp; }  // shuffles and ballots
  uint32_t previous() const { return threads + warps; }                // 1: the kernels before this one have ended
  uint32_t phases(uint32_t barrier) const { return threads + warps + 1 + barrier; }  // that are over
};
extern Places places;  // of the launch

inline uint32_t number(const Numbers& numbers, uint32_t where) { return where < numbers.size() ? numbers[where] : 0; }

struct Past {
  uint32_t thread;  // in the cluster
  uint32_t step, operations, previous;
  Knowledge known;  // of the others

  bool knows_step(uint32_t of, uint32_t at_least) const {
    return of == thread || number(*known, places.step(of)) >= at_least;
  }
  bool knows_operations_of(uint32_t of, uint32_t more_than) const {  // of its warp
    return (of / 32 == thread / 32 ? operations : number(*known, places.operations(of / 32))) > more_than;
  }
  bool knows_previous() const { return previous != 0 || number(*known, places.previous()) != 0; }
  bool knows_phase(uint32_t barrier, uint32_t at_least) const {
    return number(*known, places.phases(barrier)) >= at_least;
  }
};

// What many threads hand on, each at its time.
struct Gathering {
  std::shared_ptr<Numbers> numbers;
  Knowledge last;  // is in `numbers`

  uint32_t knows(uint32_t where) const;
};

void begin_clocks(int threads_of_block, int blocks_of_cluster);
void begin_past(Past& past, int rank, int thread);
void meet(const std::vector<Fiber*>& fibers);  // all know what any of them knows
void give(Past& past, Gathering& gathering);
void take(Past& past, const Knowledge& known);
// What those that wait for the end of a phase take.
Knowledge end_phase(Gathering& gathering, uint32_t barrier, uint64_t phases);

}  // namespace emulator
}  // namespace gpu
}  // namespace r1k

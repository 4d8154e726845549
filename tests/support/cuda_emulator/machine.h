// The state of a launch: blocks, threads as fibers, what they wait for, copies on their way.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "clocks.h"
#include "emulator.h"
#include "fiber.h"
#include "races.h"

namespace r1k {
namespace gpu {
namespace emulator {

constexpr int kLanes = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr size_t kGuard = 4096;  // bytes around a block's shared memory
constexpr unsigned char kPoison = 0xff;  // NaN as float, bfloat16 and float16

struct Block;
struct Fiber;

// Where a fiber is while it does not run.
enum class At : uint8_t {
  ready, sync_block, sync_warp, shuffle_xor, shuffle_from, ballot, sync_grid, sync_cluster, barrier_wait, ended
};

// All threads of a block, cluster or grid that have not ended; those that wait for the others.
struct Meeting {
  int alive = 0;
  std::vector<Fiber*> here;
};

struct Warp {
  Fiber* lanes[kLanes];
  unsigned members, ended, here;
  At at;  // of those that are here
};

// An mbarrier.  Its own 8 bytes hold a mark that tells when something else is written there.
struct BarrierState {
  int count;    // arrivals that end a phase
  int pending;  // of them, those still to come
  int64_t bytes = 0;
  uint64_t phase = 0;
  bool fenced = false;
  bool remote = false, remote_before = false;  // arrivals from other blocks, in this phase and the one before
  Fiber* initialiser = nullptr;
  std::vector<Fiber*> waiting;
  uint32_t number;  // in the cluster
  Access initialised;
  Gathering arrived;
  Knowledge released;  // by the phases that are over
};

// A bulk load on its way.
struct Copy {
  Block* block;
  unsigned char* shared;
  const unsigned char* global;
  uint32_t bytes;
  uint64_t* barrier;
  std::vector<unsigned char> data;  // where it was read at once
};

struct Fiber {
  Context context;
  Stack stack;
  Block* block;
  Warp* warp;
  unsigned thread;
  int level;  // higher ones run first, mostly
  At at;
  uint64_t value;  // given to a warp's operation, and what it gives back
  int argument;    // of a shuffle; parity of a wait
  uint64_t* barrier;
  bool arrived;    // at the barrier of its cluster, for which it does not wait yet
  Past past;
};

struct Unit {
  std::vector<std::unique_ptr<Block>> blocks;
  Meeting meeting;
  uint32_t barriers = 0;
};

struct Block {
  int64_t index;
  int rank;
  Unit* unit;
  bool begun = false;
  std::vector<unsigned char> memory;  // with guards around `shared`
  unsigned char* shared;
  Meeting meeting;
  std::vector<Warp> warps;
  std::vector<Fiber*> fibers;
  std::unordered_map<uint64_t*, BarrierState> barriers;
  // Where kernels are watched: what has been done to shared memory, by whom from outside, by loads for which barriers;
  // and what the threads know that have ended.
  std::vector<Cell> cells;
  std::unordered_map<uint32_t, Access> visits;
  std::unordered_map<uint32_t, uint32_t> loads;
  Gathering gone;

  bool ended() const { return meeting.alive == 0; }
  size_t offset_of(const void* p) const { return static_cast<const unsigned char*>(p) - shared; }
  std::string place_of(const void* p) const { return "offset " + std::to_string(offset_of(p)); }
  bool holds(const void* p, size_t bytes) const;
};

class Machine {
 public:
  void run(const LaunchShape& shape, const Properties& properties, void (*body)(const void*), const void* data,
           size_t bytes);

  // ---- of the running fiber
  Fiber& self() const { return *current_; }
  bool in_fiber() const { return current_ != nullptr; }
  void suspend();       // until somebody makes it ready
  void maybe_yield();   // lets others go first, sometimes
  void make_ready(Fiber* fiber);
  void meet(Meeting& meeting, At at);
  void release(Meeting& meeting);
  [[noreturn]] void fail(const std::string& message);
  [[noreturn]] void fail_with(const std::string& text);  // as it is

  uint64_t random();
  bool chance(unsigned of_256) { return (random() >> 32) % 256 < of_256; }

  LaunchShape shape;
  Properties properties;
  Meeting grid;
  std::vector<Copy> copies;
  uint64_t seed = 1;

 private:
  friend void enter_fiber();
  void begin_unit(int64_t index);
  void begin_block(Unit& unit, int64_t index, int rank);
  void end_fiber(Fiber& fiber);
  void end_block(Block& block);
  void discard();
  void resume(Fiber& fiber);
  Fiber* next();
  std::string deadlock() const;

  static constexpr int kLevels = 4;
  Context scheduler_;
  Fiber* current_ = nullptr;
  std::vector<Fiber*> ready_[kLevels];
  std::vector<std::unique_ptr<Fiber>> pool_;
  std::vector<Fiber*> free_;
  std::vector<std::unique_ptr<Unit>> units_;
  std::string error_;
  bool failed_ = false;
  uint64_t seed_of_launch_ = 0;
  int spread_ = 0;           // whose levels differ: nobody's, lanes', warps', blocks'
  unsigned yield_chance_ = 0, copy_chance_ = 0;
  void (*body_)(const void*) = nullptr;
  const void* data_ = nullptr;
};

extern Machine machine;

// Of threads.cpp.
std::string describe(At at);
std::string describe_wait(const Fiber& fiber);
void wait_at(At at);
// Of barriers.cpp.
void need_hopper(const char* what);
BarrierState& state_of(Block& block, uint64_t* barrier, const char* what);
void expect_bytes(Block& block, uint64_t* barrier, BarrierState& state, int64_t bytes);
void end_phase_if_complete(BarrierState& state);
// Of copies.cpp.
void complete_one_copy();

}  // namespace emulator
}  // namespace gpu
}  // namespace r1k

// Accesses to the same memory must be ordered by what the threads do, not by the luck of one run.
//
// Kernels compiled with -fsanitize=thread call a function at each access to memory; races.cpp defines those functions,
// and the sanitizer's own library is not linked.  Two accesses to the same two bytes, one of them a write, of which
// neither thread knows that the other's is over (clocks.h), are a race.  A bulk copy takes part like another thread:
// it is over for those who have waited for its barrier.  It may not write where a thread of the block has stored, as
// the two need a fence and kernels have none for it.  Without that flag nothing here is called.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace r1k {
namespace gpu {
namespace emulator {

struct Block;
struct Fiber;

struct Access {
  enum Kind : uint32_t { none, ordinary, load };  // the last: of a bulk copy
  Kind kind : 2;
  uint32_t who : 30;    // thread of the cluster; of a load, its barrier
  uint32_t when;        // step; of a load, the phase's number from 1
  uint32_t operations;  // of the warp until then
  uint32_t block;       // that it comes from
  uint32_t era;         // sync_grid begins another, and so does a launch
  int32_t code;         // where in the program
};

// The last write to a piece of memory, and the reads since.
struct History {
  Access write = {};
  Access read = {};
  std::vector<Access> more_reads;
};

// 16 aligned bytes: one history while they are accessed together, else one for each two bytes.
struct Cell {
  static constexpr int kParts = 8;
  History whole;
  std::unique_ptr<std::array<History, kParts>> parts;
};

class Races {
 public:
  static inline bool watched = false;  // kernels tell of their accesses: set before anything is constructed

  void begin_launch(bool overlap);
  void ignore(const void* p, size_t bytes) { ignored_ = {reinterpret_cast<uintptr_t>(p), bytes}; }
  void next_era() { ++era_; }
  void end_block(const Block& block);

  // Of the running fiber, or of a bulk copy that it starts.
  void touch(const void* p, size_t bytes, bool writes, const void* code);
  void touch_remote(Block& block, const void* p, size_t bytes);
  void touch_barrier(const Access& initialised, const std::string& barrier);
  void load(Block& block, const void* shared, const void* global, uint32_t bytes, uint32_t barrier, uint64_t phase);
  void visit(Block& block, const char* what);  // of another block of the cluster
  Access access(Access::Kind kind, uint32_t who, uint32_t when, const void* code) const;

 private:
  static constexpr size_t kPage = 64;  // cells
  static constexpr size_t kRecent = 256;
  using Page = std::array<Cell, kPage>;
  struct Place {
    uintptr_t address;
    Block* block;  // whose shared memory it is
  };
  bool over(const Access& access, bool was_read) const;
  void look(Place place, size_t bytes, const Access& access, bool writes);
  void look(Cell& cell, Place place, size_t bytes, const Access& access, bool writes);
  void look(History& history, Place place, const Access& access, bool writes);
  void add_read(History& history, const Access& access);
  Cell& cell(Place place);
  std::string name_of(Place place) const;

  uint32_t era_ = 0, era_of_launch_ = 0;
  std::pair<uintptr_t, size_t> ignored_;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  std::array<std::pair<uintptr_t, Page*>, kRecent> recent_ = {};
};

extern Races races;

}  // namespace emulator
}  // namespace gpu
}  // namespace r1k

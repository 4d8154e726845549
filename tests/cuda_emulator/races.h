// Accesses to the same memory must be ordered by what the threads do, not by the luck of one run.
//
// Kernels compiled with -fsanitize=thread call a function at each access to memory; races.cpp defines those functions,
// and the sanitizer's own library is not linked.  Two accesses to the same two bytes, one of them a write, of which
// neither thread knows that the other's is over (clocks.h), are a race.  Bulk copies take part as threads of their own:
// a load is over for those who have waited for its barrier, a store for its thread when that has waited, and neither
// may meet ordinary stores that their thread has not fenced.  Without that flag nothing here is called.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace r1k {
namespace gpu {
namespace emulator {

struct Block;
struct Fiber;

struct Access {
  enum Kind : uint32_t { none, ordinary, load, store };  // the last two: of bulk copies
  Kind kind : 2;
  uint32_t who : 30;    // thread of the cluster; of a load, its barrier
  uint32_t when;        // step; of a load, the phase's number from 1, of a store that of its group
  uint32_t operations;  // of the warp until then
  uint32_t block;       // that it comes from
  uint32_t era;         // sync_grid begins another
  int32_t code;         // where in the program
};

// Two bytes of memory: the last write, and the reads since.
struct Granule {
  Access write;
  Access read;
  std::unique_ptr<std::vector<Access>> more_reads;
};

class Races {
 public:
  static inline bool watched = false;  // kernels tell of their accesses: set before anything is constructed

  void begin_launch();
  void next_era() { ++era_; }
  void end_block(const Block& block);

  // Of the running fiber, or of a bulk copy that it starts.
  void touch(const void* p, size_t bytes, bool writes, const void* code);
  void touch_remote(Block& block, const void* p, size_t bytes);
  void touch_barrier(const Access& initialised, const std::string& barrier);
  void load(Block& block, const void* shared, const void* global, uint32_t bytes, uint32_t barrier, uint64_t phase);
  void store(Block& block, const void* global, const void* shared, uint32_t bytes, uint32_t group);
  void visit(Block& block, const char* what);  // of another block of the cluster
  Access access(Access::Kind kind, uint32_t who, uint32_t when, const void* code) const;

 private:
  static constexpr size_t kPage = 256;  // granules
  bool over(const Access& access, bool was_read) const;
  void look(Granule& granule, const Access& access, bool writes, const Block* block, uintptr_t address);
  void add_read(Granule& granule, const Access& access);
  void check_fenced(const Access& write, const char* what, uintptr_t offset) const;
  Granule& global(uintptr_t granule);

  uint32_t era_ = 0;
  std::unordered_map<uintptr_t, std::unique_ptr<Granule[]>> pages_;
  uintptr_t last_page_ = 0;
  Granule* last_ = nullptr;
};

extern Races races;

}  // namespace emulator
}  // namespace gpu
}  // namespace r1k

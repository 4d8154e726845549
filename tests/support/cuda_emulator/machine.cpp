// Which fiber runs when, and how launches begin and end.
#include "machine.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <stdexcept>

#include "source.h"

r1k::gpu::emulator::Index threadIdx, blockIdx, blockDim, gridDim;

namespace r1k {
namespace gpu {
namespace emulator {

Machine machine;

namespace {

constexpr int kMostThreads = 1024, kThreadsOfProcessor = 2048;
constexpr int kLargestCluster = 8;
constexpr int kFibers = 4096;  // alive at once, about

unsigned char guard_byte(size_t k) { return k % 2 == 0 ? 0xfe : 0xff; }  // NaN as well, and not the poison

}  // namespace

// splitmix64
uint64_t Machine::random() {
  uint64_t z = seed += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

// ---- fibers ------------------------------------------------------------------------------------------------

void enter_fiber() {
  std::string thrown;
  try {
    machine.body_(machine.data_);
  } catch (const std::exception& error) {
    thrown = std::string("a kernel throws: ") + error.what();
  }
  if (!thrown.empty()) machine.fail(thrown);
  machine.self().at = At::ended;
  machine.suspend();
}

void Machine::resume(Fiber& fiber) {
  current_ = &fiber;
  threadIdx = {fiber.thread, 0, 0};
  blockIdx = {static_cast<unsigned>(fiber.block->index), 0, 0};
  fiber.block->begun = true;
  switch_to(scheduler_, fiber.context);
  current_ = nullptr;
  if (failed_) throw std::runtime_error(error_);
  if (fiber.at == At::ended) end_fiber(fiber);
}

void Machine::suspend() { switch_to(current_->context, scheduler_); }

void Machine::make_ready(Fiber* fiber) {
  fiber->at = At::ready;
  if (chance(2)) fiber->level = random() % kLevels;
  ready_[spread_ == 0 ? 0 : fiber->level].push_back(fiber);
}

void Machine::maybe_yield() {
  if (!chance(yield_chance_)) return;
  make_ready(current_);
  suspend();
}

Fiber* Machine::next() {
  int level = kLevels;
  if (chance(16)) {
    const int any = random() % kLevels;
    if (!ready_[any].empty()) level = any;
  }
  if (level == kLevels) {
    do --level;
    while (level >= 0 && ready_[level].empty());
  }
  if (level < 0) return nullptr;
  std::vector<Fiber*>& queue = ready_[level];
  std::swap(queue[random() % queue.size()], queue.back());
  Fiber* fiber = queue.back();
  queue.pop_back();
  return fiber;
}

void Machine::meet(Meeting& meeting, At at) {
  current_->at = at;
  meeting.here.push_back(current_);
  if (static_cast<int>(meeting.here.size()) == meeting.alive) release(meeting);
  suspend();
}

void Machine::release(Meeting& meeting) {
  if (races.watched && &meeting == &grid) {
    for (const std::unique_ptr<Unit>& unit : units_) {
      std::vector<Fiber*> fibers;
      for (const std::unique_ptr<Block>& block : unit->blocks) {
        fibers.insert(fibers.end(), block->fibers.begin(), block->fibers.end());
      }
      emulator::meet(fibers);
    }
    races.next_era();
  } else if (races.watched) {
    emulator::meet(meeting.here);
  }
  for (Fiber* fiber : meeting.here) make_ready(fiber);
  meeting.here.clear();
}

void Machine::fail(const std::string& message) {
  std::ostringstream text;
  text << "CUDA emulator: " << message;
  if (in_fiber()) text << " [thread " << current_->thread << " of block " << current_->block->index << "]";
  if (in_fiber()) {
    const std::string lines = lines_here();
    if (!lines.empty()) text << " [" << lines << "]";
  }
  text << " [seed " << seed_of_launch_ << "]";
  fail_with(text.str());
}

void Machine::fail_with(const std::string& text) {
  error_ = text;
  if (!in_fiber()) throw std::runtime_error(error_);
  failed_ = true;
  for (;;) suspend();
}

void fail(const std::string& message) { machine.fail(message); }

bool Block::holds(const void* p, size_t bytes) const {
  const auto begin = static_cast<const unsigned char*>(p);
  return begin >= shared && begin + bytes <= shared + machine.shape.shared;
}

// ---- launches ----------------------------------------------------------------------------------------------

void Machine::begin_block(Unit& unit, int64_t index, int rank) {
  unit.blocks.push_back(std::make_unique<Block>());
  Block& block = *unit.blocks.back();
  block.index = index;
  block.rank = rank;
  block.unit = &unit;
  block.meeting.alive = shape.threads;

  // Aligned as promised and no better.
  block.memory.resize(shape.shared + 2 * kGuard + 256);
  uintptr_t begin = reinterpret_cast<uintptr_t>(block.memory.data()) + kGuard;
  begin = (begin + 127) / 128 * 128;
  if (begin % 256 == 0) begin += 128;
  block.shared = reinterpret_cast<unsigned char*>(begin);
  for (size_t k = 0; k < kGuard; ++k) block.shared[shape.shared + k] = guard_byte(k);
  std::memset(block.shared, kPoison, shape.shared);

  if (races.watched) block.cells = std::vector<Cell>((shape.shared + 15) / 16);

  block.warps.resize((shape.threads + kLanes - 1) / kLanes);
  for (Warp& warp : block.warps) warp = {};
  const int level_of_block = random() % kLevels;
  int level_of_warp = 0;
  for (int thread = 0; thread < shape.threads; ++thread) {
    if (free_.empty()) {
      pool_.push_back(std::make_unique<Fiber>());
      free_.push_back(pool_.back().get());
    }
    Fiber* fiber = free_.back();
    free_.pop_back();
    if (thread % kLanes == 0) level_of_warp = random() % kLevels;
    Warp& warp = block.warps[thread / kLanes];
    warp.lanes[thread % kLanes] = fiber;
    warp.members |= 1u << thread % kLanes;
    fiber->block = &block;
    fiber->warp = &warp;
    fiber->thread = thread;
    fiber->level = spread_ == 1 ? random() % kLevels : spread_ == 2 ? level_of_warp : level_of_block;
    fiber->arrived = false;
    begin_past(fiber->past, rank, thread);
    prepare(fiber->context, fiber->stack, enter_fiber);
    block.fibers.push_back(fiber);
    make_ready(fiber);
  }
}

void Machine::begin_unit(int64_t index) {
  units_.push_back(std::make_unique<Unit>());
  Unit& unit = *units_.back();
  unit.meeting.alive = shape.threads * shape.cluster;
  for (int rank = 0; rank < shape.cluster; ++rank) begin_block(unit, index * shape.cluster + rank, rank);
}

void Machine::end_fiber(Fiber& fiber) {
  Warp& warp = *fiber.warp;
  warp.ended |= 1u << fiber.thread % kLanes;
  Block& block = *fiber.block;
  const auto who = [&] {
    return "thread " + std::to_string(fiber.thread) + " of block " + std::to_string(block.index);
  };
  if (warp.here != 0) {
    fail(who() + " has ended while " + std::to_string(__builtin_popcount(warp.here)) + " lanes of its warp are at " +
         describe_wait(*warp.lanes[__builtin_ctz(warp.here)]));
  }
  if (races.watched) give(fiber.past, block.gone);
  --grid.alive;
  if (!grid.here.empty()) fail(who() + " has ended while others are at sync_grid");
  for (Meeting* meeting : {&block.meeting, &block.unit->meeting}) {
    if (--meeting->alive == static_cast<int>(meeting->here.size()) && meeting->alive > 0) release(*meeting);
  }
  if (block.ended()) end_block(block);
}

void Machine::end_block(Block& block) {
  for (size_t k = 0; k < kGuard; ++k) {
    if (block.shared[shape.shared + k] != guard_byte(k)) {
      fail("block " + std::to_string(block.index) + " has written " + std::to_string(k) +
           " bytes past the end of its " + std::to_string(shape.shared) + " bytes of shared memory");
    }
  }
  if (races.watched) races.end_block(block);
  for (const Copy& copy : copies) {
    if (copy.block == &block) {
      fail("block " + std::to_string(block.index) + " has ended before a bulk load into its shared memory, offset " +
           std::to_string(copy.shared - block.shared));
    }
  }
  for (Fiber* fiber : block.fibers) free_.push_back(fiber);
  block.fibers.clear();
}

void Machine::discard() {
  for (std::vector<Fiber*>& queue : ready_) queue.clear();
  copies.clear();
  units_.clear();
  grid = {};
  free_.clear();
  for (const std::unique_ptr<Fiber>& fiber : pool_) free_.push_back(fiber.get());
  failed_ = false;
  current_ = nullptr;
}

std::string Machine::deadlock() const {
  struct Waiting {
    int threads = 0;
    std::set<int64_t> blocks;
  };
  std::map<std::string, Waiting> waits;
  for (const std::unique_ptr<Unit>& unit : units_) {
    for (const std::unique_ptr<Block>& block : unit->blocks) {
      for (const Fiber* fiber : block->fibers) {
        if (fiber->at == At::ended) continue;
        Waiting& waiting = waits[describe_wait(*fiber)];
        ++waiting.threads;
        waiting.blocks.insert(block->index);
      }
    }
  }
  std::ostringstream text;
  text << "deadlock:";
  const char* separator = " ";
  for (const auto& [where, waiting] : waits) {
    text << separator << waiting.threads << (waiting.threads == 1 ? " thread" : " threads") << " at " << where;
    text << " in ";
    if (waiting.blocks.size() == 1) {
      text << "block " << *waiting.blocks.begin();
    } else {
      text << waiting.blocks.size() << " blocks";
    }
    separator = ", ";
  }
  return text.str();
}

void Machine::run(const LaunchShape& launch_shape, const Properties& launch_properties, void (*body)(const void*),
                  const void* data, size_t bytes) {
  shape = launch_shape;
  properties = launch_properties;
  seed_of_launch_ = seed;
  const auto refuse = [](bool condition, const std::string& why) {
    if (condition) throw std::runtime_error("CUDA emulator: kernel launch: " + why);
  };
  refuse(shape.threads < 1 || shape.threads > kMostThreads, std::to_string(shape.threads) + " threads");
  refuse(shape.blocks < 1 || shape.blocks > INT32_MAX, std::to_string(shape.blocks) + " blocks");
  refuse(shape.shared > properties.shared_per_block, std::to_string(shape.shared) + " bytes of shared memory");
  refuse(shape.cluster < 1 || shape.cluster > kLargestCluster || shape.blocks % shape.cluster != 0 ||
             (shape.cluster > 1 && properties.major < 9),
         std::to_string(shape.blocks) + " blocks in clusters of " + std::to_string(shape.cluster));
  refuse(shape.cluster > 1 && emulator::concurrent_blocks(shape, properties) == 0,
         "a cluster of " + std::to_string(shape.cluster) + " blocks does not fit on the device");
  refuse(shape.cooperative && shape.blocks > emulator::concurrent_blocks(shape, properties),
         std::to_string(shape.blocks) + " blocks cannot run at once");

  body_ = body;
  data_ = data;
  races.ignore(data, bytes);  // every thread reads its parameters there, and nobody writes
  blockDim = {static_cast<unsigned>(shape.threads), 1, 1};
  gridDim = {static_cast<unsigned>(shape.blocks), 1, 1};
  races.begin_launch(shape.overlap);
  begin_clocks(shape.threads, shape.cluster);
  grid.alive = shape.threads * static_cast<int>(shape.blocks);
  // How this launch is mixed: some keep close together, some leave a lane, a warp or a block far behind.
  constexpr unsigned kYield[] = {0, 32, 128}, kCopy[] = {0, 1, 16, 128};
  spread_ = random() % 4;
  yield_chance_ = kYield[random() % 3];
  copy_chance_ = kCopy[random() % 4];

  // Clusters, or blocks, begin in any order.
  const int64_t units = shape.blocks / shape.cluster;
  std::vector<int64_t> order(units);
  for (int64_t k = 0; k < units; ++k) {
    const int64_t other = random() % (k + 1);
    order[k] = order[other];
    order[other] = k;
  }
  int64_t at_once = std::min<int64_t>(emulator::concurrent_blocks(shape, properties) / shape.cluster,
                                      kFibers / (shape.threads * shape.cluster));
  if (!shape.cooperative && chance(128)) at_once = 1;
  if (shape.cooperative) at_once = units;
  at_once = std::max<int64_t>(at_once, 1);

  try {
    size_t begun = 0;
    for (;;) {
      while (begun < order.size() && static_cast<int64_t>(units_.size()) < at_once) begin_unit(order[begun++]);
      if (!copies.empty() && chance(copy_chance_)) complete_one_copy();
      if (Fiber* fiber = next()) {
        resume(*fiber);
        Unit* unit = fiber->block->unit;
        if (unit->meeting.alive == 0 && !shape.cooperative) {
          const auto ended = std::find_if(units_.begin(), units_.end(), [&](auto& u) { return u.get() == unit; });
          units_.erase(ended);
        }
      } else if (!copies.empty()) {
        complete_one_copy();
      } else if (grid.alive == 0) {
        break;
      } else {
        fail(deadlock());
      }
    }
  } catch (...) {
    discard();
    throw;
  }
  discard();
}

int concurrent_blocks(const LaunchShape& shape, const Properties& properties) {
  if (shape.shared > properties.shared_per_block) return 0;
  constexpr size_t kReserved = 1024;  // for each block
  const size_t shared_of_processor = properties.shared_per_block + kReserved;
  const int by_memory = static_cast<int>(shared_of_processor / (shape.shared + kReserved));
  const int blocks = std::min({kBlocksPerProcessor, by_memory, kThreadsOfProcessor / shape.threads});
  return blocks * properties.processors / shape.cluster * shape.cluster;
}

void run(const LaunchShape& shape, const Properties& properties, void (*body)(const void*), const void* data,
         size_t bytes) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  machine.run(shape, properties, body, data, bytes);
}

}  // namespace emulator
}  // namespace gpu
}  // namespace r1k

extern "C" __attribute__((visibility("default"))) void r1k_emulator_seed(uint64_t seed) {
  r1k::gpu::emulator::machine.seed = seed;
}

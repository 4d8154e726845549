// What threads do together: warps, blocks, clusters, grids.
#include <string>

#include "machine.h"

namespace r1k {
namespace gpu {
namespace emulator {
namespace {

const char* name_of(At at) {
  switch (at) {
    case At::ready: return "nothing: it may run";
    case At::sync_block: return "sync_block";
    case At::sync_warp: return "sync_warp";
    case At::shuffle_xor: return "shuffle_xor";
    case At::shuffle_from: return "shuffle_from";
    case At::ballot: return "ballot";
    case At::sync_grid: return "sync_grid";
    case At::sync_cluster: return "sync_cluster";
    case At::barrier_wait: return "barrier_wait";
    case At::ended: return "its end";
  }
  return "";
}

bool of_whole_blocks(At at) { return at == At::sync_block || at == At::sync_grid || at == At::sync_cluster; }

// Lane -> what it gets.
void exchange(Warp& warp) {
  uint64_t results[kLanes];
  unsigned votes = 0;
  for (int lane = 0; lane < kLanes; ++lane) votes |= static_cast<unsigned>(warp.lanes[lane]->value != 0) << lane;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int argument = warp.lanes[lane]->argument;
    switch (warp.at) {
      case At::shuffle_xor: results[lane] = warp.lanes[lane ^ argument]->value; break;
      case At::shuffle_from: results[lane] = warp.lanes[argument % kLanes]->value; break;
      default: results[lane] = votes; break;
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) warp.lanes[lane]->value = results[lane];
}

uint64_t together(At at, uint64_t value, int argument) {
  Fiber& fiber = machine.self();
  Warp& warp = *fiber.warp;
  const int lane = fiber.thread % kLanes;
  const auto lanes = [](unsigned mask) { return std::to_string(__builtin_popcount(mask)) + " lanes of its warp"; };
  if (warp.members != kWholeWarp) fail(std::string(name_of(at)) + " in a warp of " + lanes(warp.members));
  if (warp.ended != 0) fail(std::string(name_of(at)) + " after the end of " + lanes(warp.ended));
  if (warp.here != 0) {
    const Fiber& first = *warp.lanes[__builtin_ctz(warp.here)];
    if (warp.at != at) fail(std::string(name_of(at)) + " while " + lanes(warp.here) + " are at " + name_of(warp.at));
    if (at == At::shuffle_xor && first.argument != argument) {
      fail("shuffle_xor with " + std::to_string(argument) + " while " + lanes(warp.here) + " have " +
           std::to_string(first.argument));
    }
  }
  for (const Fiber* other : warp.lanes) {
    if (of_whole_blocks(other->at)) {
      fail(std::string(name_of(at)) + " while another lane of its warp is at " + name_of(other->at));
    }
  }
  fiber.at = at;
  fiber.value = value;
  fiber.argument = argument;
  warp.at = at;
  warp.here |= 1u << lane;
  if (warp.here == kWholeWarp) {
    exchange(warp);
    warp.here = 0;
    if (races.watched) {
      for (Fiber* other : warp.lanes) ++other->past.operations;
      if (at == At::sync_warp) emulator::meet({warp.lanes, warp.lanes + kLanes});
    }
    for (Fiber* other : warp.lanes) machine.make_ready(other);
  }
  machine.suspend();
  return fiber.value;
}

void meet(Meeting& meeting, At at) {
  const Warp& warp = *machine.self().warp;
  if (warp.here != 0) {
    fail(std::string(name_of(at)) + " while " + std::to_string(__builtin_popcount(warp.here)) +
         " lanes of its warp are at " + name_of(warp.at));
  }
  machine.meet(meeting, at);
}

}  // namespace

void wait_at(At at) {
  machine.self().at = at;
  machine.suspend();
}

std::string describe(At at) { return name_of(at); }

unsigned char* dynamic_shared() { return machine.self().block->shared; }

void check_aligned(const void* address, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) fail(std::string(what) + " at an address that is not aligned");
}

void fail_check(const char* message) {
  const std::string text = message, prefix = "r1kernels: ";
  machine.fail_with(text.compare(0, prefix.size(), prefix) == 0 ? text : prefix + text);
}

void sync_block() { meet(machine.self().block->meeting, At::sync_block); }
void sync_cluster() {
  need_hopper("sync_cluster");
  meet(machine.self().block->unit->meeting, At::sync_cluster);
}
// The barrier that a thread waits at needs all threads to wait, which is more than a device asks for: all have arrived.
void arrive_cluster() {
  need_hopper("arrive_cluster");
  if (machine.self().arrived) fail("arrive_cluster twice without wait_cluster");
  machine.self().arrived = true;
}
void wait_cluster() {
  if (!machine.self().arrived) fail("wait_cluster without arrive_cluster");
  machine.self().arrived = false;
  sync_cluster();
}
void sync_grid() {
  if (!machine.shape.cooperative) fail("sync_grid in a launch that is not cooperative");
  if (machine.grid.alive != machine.shape.blocks * machine.shape.threads) fail("sync_grid after the end of a thread");
  meet(machine.grid, At::sync_grid);
}

void sync_warp() { together(At::sync_warp, 0, 0); }
uint64_t shuffle_xor(uint64_t value, int mask) {
  if (mask < 0 || mask >= kLanes) fail("shuffle_xor with " + std::to_string(mask));
  return together(At::shuffle_xor, value, mask);
}
uint64_t shuffle_from(uint64_t value, int lane) { return together(At::shuffle_from, value, lane & (kLanes - 1)); }
unsigned ballot(bool predicate) { return static_cast<unsigned>(together(At::ballot, predicate, 0)); }

}  // namespace emulator
}  // namespace gpu
}  // namespace r1k

#include "clocks.h"

#include <algorithm>

#include "machine.h"

namespace r1k {
namespace gpu {
namespace emulator {
namespace {

uint32_t threads() { return machine.shape.threads * machine.shape.cluster; }
uint32_t warps_of_block() { return (machine.shape.threads + kLanes - 1) / kLanes; }

uint32_t number(const Numbers& numbers, uint32_t where) { return where < numbers.size() ? numbers[where] : 0; }

void put(Numbers& numbers, uint32_t where, uint32_t value) {
  if (where >= numbers.size()) numbers.resize(where + 1);
  numbers[where] = std::max(numbers[where], value);
}

void put_own(Numbers& numbers, const Past& past) {
  put(numbers, operations_of(past.warp), past.operations);
  put(numbers, step_of(past.thread), past.step);
  put(numbers, fenced_of(past.thread), past.fenced);
  put(numbers, stores_read_of(past.thread), past.stores_read);
  put(numbers, stores_done_of(past.thread), past.stores_done);
}

void merge(Numbers& numbers, const Numbers& others) {
  if (others.size() > numbers.size()) numbers.resize(others.size());
  for (size_t k = 0; k < others.size(); ++k) numbers[k] = std::max(numbers[k], others[k]);
}

}  // namespace

uint32_t step_of(uint32_t thread) { return thread; }
uint32_t fenced_of(uint32_t thread) { return threads() + thread; }
uint32_t stores_read_of(uint32_t thread) { return 2 * threads() + thread; }
uint32_t stores_done_of(uint32_t thread) { return 3 * threads() + thread; }
uint32_t operations_of(uint32_t warp) { return 4 * threads() + warp; }
uint32_t phases_of(uint32_t barrier) { return 4 * threads() + warps_of_block() * machine.shape.cluster + barrier; }

uint32_t warp_of(uint32_t thread) {
  const uint32_t of_block = machine.shape.threads;
  return thread / of_block * warps_of_block() + thread % of_block / kLanes;
}

uint32_t Past::knows(uint32_t where) const {
  if (where == step_of(thread)) return step;
  if (where == fenced_of(thread)) return fenced;
  if (where == stores_read_of(thread)) return stores_read;
  if (where == stores_done_of(thread)) return stores_done;
  if (where == operations_of(warp)) return operations;
  return number(*known, where);
}

uint32_t Gathering::knows(uint32_t where) const { return numbers ? number(*numbers, where) : 0; }

void begin_past(Past& past, uint32_t thread) {
  static const Knowledge nothing = std::make_shared<Numbers>();
  past = {thread, warp_of(thread), 1, 0, 0, 0, 0, nothing};
}

void meet(const std::vector<Fiber*>& fibers) {
  const auto numbers = std::make_shared<Numbers>(*fibers[0]->past.known);
  std::vector<const Numbers*> merged = {fibers[0]->past.known.get()};  // mostly they all know the same
  for (const Fiber* fiber : fibers) {
    const Numbers* const known = fiber->past.known.get();
    if (std::find(merged.rbegin(), merged.rend(), known) == merged.rend()) {
      merge(*numbers, *known);
      merged.push_back(known);
    }
  }
  for (const Fiber* fiber : fibers) put_own(*numbers, fiber->past);
  for (Fiber* fiber : fibers) {
    ++fiber->past.step;
    fiber->past.known = numbers;
  }
}

void give(Past& past, Gathering& gathering) {
  if (!gathering.numbers) {
    gathering.numbers = std::make_shared<Numbers>(*past.known);
  } else if (gathering.last != past.known) {
    merge(*gathering.numbers, *past.known);
  }
  gathering.last = past.known;
  put_own(*gathering.numbers, past);
  ++past.step;
}

void take(Past& past, const Knowledge& known) {
  // Threads that knew the same and learn the same share what they know then.
  struct Sum {
    Knowledge a, b, both;
  };
  static Sum sums[16];
  static unsigned oldest = 0;
  if (!known || past.known == known) return;
  for (const Sum& sum : sums) {
    if (sum.a == past.known && sum.b == known) {
      past.known = sum.both;
      return;
    }
  }
  const auto both = std::make_shared<Numbers>(*known);
  merge(*both, *past.known);
  sums[oldest++ % 16] = {past.known, known, both};
  past.known = both;
}

void fence(Past& past) { past.fenced = past.step++; }

Knowledge end_phase(Gathering& gathering, uint32_t barrier, uint64_t phases) {
  if (!gathering.numbers) gathering.numbers = std::make_shared<Numbers>();
  put(*gathering.numbers, phases_of(barrier), static_cast<uint32_t>(phases));
  return std::make_shared<Numbers>(*gathering.numbers);
}

}  // namespace emulator
}  // namespace gpu
}  // namespace r1k

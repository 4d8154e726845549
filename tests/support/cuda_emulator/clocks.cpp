#include "clocks.h"

#include <algorithm>

#include "machine.h"

namespace r1k {
namespace gpu {
namespace emulator {
Places places;

namespace {

void put(Numbers& numbers, uint32_t where, uint32_t value) {
  if (where >= numbers.size()) numbers.resize(where + 1);
  numbers[where] = std::max(numbers[where], value);
}

void put_own(Numbers& numbers, const Past& past) {
  put(numbers, places.operations(past.thread / kLanes), past.operations);
  put(numbers, places.previous(), past.previous);
  put(numbers, places.step(past.thread), past.step);
}

void merge(Numbers& numbers, const Numbers& others) {
  if (others.size() > numbers.size()) numbers.resize(others.size());
  for (size_t k = 0; k < others.size(); ++k) numbers[k] = std::max(numbers[k], others[k]);
}

}  // namespace

uint32_t Gathering::knows(uint32_t where) const { return numbers ? number(*numbers, where) : 0; }

void begin_clocks(int threads_of_block, int blocks_of_cluster) {
  const uint32_t warps = (threads_of_block + kLanes - 1) / kLanes;
  places = {warps * kLanes, warps * kLanes * blocks_of_cluster, warps * blocks_of_cluster};
}

void begin_past(Past& past, int rank, int thread) {
  static const Knowledge nothing = std::make_shared<Numbers>();
  past = {rank * places.threads_of_block + thread, 1, 0, 0, nothing};
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

Knowledge end_phase(Gathering& gathering, uint32_t barrier, uint64_t phases) {
  if (!gathering.numbers) gathering.numbers = std::make_shared<Numbers>();
  put(*gathering.numbers, places.phases(barrier), static_cast<uint32_t>(phases));
  return std::make_shared<Numbers>(*gathering.numbers);
}

}  // namespace emulator
}  // namespace gpu
}  // namespace r1k

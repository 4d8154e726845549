// Stacks and the switch between them.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace r1k {
namespace gpu {
namespace emulator {

// Where a flow of control goes on.  ucontext would do everywhere, but it calls the kernel twice for each switch.
struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t state;
#endif
};

// A stack with a page below it that faults.
struct Stack {
  static constexpr size_t kBytes = 128 * 1024;
  unsigned char* base = nullptr;

  Stack();  // throws std::bad_alloc
  ~Stack();
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
};

// The first switch to `context` calls `entry`, which must not return.
void prepare(Context& context, Stack& stack, void (*entry)());
void switch_to(Context& from, const Context& to);

}  // namespace emulator
}  // namespace gpu
}  // namespace r1k

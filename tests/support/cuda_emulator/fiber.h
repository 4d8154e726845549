// Stacks and the switch between them.
#pragma once

#include <cstddef>

// ucontext would do everywhere, but it calls the kernel twice for each switch.
#if !defined(R1K_OWN_SWITCH)
#if defined(__x86_64__)
#define R1K_OWN_SWITCH 1
#else
#define R1K_OWN_SWITCH 0
#endif
#endif
#if !R1K_OWN_SWITCH
#include <ucontext.h>
#endif

namespace r1k {
namespace gpu {
namespace emulator {

// Where a flow of control goes on.
struct Context {
#if R1K_OWN_SWITCH
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

#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <new>

#if R1K_OWN_SWITCH
// Saves what a function must keep and takes it up from another stack; its return address is that of the other side.
asm(R"(
.text
.p2align 4
.local r1k_emulator_switch
.type r1k_emulator_switch, @function
r1k_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size r1k_emulator_switch, .-r1k_emulator_switch
)");
extern "C" __attribute__((visibility("hidden"))) void r1k_emulator_switch(void** from, void* to);
#endif

namespace r1k {
namespace gpu {
namespace emulator {
namespace {

constexpr size_t kPage = 4096;

}  // namespace

Stack::Stack() {
  constexpr int kHow = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, kBytes + kPage, PROT_READ | PROT_WRITE, kHow, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kPage, PROT_NONE);
  base = static_cast<unsigned char*>(memory) + kPage;
}

Stack::~Stack() { munmap(base - kPage, kBytes + kPage); }

#if R1K_OWN_SWITCH

void prepare(Context& context, Stack& stack, void (*entry)()) {
  // From the top: a return address for `entry` that is never used, `entry`, six registers.  At its first instruction
  // the stack pointer is 8 beyond a multiple of 16, as after a call.
  void** top = reinterpret_cast<void**>(stack.base + Stack::kBytes) - 1;
  *top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  top -= 6;
  std::memset(top, 0, 6 * sizeof(void*));
  context.stack_pointer = top;
}

void switch_to(Context& from, const Context& to) { r1k_emulator_switch(&from.stack_pointer, to.stack_pointer); }

#else

void prepare(Context& context, Stack& stack, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack.base;
  context.state.uc_stack.ss_size = Stack::kBytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

void switch_to(Context& from, const Context& to) { swapcontext(&from.state, &to.state); }

#endif

}  // namespace emulator
}  // namespace gpu
}  // namespace r1k

// Where in the source a kernel is.
#pragma once

#include <string>

namespace r1k {
namespace gpu {
namespace emulator {

// "file:line" of a place in the program, and of what it is inlined into; empty where that is not known.
std::string line_of(const void* code);
// The same of all functions of the kernel that the caller is in, innermost first.
std::string lines_here();

}  // namespace emulator
}  // namespace gpu
}  // namespace r1k

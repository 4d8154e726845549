// Which devices the targets of a build serve.  Plain C++, for tests on the host as well.
#pragma once

#include <cstdlib>
#include <sstream>
#include <string>

namespace r1k {
namespace gpu {

inline bool is_jetson(long capability) { return capability == 87 || capability == 101; }

// Whether one of `architectures` ("sm_80 sm_90a compute_90") has code for a device of this compute capability. Machine
// code runs on later devices of its generation, and so do features of a family ("f"); features of one architecture ("a")
// run on that alone. The driver compiles other PTX for any later device. Jetsons run only their own machine code, and no
// other device runs it: 8.7 is Orin, 10.1 was Thor before CUDA 13.
inline bool serves(const std::string& architectures, int major, int minor) {
  const long capability = 10 * major + minor;
  std::istringstream names(architectures);
  for (std::string name; names >> name;) {
    const std::string digits = name.substr(name.find('_') + 1);
    const long target = std::strtol(digits.c_str(), nullptr, 10);
    const bool ptx = name[0] == 'c', family = digits.back() == 'f';
    const bool exact = digits.back() == 'a' || (!ptx && (is_jetson(capability) || is_jetson(target)));
    const bool later = capability >= target && ((ptx && !family) || major == target / 10);
    if (exact ? capability == target : later) return true;
  }
  return false;
}

}  // namespace gpu
}  // namespace r1k

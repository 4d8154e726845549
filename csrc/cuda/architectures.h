// Which devices the targets of a build serve.  Plain C++, for tests on the host as well.
#pragma once

#include <cstdlib>
#include <sstream>
#include <string>

namespace r1k {
namespace gpu {

// Whether one of `architectures` ("sm_80 sm_90a compute_90") has code for a device of this compute capability: machine
// code runs on later devices of its generation, with features of its own ("a") on that device alone, and the driver
// compiles PTX for any later device.
inline bool serves(const std::string& architectures, int major, int minor) {
  const long capability = 10 * major + minor;
  std::istringstream names(architectures);
  for (std::string name; names >> name;) {
    const std::string digits = name.substr(name.find('_') + 1);
    const long target = std::strtol(digits.c_str(), nullptr, 10);
    const bool ptx = name[0] == 'c', exact = digits.back() == 'a';
    if (exact ? capability == target : capability >= target && (ptx || major == target / 10)) return true;
  }
  return false;
}

}  // namespace gpu
}  // namespace r1k

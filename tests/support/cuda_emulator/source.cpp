#include "source.h"

#include <dlfcn.h>
#include <execinfo.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

namespace r1k {
namespace gpu {
namespace emulator {
namespace {

// Of return addresses in the same library or program, by the tool that reads debugging information.
std::vector<std::string> lines_of(const std::vector<const void*>& code) {
  std::vector<std::string> lines;
  Dl_info info;
  if (code.empty() || dladdr(code[0], &info) == 0) return lines;
  std::string command = std::string("addr2line -i -e '") + info.dli_fname + "'";
  for (const void* each : code) {
    char offset[32];
    std::snprintf(offset, sizeof(offset), " 0x%lx",
                  static_cast<unsigned long>(static_cast<const char*>(each) - static_cast<char*>(info.dli_fbase) - 1));
    command += offset;
  }
  FILE* const pipe = popen((command + " 2>/dev/null").c_str(), "r");
  if (pipe == nullptr) return lines;
  char line[1024];
  while (std::fgets(line, sizeof(line), pipe) != nullptr) lines.push_back(line);
  pclose(pipe);
  return lines;
}

// Kernels' own lines: neither the emulator's nor the standard library's.
std::string readable(const std::vector<std::string>& lines) {
  std::string text;
  for (const std::string& line : lines) {
    if (line.find("cuda_emulator/") != std::string::npos || line.find("/include/") != std::string::npos) continue;
    if (line.find("?") != std::string::npos || line[0] != '/') continue;
    const size_t begin = line.rfind('/') + 1, end = line.find_first_of(" \n", begin);
    text += (text.empty() ? "" : " < ") + line.substr(begin, end - begin);
  }
  return text;
}

}  // namespace

std::string line_of(const void* code) { return readable(lines_of({code})); }

std::string lines_here() {
  void* frames[32];
  const int count = backtrace(frames, 32);
  // Those of other libraries would be looked up in vain.
  std::vector<const void*> code;
  Dl_info mine, other;
  if (dladdr(reinterpret_cast<const void*>(&lines_here), &mine) == 0) return "";
  for (int k = 0; k < count; ++k) {
    if (dladdr(frames[k], &other) != 0 && other.dli_fbase == mine.dli_fbase) code.push_back(frames[k]);
  }
  return readable(lines_of(code));
}

}  // namespace emulator
}  // namespace gpu
}  // namespace r1k

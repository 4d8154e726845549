// Where kernels run: a device of which the library knows a few numbers, and a stream.  Plain C++, for bindings.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <tuple>

namespace r1k {
namespace gpu {

struct Properties {
  int major, minor;         // compute capability
  int processors;           // streaming multiprocessors
  size_t shared_per_block;  // bytes a block can ask for

  bool operator<(const Properties& other) const {
    return std::tie(major, minor, processors, shared_per_block) <
           std::tie(other.major, other.minor, other.processors, other.shared_per_block);
  }
};

struct Stream {
  void* handle;  // cudaStream_t
  int device;
  Properties properties;
};

// Makes a device current in this thread, and the one before it again when it goes.  Throws what `missing` would say.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int previous_;
};

// The stream that torch is using on a device, which is current.
Stream current_stream(int device);

// What the kernels of this build are compiled for, as "sm_80 sm_90a compute_90".
const char* architectures();

// Why no kernel of this build can run on a device, with the remedy; empty where they can.
std::string missing(int device);

}  // namespace gpu
}  // namespace r1k

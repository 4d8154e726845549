// csrc/cuda/stream.h of the emulated device.
#include "cuda/stream.h"

#include "emulator.h"

namespace r1k {
namespace gpu {
namespace {

Properties device = {9, 0, 4, 227 * 1024};

}  // namespace

OnDevice::OnDevice(int) : previous_(0) {}
OnDevice::~OnDevice() {}
Stream current_stream(int) { return {nullptr, 0, device}; }
std::string missing(int) { return ""; }

}  // namespace gpu
}  // namespace r1k

extern "C" __attribute__((visibility("default"))) void r1k_emulator_properties(int major, int minor, int processors,
                                                                               size_t shared_per_block) {
  r1k::gpu::device = {major, minor, processors, shared_per_block};
}

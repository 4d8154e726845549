// The device and the stream that kernels are launched on.  torch's own functions are looked up when the first kernel
// runs, and the driver is asked when somebody wants to know: importing the extension touches neither.

#include <dlfcn.h>

#include <array>
#include <mutex>

#include "cuda/architectures.h"
#include "cuda/launch.cuh"

namespace r1k {
namespace gpu {
namespace {

constexpr int kMostDevices = 64;
constexpr int kNothingToRestore = -1;

struct Device {
  std::once_flag asked;
  Properties properties = {};
  std::string missing;
};

std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

// Why there is no device to ask; `status` is what counting them came to.
std::string no_devices(cudaError_t status) {
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  if (driver == 0) return "no NVIDIA driver is installed; install one for CUDA " + version(runtime) + " or newer";
  if (status == cudaErrorInsufficientDriver) {
    return "the NVIDIA driver is one for CUDA " + version(driver) + ", too old for these kernels of CUDA " +
           version(runtime) + "; update it, or use Triton (pip install triton, R1KERNELS_BACKEND=triton)";
  }
  if (status == cudaErrorNoDevice) return "the NVIDIA driver sees no GPU; CUDA_VISIBLE_DEVICES may hide it";
  return std::string("CUDA cannot be used: ") + cudaGetErrorString(status);
}

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, index), "cudaDeviceGetAttribute");
  return value;
}

// Makes no context: a process that uses one of many devices shall not take memory on the others.
std::string ask(int index, Properties& properties) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) return no_devices(status);
  if (index >= count) return "there is no GPU " + std::to_string(index) + " among " + std::to_string(count);
  properties.major = attribute(cudaDevAttrComputeCapabilityMajor, index);
  properties.minor = attribute(cudaDevAttrComputeCapabilityMinor, index);
  properties.processors = attribute(cudaDevAttrMultiProcessorCount, index);
  properties.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  if (serves(architectures(), properties.major, properties.minor)) return "";

  cudaDeviceProp device = {};
  check(cudaGetDeviceProperties(&device, index), "cudaGetDeviceProperties");
  const std::string is = std::string(device.name) + " is sm_" + std::to_string(properties.major) +
                         std::to_string(properties.minor) + ", ";
  if (properties.major < 8) return is + "expected sm_80 or newer; R1KERNELS_BACKEND=reference runs plain PyTorch";
  return is + "for which this build has no code (" + architectures() +
         "); build it with R1KERNELS_CUDA_ARCHS=" + std::to_string(properties.major) +
         std::to_string(properties.minor) + ", or use R1KERNELS_BACKEND=triton";
}

const Device& device_at(int index) {
  static std::array<Device, kMostDevices> devices;
  Device& device = devices.at(index);
  std::call_once(device.asked, [&] {
    try {
      device.missing = ask(index, device.properties);
    } catch (const std::exception& error) {
      device.missing = error.what();
    }
    cudaGetLastError();  // what failed here is no error of the next launch
  });
  return device;
}

// aoti_torch_get_current_cuda_stream of torch's C interface, which a torch without CUDA does not have.
using CurrentStream = int32_t (*)(int32_t device, void** stream);

CurrentStream torch_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_NOW);
  void* function = library != nullptr ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
  if (function == nullptr) throw std::runtime_error("this torch has no CUDA streams; install one built with CUDA");
  return reinterpret_cast<CurrentStream>(function);
}

}  // namespace

const char* architectures() { return R1K_CUDA_ARCHITECTURES; }

std::string missing(int device) {
  if (device < 0 || device >= kMostDevices) return "there is no GPU " + std::to_string(device);
  return device_at(device).missing;
}

OnDevice::OnDevice(int device) {
  const std::string why = missing(device);
  if (!why.empty()) throw std::runtime_error("no CUDA kernel can run: " + why);
  check(cudaGetDevice(&previous_), "cudaGetDevice");
  if (previous_ == device) {
    previous_ = kNothingToRestore;
  } else {
    check(cudaSetDevice(device), "cudaSetDevice");
  }
}

OnDevice::~OnDevice() {
  if (previous_ != kNothingToRestore) cudaSetDevice(previous_);
}

Stream current_stream(int device) {
  static const CurrentStream current = torch_current_stream();  // looked up again if that threw
  Stream stream = {nullptr, device, device_at(device).properties};
  if (current(device, &stream.handle) != 0) throw std::runtime_error("torch has no current CUDA stream");
  return stream;
}

}  // namespace gpu
}  // namespace r1k

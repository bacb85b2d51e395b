// Errors, the one device, and the checks of a launch.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#include "block.h"
#include "cuda_runtime.h"
#include "emulation.h"
#include "runtime.h"

namespace weft_emulation {
namespace {

constexpr int kShared = 48 << 10, kSharedOptIn = 232448, kSharedReserved = 1 << 10, kSharedTotal = 233472;
constexpr int kThreads = 1024, kThreadsTotal = 2048, kBlocksTotal = 32;
constexpr dim3 kLargestBlock(1024, 1024, 64), kLargestGrid(0x7fffffff, 65535, 65535);

struct {
  int major = 9, minor = 0;
} compute_capability;
std::atomic<bool> cudnn = true;

struct ErrorText {
  cudaError_t error;
  const char *name, *text;
};
#define WEFT_ERROR(code, text) {code, #code, text}
constexpr ErrorText kErrors[] = {
    WEFT_ERROR(cudaSuccess, "no error"),
    WEFT_ERROR(cudaErrorInvalidValue, "invalid argument"),
    WEFT_ERROR(cudaErrorMemoryAllocation, "out of memory"),
    WEFT_ERROR(cudaErrorInitializationError, "initialization error"),
    WEFT_ERROR(cudaErrorInvalidConfiguration, "invalid configuration argument"),
    WEFT_ERROR(cudaErrorInvalidDevicePointer, "invalid device pointer"),
    WEFT_ERROR(cudaErrorInsufficientDriver, "CUDA driver version is insufficient for CUDA runtime version"),
    WEFT_ERROR(cudaErrorInvalidDeviceFunction, "invalid device function"),
    WEFT_ERROR(cudaErrorNoDevice, "no CUDA-capable device is detected"),
    WEFT_ERROR(cudaErrorInvalidDevice, "invalid device ordinal"),
    WEFT_ERROR(cudaErrorNoKernelImageForDevice, "no kernel image is available for execution on the device"),
    WEFT_ERROR(cudaErrorInvalidResourceHandle, "invalid resource handle"),
    WEFT_ERROR(cudaErrorIllegalState, "the operation cannot be performed in the present state"),
    WEFT_ERROR(cudaErrorNotReady, "device not ready"),
    WEFT_ERROR(cudaErrorIllegalAddress, "an illegal memory access was encountered"),
    WEFT_ERROR(cudaErrorLaunchOutOfResources, "too many resources requested for launch"),
    WEFT_ERROR(cudaErrorLaunchTimeout, "the launch timed out and was terminated"),
    WEFT_ERROR(cudaErrorAssert, "device-side assert triggered"),
    WEFT_ERROR(cudaErrorMisalignedAddress, "misaligned address"),
    WEFT_ERROR(cudaErrorLaunchFailure, "unspecified launch failure"),
    WEFT_ERROR(cudaErrorNotPermitted, "operation not permitted"),
    WEFT_ERROR(cudaErrorNotSupported, "operation not supported"),
    WEFT_ERROR(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing"),
    WEFT_ERROR(cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture"),
    WEFT_ERROR(cudaErrorStreamCaptureMerge, "operation would result in a merge of separate capture sequences"),
    WEFT_ERROR(cudaErrorStreamCaptureUnmatched, "capture was not ended in the same stream as it began"),
    WEFT_ERROR(cudaErrorStreamCaptureUnjoined, "capturing stream has unjoined work"),
    WEFT_ERROR(cudaErrorStreamCaptureIsolation, "dependency created on uncaptured work in another stream"),
    WEFT_ERROR(cudaErrorStreamCaptureImplicit,
               "operation would make the legacy stream depend on a capturing blocking stream"),
    WEFT_ERROR(cudaErrorCapturedEvent, "operation not permitted on an event last recorded in a capturing stream"),
    WEFT_ERROR(cudaErrorStreamCaptureWrongThread,
               "attempt to terminate a thread-local capture sequence from another thread"),
    WEFT_ERROR(cudaErrorUnknown, "unknown error"),
};
#undef WEFT_ERROR

const ErrorText* find(cudaError_t error) {
  const auto* found =
      std::find_if(std::begin(kErrors), std::end(kErrors), [&](const ErrorText& e) { return e.error == error; });
  return found == std::end(kErrors) ? nullptr : found;
}

constinit thread_local cudaError_t last_error = cudaSuccess;

std::mutex kernels_mutex;
std::map<const void*, int>& shared_limits() {
  static std::map<const void*, int> limits;
  return limits;
}

int shared_limit(const void* kernel) {
  const std::lock_guard lock(kernels_mutex);
  const auto found = shared_limits().find(kernel);
  return found == shared_limits().end() ? kShared : found->second;
}

bool fits(const dim3& size, const dim3& largest) {
  return size.x >= 1 && size.y >= 1 && size.z >= 1 && size.x <= largest.x && size.y <= largest.y && size.z <= largest.z;
}

cudaError_t check_attributes(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative && attribute.val.cooperative) return cudaErrorNotSupported;
    const auto& cluster = attribute.val.clusterDim;
    if (attribute.id == cudaLaunchAttributeClusterDimension && cluster.x * cluster.y * cluster.z != 1)
      return cudaErrorNotSupported;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, std::function<void()> thread) {
  if (kernel == nullptr) return result(cudaErrorInvalidDeviceFunction);
  const dim3 grid = config.gridDim, block = config.blockDim;
  if (!fits(grid, kLargestGrid) || !fits(block, kLargestBlock) || uint64_t{block.x} * block.y * block.z > kThreads) {
    return result(cudaErrorInvalidConfiguration);
  }
  if (config.dynamicSmemBytes > static_cast<size_t>(shared_limit(kernel))) return result(cudaErrorInvalidValue);
  if (const cudaError_t error = check_attributes(config); error != cudaSuccess) return result(error);
  return submit(config.stream, [grid, block, bytes = config.dynamicSmemBytes, thread = std::move(thread)] {
    run_grid(grid, block, bytes, thread);
  });
}

}  // namespace weft_emulation

using weft_emulation::result;

const char* cudaGetErrorName(cudaError_t error) {
  const auto* found = weft_emulation::find(error);
  return found ? found->name : "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t error) {
  const auto* found = weft_emulation::find(error);
  return found ? found->text : "unrecognized error code";
}
cudaError_t cudaGetLastError() { return std::exchange(weft_emulation::last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return weft_emulation::last_error; }

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
void weft_emulation::set_compute_capability(int major, int minor) { compute_capability = {major, minor}; }
void weft_emulation::set_cudnn(bool there) { cudnn = there; }
bool weft_emulation::has_cudnn() { return cudnn; }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return result(device == 0 ? cudaSuccess : cudaErrorInvalidDevice); }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  using namespace weft_emulation;
  if (device != 0) return result(cudaErrorInvalidDevice);
  cudaDeviceProp p = {};
  std::strcpy(p.name, "emulated device");
  p.totalGlobalMem = size_t{4} << 30;
  p.sharedMemPerBlock = kShared;
  p.sharedMemPerBlockOptin = kSharedOptIn;
  p.sharedMemPerMultiprocessor = kSharedTotal;
  p.reservedSharedMemPerBlock = kSharedReserved;
  p.regsPerBlock = p.regsPerMultiprocessor = 65536;
  p.warpSize = 32;
  p.maxThreadsPerBlock = kThreads;
  p.maxThreadsPerMultiProcessor = kThreadsTotal;
  p.maxBlocksPerMultiProcessor = kBlocksTotal;
  const unsigned block[] = {kLargestBlock.x, kLargestBlock.y, kLargestBlock.z};
  const unsigned grid[] = {kLargestGrid.x, kLargestGrid.y, kLargestGrid.z};
  std::copy(std::begin(block), std::end(block), p.maxThreadsDim);
  std::copy(std::begin(grid), std::end(grid), p.maxGridSize);
  p.totalConstMem = 64 << 10;
  p.major = compute_capability.major;
  p.minor = compute_capability.minor;
  p.multiProcessorCount = 4;
  p.canMapHostMemory = p.concurrentKernels = p.unifiedAddressing = 1;
  p.asyncEngineCount = 1;
  p.memoryBusWidth = 256;
  p.l2CacheSize = 4 << 20;
  *properties = p;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* address, int bytes, int device) {
  constexpr char kAddress[] = "ffff:ff:1f.0";  // of no device that a machine may have besides
  if (device != 0) return result(cudaErrorInvalidDevice);
  if (address == nullptr || bytes < static_cast<int>(sizeof kAddress)) return result(cudaErrorInvalidValue);
  std::memcpy(address, kAddress, sizeof kAddress);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp p;
  if (const cudaError_t error = cudaGetDeviceProperties(&p, device); error != cudaSuccess) return error;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = p.maxThreadsPerBlock;
      break;
    case cudaDevAttrMaxBlockDimX:
      *value = p.maxThreadsDim[0];
      break;
    case cudaDevAttrMaxBlockDimY:
      *value = p.maxThreadsDim[1];
      break;
    case cudaDevAttrMaxBlockDimZ:
      *value = p.maxThreadsDim[2];
      break;
    case cudaDevAttrMaxGridDimX:
      *value = p.maxGridSize[0];
      break;
    case cudaDevAttrMaxGridDimY:
      *value = p.maxGridSize[1];
      break;
    case cudaDevAttrMaxGridDimZ:
      *value = p.maxGridSize[2];
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = static_cast<int>(p.sharedMemPerBlock);
      break;
    case cudaDevAttrWarpSize:
      *value = p.warpSize;
      break;
    case cudaDevAttrMaxRegistersPerBlock:
      *value = p.regsPerBlock;
      break;
    case cudaDevAttrClockRate:
      *value = 1000000;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = p.multiProcessorCount;
      break;
    case cudaDevAttrMemoryClockRate:
      *value = 1000000;
      break;
    case cudaDevAttrGlobalMemoryBusWidth:
      *value = p.memoryBusWidth;
      break;
    case cudaDevAttrL2CacheSize:
      *value = p.l2CacheSize;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = p.maxThreadsPerMultiProcessor;
      break;
    case cudaDevAttrUnifiedAddressing:
      *value = p.unifiedAddressing;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = p.major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = p.minor;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(p.sharedMemPerMultiprocessor);
      break;
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      *value = p.regsPerMultiprocessor;
      break;
    case cudaDevAttrCooperativeLaunch:
      *value = p.cooperativeLaunch;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(p.sharedMemPerBlockOptin);
      break;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      *value = p.maxBlocksPerMultiProcessor;
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = static_cast<int>(p.reservedSharedMemPerBlock);
      break;
    case cudaDevAttrMemoryPoolsSupported:
      *value = p.memoryPoolsSupported;
      break;
    case cudaDevAttrClusterLaunch:
      *value = p.clusterLaunch;
      break;
    default:
      return result(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  using namespace weft_emulation;
  if (kernel == nullptr) return result(cudaErrorInvalidDeviceFunction);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > kSharedOptIn) return result(cudaErrorInvalidValue);
  const std::lock_guard lock(kernels_mutex);
  shared_limits()[kernel] = value;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int block_size,
                                                          size_t dynamic_shared_bytes) {
  using namespace weft_emulation;
  if (kernel == nullptr) return result(cudaErrorInvalidDeviceFunction);
  if (block_size < 1) return result(cudaErrorInvalidValue);
  const int warps = (block_size + 31) / 32;
  const size_t by_shared = kSharedTotal / (dynamic_shared_bytes + kSharedReserved);
  const bool runs = block_size <= kThreads && dynamic_shared_bytes <= static_cast<size_t>(shared_limit(kernel));
  *blocks = runs ? std::min({kBlocksTotal, kThreadsTotal / 32 / warps, static_cast<int>(by_shared)}) : 0;
  return cudaSuccess;
}

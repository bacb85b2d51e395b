// What `weft doctor` tells of CUDA.
#include <cuda_runtime.h>

#include <string>

#include "core/device_report.h"
#include "core/error.h"
#include "core/memory.h"
#include "cuda/cudnn_sdpa.h"
#include "cuda/error.h"
#include "cuda/library_version.h"
#include "cuda/nvml.h"

namespace weft {
namespace {

/// CUDA's 13020 as "13.2".
std::string cuda_version(int version) { return concat(version / 1000, '.', version % 1000 / 10); }

/// The value, or what CUDA says instead of it. The error is cleared: a report changes nothing.
template <class Text>
std::string fact(cudaError_t status, Text&& text) {
  if (status == cudaSuccess) return text();
  cudaGetLastError();
  return concat("unknown: ", cudaGetErrorName(status));
}

std::string driver(const cuda::Nvml& nvml) {
  int newest = 0;
  const cudaError_t status = cudaDriverGetVersion(&newest);
  const std::string text = fact(status, [&] {
    return newest == 0 ? std::string("none on this machine") : concat("for CUDA up to ", cuda_version(newest));
  });
  const std::optional<std::string> version = nvml.driver_version();
  return version ? concat(*version, ", ", text) : text;
}

std::string cublaslt() {
  try {
    return cuda::cublaslt_version();
  } catch (const Error& error) {
    return concat("unusable: ", error.what());
  }
}

DeviceReport::Facts device_facts(int index, const cuda::Nvml& nvml) {
  DeviceReport::Facts facts;
  cudaDeviceProp properties{};
  const cudaError_t status = cudaGetDeviceProperties(&properties, index);
  facts.emplace_back("name", fact(status, [&] { return std::string(properties.name); }));
  if (status != cudaSuccess) return facts;
  facts.emplace_back("compute capability", concat(properties.major, '.', properties.minor));
  facts.emplace_back("multiprocessors", concat(properties.multiProcessorCount));
  size_t free = 0, total = 0;
  cudaError_t memory = cudaSetDevice(index);
  if (memory == cudaSuccess) memory = cudaMemGetInfo(&free, &total);
  facts.emplace_back("memory", fact(memory, [&] {
                       return concat(human_bytes(static_cast<int64_t>(total)), ", ",
                                     human_bytes(static_cast<int64_t>(free)), " free");
                     }));
  facts.emplace_back("L2 cache", human_bytes(properties.l2CacheSize));
  facts.emplace_back("ECC", properties.ECCEnabled != 0 ? "on" : "off");
  char address[32] = "";
  const cudaError_t found = cudaDeviceGetPCIBusId(address, sizeof address, index);
  facts.emplace_back("PCI address", fact(found, [&] { return std::string(address); }));
  facts.emplace_back("clocks", nvml.state(address).value_or("unknown: the driver's management library tells none"));
  return facts;
}

}  // namespace

DeviceReport cuda_report() {
  DeviceReport report;
  const cuda::Nvml nvml;
  report.backend.emplace_back(
      "compiled for", concat("CUDA ", cuda_version(CUDART_VERSION), ", device code for ", WEFT_CUDA_ARCHITECTURES));
  report.backend.emplace_back("driver", driver(nvml));
  int version = 0;
  const cudaError_t status = cudaRuntimeGetVersion(&version);
  report.backend.emplace_back("runtime", fact(status, [&] { return cuda_version(version); }));
  report.backend.emplace_back("cuBLASLt", cublaslt());
  report.backend.emplace_back("cuDNN", cuda::describe_cudnn());
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    count = 0;
  }
  int current = 0;
  if (count > 0) WEFT_CUDA(cudaGetDevice(&current));
  for (int i = 0; i < count; ++i) report.devices.push_back(device_facts(i, nvml));
  if (count > 0) WEFT_CUDA(cudaSetDevice(current));
  return report;
}

}  // namespace weft

// The CUDA backend: memory, copies and casts of the tensor runtime.
#include "core/backend.h"

#include <cuda_runtime.h>

#include <mutex>
#include <string>

#include "core/error.h"
#include "cuda/context.h"
#include "cuda/error.h"
#include "cuda/graph.h"
#include "cuda/event.h"
#include "cuda/staging.h"
#include "cuda/strided.h"
#include "ops/reduce_kernels.h"

namespace weft {
namespace {

/// A place in a stream.
class CudaEvent final : public Backend::Event {
 public:
  explicit CudaEvent(cudaStream_t stream) {
    WEFT_CUDA(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming));
    WEFT_CUDA(cudaEventRecord(event_, stream));
  }
  ~CudaEvent() override { cudaEventDestroy(event_); }
  void hold_up(cudaStream_t stream) const { WEFT_CUDA(cudaStreamWaitEvent(stream, event_, 0)); }

 private:
  cudaEvent_t event_ = nullptr;
};

class CudaBackend : public Backend {
 public:
  explicit CudaBackend(int index) : context_(index) {}

  std::string name() const override {
    cudaDeviceProp properties{};
    WEFT_CUDA(cudaGetDeviceProperties(&properties, context_.index));
    return properties.name;
  }

  void* use() override {
    context_.use();
    return context_.stream;
  }

  void* system_allocate(size_t bytes) override {
    context_.use();
    void* data = nullptr;
    const cuda::AllowWhileCapturing allow;
    const cudaError_t status = cudaMalloc(&data, bytes);
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      return nullptr;
    }
    WEFT_CUDA(status);
    return data;
  }
  // cudaFree waits for the device: what is queued may still use the memory.
  void system_free(void* data, size_t) override {
    context_.use();
    WEFT_CUDA(cudaFree(data));
  }

  MemorySize memory() override {
    context_.use();
    size_t free = 0, total = 0;
    WEFT_CUDA(cudaMemGetInfo(&free, &total));
    return {static_cast<int64_t>(free), static_cast<int64_t>(total)};
  }
  void* host_allocate(size_t bytes) override {
    context_.use();
    void* data = nullptr;
    const cudaError_t status = cudaHostAlloc(&data, bytes, cudaHostAllocDefault);
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      return nullptr;
    }
    WEFT_CUDA(status);
    return data;
  }
  void host_free(void* data, size_t) override {
    synchronize();  // a copy may be under way
    WEFT_CUDA(cudaFreeHost(data));
  }
  std::shared_ptr<Event> copy_async(void* dst, const void* src, size_t bytes, Direction direction,
                                    const Event* after) override {
    context_.use();
    const bool to_host = direction == Direction::kToHost;
    const cudaStream_t stream = context_.copies[to_host ? 0 : 1];
    CudaEvent(context_.stream).hold_up(stream);
    if (after != nullptr) static_cast<const CudaEvent*>(after)->hold_up(stream);
    WEFT_CUDA(cudaMemcpyAsync(dst, src, bytes, to_host ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice, stream));
    return std::make_shared<CudaEvent>(stream);
  }
  void wait(const Event& event) override {
    context_.use();
    static_cast<const CudaEvent&>(event).hold_up(context_.stream);
  }

  void copy(const StridedView& dst, const StridedView& src) override { cuda::copy(queue("copy"), dst, src); }
  void fill(const StridedView& dst, double value) override { cuda::fill(queue("fill"), dst, value); }
  void add(const StridedView& dst, const StridedView& src) override { cuda::add(queue("accumulate"), dst, src); }
  void sum_broadcast(const StridedView& dst, const StridedView& src) override {
    sum_over(queue("sum_broadcast"), dst, src, 1);
  }

  void to_device(void* dst, const void* src, size_t bytes) override {
    context_.refuse_while_capturing("sends values to the device");
    context_.use();
    if (bytes <= cuda::Staging::kSlotBytes) {
      const std::lock_guard lock(staging_mutex_);
      return staging_.copy(dst, src, bytes, context_.stream);
    }
    WEFT_CUDA(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyHostToDevice, context_.stream));
    context_.synchronize();
  }
  void to_host(void* dst, const void* src, size_t bytes) override {
    context_.refuse_while_capturing("reads values of the device");
    context_.use();
    WEFT_CUDA(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, context_.stream));
    context_.synchronize();
  }
  void synchronize() override {
    context_.refuse_while_capturing("waits for the device");
    context_.use();
    for (const cudaStream_t copy : context_.copies) WEFT_CUDA(cudaStreamSynchronize(copy));
    context_.synchronize();
  }
  std::unique_ptr<Graph> capture(const std::function<void()>& queue) override { return cuda::capture(context_, queue); }
  double seconds_of(const std::function<void()>& work) override {
    context_.use();
    const cuda::Event begin, end;
    WEFT_CUDA(cudaEventRecord(begin.get(), context_.stream));
    work();
    context_.use();
    WEFT_CUDA(cudaEventRecord(end.get(), context_.stream));
    context_.synchronize();
    return begin.seconds_until(end);
  }

 private:
  Cuda queue(const char* op) { return {use(), op}; }

  cuda::Context context_;
  std::mutex staging_mutex_;
  cuda::Staging staging_;
};

/// Number of devices, or what the driver says instead.
int device_count(std::string& why) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && count > 0) return count;
  cudaGetLastError();
  why = status == cudaSuccess || status == cudaErrorNoDevice ? "this machine has no CUDA device"
        : status == cudaErrorInsufficientDriver
            ? "this machine has no CUDA driver, or one that is older than this build's CUDA"
            : std::string("CUDA says ") + cudaGetErrorName(status) + ": " + cudaGetErrorString(status);
  return 0;
}

struct Devices {
  Devices() { count = device_count(why); }
  int count = 0;
  std::string why;
};
const Devices& devices() {
  static const Devices& all = *new Devices;
  return all;
}

}  // namespace

std::unique_ptr<Backend> make_cuda_backend(int index) {
  if (index < 0 || index >= devices().count) return nullptr;
  return std::make_unique<CudaBackend>(index);
}

const char* why_no_cuda() { return devices().why.c_str(); }

}  // namespace weft

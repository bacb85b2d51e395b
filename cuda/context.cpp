#include "cuda/context.h"

#include <array>
#include <atomic>

#include "core/error.h"
#include "cuda/cublaslt_library.h"
#include "cuda/error.h"
#include "cuda/fault.h"

namespace weft::cuda {
namespace {

constexpr int kMostDevices = 64;
std::array<std::atomic<Context*>, kMostDevices> contexts;

}  // namespace

Context::Context(int i) : index(i) {
  if (i >= kMostDevices) fail(ErrorKind::kDevice, "cuda", "devices are numbered up to ", kMostDevices - 1, ", got ", i);
  use();
  cudaDeviceProp properties{};
  WEFT_CUDA(cudaGetDeviceProperties(&properties, index));
  if (properties.major < 8) {
    fail(ErrorKind::kDevice, "cuda", properties.name, " has compute capability ", properties.major, '.',
         properties.minor, "; the kernels need 8.0 or newer (Ampere)");
  }
  multiprocessors = properties.multiProcessorCount;
  compute_capability = properties.major * 10 + properties.minor;
  WEFT_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  for (cudaStream_t& copy : copies) WEFT_CUDA(cudaStreamCreateWithFlags(&copy, cudaStreamNonBlocking));
  WEFT_CUDA(cudaHostAlloc(reinterpret_cast<void**>(&fault), sizeof(Fault), cudaHostAllocMapped));
  *fault = Fault{};
  if (cublaslt().Create(&blas) != CUBLAS_STATUS_SUCCESS)
    fail(ErrorKind::kDevice, "cuda", "cublasLtCreate failed on device ", index);
  WEFT_CUDA(cudaMalloc(&workspace, kWorkspace));
  struct {
    double wide[2] = {0, 1};
    float narrow[2] = {0, 1};
  } const constants;
  WEFT_CUDA(cudaMalloc(&constants_, sizeof constants));
  WEFT_CUDA(cudaMemcpy(constants_, &constants, sizeof constants, cudaMemcpyHostToDevice));
  contexts[static_cast<size_t>(index)] = this;
}

Context::~Context() {
  contexts[static_cast<size_t>(index)] = nullptr;
  cudaFree(constants_);
  cudaFree(workspace);
  cublaslt().Destroy(blas);
  cudaFreeHost(fault);
  for (const cudaStream_t copy : copies) cudaStreamDestroy(copy);
  cudaStreamDestroy(stream);
}

void Context::use() const {
  static thread_local int current = -1;  // the runtime's own look-up takes longer than a kernel's launch may cost
  if (current == index) return;
  WEFT_CUDA(cudaSetDevice(index));
  current = index;
}

void Context::refuse_while_capturing(const char* what) const {
  if (!capturing) return;
  fail(ErrorKind::kState, "capture", "the host ", what,
       " while a step is being recorded: a run of the recording would not do so again. Hint: cuda_graph off");
}

void Context::synchronize() {
  refuse_while_capturing("waits for the device");
  use();
  WEFT_CUDA(cudaStreamSynchronize(stream));
  if (fault->kind != Fault::kNone) throw_fault();
}

void Context::throw_fault() {
  const Fault found = *fault;
  *fault = Fault{};
  switch (found.kind) {
    case Fault::kOutside:
      fail(ErrorKind::kIndex, found.op, found.what, " element ", found.position, " is ", found.value,
           " but must be from 0 to ", found.limit - 1,
           " (found on the device by work queued earlier, whose results are not to be used)");
    default:
      fail(ErrorKind::kValue, found.op, "the mean is over valid tokens, but none of the ", found.limit,
           " targets is valid (found on the device by work queued earlier). Hint: Reduction::kSum, or valid_tokens of "
           "the whole batch");
  }
}

Context& current_context() {
  int index = 0;
  WEFT_CUDA(cudaGetDevice(&index));
  Context* context = contexts[static_cast<size_t>(index)];
  if (context == nullptr) fail(ErrorKind::kState, "cuda", "device ", index, " is current but has no context");
  return *context;
}

}  // namespace weft::cuda

#pragma once
#include <cublasLt.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace weft::cuda {

struct Fault;

/// What belongs to one device for as long as the program runs.
class Context {
 public:
  /// @throws Error kDevice naming the call of CUDA that failed.
  explicit Context(int index);
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
  ~Context();

  /// Makes this the calling thread's current device.
  void use() const;
  /// Waits for all queued work. @throws Error if the device failed, or for the input that a kernel reported; kState
  /// while work is being recorded.
  void synchronize();
  /// @throws Error kState while work is being recorded, in which the host can take no part.
  void refuse_while_capturing(const char* what) const;

  const int index;
  cudaStream_t stream = nullptr;
  cudaStream_t copies[2] = {};  ///< beside it: copies to the host, copies to the device
  cublasLtHandle_t blas = nullptr;
  bool capturing = false;     ///< the stream's work is being recorded (cuda/graph.h)
  void* workspace = nullptr;  ///< for one kernel or product at a time, in the order of the stream
  Fault* fault = nullptr;     ///< written by kernels
  /// {0, 1} in the device's memory, as double or float: factors for products whose other factor lies there.
  const void* zero_and_one(bool as_double) const {
    return static_cast<const char*>(constants_) + (as_double ? 0 : 2 * sizeof(double));
  }
  int multiprocessors = 0;
  int compute_capability = 0;  ///< major * 10 + minor
  static constexpr size_t kWorkspace = size_t{32} << 20;

 private:
  void throw_fault();

  void* constants_ = nullptr;
};

/// The context of the calling thread's current device, which Context::use() has chosen.
Context& current_context();

}  // namespace weft::cuda

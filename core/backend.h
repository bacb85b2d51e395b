#pragma once
#include <cstddef>
#include <memory>
#include <string>

#include "core/device.h"
#include "core/dtype.h"
#include "core/shape.h"

namespace weft {

/// A region of device memory read or written as a strided array; strides are in elements, 0 repeats.
struct StridedView {
  void* data = nullptr;
  Shape shape;
  Strides strides;
  DType dtype = DType::f32;
};

/// What the tensor runtime asks of a device. Calls may return before the work is done; work on one device is ordered.
class Backend {
 public:
  virtual ~Backend() = default;
  /// What the device calls itself: "AMD EPYC 9654", "NVIDIA H200".
  virtual std::string name() const = 0;
  /// Memory from the system, aligned to 64 bytes; null if there is none left.
  virtual void* system_allocate(size_t bytes) = 0;
  virtual void system_free(void* data, size_t bytes) = 0;
  /// dst = cast(src), same shape. A cast to an integer truncates towards zero and saturates, NaN gives 0; to bool it
  /// tests for non-zero; to a float it rounds once, to nearest even. dst and src must not overlap.
  virtual void copy(const StridedView& dst, const StridedView& src) = 0;
  virtual void fill(const StridedView& dst, double value) = 0;
  /// dst += src, same shape and float dtype, each sum rounded once to the dtype.
  virtual void add(const StridedView& dst, const StridedView& src) = 0;
  /// dst = sum of src over the dimensions in which dst has stride 0; same shape (dst expanded), same float dtype.
  /// Accumulated in f64 in index order and rounded once.
  virtual void sum_broadcast(const StridedView& dst, const StridedView& src) = 0;
  /// Host bytes to the device and back; `bytes` of contiguous data. `src` may be used again, and `dst` of to_host()
  /// read, on return.
  virtual void to_device(void* dst, const void* src, size_t bytes) = 0;
  virtual void to_host(void* dst, const void* src, size_t bytes) = 0;
  /// Makes this the calling thread's current device; the stream of its kernels, or null where work is done on return.
  virtual void* use() { return nullptr; }
  /// Returns when all work is done. This and to_host() throw what a kernel found wrong with its input
  /// meanwhile (an index out of range, say): such a kernel leaves the element at fault alone.
  virtual void synchronize() = 0;
};

/// The backend of a device. @throws Error kDevice if this build or machine has no such device.
Backend& backend(Device device);

/// The CUDA backend of a device, or null where this build or machine has none. Defined by cuda/ or its stub.
std::unique_ptr<Backend> make_cuda_backend(int index);
/// Why make_cuda_backend gives null, or "" if it does not.
const char* why_no_cuda();

}  // namespace weft

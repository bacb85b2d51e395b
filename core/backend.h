#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
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

/// Bytes of a device's memory, or of what this process may have of the host's.
struct MemorySize {
  int64_t free = 0;
  int64_t total = 0;
};

/// Work of a device that was recorded once and is queued as a whole, as often as one likes. It reads what its memory
/// holds then: every host value that it took was frozen when it was recorded, so that what changes from run to run must
/// come from the device's memory.
class Graph {
 public:
  virtual ~Graph() = default;
  /// Queues it. @throws Error kState where taken() is not 0.
  virtual void launch() = 0;
  /// Bytes that its temporaries had and others hold now (ReplayMemory): then it has to be recorded again.
  virtual int64_t taken() const = 0;
};

/// What the tensor runtime asks of a device. Calls may return before the work is done; work on one device is ordered,
/// but for that of copy_async().
class Backend {
 public:
  virtual ~Backend() = default;
  /// What the device calls itself: "AMD EPYC 9654", "NVIDIA H200".
  virtual std::string name() const = 0;
  /// Memory from the system, aligned to 64 bytes; null if there is none left.
  virtual void* system_allocate(size_t bytes) = 0;
  virtual void system_free(void* data, size_t bytes) = 0;
  /// What is free for this process and what there is; 0 for what cannot be told.
  virtual MemorySize memory() = 0;
  /// Host memory that the device copies from and to while the host goes on; null if there is none left.
  virtual void* host_allocate(size_t bytes) = 0;
  virtual void host_free(void* data, size_t bytes) = 0;
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
  enum class Direction : uint8_t { kToHost, kToDevice };
  /// A point in the device's work.
  class Event {
   public:
    virtual ~Event() = default;
  };
  /// Queues a copy between host_allocate()'s memory and the device's beside the device's other work, on one queue for
  /// each direction. It begins when all work queued before this call, and what `after` stands for (may be null), is
  /// done; work queued later does not wait for it unless wait() says so. The answer stands for its end.
  ///
  /// So a copy reads what earlier work wrote, and may write where earlier work reads. What the caller must see to: both
  /// places belong to the copy until wait() was called for it. Memory is given back to an allocator, which hands it to
  /// work queued later, after that call, not before; nor may the host read the one or write the other before
  /// synchronize().
  virtual std::shared_ptr<Event> copy_async(void* dst, const void* src, size_t bytes, Direction direction,
                                            const Event* after = nullptr) = 0;
  /// Work queued from now on, copies among it, begins after the event. The host does not wait.
  virtual void wait(const Event& event) = 0;
  /// Makes this the calling thread's current device; the stream of its kernels, or null where work is done on return.
  virtual void* use() { return nullptr; }
  /// Returns when all work, copies among it, is done. This and to_host() throw what a kernel found wrong with its input
  /// meanwhile (an index out of range, say): such a kernel leaves the element at fault alone.
  virtual void synchronize() = 0;
  /// Calls queue() and records the work that this thread queues in it, instead of doing it. Meanwhile whatever waits
  /// for the device or sends it values of the host is an Error kState; queue() should have run before, so that nothing
  /// is left to look up or to allocate. Tensors that outlive queue() keep their place. An exception of queue() passes,
  /// and nothing is recorded. @throws Error kDevice where the device cannot record.
  virtual std::unique_ptr<Graph> capture(const std::function<void()>& queue);
  /// Seconds that the device takes for what work() queues there, measured by the device's own clock where it has one;
  /// returns when that is done. Work queued earlier does not count.
  virtual double seconds_of(const std::function<void()>& work);
};

/// The backend of a device. @throws Error kDevice if this build or machine has no such device.
Backend& backend(Device device);

/// The CUDA backend of a device, or null where this build or machine has none. Defined by cuda/ or its stub.
std::unique_ptr<Backend> make_cuda_backend(int index);
/// Why make_cuda_backend gives null, or "" if it does not.
const char* why_no_cuda();

/// Names what the calling thread queues during its life for a profiler (NVTX). Costs next to nothing without one, and
/// is nothing without CUDA.
class Range {
 public:
  explicit Range(const char* name);
  ~Range();
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;
};

}  // namespace weft

#pragma once
#include <cstdint>
#include <type_traits>

namespace weft {

/// A reference to a callable that outlives the call it is passed to: no allocation, no ownership.
template <class Signature>
class FunctionRef;
template <class R, class... Args>
class FunctionRef<R(Args...)> {
 public:
  template <class F>
    requires(!std::is_same_v<std::remove_cvref_t<F>, FunctionRef>)
  FunctionRef(F&& f)  // NOLINT: implicit on purpose, a lambda is passed as it is
      : object_(const_cast<void*>(static_cast<const void*>(&f))), call_([](void* object, Args... args) -> R {
          return (*static_cast<std::remove_reference_t<F>*>(object))(args...);
        }) {}
  R operator()(Args... args) const { return call_(object_, args...); }

 private:
  void* object_;
  R (*call_)(void*, Args...);
};

/// Threads that kernels use, the calling thread included. First value: WEFT_NUM_THREADS if set, else the processors
/// that the affinity mask and the cgroup's CPU limit allow.
int num_threads();

/// Changes it; n >= 1. Must not be called while kernels run. No result depends on it.
void set_num_threads(int n);

/// Processors this process may use: affinity mask and cgroup (v1, v2) CPU quota, rounded up, at least 1.
int available_processors();

/// Calls task(i) for every i in [0, count), each once, on the pool's threads and the calling one; returns when all are
/// done. Which thread runs a task is not determined: a task's result must depend on i alone, which is what keeps
/// results bit-equal on any number of threads. The first exception thrown by a task is rethrown here. A call from
/// inside a task, or while another thread uses the pool, runs inline.
void parallel_tasks(int64_t count, FunctionRef<void(int64_t)> task);

/// Calls body(begin, end) over consecutive pieces of [0, count) of `grain` elements (the last may be shorter). Pieces
/// depend on count and grain only, never on the number of threads.
template <class Body>
void parallel_for(int64_t count, int64_t grain, Body&& body) {
  if (count <= 0) return;
  const int64_t pieces = (count + grain - 1) / grain;
  if (pieces == 1) return body(int64_t{0}, count);
  parallel_tasks(pieces, [&](int64_t piece) {
    const int64_t begin = piece * grain;
    body(begin, begin + grain < count ? begin + grain : count);
  });
}

}  // namespace weft

#pragma once
#include <functional>
#include <span>
#include <vector>

#include "core/tensor.h"
#include "optim/optimizer_kernels.h"

namespace weft::optim {

/// An optimizer's state in pinned host memory, which visits the device in pieces while an update needs it. A piece is
/// copied in while the one before it is updated and the one before that is copied out, on the two queues of
/// Backend::copy_async. Kernels see the same numbers in other places; those that work element by element give the same
/// bits, and tensors that they add up are not cut.
///
/// The device holds three pieces at a time: 3 * (2 or, with masters, 3) * piece elements, more if a tensor that is not
/// cut is larger than a piece.
class StateStream {
 public:
  /// What a parameter's state is; masters only where they are wanted.
  struct Wanted {
    Shape shape;
    bool master = false;
  };
  struct Slot {
    Tensor exp_avg, exp_avg_sq, master;
  };
  /// Moments are 0, masters unspecified. @param piece  elements, at least 1; rounded up to whole runs of 64 bytes
  StateStream(Device device, DType dtype, std::span<const Wanted> wanted, int64_t piece);

  /// The state of each parameter, on the CPU: parts of few large tensors.
  const std::vector<Slot>& slots() const { return slots_; }

  /// A tensor of an update, its state on the host. `whole`: it is not to be cut.
  struct Job {
    AdamTensor tensor;
    bool whole = false;
  };
  /// Elements `begin` on of jobs[job]: `tensor` has its state on the device.
  struct Part {
    size_t job;
    int64_t begin;
    AdamTensor tensor;
  };
  enum class Changes : uint8_t { kAll, kMasters };
  /// Calls update(parts) piece by piece and returns when what it changed is on the host.
  /// @param jobs  in the order of slots(); state that no job has stays as it is
  void run(std::span<const Job> jobs, Changes changes, const std::function<void(std::span<const Part>)>& update) const;

 private:
  struct Piece;
  std::vector<Piece> pieces(std::span<const Job> jobs) const;

  Device device_;
  DType dtype_;
  int64_t piece_;
  Tensor moments_, masters_;  // [2, elements], [elements]: the slots are parts of them
  std::vector<Slot> slots_;
};

}  // namespace weft::optim

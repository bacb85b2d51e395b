#pragma once
#include <cstdint>
#include <memory>

#include "core/autograd.h"

namespace weft::autograd {

/// Keeps what the rules of one forward pass save in pinned host memory until their backward pass. The pass is told in
/// groups, one after another (the blocks of a model):
///
///   Offload offload(1 << 20);
///   for (int i = 0; i < layers; ++i) {
///     const Offload::Group group(offload, i + 2 < layers);
///     x = block[i](x);
///   }
///
/// A tensor that a rule of a group saves is copied out beside the computation. Its memory on the device is given back
/// when the group after the next begins: the next one's work is what the copies hide behind. When a rule of group g
/// runs backward, the tensors of g are on the device or on their way, and those of g - 1 are sent for. So the device
/// holds two groups at a time, and the last two need not leave it. Same numbers, and no time of any copy decides what
/// is allocated when.
///
/// Only whole storages of CUDA devices that are counted as activations move, each once however many rules save it:
/// parameters stay, and so does what is on the CPU already. Changing one in place before its backward pass is an error,
/// as without.
///
/// Why no memory is used too early (Backend::copy_async): a copy begins after all work queued before it, so it reads
/// what was written, and writes where nobody reads any more. What it touches is given back only after the device's
/// queue was told to wait for it: on the way out at the beginning of a later group, on the way in before the first use,
/// and for whatever is dropped before that, when it is dropped.
class Offload {
 public:
  /// @param from  bytes of the smallest tensor that moves; smaller ones are not worth a copy
  explicit Offload(int64_t from);

  class Group {
   public:
    /// What this thread records while it lives is the next group. @param moves  false: its tensors stay on the device
    Group(Offload& offload, bool moves);

   private:
    SavedTensorHooks hooks_;
  };

 private:
  class State;
  std::shared_ptr<State> state_;
};

}  // namespace weft::autograd

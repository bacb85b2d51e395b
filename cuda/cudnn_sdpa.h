#pragma once
#include <array>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/dtype.h"

namespace weft::cuda {

class Context;

/// The tensors of scaled dot-product attention: [B, H or kv_heads, T, D] with any strides but 1 in the last dimension;
/// kLse is [B, H, T] in f32, row-major.
enum SdpaTensor : uint8_t { kQ, kK, kV, kOut, kLse, kDout, kDq, kDk, kDv, kSdpaTensors };

/// What a plan of cuDNN's depends on: one pass of attention of a sequence to itself.
struct Sdpa {
  struct Strides {
    int64_t batch = 0, head = 0, token = 0;  ///< in elements
    auto operator<=>(const Strides&) const = default;
  };
  bool backward = false;
  DType dtype = DType::bf16;  ///< bf16 or f16
  int64_t batch = 0, heads = 0, kv_heads = 0, tokens = 0, head_size = 0;
  bool causal = true;
  double scale = 1;
  std::array<Strides, kSdpaTensors> strides{};  ///< zero for kLse and for tensors of the other pass

  auto operator<=>(const Sdpa&) const = default;
};

using SdpaPointers = std::array<void*, kSdpaTensors>;

/// One pass as cuDNN computes it, with the same bits every time.
class SdpaPlan {
 public:
  virtual ~SdpaPlan() = default;
  /// Queues it on the stream of its context. @param tensors  null for those of the other pass. @param workspace  so
  /// many bytes of the device, for the work that is queued here.
  virtual void run(const SdpaPointers& tensors, void* workspace) = 0;
  size_t workspace = 0;
};

/// Why no plan can be made in this build or on this machine, whatever the shape; "" if plans can be made.
std::string why_no_cudnn();
/// Of the library that is loaded: "9.19.0".
std::string cudnn_version();
/// What was built in, what was found and what it is used for, for `weft doctor`.
std::string describe_cudnn();

/// @throws Error kDevice with cuDNN's own words where it has no plan for this.
std::unique_ptr<SdpaPlan> make_sdpa_plan(Context& context, const Sdpa& sdpa);

/// The names of cuDNN's plans, one at least supported, for a device that is described instead of there.
/// @param properties  in JSON, as CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION has it
/// @param compute_capability  major * 10 + minor
std::vector<std::string> sdpa_proposals(const Sdpa& sdpa, const std::string& properties, int compute_capability);

}  // namespace weft::cuda

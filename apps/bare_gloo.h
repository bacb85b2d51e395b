#pragma once
#include <cstdint>
#include <filesystem>
#include <memory>

namespace weft::apps {

/// Gloo's own collectives on plain buffers of floats, with connections of their own: what the collectives of
/// dist::gloo_group() are measured against.
class BareGloo {
 public:
  /// Connects `size` processes through files in `directory`. @throws Error kIo if that fails; kUsage if this build has
  /// no Gloo.
  BareGloo(int rank, int size, const std::filesystem::path& directory);
  ~BareGloo();

  /// data[i] = sum over ranks, in the order that suits Gloo.
  void all_reduce(float* data, int64_t elements);
  /// The first elements / size of data = this rank's part of the sum; the rest is overwritten.
  void reduce_scatter(float* data, int64_t elements);
  /// output[elements * size] = the inputs of all ranks.
  void all_gather(float* input, float* output, int64_t elements);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace weft::apps

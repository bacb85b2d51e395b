#pragma once
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "core/device.h"

// Which algorithm a GPU's library computes each product with. Without the functions below it is the library's own first
// choice, asked for once for each product, so that every run has the same bits. Choices that were timed and kept have
// the same property: runs that use the same ones have the same bits.

namespace weft {

/// The algorithm of one product.
struct GemmAlgorithm {
  std::string product;    ///< types, shape, layouts, epilogue, alignment: what the library's choice depends on
  std::string algorithm;  ///< the library's description of it, opaque, in hexadecimal digits
  double seconds = 0;     ///< of one call, when it was chosen
  double first_choice_seconds = 0;
  double flops = 0;  ///< of one call: 2 m n k for each product of a batch
  int64_t candidates = 0;
};

/// What choices hold for.
struct GemmLibrary {
  std::string device;   ///< "NVIDIA H200"
  std::string version;  ///< "cuBLASLt 13.0.2"
  bool operator==(const GemmLibrary&) const = default;
};

/// Of a CUDA device. @throws Error kDevice without one.
GemmLibrary gemm_library(Device device);

/// From now on, the device computes these products so, and others by the library's first choice; an empty list goes
/// back to that for all. @param from  where they were read, for messages
/// @throws Error kData for a description that has not the library's size. One that the library does not accept for its
///         product is an error (kData) of the product.
void use_gemm_algorithms(Device device, std::span<const GemmAlgorithm> algorithms, const std::string& from);

/// Distinct products that were queued since use_gemm_algorithms().
struct GemmAlgorithmUse {
  int64_t found = 0;
  std::vector<std::string> missing;  ///< computed by the library's first choice
};
GemmAlgorithmUse gemm_algorithm_use(Device device);

/// Runs work(), and chooses for each product that it queues on the device, the first time that it comes: every
/// candidate is timed on the product's own operands, in turns, medians of five, and the fastest taken. Candidates are
/// the library's first choice and those of its further proposals that add up each element in one sequence: not those
/// that split the sum and bring the parts together. The first choice stays unless another is faster by more than 1%,
/// which is noise. What work() computes is right. @param chosen  called for each product
std::vector<GemmAlgorithm> tune_gemm(Device device, const std::function<void()>& work,
                                     const std::function<void(const GemmAlgorithm&)>& chosen);

}  // namespace weft

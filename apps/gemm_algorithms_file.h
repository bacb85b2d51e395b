#pragma once
#include <span>
#include <string>

#include "core/device.h"
#include "ops/gemm_algorithms.h"

// The list of algorithms that `weft bench gemm --tune FILE` writes and --gemm-algorithms FILE reads: JSON, bound to the
// device's name and the library's version.

namespace weft::apps {

/// @param peak_flops  GEMM peak of the device, measured in the same run: what each entry's share is of
void write_gemm_algorithms_file(const std::string& path, const GemmLibrary& library,
                                std::span<const GemmAlgorithm> algorithms, double peak_flops);

/// Reads a file and gives its choices to the device. @throws Error kIo; kData with the place for a file that is no such
/// list, or one that was made on another device or with another version of the library.
void use_gemm_algorithms_file(Device device, const std::string& path);

}  // namespace weft::apps

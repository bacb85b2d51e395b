#pragma once
#include <span>
#include <string>

/// The commands below `weft bench`.
namespace weft::apps {

int bench_machine(std::span<const std::string> args);
int bench_ops(std::span<const std::string> args);
int bench_attention(std::span<const std::string> args);
int bench_gemm(std::span<const std::string> args);
int bench_step(std::span<const std::string> args);
int bench_collectives(std::span<const std::string> args);
int bench_parallel(std::span<const std::string> args);
int bench_overlap(std::span<const std::string> args);
int bench_checkpoint(std::span<const std::string> args);

}  // namespace weft::apps

// `weft bench ops`, `attention`, `gemm`: that the table of ops is whole, and that every row of every table runs and is
// written, on the CPU and on the emulated device.
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "apps/bench.h"
#include "apps/op_benches.h"
#include "core/backend.h"
#include "ops/attention_library.h"
#include "tests/apps_process.h"
#include "tests/op_cases.h"

namespace weft::testing {
namespace {

using Args = std::vector<std::string>;

/// What a command prints on standard output.
std::string output_of(int (*command)(std::span<const std::string>), const Args& args) {
  std::ostringstream out;
  const std::unique_ptr<std::streambuf, void (*)(std::streambuf*)> before(
      std::cout.rdbuf(out.rdbuf()), [](std::streambuf* buffer) { std::cout.rdbuf(buffer); });
  EXPECT_EQ(command(args), 0);
  return out.str();
}

std::string device_name() { return *why_no_cuda() == '\0' ? "cuda" : "cpu"; }

/// The rows that a quick run of the command writes, each of which must have a time and a share of the peak.
nlohmann::json quick_rows(int (*command)(std::span<const std::string>), const std::string& precision) {
  const apps_test::Scratch scratch;
  const std::string path = (scratch.path() / "rows.json").string();
  const std::string out = output_of(
      command, {"--quick", "--device", device_name(), "--precision", precision, "--json", path, "--threads", "2"});
  const nlohmann::json all = nlohmann::json::parse(std::ifstream(path));
  EXPECT_EQ(all["precision"], precision);
  EXPECT_GT(all["gemm_flops"].get<double>(), 0);
  for (const auto& row : all["rows"]) {
    EXPECT_GT(row["seconds"].get<double>(), 0) << row;
    EXPECT_GT(row["bytes"].get<double>() + row["flops"].get<double>(), 0) << row;
    EXPECT_TRUE(std::isfinite(row["percent_of_peak"].get<double>())) << row;
    EXPECT_NE(out.find(row["case"].get<std::string>()), std::string::npos) << row << " is not in\n" << out;
  }
  return all["rows"];
}

TEST(BenchOps, EveryOpThatHasCasesIsInTheTableAndNoOther) {
  std::set<std::string> with_cases, benched;
  for (const OpCase& made : all_op_cases()) with_cases.insert(made.op);
  for (const apps::OpBench& bench : apps::op_benches(Device::cpu(), DType::f32, false)) benched.insert(bench.op);
  EXPECT_GE(benched.size(), 45u);
  for (const std::string& op : with_cases) EXPECT_TRUE(benched.contains(op)) << op << " is not in apps/op_benches.cpp";
  for (const std::string& op : benched) EXPECT_TRUE(with_cases.contains(op)) << op << " is no op that has cases";
}

TEST(BenchOps, EveryDifferentiableOpIsTimedBackwardsWhereItsGradientTouchesMemory) {
  std::set<std::string> differentiable, timed;
  for (const OpCase& made : all_op_cases()) {
    if (made.differentiable) differentiable.insert(made.op);
  }
  for (const apps::OpBench& bench : apps::op_benches(Device::cpu(), DType::f32, false)) {
    if (bench.backward.bytes > 0 || bench.backward.flops > 0) timed.insert(bench.op);
  }
  // These hand their gradient on as it is, or spread by strides.
  for (const char* op : {"add", "sum", "mean"}) EXPECT_EQ(differentiable.erase(op), 1u) << op;
  EXPECT_EQ(differentiable, timed);
}

TEST(BenchOps, BytesAreCountedFromTheElementSize) {
  for (const apps::OpBench& bench : apps::op_benches(Device::cpu(), DType::bf16, false)) {
    if (bench.op == "gelu") {
      EXPECT_EQ(bench.forward.bytes, 2.0 * 2 * 65536 * 768);
    } else if (bench.op == "where") {
      EXPECT_EQ(bench.forward.bytes, (3.0 * 2 + 1) * 65536 * 768);
    } else if (bench.op == "causal_attention") {
      EXPECT_EQ(bench.forward.flops, 2.0 * 1024 * 1024 * 768);
    }
  }
}

TEST(BenchOps, EveryRowRunsInEveryPrecision) {
  for (const char* precision : {"f32", "bf16", "f16"}) {
    size_t expected = 0;
    for (const apps::OpBench& bench : apps::op_benches(Device::cpu(), DType::f32, true))
      expected += bench.backward.bytes > 0 || bench.backward.flops > 0 ? 2 : 1;
    EXPECT_EQ(quick_rows(apps::bench_ops, precision).size(), expected) << precision;
  }
}

TEST(BenchOps, AFilterThatFitsNoOpIsRefused) {
  EXPECT_THROW(output_of(apps::bench_ops, {"--quick", "--filter", "gellu"}), Error);
}

TEST(BenchAttention, ForwardBackwardAndACacheAreTimed) {
  for (const char* precision : {"f32", "bf16", "f16"})
    EXPECT_EQ(quick_rows(apps::bench_attention, precision).size(), 3u);
}

TEST(BenchAttention, CudnnIsTimedBesideOurOwnAndTheRatioPrintedWhereItTakesTheShape) {
  const std::string out = output_of(apps::bench_attention, {"--quick", "--device", device_name(), "--precision", "bf16",
                                                            "--size", "1,1,128,16", "--threads", "2"});
  AttentionShape shape{.batch = 1, .heads = 1, .kv_heads = 1};
  shape.queries = shape.keys = 128, shape.head_size = 16, shape.scale = 0.25;
  const bool there =
      device_name() == "cuda" && describe_attention(Device::cuda(), shape, DType::bf16).starts_with("cuDNN");
  for (const char* part :
       {"B 1, H 1, T 128, D 16 (cuDNN)", ": cuDNN takes ", " of the time of our own kernels forward, "})
    EXPECT_EQ(out.find(part) != std::string::npos, there) << part << " in\n" << out;
  EXPECT_NE(out.find("B 1, H 1, T 128, D 16  "), std::string::npos) << out;
}

TEST(BenchGemm, TheProductsOfATrainingStepAreTimed) {
  for (const char* precision : {"f32", "bf16", "f16"}) EXPECT_EQ(quick_rows(apps::bench_gemm, precision).size(), 15u);
}

TEST(BenchGemm, AGivenProductIsTimedInAllLayouts) {
  const std::string out = output_of(apps::bench_gemm, {"--quick", "--size", "8,16,24", "--device", device_name()});
  for (const char* layout : {"8 x 16 x 24 ", "A^T ", "B^T", "A^T B^T"})
    EXPECT_NE(out.find(layout), std::string::npos) << out;
  EXPECT_THROW(output_of(apps::bench_gemm, {"--size", "8,16"}), Error);
}

}  // namespace
}  // namespace weft::testing

// Choosing among cuBLASLt's algorithms, on the emulated device, whose four cost 3, 1, 2 and 0.1 ms on the clock of
// events; the last splits the sum.
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <iostream>
#include <memory>
#include <sstream>

#include "apps/bench.h"
#include "apps/gemm_algorithms_file.h"
#include "core/autograd.h"
#include "core/backend.h"
#include "core/random.h"
#include "emulation.h"
#include "ops/gemm_algorithms.h"
#include "ops/matmul.h"
#include "tests/apps_process.h"
#include "tests/error_of.h"

namespace weft::testing {
namespace {

using apps_test::content_of;
using apps_test::Scratch;
using apps_test::write_content;

const Device kDevice = Device::cuda();

Tensor random(const Shape& shape, const char* name) {
  const Tensor x = Tensor::empty(shape, DType::f32);
  fill_uniform(x, RandomStream(5, name), -1, 1);
  return x.to(kDevice);
}

/// Runs of each algorithm since this was made.
class Runs {
 public:
  Runs() {
    for (int i = 0; i < 4; ++i) before_[i] = weft_emulation::products_with(i);
  }
  int64_t operator[](int i) const { return weft_emulation::products_with(i) - before_[i]; }

 private:
  int64_t before_[4];
};

class GemmAlgorithms : public ::testing::Test {
 protected:
  void SetUp() override { use_gemm_algorithms(kDevice, {}, ""); }
  void TearDown() override { use_gemm_algorithms(kDevice, {}, ""); }

  std::vector<GemmAlgorithm> tune(const std::function<void()>& work) {
    return tune_gemm(kDevice, work, [](const GemmAlgorithm&) {});
  }
  std::string file(const char* name) const { return (scratch_.path() / name).string(); }
  /// A list of what a product of that many rows takes.
  std::string tuned_file(int64_t rows) {
    const std::vector<GemmAlgorithm> all = tune([&] { product(rows); });
    apps::write_gemm_algorithms_file(file("tuned.json"), gemm_library(kDevice), all, 1e12);
    return file("tuned.json");
  }
  static std::vector<float> product(int64_t rows) {
    const autograd::NoGrad no_grad;
    return matmul(random({rows, 24}, "a"), random({24, 16}, "b")).to(Device::cpu()).to_vector<float>();
  }
  Scratch scratch_;
};

TEST_F(GemmAlgorithms, WithoutAListEveryProductTakesTheLibrarysFirstChoice) {
  const Runs runs;
  product(8);
  product(8);
  EXPECT_EQ(runs[0], 2);
  EXPECT_EQ(runs[1] + runs[2] + runs[3], 0);
}

TEST_F(GemmAlgorithms, TuningTakesTheFastestThatSumsInOneSequence) {
  const std::vector<float> expected = product(8);
  std::vector<float> got;
  const Runs runs;
  const std::vector<GemmAlgorithm> all = tune([&] { got = product(8); });
  ASSERT_EQ(all.size(), 1u);
  EXPECT_EQ(got, expected) << "the work itself must come out right";
  EXPECT_EQ(all[0].candidates, 3);
  EXPECT_EQ(runs[3], 0) << "an algorithm that splits the sum was tried";
  EXPECT_NEAR(all[0].first_choice_seconds, 3e-3, 5e-4);
  EXPECT_NEAR(all[0].seconds, 1e-3, 5e-4);
  EXPECT_EQ(all[0].flops, 2.0 * 8 * 24 * 16);
  for (const char* part : {"f32 x f32 -> f32", "m 8, n 16, k 24", "lda 24 rows", "batch 1"})
    EXPECT_NE(all[0].product.find(part), std::string::npos) << all[0].product;
}

TEST_F(GemmAlgorithms, TuningDoesNotChangeWhatAProductAddsTo) {
  const Tensor x = random({8, 24}, "x"), w = random({16, 24}, "w");
  size_t products = 0;
  const auto gradient = [&](bool tuned) {
    const Tensor weight = w.clone().requires_grad_();
    const auto pass = [&] {
      const Tensor y = linear(x, weight);
      autograd::backward({y}, {Tensor::full(y.shape(), 0.5, DType::f32, kDevice)});
    };
    pass();
    if (tuned) {
      products = tune(pass).size();
    } else {
      pass();  // adds to what is there
    }
    return weight.grad().to(Device::cpu()).to_vector<float>();
  };
  const std::vector<float> expected = gradient(false), got = gradient(true);
  EXPECT_EQ(got, expected);
  EXPECT_EQ(products, 2u);
}

TEST_F(GemmAlgorithms, AListThatIsLoadedChangesTheChoiceAndNotTheBitsBetweenRuns) {
  const std::string path = tuned_file(8);
  apps::use_gemm_algorithms_file(kDevice, path);
  const Runs runs;
  const std::vector<float> first = product(8), second = product(8);
  EXPECT_EQ(first, second);
  EXPECT_EQ(runs[1], 2);
  EXPECT_EQ(runs[0] + runs[2] + runs[3], 0);
  EXPECT_EQ(gemm_algorithm_use(kDevice).found, 1);
  EXPECT_TRUE(gemm_algorithm_use(kDevice).missing.empty());
}

TEST_F(GemmAlgorithms, AProductThatIsNotInTheListTakesTheFirstChoiceAndIsCountedOnce) {
  apps::use_gemm_algorithms_file(kDevice, tuned_file(8));
  const Runs runs;
  product(9);
  product(9);
  EXPECT_EQ(runs[0], 2);
  const GemmAlgorithmUse use = gemm_algorithm_use(kDevice);
  EXPECT_EQ(use.found, 0);
  ASSERT_EQ(use.missing.size(), 1u);
  EXPECT_NE(use.missing[0].find("m 9"), std::string::npos) << use.missing[0];
}

TEST_F(GemmAlgorithms, AListOfAnotherDeviceOrLibraryIsRefusedByName) {
  const std::string path = tuned_file(8), content = content_of(path);
  for (const std::string& from : {gemm_library(kDevice).device, gemm_library(kDevice).version}) {
    std::string changed = content;
    changed.replace(changed.find(from), from.size(), "NVIDIA X1");
    write_content(file("other.json"), changed);
    const std::string message =
        error_of(ErrorKind::kData, [&] { apps::use_gemm_algorithms_file(kDevice, file("other.json")); });
    for (const std::string& part : {std::string("other.json"), std::string("NVIDIA X1"), from, std::string("--tune")})
      EXPECT_NE(message.find(part), std::string::npos) << message;
  }
}

TEST_F(GemmAlgorithms, AFileThatIsNoListIsRefusedWithThePlace) {
  const std::string content = content_of(tuned_file(8));
  const auto message_of = [&](const std::string& text) {
    write_content(file("bad.json"), text);
    return error_of(ErrorKind::kData, [&] { apps::use_gemm_algorithms_file(kDevice, file("bad.json")); });
  };
  const auto with = [&](const std::string& from, const std::string& to) {
    std::string changed = content;
    changed.replace(changed.find(from), from.size(), to);
    return changed;
  };
  const auto expect = [](const std::string& message, const std::string& part) {
    EXPECT_NE(message.find("bad.json"), std::string::npos) << message;
    EXPECT_NE(message.find(part), std::string::npos) << message;
  };
  expect(message_of("{\n  \"format\": ,\n}"), "line 2, column");
  expect(message_of(content.substr(0, content.size() / 2)), "line ");
  expect(message_of("[]"), "must have a text named \"format\"");
  expect(message_of(with("algorithms 1", "algorithms 2")), "the format must be");
  expect(message_of(with("\"products\"", "\"product\"")), "a list named \"products\"");
  expect(message_of(with("\"algorithm\"", "\"algorythm\"")), "products[0] must have a text named \"algorithm\"");
  expect(message_of(with("\"algorithm\": \"", "\"algorithm\": \"0")), "must be 128 hexadecimal digits");
}

TEST_F(GemmAlgorithms, AnAlgorithmThatTheLibraryDoesNotAcceptIsAnErrorOfItsProduct) {
  std::vector<GemmAlgorithm> all = tune([] { product(8); });
  all[0].algorithm = std::string(128, '1');
  use_gemm_algorithms(kDevice, all, "some.json");
  const std::string message = error_of(ErrorKind::kData, [] { product(8); });
  for (const char* part : {"some.json", "does not accept", "m 8"})
    EXPECT_NE(message.find(part), std::string::npos) << message;
}

TEST_F(GemmAlgorithms, ATrainingStepIsTunedAndThenTakesItsListForEveryProduct) {
  const auto run = [](const std::vector<std::string>& args) {
    std::ostringstream out;
    const std::unique_ptr<std::streambuf, void (*)(std::streambuf*)> before(
        std::cout.rdbuf(out.rdbuf()), [](std::streambuf* buffer) { std::cout.rdbuf(buffer); });
    EXPECT_EQ(apps::bench_gemm(args), 0);
    return out.str();
  };
  const std::string path = file("step.json");
  const std::string out = run({"--quick", "--tune", path, "--precision", "bf16", "--device", "cuda"});
  EXPECT_NE(out.find("bf16 x bf16 -> bf16"), std::string::npos) << out;
  // Four linear layers and the head, each with three products.
  const auto lines = std::count(out.begin(), out.end(), '\n');
  EXPECT_GE(lines, 2 + 15 + 1) << out;
  const Runs runs;
  run({"--quick", "--size", "8,16,24", "--precision", "bf16", "--device", "cuda", "--gemm-algorithms", path});
  EXPECT_GT(runs[0], 0);
  EXPECT_EQ(gemm_algorithm_use(kDevice).found, 0);
  EXPECT_EQ(gemm_algorithm_use(kDevice).missing.size(), 5u) << "four layouts, and the product of the peak";
  EXPECT_THROW(run({"--tune", path, "--device", "cpu"}), Error);
  EXPECT_THROW(run({"--quick", "--gemm-algorithms", path, "--device", "cpu"}), Error);
}

}  // namespace
}  // namespace weft::testing

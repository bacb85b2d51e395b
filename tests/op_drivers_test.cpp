// Four drivers over the op cases: forward, gradient, threads, and the support matrix. (The benchmark is `weft bench
// ops`.)
#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <string_view>

#include "core/autograd.h"
#include "core/thread_pool.h"
#include "tests/op_drivers.h"

namespace weft::testing {

void PrintTo(const OpCase& made, std::ostream* out) { *out << full_name(made); }

namespace {

std::vector<std::vector<double>> values_of(const Tensors& tensors) {
  std::vector<std::vector<double>> out;
  for (const Tensor& tensor : tensors) out.push_back(tensor.to_vector<double>());
  return out;
}

std::string bytes_of(const Tensor& x) {
  const Tensor flat = x.contiguous();
  return {static_cast<const char*>(flat.raw()), static_cast<size_t>(flat.numel() * size_of(flat.dtype()))};
}

/// Compares outputs with what the composed definition says, after a cast of that to the outputs' dtype if they are
/// of a small one: an overflow to infinity is then expected where the cast has one.
void expect_close(const Tensors& got, const Tensors& want, double tolerance, const std::string& what) {
  ASSERT_EQ(got.size(), want.size()) << what;
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_EQ(got[i].shape(), want[i].shape()) << what << ", output " << i;
    const bool overflows = got[i].dtype() == DType::f16;
    const Tensor expected = overflows ? want[i].to(DType::f16) : want[i];
    const double error = worst_error(got[i].to_vector<double>(), expected.to_vector<double>());
    EXPECT_LE(error, tolerance) << what << ", output " << i << ": got " << got[i] << ", want " << want[i];
  }
}

class OpCases : public ::testing::TestWithParam<OpCase> {};

std::string test_name(const ::testing::TestParamInfo<OpCase>& info) { return full_name(info.param); }

// ---- forward ----

TEST_P(OpCases, ForwardAgreesWithTheComposedDefinitionInEveryDTypeAndLayout) {
  const OpCase& made = GetParam();
  const autograd::NoGrad no_grad;
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    const Tensors arguments = make_arguments(made, dtype);
    // From the rounded arguments, so that only the op's own rounding counts.
    const Tensors want = made.composed(cast(arguments, DType::f64));
    // f64: two ways to compute one number, both with a few roundings of 1e-16. f16 has more digits than bf16.
    const double tolerance = dtype == DType::f64   ? 1e-12
                             : dtype == DType::f32 ? made.tolerance_f32
                                                   : made.tolerance_bf16;
    for (const Layout layout : {Layout::kContiguous, Layout::kTransposed, Layout::kSliced}) {
      std::vector<Placed> placed;
      Tensors views;
      for (const Tensor& argument : arguments) {
        placed.push_back(place(argument, layout));
        views.push_back(placed.back().view);
      }
      std::vector<std::string> before;
      for (const Placed& each : placed) before.push_back(bytes_of(each.buffer));
      const Tensors got = made.run(views);
      const std::string what = concat(dtype, ", layout ", static_cast<int>(layout), " (", made.reason, ")");
      expect_close(got, want, tolerance, what);
      for (size_t i = 0; i < placed.size(); ++i) {
        EXPECT_EQ(before[i], bytes_of(placed[i].buffer))
            << what << ": the op wrote into argument " << i << " or around it";
      }
    }
  }
}

TEST_P(OpCases, ResultsHaveTheSameBitsOnAnyNumberOfThreads) {
  const OpCase& made = GetParam();
  const int before = num_threads();
  std::vector<std::string> expected;
  for (const int threads : {1, 2, 3}) {
    set_num_threads(threads);
    const Tensors arguments = make_arguments(made, DType::f32);
    Tensors results;
    {
      const autograd::NoGrad no_grad;
      results = made.run(arguments);
    }
    if (made.differentiable) {
      for (const Tensor& gradient : gradients_of(made, made.run, arguments, make_cotangents(made, results)))
        results.push_back(gradient);
    }
    std::vector<std::string> bytes;
    for (const Tensor& result : results) bytes.push_back(bytes_of(result));
    if (threads == 1) expected = bytes;
    EXPECT_TRUE(bytes == expected) << threads << " threads";
  }
  set_num_threads(before);
}

// ---- gradient ----

/// Elements of an argument whose derivative is measured: all, or some 256 spread over a large one.
std::vector<size_t> measured(size_t numel) {
  const size_t step = numel <= 512 ? 1 : numel / 256;
  std::vector<size_t> out;
  for (size_t i = 0; i < numel; i += step) out.push_back(i);
  return out;
}

/// Derivatives of sum(outputs * cotangents) in f64 by central differences of fourth order. With steps of 1e-4 their own
/// error is some 1e-16 of truncation (fifth derivatives are near 1) and 1e-12 of rounding, relative to the sum.
std::vector<std::vector<double>> measure_gradients(const OpCase& made, const Tensors& arguments,
                                                   const Tensors& cotangents) {
  const autograd::NoGrad no_grad;
  std::vector<std::vector<double>> weights = values_of(cotangents);
  const auto loss = [&](const Tensors& at) {
    const Tensors outputs = made.run(at);
    double total = 0;
    for (size_t o = 0; o < outputs.size(); ++o) {
      const std::vector<double> values = outputs[o].to_vector<double>();
      for (size_t i = 0; i < values.size(); ++i) total += values[i] * weights[o][i];
    }
    return total;
  };
  std::vector<std::vector<double>> all;
  for (const size_t a : differentiable_arguments(made)) {
    Tensors at = arguments;
    at[a] = arguments[a].clone();
    double* x = at[a].data<double>();
    std::vector<double> derivatives;
    for (const size_t i : measured(static_cast<size_t>(at[a].numel()))) {
      const double middle = x[i], h = 1e-4 * (1 + std::abs(middle));
      const auto at_step = [&](double step) {
        x[i] = middle + step;
        return loss(at);
      };
      derivatives.push_back((8 * (at_step(h) - at_step(-h)) - (at_step(2 * h) - at_step(-2 * h))) / (12 * h));
      x[i] = middle;
    }
    all.push_back(derivatives);
  }
  return all;
}

/// Whether the gradients of `run` are the measured ones within 1e-6, relative to an element, or to a thousandth of the
/// largest for those that are smaller still.
bool gradient_is_right(const OpCase& made, const OpFunction& run, const Tensors& arguments, const Tensors& cotangents,
                       const std::vector<std::vector<double>>& want, std::string& why) {
  const std::vector<std::vector<double>> got = values_of(gradients_of(made, run, arguments, cotangents));
  for (size_t a = 0; a < want.size(); ++a) {
    double largest = 0;
    for (const double value : want[a]) largest = std::max(largest, std::abs(value));
    const std::vector<size_t> elements = measured(got[a].size());
    for (size_t k = 0; k < elements.size(); ++k) {
      const double analytic = got[a][elements[k]], measured = want[a][k];
      const double scale = std::max({std::abs(analytic), std::abs(measured), 1e-3 * largest, 1e-6});
      const double error = std::abs(analytic - measured) / scale;
      if (!(error <= 1e-6)) {  // in this form, NaN fails
        why = concat("argument ", differentiable_arguments(made)[a], ", element ", elements[k], ": analytic ", analytic,
                     ", measured ", measured, ", relative error ", error);
        return false;
      }
    }
  }
  return true;
}

TEST_P(OpCases, GradientMatchesCentralDifferencesInF64AndAWrongOneDoesNot) {
  const OpCase& made = GetParam();
  if (!made.differentiable) return;  // its support is checked below
  const Tensors arguments = make_arguments(made, DType::f64);
  Tensors outputs;
  {
    const autograd::NoGrad no_grad;
    outputs = made.run(arguments);
  }
  const Tensors cotangents = make_cotangents(made, outputs);
  const auto want = measure_gradients(made, arguments, cotangents);
  std::string why;
  EXPECT_TRUE(gradient_is_right(made, made.run, arguments, cotangents, want, why)) << why;

  const std::vector<size_t> asked = differentiable_arguments(made);
  for (size_t a = 0; a < asked.size(); ++a) {
    // No derivative is wrong where there is none, or only zeros.
    if (std::all_of(want[a].begin(), want[a].end(), [](double value) { return std::abs(value) < 1e-6; })) continue;
    for (const Plant plant : {Plant::kScaled, Plant::kFlipped}) {
      if (plant == Plant::kFlipped && want[a].size() < static_cast<size_t>(arguments[asked[a]].numel()))
        continue;  // may not be looked at
      const OpFunction wrong = [&](const Tensors& in) {
        Tensors changed = in;
        changed[asked[a]] = planted(in[asked[a]], plant);
        return made.run(changed);
      };
      EXPECT_FALSE(gradient_is_right(made, wrong, arguments, cotangents, want, why))
          << "a wrong derivative of argument " << asked[a]
          << " was accepted: " << (plant == Plant::kScaled ? "times 1.01" : "one sign flipped");
    }
  }
}

TEST_P(OpCases, GradientInF32AndBf16AgreesWithF64) {
  const OpCase& made = GetParam();
  if (!made.differentiable) return;
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const Tensors arguments = make_arguments(made, dtype);
    Tensors outputs;
    {
      const autograd::NoGrad no_grad;
      outputs = made.run(arguments);
    }
    const Tensors cotangents = make_cotangents(made, outputs);
    Tensors cotangents_f64;
    for (const Tensor& each : cotangents) cotangents_f64.push_back(each.to(DType::f64));
    const auto got = values_of(gradients_of(made, made.run, arguments, cotangents));
    const auto want = values_of(gradients_of(made, made.run, cast(arguments, DType::f64), cotangents_f64));
    for (size_t a = 0; a < want.size(); ++a) {
      // A gradient is a sum of products of numbers that were each rounded: several times what the forward pass may err,
      // relative to the largest element, because the terms of a small one may be large.
      double largest = 0;
      for (const double value : want[a]) largest = std::max(largest, std::abs(value));
      const double tolerance =
          (dtype == DType::f32 ? 4 * made.tolerance_f32 + 1e-5 : 4 * made.tolerance_bf16 + 1e-2) * (1 + largest);
      ASSERT_EQ(got[a].size(), want[a].size());
      for (size_t i = 0; i < want[a].size(); ++i) {
        const double error = std::abs(got[a][i] - want[a][i]);
        EXPECT_TRUE(error <= tolerance) << dtype << ", argument " << a << ", element " << i << ": " << got[a][i]
                                        << ", in f64 " << want[a][i];
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, OpCases, ::testing::ValuesIn(all_op_cases()), test_name);

// ---- support ----

/// Names of the public ops: the functions of tensors that the headers of ops/ declare, but for composed definitions,
/// which are what others are compared with. So the headers are the one list.
std::set<std::string> declared_ops() {
  std::set<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(std::string(WEFT_SOURCE_DIR) + "/ops")) {
    if (entry.path().extension() != ".h") continue;
    std::ifstream file(entry.path());
    for (std::string line; std::getline(file, line);) {
      // "Type name(const Tensor& ...", perhaps with a number before the tensor, from the first column.
      const size_t open = line.find('(');
      if (open == std::string::npos || std::isalpha(static_cast<unsigned char>(line[0])) == 0) continue;
      std::string_view arguments = std::string_view(line).substr(open + 1);
      if (arguments.starts_with("double "))
        arguments.remove_prefix(std::min(arguments.size(), arguments.find(' ', 7) + 1));
      size_t begin = open;
      while (begin > 0 && (std::isalnum(static_cast<unsigned char>(line[begin - 1])) != 0 || line[begin - 1] == '_'))
        --begin;
      const std::string name = line.substr(begin, open - begin);
      if (!arguments.starts_with("const Tensor& ") || begin == 0 || name.empty()) continue;
      if (!name.ends_with("_composed")) names.insert(name);
    }
  }
  return names;
}

/// Ops that have tests of their own: those that add to what they are given, and those that are rounded on purpose, so
/// that differences of their values are no derivative and wider types no reference.
const std::map<std::string, std::string> kOwnTests = {{"attention_part", "ops_attention_test.cpp"},
                                                      {"attention_part_backward", "ops_attention_test.cpp"},
                                                      {"linear_fp8", "ops_matmul_fp8_test.cpp"}};

TEST(OpSupport, EveryDeclaredOpHasCases) {
  std::set<std::string> with_cases;
  for (const OpCase& made : all_op_cases()) with_cases.insert(made.op);
  const std::set<std::string> declared = declared_ops();
  ASSERT_GE(declared.size(), 30u) << "the headers were not read";
  for (const std::string& op : declared) {
    if (const auto own = kOwnTests.find(op); own != kOwnTests.end()) {
      std::ifstream file(std::string(WEFT_SOURCE_DIR) + "/tests/" + own->second);
      std::stringstream text;
      text << file.rdbuf();
      EXPECT_NE(text.str().find(op + "("), std::string::npos) << own->second << " does not test " << op;
      continue;
    }
    EXPECT_TRUE(with_cases.contains(op)) << op << " has no case in tests/op_cases_*.cpp";
  }
  for (const std::string& op : with_cases)
    EXPECT_TRUE(declared.contains(op)) << op << " has cases, but no header of ops/ declares it";
}

TEST(OpSupport, CaseNamesAreUnique) {
  std::set<std::string> seen;
  for (const OpCase& made : all_op_cases()) EXPECT_TRUE(seen.insert(full_name(made)).second) << full_name(made);
}

TEST(OpSupport, EveryOpRunsForwardAndBackwardInEveryDType) {
  const std::vector<DType> dtypes = {DType::f64, DType::f32, DType::bf16, DType::f16};
  std::map<std::string, std::map<std::string, std::string>> table;
  for (const OpCase& made : all_op_cases()) {
    for (const DType dtype : dtypes) {
      std::string& forward = table[made.op][concat(dtype)];
      std::string& backward = table[made.op][concat(dtype, "'")];
      try {
        const Tensors arguments = make_arguments(made, dtype);
        Tensors outputs;
        {
          const autograd::NoGrad no_grad;
          outputs = made.run(arguments);
        }
        if (forward.empty()) forward = "yes";
        if (!made.differentiable) {
          if (backward.empty()) backward = "-";
          continue;
        }
        gradients_of(made, made.run, arguments, make_cotangents(made, outputs));
        if (backward.empty() || backward == "-") backward = "yes";
      } catch (const std::exception& error) {
        (forward.empty() ? forward : backward) = "NO";
        ADD_FAILURE() << full_name(made) << " in " << dtype << ": " << error.what();
      }
    }
  }
  std::printf("%-22s %12s %12s %12s %12s   (forward, backward; -: has no derivative)\n", "op", "f64", "f32", "bf16",
              "f16");
  for (const auto& [op, cells] : table) {
    std::printf("%-22s", op.c_str());
    for (const DType dtype : dtypes) {
      std::printf(" %12s", (cells.at(concat(dtype)) + ", " + cells.at(concat(dtype, "'"))).c_str());
    }
    std::printf("\n");
  }
}

}  // namespace
}  // namespace weft::testing

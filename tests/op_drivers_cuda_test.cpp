// The op cases on a CUDA device against the CPU, which is their oracle: forward and gradients, every dtype and layout,
// the same bits twice, and nothing written around an argument. Runs on a real device and on the emulated one.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/autograd.h"
#include "core/backend.h"
#include "tests/op_drivers.h"

namespace weft::testing {

void PrintTo(const OpCase& made, std::ostream* out) { *out << full_name(made); }

namespace {

Tensors to_device(const Tensors& in) {
  const autograd::NoGrad no_grad;
  Tensors out;
  for (const Tensor& x : in) out.push_back(x.to(Device::cuda()));
  return out;
}

/// The argument in another layout on the device: what place() made, with its buffer moved.
Placed to_device(const Placed& host) {
  const autograd::NoGrad no_grad;
  Placed out;
  out.buffer = host.buffer.to(Device::cuda());
  out.view = Tensor::make_view(out.buffer, host.view.shape(), host.view.strides(), host.view.offset());
  return out;
}

std::string bytes_of(const Tensor& x) {
  const Tensor host = x.detach().contiguous().to(Device::cpu());
  return {static_cast<const char*>(host.raw()), static_cast<size_t>(host.numel() * size_of(host.dtype()))};
}

/// How far the device may be from the CPU. Both are within the case's tolerance of the exact value: their sums run in
/// different orders, and exp, tanh and the like may differ in their last digits; so the bound is twice that tolerance.
/// f64 is held to what two orders of a long sum may differ by.
double tolerance_of(const OpCase& made, DType dtype) {
  return dtype == DType::f64 ? 1e-11 : 2 * (dtype == DType::f32 ? made.tolerance_f32 : made.tolerance_bf16);
}

class CudaOpCases : public ::testing::TestWithParam<OpCase> {
 protected:
  void SetUp() override {
    if (*why_no_cuda() != '\0') GTEST_SKIP() << why_no_cuda();
  }
};

std::string test_name(const ::testing::TestParamInfo<OpCase>& info) { return full_name(info.param); }

TEST_P(CudaOpCases, ForwardAgreesWithTheCpuInEveryDTypeAndLayout) {
  const OpCase& made = GetParam();
  const autograd::NoGrad no_grad;
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    const Tensors arguments = make_arguments(made, dtype);
    const Tensors want = made.run(arguments);
    for (const Layout layout : {Layout::kContiguous, Layout::kTransposed, Layout::kSliced}) {
      std::vector<Placed> placed;
      Tensors views;
      std::vector<std::string> before;
      for (const Tensor& argument : arguments) {
        placed.push_back(to_device(place(argument, layout)));
        views.push_back(placed.back().view);
        before.push_back(bytes_of(placed.back().buffer));
      }
      const Tensors got = made.run(views);
      const std::string what = concat(dtype, ", layout ", static_cast<int>(layout), " (", made.reason, ")");
      ASSERT_EQ(got.size(), want.size()) << what;
      for (size_t i = 0; i < got.size(); ++i) {
        ASSERT_EQ(got[i].shape(), want[i].shape()) << what;
        ASSERT_EQ(got[i].dtype(), want[i].dtype()) << what;
        EXPECT_LE(worst_error(got[i].to_vector<double>(), want[i].to_vector<double>()), tolerance_of(made, dtype))
            << what << ", output " << i << ": got " << got[i] << ", on the CPU " << want[i];
      }
      for (size_t i = 0; i < placed.size(); ++i) {
        EXPECT_EQ(before[i], bytes_of(placed[i].buffer))
            << what << ": the op wrote into argument " << i << " or around it";
      }
    }
  }
}

TEST_P(CudaOpCases, GradientsAgreeWithTheCpuAndHaveTheSameBitsTwice) {
  const OpCase& made = GetParam();
  if (!made.differentiable) return;
  for (const DType dtype : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    const Tensors arguments = make_arguments(made, dtype);
    Tensors outputs;
    {
      const autograd::NoGrad no_grad;
      outputs = made.run(arguments);
    }
    const Tensors cotangents = make_cotangents(made, outputs);
    const Tensors want = gradients_of(made, made.run, arguments, cotangents);
    std::vector<std::string> bits[2];
    Tensors got;
    for (auto& run : bits) {
      got = gradients_of(made, made.run, to_device(arguments), to_device(cotangents));
      for (const Tensor& gradient : got) run.push_back(bytes_of(gradient));
    }
    EXPECT_TRUE(bits[0] == bits[1]) << dtype << ": two runs gave different bits";
    ASSERT_EQ(got.size(), want.size());
    for (size_t a = 0; a < want.size(); ++a) {
      const std::vector<double> x = got[a].to_vector<double>(), y = want[a].to_vector<double>();
      ASSERT_EQ(x.size(), y.size());
      // A gradient is a sum of products of rounded numbers: relative to the largest element, because the terms of a
      // small one may be large.
      double largest = 0;
      for (const double value : y) largest = std::max(largest, std::abs(value));
      const double bound = (4 * tolerance_of(made, dtype) + (dtype == DType::f64   ? 0
                                                             : dtype == DType::f32 ? 1e-5
                                                                                   : 1e-2)) *
                           (1 + largest);
      for (size_t i = 0; i < x.size(); ++i) {
        EXPECT_TRUE(std::abs(x[i] - y[i]) <= bound)
            << dtype << ", argument " << a << ", element " << i << ": " << x[i] << ", on the CPU " << y[i];
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, CudaOpCases, ::testing::ValuesIn(all_op_cases()), test_name);

}  // namespace
}  // namespace weft::testing

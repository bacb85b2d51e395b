// Products on a CUDA device against the CPU's: layouts, batches, bias, factors that lie on the device, GELU epilogues.
#include "ops/gemm.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>

#include "core/autograd.h"
#include "core/backend.h"
#include "core/random.h"
#include "ops/elementwise.h"
#include "ops/gemm_sums.h"
#include "ops/gemm_types.h"
#include "ops/launch.h"
#include "ops/matmul.h"
#include "ops/reduce.h"
#include "tests/error_of.h"

namespace weft {
namespace {

class CudaGemm : public ::testing::Test {
 protected:
  void SetUp() override {
    if (*why_no_cuda() != '\0') GTEST_SKIP() << why_no_cuda();
  }
};

Tensor random_matrix(const Shape& shape, DType dtype, const char* name) {
  const Tensor x = Tensor::empty(shape, DType::f64);
  fill_uniform(x, RandomStream(3, name), -1, 1);
  return x.to(dtype);
}

/// Largest difference relative to 1 + |want|.
double worst(const Tensor& got, const Tensor& want) {
  const std::vector<double> a = got.to_vector<double>(), b = want.to_vector<double>();
  double most = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    const double error = std::abs(a[i] - b[i]) / (1 + std::abs(b[i]));
    if (!(error <= most)) most = error;
  }
  return most;
}

/// Sums of 24 products of numbers below 1 in two orders; one rounding of the result in bf16.
template <class T>
constexpr double kTolerance = std::is_same_v<T, double>  ? 1e-13
                              : std::is_same_v<T, float> ? 1e-5
                                                         : 1e-2;

template <class T>
void check_layouts() {
  constexpr int64_t m = 16, n = 40, k = 24, batch = 3;
  const Tensor a = random_matrix({batch, m, k}, kGemmDType<T>, "a"),
               b = random_matrix({batch, k, n}, kGemmDType<T>, "b"),
               c = random_matrix({batch, m, n}, kGemmDType<T>, "c");
  const Tensor a_t = a.transpose(1, 2).contiguous(), b_t = b.transpose(1, 2).contiguous();
  for (const bool trans_a : {false, true}) {
    for (const bool trans_b : {false, true}) {
      for (const double beta : {0.0, 1.0}) {
        const auto run = [&](Device device) {
          const Tensor x = (trans_a ? a_t : a).to(device), y = (trans_b ? b_t : b).to(device);
          const Tensor out = c.clone().to(device);
          launch(device, "test", [&](auto on) {
            auto g = make_gemm(trans_a, trans_b, m, n, k, static_cast<const T*>(x.raw()), trans_a ? m : k,
                               static_cast<const T*>(y.raw()), trans_b ? k : n, static_cast<T*>(out.raw()), n);
            g.alpha = 0.5f;
            g.beta = static_cast<typename Gemm<T>::Sum>(beta);
            gemm_batched(on, g, {.count = batch, .a = m * k, .b = k * n, .c = m * n});
          });
          return out.to(Device::cpu());
        };
        EXPECT_LE(worst(run(Device::cuda()), run(Device::cpu())), kTolerance<T>)
            << kGemmDType<T> << ", transposed " << trans_a << trans_b << ", beta " << beta;
      }
    }
  }
}

TEST_F(CudaGemm, EveryLayoutAndBatchIsTheCpus) {
  check_layouts<float>();
  check_layouts<double>();
  check_layouts<uint16_t>();
}

TEST_F(CudaGemm, AFactorMayLieOnTheDevice) {
  constexpr int64_t m = 8, n = 16, k = 24;
  const Tensor a = random_matrix({m, k}, DType::f32, "a"), b = random_matrix({k, n}, DType::f32, "b"),
               c = random_matrix({m, n}, DType::f32, "c");
  for (const float beta : {0.0f, 1.0f}) {
    const auto run = [&](Device device) {
      const Tensor x = a.to(device), y = b.to(device), out = c.clone().to(device),
                   factor = Tensor::full({}, 0.25, DType::f32, device);
      launch(device, "test", [&](auto on) {
        auto g = make_gemm(false, false, m, n, k, static_cast<const float*>(x.raw()), k,
                           static_cast<const float*>(y.raw()), n, static_cast<float*>(out.raw()), n);
        g.scale = static_cast<const float*>(factor.raw());
        g.beta = beta;
        gemm(on, g);
      });
      return out.to(Device::cpu());
    };
    EXPECT_LE(worst(run(Device::cuda()), run(Device::cpu())), 1e-5) << "beta " << beta;
  }
}

TEST_F(CudaGemm, GeluAndItsGradientAreFusedAsOnTheCpu) {
  // The second has rows that cuBLASLt's auxiliary matrix cannot have, the last is an empty sum.
  for (const auto& [m, n, k] : {std::array<int64_t, 3>{8, 16, 24}, {8, 13, 24}, {5, 8, 0}}) {
    const Tensor a = random_matrix({m, k}, DType::f32, "a"), b = random_matrix({k, n}, DType::f32, "b"),
                 bias = random_matrix({n}, DType::f32, "bias"), aux = random_matrix({m, n}, DType::f32, "aux");
    for (const GemmActivation activation : {GemmActivation::kGelu, GemmActivation::kGeluGrad}) {
      const auto run = [&](Device device) {
        const Tensor x = a.to(device), y = b.to(device), p = bias.to(device), q = aux.to(device);
        const Tensor out = Tensor::zeros({2, m, n}, DType::f32, device);  // C and D
        launch(device, "test", [&](auto on) {
          float* c = static_cast<float*>(out.raw());
          auto g = make_gemm(false, false, m, n, k, static_cast<const float*>(x.raw()), k,
                             static_cast<const float*>(y.raw()), n, c, n);
          g.activation = activation;
          if (activation == GemmActivation::kGelu) {
            g.bias = static_cast<const float*>(p.raw());
            g.d = c + m * n, g.ldd = n;
          } else {
            g.aux = static_cast<const float*>(q.raw()), g.ldaux = n;
          }
          gemm(on, g);
        });
        return out.to(Device::cpu());
      };
      EXPECT_LE(worst(run(Device::cuda()), run(Device::cpu())), 2e-5) << static_cast<int>(activation) << ", n " << n;
    }
  }
}

/// dW and db of a linear layer as it has them: dW (+)= dy^T x, and the sums of dy's rows.
template <class T>
void check_sums() {
  for (const auto& [out, in, rows] : {std::array<int64_t, 3>{16, 24, 40}, {5, 7, 33}, {8, 16, 0}}) {
    const DType dtype = kGemmDType<T>;
    const Tensor dy = random_matrix({rows, out}, dtype, "dy"), x = random_matrix({rows, in}, dtype, "x"),
                 before = random_matrix({out, in}, dtype, "dw");
    for (const double beta : {0.0, 1.0}) {
      const Tensor a = dy.to(Device::cuda()), b = x.to(Device::cuda()), dw = before.clone().to(Device::cuda()),
                   plain = before.clone().to(Device::cuda()), db = Tensor::full({out}, 99, dtype, Device::cuda());
      launch(Device::cuda(), "test", [&](auto on) {
        if constexpr (std::is_same_v<decltype(on), Cuda>) {
          auto g = make_gemm(true, false, out, in, rows, static_cast<const T*>(a.raw()), out,
                             static_cast<const T*>(b.raw()), in, static_cast<T*>(dw.raw()), in);
          g.beta = static_cast<typename Gemm<T>::Sum>(beta);
          gemm_with_sums(on, g, static_cast<T*>(db.raw()));
          g.c = static_cast<T*>(plain.raw());
          gemm(on, g);
        }
      });
      EXPECT_LE(worst(db.to(Device::cpu()), sum(dy.to(DType::f64), {0})), kTolerance<T>) << dtype << ", rows " << rows;
      EXPECT_LE(worst(dw.to(Device::cpu()), plain.to(Device::cpu())), kTolerance<T>) << dtype << ", beta " << beta;
    }
  }
}

TEST_F(CudaGemm, SumsOfTheFirstMatrixComeBesideTheProduct) {
  check_sums<uint16_t>();
  check_sums<Half>();
}

TEST_F(CudaGemm, SumsBesideABiasAreRefused) {
  launch(Device::cuda(), "test", [&](auto on) {
    if constexpr (std::is_same_v<decltype(on), Cuda>) {
      Gemm<Half> g;
      const Half bias(1.0f);
      g.bias_of_c = &bias;
      EXPECT_ERROR(ErrorKind::kValue, "sums of A come beside a plain product", gemm_with_sums<Half>(on, g, nullptr));
    }
  });
}

TEST_F(CudaGemm, GeluLinearIsItsPartsButForOneRoundingOfTheGradientBetweenThem) {
  for (const auto& [dtype, unit] :
       {std::pair{DType::f64, 0x1p-53}, {DType::f32, 0x1p-24}, {DType::bf16, 0x1p-9}, {DType::f16, 0x1p-12}}) {
    const auto on_device = [&](const char* name, const Shape& shape) {
      return random_matrix(shape, DType::f64, name).to(dtype).to(Device::cuda());
    };
    const Tensor dy = on_device("dy", {6, 8});
    const auto run = [&](auto&& function) {
      std::vector<Tensor> all = {on_device("x", {6, 16}), on_device("w", {8, 16}), on_device("b", {8})};
      for (Tensor& each : all) each.requires_grad_();
      all.push_back(function(all[0], all[1], all[2]));
      all[3].backward(dy);
      return all;
    };
    const auto parts = run([](const auto& x, const auto& w, const auto& b) { return linear(gelu(x), w, b); });
    const auto fused = run([](const auto& x, const auto& w, const auto& b) { return gelu_linear(x, w, b); });
    const auto again =
        run([](const auto& x, const auto& w, const auto& b) { return gelu_linear(x, w, b, autograd::Keep::kRecipe); });
    const auto values = [](const Tensor& x) { return x.detach().to(Device::cpu()).to_vector<double>(); };
    EXPECT_EQ(values(fused[3]), values(parts[3])) << dtype;
    for (const int parameter : {1, 2})
      EXPECT_EQ(values(fused[parameter].grad()), values(parts[parameter].grad())) << dtype;
    for (int i = 0; i < 3; ++i) EXPECT_EQ(values(fused[i].grad()), values(again[i].grad())) << dtype << " made again";
    // The sum is below 8, gelu' below 1.13 and a few units of f32 away from cuBLASLt's; both results are rounded.
    const double bound = dtype == DType::f64 ? 64 * unit : 8 * 1.13 * 3 * unit + 8 * 16 * 0x1p-24;
    const std::vector<double> got = values(fused[0].grad()), want = values(parts[0].grad());
    for (size_t i = 0; i < want.size(); ++i) EXPECT_LE(std::abs(got[i] - want[i]), bound) << dtype << ", " << i;
  }
}

}  // namespace
}  // namespace weft

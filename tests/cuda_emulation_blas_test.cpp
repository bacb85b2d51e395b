// The emulated cuBLASLt against plain loops over column-major matrices.
#include <cublasLt.h>
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "core/float_types.h"

namespace {

template <class T>
constexpr cudaDataType kType = CUDA_R_32F;
template <>
constexpr cudaDataType kType<double> = CUDA_R_64F;
template <>
constexpr cudaDataType kType<weft::BFloat16> = CUDA_R_16BF;
template <>
constexpr cudaDataType kType<weft::Half> = CUDA_R_16F;
template <>
constexpr cudaDataType kType<weft::Float8E4M3> = CUDA_R_8F_E4M3;
template <>
constexpr cudaDataType kType<weft::Float8E5M2> = CUDA_R_8F_E5M2;

/// Small values that every type holds exactly, different in every place.
template <class T>
std::vector<T> values(size_t count, int step) {
  std::vector<T> result;
  for (size_t i = 0; i < count; ++i)
    result.push_back(static_cast<T>(static_cast<double>(i * static_cast<size_t>(step) % 13) / 4 - 1.5));
  return result;
}

class CublasLt : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_EQ(cublasLtCreate(&handle_), CUBLAS_STATUS_SUCCESS);
    describe(CUBLAS_COMPUTE_32F, CUDA_R_32F);
  }
  void TearDown() override {
    for (const cublasLtMatrixLayout_t layout : layouts_)
      EXPECT_EQ(cublasLtMatrixLayoutDestroy(layout), CUBLAS_STATUS_SUCCESS);
    EXPECT_EQ(cublasLtMatmulDescDestroy(desc_), CUBLAS_STATUS_SUCCESS);
    EXPECT_EQ(cublasLtDestroy(handle_), CUBLAS_STATUS_SUCCESS);
  }

  void describe(cublasComputeType_t compute, cudaDataType scale) {
    if (desc_ != nullptr) cublasLtMatmulDescDestroy(desc_);
    ASSERT_EQ(cublasLtMatmulDescCreate(&desc_, compute, scale), CUBLAS_STATUS_SUCCESS);
  }
  template <class T>
  void set(cublasLtMatmulDescAttributes_t attribute, const T& value) {
    ASSERT_EQ(cublasLtMatmulDescSetAttribute(desc_, attribute, &value, sizeof(value)), CUBLAS_STATUS_SUCCESS);
  }
  cublasLtMatrixLayout_t layout(cudaDataType type, uint64_t rows, uint64_t columns, int64_t ld) {
    cublasLtMatrixLayout_t result = nullptr;
    EXPECT_EQ(cublasLtMatrixLayoutCreate(&result, type, rows, columns, ld), CUBLAS_STATUS_SUCCESS);
    layouts_.push_back(result);
    return result;
  }
  void set_batch(cublasLtMatrixLayout_t layout, int32_t count, int64_t stride) {
    ASSERT_EQ(cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof(count)),
              CUBLAS_STATUS_SUCCESS);
    ASSERT_EQ(
        cublasLtMatrixLayoutSetAttribute(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof(stride)),
        CUBLAS_STATUS_SUCCESS);
  }

  /// D = alpha op(A) op(B) + beta D with the algorithm that the library proposes.
  template <class Scale = float>
  cublasStatus_t multiply(cublasLtMatrixLayout_t a_layout, const void* a, cublasLtMatrixLayout_t b_layout,
                          const void* b, cublasLtMatrixLayout_t d_layout, void* d, Scale alpha = 1, Scale beta = 0,
                          cudaStream_t stream = nullptr, cublasLtMatrixLayout_t c_layout = nullptr) {
    if (c_layout == nullptr) c_layout = d_layout;
    cublasLtMatmulPreference_t preference = nullptr;
    EXPECT_EQ(cublasLtMatmulPreferenceCreate(&preference), CUBLAS_STATUS_SUCCESS);
    cublasLtMatmulHeuristicResult_t found;
    int count = -1;
    const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(handle_, desc_, a_layout, b_layout, c_layout, d_layout,
                                                                 preference, 1, &found, &count);
    EXPECT_EQ(cublasLtMatmulPreferenceDestroy(preference), CUBLAS_STATUS_SUCCESS);
    EXPECT_EQ(count, status == CUBLAS_STATUS_SUCCESS);
    const cublasStatus_t done = cublasLtMatmul(handle_, desc_, &alpha, a, a_layout, b, b_layout, &beta, d, c_layout, d,
                                               d_layout, count == 1 ? &found.algo : nullptr, nullptr, 0, stream);
    EXPECT_EQ(done, status);
    return done;
  }

  cublasLtHandle_t handle_ = nullptr;
  cublasLtMatmulDesc_t desc_ = nullptr;
  std::vector<cublasLtMatrixLayout_t> layouts_;
};

// m, n, k of most products below, and leading dimensions with room to spare.
constexpr int kM = 5, kN = 4, kK = 7, kLd = 8;

/// op(A) op(B) at one place, both in column-major order with leading dimension kLd.
template <class T>
double product(const T* a, bool transpose_a, const T* b, bool transpose_b, int row, int column) {
  double sum = 0;
  for (int k = 0; k < kK; ++k) {
    const double x(a[transpose_a ? row * kLd + k : k * kLd + row]),
        y(b[transpose_b ? k * kLd + column : column * kLd + k]);
    sum += x * y;
  }
  return sum;
}

TEST_F(CublasLt, MultipliesBatchesInEveryTransposition) {
  describe(CUBLAS_COMPUTE_64F, CUDA_R_64F);
  constexpr int kBatches = 3, kStride = 80;
  const auto a = values<double>(kBatches * kStride, 3), b = values<double>(kBatches * kStride, 5);
  for (const bool transpose_a : {false, true}) {
    for (const bool transpose_b : {false, true}) {
      set(CUBLASLT_MATMUL_DESC_TRANSA, int32_t{transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N});
      set(CUBLASLT_MATMUL_DESC_TRANSB, int32_t{transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N});
      const auto a_layout = layout(CUDA_R_64F, transpose_a ? kK : kM, transpose_a ? kM : kK, kLd);
      const auto b_layout = layout(CUDA_R_64F, transpose_b ? kN : kK, transpose_b ? kK : kN, kLd);
      const auto d_layout = layout(CUDA_R_64F, kM, kN, kLd);
      for (const auto one : {a_layout, b_layout, d_layout}) set_batch(one, kBatches, kStride);
      const auto before = values<double>(kBatches * kStride, 7);
      auto d = before;
      ASSERT_EQ(multiply(a_layout, a.data(), b_layout, b.data(), d_layout, d.data(), 2.0, -0.5), CUBLAS_STATUS_SUCCESS);
      for (int i = 0; i < kBatches * kStride; ++i) {
        const int start = i / kStride * kStride, row = i % kStride % kLd, column = i % kStride / kLd;
        const bool inside = row < kM && column < kN;
        const double expected =
            inside ? 2 * product(&a[start], transpose_a, &b[start], transpose_b, row, column) - 0.5 * before[i]
                   : before[i];
        EXPECT_EQ(d[i], expected) << "at " << i;
      }
    }
  }
}

TEST_F(CublasLt, ReadsAndWritesRows) {
  const auto a = values<float>(kM * kLd, 3), b = values<float>(kK * kLd, 5);
  const auto a_layout = layout(CUDA_R_32F, kM, kK, kLd), b_layout = layout(CUDA_R_32F, kK, kN, kLd),
             d_layout = layout(CUDA_R_32F, kM, kN, kN);
  const int32_t order = CUBLASLT_ORDER_ROW;
  for (const auto one : {a_layout, b_layout, d_layout}) {
    ASSERT_EQ(cublasLtMatrixLayoutSetAttribute(one, CUBLASLT_MATRIX_LAYOUT_ORDER, &order, sizeof(order)),
              CUBLAS_STATUS_SUCCESS);
  }
  // With beta 0 what D held is not read.
  std::vector<float> d(kM * kN, std::nanf(""));
  ASSERT_EQ(multiply(a_layout, a.data(), b_layout, b.data(), d_layout, d.data()), CUBLAS_STATUS_SUCCESS);
  for (int row = 0; row < kM; ++row) {
    for (int column = 0; column < kN; ++column) {
      double sum = 0;
      for (int k = 0; k < kK; ++k) sum += static_cast<double>(a[row * kLd + k]) * b[k * kLd + column];
      EXPECT_EQ(d[row * kN + column], static_cast<float>(sum));
    }
  }
}

double gelu(double x) { return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x))); }

TEST_F(CublasLt, TheForwardEpilogueAddsABiasKeepsItAndAppliesGelu) {
  const auto a = values<float>(kK * kLd, 3), b = values<float>(kN * kLd, 5), bias = values<float>(kM, 2);
  std::vector<float> d(kM * kN), aux(kLd * kN);
  set(CUBLASLT_MATMUL_DESC_EPILOGUE, uint32_t{CUBLASLT_EPILOGUE_GELU_AUX_BIAS});
  set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias.data());
  set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aux.data());
  set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, int64_t{kLd});
  ASSERT_EQ(multiply(layout(CUDA_R_32F, kM, kK, kLd), a.data(), layout(CUDA_R_32F, kK, kN, kLd), b.data(),
                     layout(CUDA_R_32F, kM, kN, kM), d.data()),
            CUBLAS_STATUS_SUCCESS);
  for (int row = 0; row < kM; ++row) {
    for (int column = 0; column < kN; ++column) {
      const double x = product(a.data(), false, b.data(), false, row, column) + bias[row];
      EXPECT_EQ(aux[column * kLd + row], x);
      EXPECT_FLOAT_EQ(d[column * kM + row], static_cast<float>(gelu(x)));
    }
  }
}

TEST_F(CublasLt, TheBackwardEpilogueMultipliesByTheDerivativeAndSumsRows) {
  const auto a = values<float>(kK * kLd, 3), b = values<float>(kN * kLd, 5), aux = values<float>(kLd * kN, 2);
  std::vector<float> d(kM * kN), gradient(kM);
  set(CUBLASLT_MATMUL_DESC_EPILOGUE, uint32_t{CUBLASLT_EPILOGUE_DGELU_BGRAD});
  set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, gradient.data());
  set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aux.data());
  set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, int64_t{kLd});
  ASSERT_EQ(multiply(layout(CUDA_R_32F, kM, kK, kLd), a.data(), layout(CUDA_R_32F, kK, kN, kLd), b.data(),
                     layout(CUDA_R_32F, kM, kN, kM), d.data()),
            CUBLAS_STATUS_SUCCESS);
  constexpr double kStep = 1e-5;  // the central difference is then exact to about 1e-10
  for (int row = 0; row < kM; ++row) {
    double sum = 0;
    for (int column = 0; column < kN; ++column) {
      const double x = aux[column * kLd + row], derivative = (gelu(x + kStep) - gelu(x - kStep)) / (2 * kStep);
      const double expected = product(a.data(), false, b.data(), false, row, column) * derivative;
      EXPECT_NEAR(d[column * kM + row], expected, 1e-6 * (1 + std::fabs(expected)));
      sum += expected;
    }
    EXPECT_NEAR(gradient[row], sum, 1e-6 * (1 + std::fabs(sum)));
  }
}

TEST_F(CublasLt, BiasGradientsSumTheOperandsOverK) {
  const auto a = values<float>(kM * kLd, 3), b = values<float>(kN * kLd, 5);
  std::vector<float> d(kM * kN), gradient(kM);
  set(CUBLASLT_MATMUL_DESC_TRANSA, int32_t{CUBLAS_OP_T});
  set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, gradient.data());
  for (const auto epilogue : {CUBLASLT_EPILOGUE_BGRADA, CUBLASLT_EPILOGUE_BGRADB}) {
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, uint32_t{epilogue});
    ASSERT_EQ(multiply(layout(CUDA_R_32F, kK, kM, kLd), a.data(), layout(CUDA_R_32F, kK, kN, kLd), b.data(),
                       layout(CUDA_R_32F, kM, kN, kM), d.data()),
              CUBLAS_STATUS_SUCCESS);
    const bool of_a = epilogue == CUBLASLT_EPILOGUE_BGRADA;
    for (int i = 0; i < (of_a ? kM : kN); ++i) {
      float sum = 0;
      for (int k = 0; k < kK; ++k) sum += (of_a ? a : b)[i * kLd + k];
      EXPECT_EQ(gradient[i], sum);
    }
    EXPECT_EQ(d[0], static_cast<float>(product(a.data(), true, b.data(), false, 0, 0)));
  }
}

TEST_F(CublasLt, SixteenBitProductsAreRoundedOnce) {
  const auto run = [&]<class T>(T) {
    const auto a = values<T>(kK * kLd, 3), b = values<T>(kN * kLd, 5);
    std::vector<T> d(kM * kN);
    std::vector<float> wide(kM * kN);
    const auto a_layout = layout(kType<T>, kM, kK, kLd), b_layout = layout(kType<T>, kK, kN, kLd);
    ASSERT_EQ(multiply(a_layout, a.data(), b_layout, b.data(), layout(kType<T>, kM, kN, kM), d.data(), 1.01f),
              CUBLAS_STATUS_SUCCESS);
    ASSERT_EQ(multiply(a_layout, a.data(), b_layout, b.data(), layout(CUDA_R_32F, kM, kN, kM), wide.data(), 1.01f),
              CUBLAS_STATUS_SUCCESS);
    for (int row = 0; row < kM; ++row) {
      for (int column = 0; column < kN; ++column) {
        const double x = 1.01f * product(a.data(), false, b.data(), false, row, column);
        EXPECT_EQ(d[column * kM + row].bits, T(x).bits);
        EXPECT_EQ(wide[column * kM + row], static_cast<float>(x));
      }
    }
  };
  run(weft::BFloat16());
  run(weft::Half());
}

TEST_F(CublasLt, Tf32ReadsTenFractionBits) {
  describe(CUBLAS_COMPUTE_32F_FAST_TF32, CUDA_R_32F);
  const float a = 1 + std::ldexp(1.0f, -10) + std::ldexp(1.0f, -12), b = 1;
  float d = 0;
  const auto one = layout(CUDA_R_32F, 1, 1, 1);
  ASSERT_EQ(multiply(one, &a, one, &b, one, &d), CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(d, 1 + std::ldexp(1.0f, -10));
}

TEST_F(CublasLt, EightBitProductsAreScaledAndSaturate) {
  constexpr int kSize = 16;
  const auto a = values<weft::Float8E4M3>(kSize * kSize, 3);
  const auto b = values<weft::Float8E5M2>(kSize * kSize, 5);
  std::vector<weft::BFloat16> bias(kSize, weft::BFloat16(0.5f));
  std::vector<weft::Float8E4M3> d(kSize * kSize);
  const float scale_a = 2, scale_b = 0.25f, scale_d = 256;
  float largest = 0;
  set(CUBLASLT_MATMUL_DESC_TRANSA, int32_t{CUBLAS_OP_T});
  set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &scale_a);
  set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &scale_b);
  set(CUBLASLT_MATMUL_DESC_D_SCALE_POINTER, &scale_d);
  set(CUBLASLT_MATMUL_DESC_AMAX_D_POINTER, &largest);
  set(CUBLASLT_MATMUL_DESC_EPILOGUE, uint32_t{CUBLASLT_EPILOGUE_BIAS});
  set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias.data());
  const auto a_layout = layout(CUDA_R_8F_E4M3, kSize, kSize, kSize),
             b_layout = layout(CUDA_R_8F_E5M2, kSize, kSize, kSize);
  ASSERT_EQ(multiply(a_layout, a.data(), b_layout, b.data(), layout(CUDA_R_8F_E4M3, kSize, kSize, kSize), d.data(),
                     1.0f, 0.0f, nullptr, layout(CUDA_R_16BF, kSize, kSize, kSize)),
            CUBLAS_STATUS_SUCCESS);
  double expected_largest = 0;
  int saturated = 0;
  for (int row = 0; row < kSize; ++row) {
    for (int column = 0; column < kSize; ++column) {
      double x = 0;
      for (int k = 0; k < kSize; ++k)
        x += static_cast<double>(a[row * kSize + k]) * static_cast<double>(b[column * kSize + k]);
      x = x * 0.5 + 0.5;
      expected_largest = std::max(expected_largest, std::fabs(x));
      const double scaled = std::min(448.0, std::max(-448.0, scale_d * x));
      saturated += std::fabs(scaled) == 448;
      EXPECT_EQ(d[column * kSize + row].bits, weft::Float8E4M3(scaled).bits);
    }
  }
  EXPECT_EQ(largest, expected_largest);
  EXPECT_GT(saturated, 0);
  set(CUBLASLT_MATMUL_DESC_TRANSA, int32_t{CUBLAS_OP_N});
  EXPECT_EQ(multiply(a_layout, a.data(), b_layout, b.data(), layout(CUDA_R_8F_E4M3, kSize, kSize, kSize), d.data(),
                     1.0f, 0.0f, nullptr, layout(CUDA_R_16BF, kSize, kSize, kSize)),
            CUBLAS_STATUS_NOT_SUPPORTED);
}

TEST_F(CublasLt, WhatTheLibraryCannotDoIsRefused) {
  std::vector<float> x(64), aux(64);
  const auto square = layout(CUDA_R_32F, 4, 4, 4), bf16 = layout(CUDA_R_16BF, 4, 4, 4);
  EXPECT_EQ(multiply(square, x.data(), square, x.data(), bf16, x.data()), CUBLAS_STATUS_NOT_SUPPORTED);
  EXPECT_EQ(multiply(square, x.data(), bf16, x.data(), square, x.data()), CUBLAS_STATUS_NOT_SUPPORTED);
  EXPECT_EQ(multiply(square, x.data(), layout(CUDA_R_32F, 3, 4, 4), x.data(), square, x.data()),
            CUBLAS_STATUS_INVALID_VALUE);
  EXPECT_EQ(multiply(square, x.data(), square, x.data(), layout(CUDA_R_32F, 4, 4, 3), x.data()),
            CUBLAS_STATUS_INVALID_VALUE);
  set(CUBLASLT_MATMUL_DESC_EPILOGUE, uint32_t{CUBLASLT_EPILOGUE_GELU_AUX});
  set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aux.data());
  set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, int64_t{4});  // not a multiple of 8
  EXPECT_EQ(multiply(square, x.data(), square, x.data(), square, x.data()), CUBLAS_STATUS_INVALID_VALUE);
  EXPECT_EQ(cublasLtMatmulDescSetAttribute(desc_, CUBLASLT_MATMUL_DESC_TRANSA, x.data(), 8),
            CUBLAS_STATUS_INVALID_VALUE);
}

TEST_F(CublasLt, FactorsOfTheDeviceAreReadWhenAProductIsComputed) {
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  const float a = 3, b = 4;
  float d = 0, factors[] = {2, 0};
  const auto one = layout(CUDA_R_32F, 1, 1, 1);
  set(CUBLASLT_MATMUL_DESC_POINTER_MODE, static_cast<int32_t>(CUBLASLT_POINTER_MODE_DEVICE));
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
  ASSERT_EQ(cublasLtMatmul(handle_, desc_, &factors[0], &a, one, &b, one, &factors[1], &d, one, &d, one, nullptr,
                           nullptr, 0, stream),
            CUBLAS_STATUS_SUCCESS);
  ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  ASSERT_EQ(cudaGraphInstantiate(&executable, graph), cudaSuccess);
  for (const float value : {5.0f, 6.0f}) {
    factors[0] = value;
    ASSERT_EQ(cudaGraphLaunch(executable, stream), cudaSuccess);
    EXPECT_EQ(d, 12 * value);
  }
  EXPECT_EQ(cudaGraphExecDestroy(executable), cudaSuccess);
  EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
}

TEST_F(CublasLt, AProductIsCapturedWithItsScalars) {
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  float a = 3, b = 4, d = 0;
  const auto one = layout(CUDA_R_32F, 1, 1, 1);
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), cudaSuccess);
  ASSERT_EQ(multiply(one, &a, one, &b, one, &d, 2.0f, 0.0f, stream), CUBLAS_STATUS_SUCCESS);
  ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  EXPECT_EQ(d, 0);
  ASSERT_EQ(cudaGraphInstantiate(&executable, graph), cudaSuccess);
  for (const float value : {5.0f, 6.0f}) {
    b = value;
    ASSERT_EQ(cudaGraphLaunch(executable, stream), cudaSuccess);
    EXPECT_EQ(d, 2 * 3 * value);
  }
  EXPECT_EQ(cudaGraphExecDestroy(executable), cudaSuccess);
  EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
}

}  // namespace

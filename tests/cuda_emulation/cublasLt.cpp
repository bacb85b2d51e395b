#include "cublasLt.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <iterator>
#include <vector>

#include "core/float_types.h"
#include "emulation.h"
#include "runtime.h"

struct cublasLtContext {};

struct cublasLtMatmulDescOpaque {
  int32_t compute, scale, pointer_mode = CUBLASLT_POINTER_MODE_HOST, op_a = CUBLAS_OP_N, op_b = CUBLAS_OP_N;
  uint32_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  void *bias = nullptr, *aux = nullptr;
  int64_t bias_batch_stride = 0, aux_ld = 0, aux_batch_stride = 0;
  const void *scale_a = nullptr, *scale_b = nullptr, *scale_d = nullptr;
  void* largest_d = nullptr;
  int32_t aux_type = -1, bias_type = -1;
  int8_t fast_accumulation = 0;
};

struct cublasLtMatrixLayoutOpaque {
  uint32_t type;
  int32_t order = CUBLASLT_ORDER_COL;
  uint64_t rows, columns;
  int64_t ld;
  int32_t batch_count = 1;
  int64_t batch_stride = 0;

  size_t index(uint64_t row, uint64_t column) const {
    const auto stride = static_cast<uint64_t>(ld);
    return order == CUBLASLT_ORDER_COL ? column * stride + row : row * stride + column;
  }
};

struct cublasLtMatmulPreferenceOpaque {
  uint64_t workspace_bytes = 0;
  uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_MASK;
};

namespace weft_emulation {
namespace {

using Desc = cublasLtMatmulDescOpaque;
using Layout = cublasLtMatrixLayoutOpaque;

template <class T>
cublasStatus_t set(T& member, const void* value, size_t bytes) {
  if (value == nullptr || bytes != sizeof(T)) return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(&member, value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}

// ---- elements ----

size_t element_bytes(int type) {
  switch (type) {
    case CUDA_R_64F:
      return 8;
    case CUDA_R_32F:
      return 4;
    case CUDA_R_16F:
    case CUDA_R_16BF:
      return 2;
    case CUDA_R_8F_E4M3:
    case CUDA_R_8F_E5M2:
      return 1;
    default:
      return 0;
  }
}

template <class T>
double load_as(const void* data, size_t index) {
  T value;
  std::memcpy(&value, static_cast<const unsigned char*>(data) + index * sizeof(T), sizeof(T));
  return static_cast<double>(value);
}

double load(int type, const void* data, size_t index) {
  switch (type) {
    case CUDA_R_64F:
      return load_as<double>(data, index);
    case CUDA_R_32F:
      return load_as<float>(data, index);
    case CUDA_R_16F:
      return load_as<weft::Half>(data, index);
    case CUDA_R_16BF:
      return load_as<weft::BFloat16>(data, index);
    case CUDA_R_8F_E4M3:
      return load_as<weft::Float8E4M3>(data, index);
    default:
      return load_as<weft::Float8E5M2>(data, index);
  }
}

template <class T>
void store_as(void* data, size_t index, double x) {
  const T value = static_cast<T>(x);
  std::memcpy(static_cast<unsigned char*>(data) + index * sizeof(T), &value, sizeof(T));
}

/// cuBLAS saturates 8-bit floats, infinities included.
double saturated(double x, double largest) { return x > largest ? largest : x < -largest ? -largest : x; }

void store(int type, void* data, size_t index, double x) {
  switch (type) {
    case CUDA_R_64F:
      return store_as<double>(data, index, x);
    case CUDA_R_32F:
      return store_as<float>(data, index, x);
    case CUDA_R_16F:
      return store_as<weft::Half>(data, index, x);
    case CUDA_R_16BF:
      return store_as<weft::BFloat16>(data, index, x);
    case CUDA_R_8F_E4M3:
      return store_as<weft::Float8E4M3>(data, index, saturated(x, 448));
    default:
      return store_as<weft::Float8E5M2>(data, index, saturated(x, 57344));
  }
}

/// To the ten fraction bits that tensor cores read of a float, ties to even.
double to_tf32(double x) {
  const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(x));
  if ((bits & 0x7f800000u) == 0x7f800000u) return x;
  return std::bit_cast<float>((bits + 0xfff + (bits >> 13 & 1)) & ~0x1fffu);
}

// ---- algorithms ----

/// In the order in which they are proposed. The second is the fastest that sums in one sequence; the last is faster
/// still and does not.
struct Algorithm {
  double seconds;
  int32_t parts;
  uint32_t reduction;
};
constexpr Algorithm kAlgorithms[] = {{3e-3, 1, CUBLASLT_REDUCTION_SCHEME_NONE},
                                     {1e-3, 1, CUBLASLT_REDUCTION_SCHEME_NONE},
                                     {2e-3, 1, CUBLASLT_REDUCTION_SCHEME_NONE},
                                     {1e-4, 4, CUBLASLT_REDUCTION_SCHEME_INPLACE}};
constexpr uint64_t kAlgorithmMark = 0x77656674;  // a description made here has it in its second word
std::atomic<int64_t> runs[std::size(kAlgorithms)];

const Algorithm* find(const cublasLtMatmulAlgo_t* algorithm) {
  if (algorithm == nullptr || algorithm->data[0] >= std::size(kAlgorithms) || algorithm->data[1] != kAlgorithmMark)
    return nullptr;
  return &kAlgorithms[algorithm->data[0]];
}

// ---- what the library supports ----

bool is_fp8(uint32_t type) { return type == CUDA_R_8F_E4M3 || type == CUDA_R_8F_E5M2; }

bool types_fit(const Desc& desc, const Layout& a, const Layout& b, const Layout& c, const Layout& d) {
  if (desc.compute == CUBLAS_COMPUTE_64F || desc.compute == CUBLAS_COMPUTE_64F_PEDANTIC) {
    const auto wide = [](const Layout& m) { return m.type == CUDA_R_64F; };
    return desc.scale == CUDA_R_64F && wide(a) && wide(b) && wide(c) && wide(d);
  }
  if (desc.scale != CUDA_R_32F) return false;
  const bool tf32 = desc.compute == CUBLAS_COMPUTE_32F_FAST_TF32;
  if (!tf32 && desc.compute != CUBLAS_COMPUTE_32F && desc.compute != CUBLAS_COMPUTE_32F_PEDANTIC) return false;
  if (is_fp8(a.type) || is_fp8(b.type)) {
    if (tf32 || !is_fp8(a.type) || !is_fp8(b.type)) return false;
    if (a.type == CUDA_R_8F_E5M2 && b.type == CUDA_R_8F_E5M2) return false;
    if (!is_fp8(d.type)) return c.type == d.type && d.type != CUDA_R_64F;
    if (d.type == CUDA_R_8F_E5M2 && a.type == CUDA_R_8F_E4M3 && b.type == CUDA_R_8F_E4M3) return false;
    return c.type == CUDA_R_16BF || c.type == CUDA_R_16F;
  }
  if (a.type != b.type || c.type != d.type || a.type == CUDA_R_64F) return false;
  if (a.type == CUDA_R_32F) return d.type == CUDA_R_32F;
  return !tf32 && (d.type == a.type || d.type == CUDA_R_32F);
}

bool layout_is_valid(const Layout& m) {
  const uint64_t least = m.order == CUBLASLT_ORDER_COL ? m.rows : m.columns;
  return m.rows > 0 && m.columns > 0 && m.ld > 0 && static_cast<uint64_t>(m.ld) >= least && m.batch_count > 0 &&
         (m.order == CUBLASLT_ORDER_COL || m.order == CUBLASLT_ORDER_ROW);
}

/// 8-bit operands are read along k, in pieces of 16 bytes.
bool fp8_fits(const Desc& desc, const Layout& a, const Layout& b, const Layout& d) {
  const auto whole = [](const Layout& m) { return m.order == CUBLASLT_ORDER_COL && m.ld % 16 == 0; };
  return desc.op_a == CUBLAS_OP_T && desc.op_b == CUBLAS_OP_N && whole(a) && whole(b) &&
         d.order == CUBLASLT_ORDER_COL &&
         static_cast<uint64_t>(d.ld) * element_bytes(static_cast<int>(d.type)) % 16 == 0 && a.rows % 16 == 0 &&
         d.rows % 16 == 0;
}

enum class Bias { kNone, kAdded, kGradientOfOutput, kGradientOfA, kGradientOfB };

struct Epilogue {
  Bias bias;
  bool gelu, gelu_backward, aux;
};

bool find_epilogue(uint32_t code, Epilogue& epilogue) {
  switch (code) {
    case CUBLASLT_EPILOGUE_DEFAULT:
      epilogue = {Bias::kNone, false, false, false};
      return true;
    case CUBLASLT_EPILOGUE_BIAS:
      epilogue = {Bias::kAdded, false, false, false};
      return true;
    case CUBLASLT_EPILOGUE_GELU:
      epilogue = {Bias::kNone, true, false, false};
      return true;
    case CUBLASLT_EPILOGUE_GELU_AUX:
      epilogue = {Bias::kNone, true, false, true};
      return true;
    case CUBLASLT_EPILOGUE_GELU_BIAS:
      epilogue = {Bias::kAdded, true, false, false};
      return true;
    case CUBLASLT_EPILOGUE_GELU_AUX_BIAS:
      epilogue = {Bias::kAdded, true, false, true};
      return true;
    case CUBLASLT_EPILOGUE_DGELU:
      epilogue = {Bias::kNone, false, true, true};
      return true;
    case CUBLASLT_EPILOGUE_DGELU_BGRAD:
      epilogue = {Bias::kGradientOfOutput, false, true, true};
      return true;
    case CUBLASLT_EPILOGUE_BGRADA:
      epilogue = {Bias::kGradientOfA, false, false, false};
      return true;
    case CUBLASLT_EPILOGUE_BGRADB:
      epilogue = {Bias::kGradientOfB, false, false, false};
      return true;
    default:
      return false;
  }
}

cublasStatus_t check(const Desc& desc, const Layout& a, const Layout& b, const Layout& c, const Layout& d) {
  for (const Layout* m : {&a, &b, &c, &d}) {
    if (!layout_is_valid(*m)) return CUBLAS_STATUS_INVALID_VALUE;
    if (m->batch_count != d.batch_count) return CUBLAS_STATUS_INVALID_VALUE;
    if (element_bytes(static_cast<int>(m->type)) == 0) return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  const bool flip_a = desc.op_a != CUBLAS_OP_N, flip_b = desc.op_b != CUBLAS_OP_N;
  const uint64_t m = flip_a ? a.columns : a.rows, k = flip_a ? a.rows : a.columns;
  const uint64_t n = flip_b ? b.rows : b.columns, k_of_b = flip_b ? b.columns : b.rows;
  if (k != k_of_b || d.rows != m || d.columns != n || c.rows != m || c.columns != n) return CUBLAS_STATUS_INVALID_VALUE;
  const bool known_mode =
      desc.pointer_mode == CUBLASLT_POINTER_MODE_HOST || desc.pointer_mode == CUBLASLT_POINTER_MODE_DEVICE;
  if (!known_mode || !types_fit(desc, a, b, c, d)) return CUBLAS_STATUS_NOT_SUPPORTED;
  if (is_fp8(a.type) && !fp8_fits(desc, a, b, d)) return CUBLAS_STATUS_NOT_SUPPORTED;
  if (!is_fp8(a.type) && (desc.scale_a != nullptr || desc.scale_b != nullptr)) return CUBLAS_STATUS_INVALID_VALUE;
  if (!is_fp8(d.type) && (desc.scale_d != nullptr || desc.largest_d != nullptr)) return CUBLAS_STATUS_INVALID_VALUE;

  Epilogue epilogue;
  if (!find_epilogue(desc.epilogue, epilogue)) return CUBLAS_STATUS_NOT_SUPPORTED;
  const bool plain = desc.epilogue == CUBLASLT_EPILOGUE_DEFAULT;
  if (!plain && (d.order != CUBLASLT_ORDER_COL || d.type == CUDA_R_64F)) return CUBLAS_STATUS_NOT_SUPPORTED;
  if (epilogue.aux && (desc.aux_ld % 8 != 0 || desc.aux_ld < static_cast<int64_t>(d.rows)))
    return CUBLAS_STATUS_INVALID_VALUE;
  if (epilogue.aux && desc.aux_batch_stride % 8 != 0) return CUBLAS_STATUS_INVALID_VALUE;
  return CUBLAS_STATUS_SUCCESS;
}

// ---- the product ----

// GELU by tanh, as cuBLASLt has it: x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
constexpr double kSqrt2OverPi = 0.79788456080286535588, kCubic = 0.044715;

double gelu(double x) { return 0.5 * x * (1 + std::tanh(kSqrt2OverPi * (x + kCubic * x * x * x))); }
double gelu_derivative(double x) {
  const double t = std::tanh(kSqrt2OverPi * (x + kCubic * x * x * x));
  return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * kSqrt2OverPi * (1 + 3 * kCubic * x * x);
}

struct Matmul {
  Desc desc;
  Layout a, b, c, d;
  const void *a_data, *b_data, *c_data;
  void* d_data;
  double alpha, beta;
};

/// op(M) of one batch, with `k` contiguous, in the precision in which it is multiplied.
std::vector<double> operand(const Matmul& call, const Layout& m, const void* data, int64_t batch, bool k_is_row) {
  const size_t start = static_cast<size_t>(batch * m.batch_stride);
  const uint64_t length = k_is_row ? m.rows : m.columns, lines = k_is_row ? m.columns : m.rows;
  std::vector<double> values(length * lines);
  for (uint64_t line = 0; line < lines; ++line) {
    for (uint64_t k = 0; k < length; ++k) {
      const double x = load(static_cast<int>(m.type), data, start + (k_is_row ? m.index(k, line) : m.index(line, k)));
      values[line * length + k] = call.desc.compute == CUBLAS_COMPUTE_32F_FAST_TF32 ? to_tf32(x) : x;
    }
  }
  return values;
}

std::vector<double> line_sums(const std::vector<double>& values, size_t lines) {
  const size_t length = values.size() / lines;
  std::vector<double> sums(lines, 0);
  for (size_t i = 0; i < values.size(); ++i) sums[i / length] += values[i];
  return sums;
}

double scale_factor(const void* scale) { return scale == nullptr ? 1 : load(CUDA_R_32F, scale, 0); }

void multiply_batch(const Matmul& call, const Epilogue& epilogue, int64_t batch, double& largest) {
  const Desc& desc = call.desc;
  const Layout& d = call.d;
  const int d_type = static_cast<int>(d.type);
  const bool narrow = is_fp8(call.a.type) && (d.type == CUDA_R_32F || is_fp8(d.type));
  const int bias_type = desc.bias_type >= 0 ? desc.bias_type : narrow ? CUDA_R_16BF : d_type;
  const int aux_type = desc.aux_type >= 0 ? desc.aux_type : d_type;
  const double scale = call.alpha * scale_factor(desc.scale_a) * scale_factor(desc.scale_b),
               scale_d = scale_factor(desc.scale_d);
  const auto bias_at = [&](size_t i) { return static_cast<size_t>(batch * desc.bias_batch_stride) + i; };

  const std::vector<double> a = operand(call, call.a, call.a_data, batch, desc.op_a != CUBLAS_OP_N);
  const std::vector<double> b = operand(call, call.b, call.b_data, batch, desc.op_b == CUBLAS_OP_N);
  const size_t rows = d.rows, columns = d.columns, length = a.size() / rows;
  std::vector<double> gradient(rows, 0);
  for (size_t column = 0; column < columns; ++column) {
    for (size_t row = 0; row < rows; ++row) {
      double x = 0;
      for (size_t k = 0; k < length; ++k) x += a[row * length + k] * b[column * length + k];
      x *= scale;
      if (call.beta != 0) {
        const size_t at = static_cast<size_t>(batch * call.c.batch_stride) + call.c.index(row, column);
        x += call.beta * load(static_cast<int>(call.c.type), call.c_data, at);
      }
      if (epilogue.bias == Bias::kAdded) x += load(bias_type, desc.bias, bias_at(row));
      const size_t aux_at =
          static_cast<size_t>(batch * desc.aux_batch_stride + static_cast<int64_t>(column) * desc.aux_ld) + row;
      if (epilogue.gelu && epilogue.aux) store(aux_type, desc.aux, aux_at, x);
      if (epilogue.gelu) x = gelu(x);
      if (epilogue.gelu_backward) x *= gelu_derivative(load(aux_type, desc.aux, aux_at));
      gradient[row] += x;
      if (std::isnan(x) || std::fabs(x) > largest) largest = std::fabs(x);
      store(d_type, call.d_data, static_cast<size_t>(batch * d.batch_stride) + d.index(row, column), scale_d * x);
    }
  }
  if (epilogue.bias == Bias::kGradientOfA) gradient = line_sums(a, rows);
  if (epilogue.bias == Bias::kGradientOfB) gradient = line_sums(b, columns);
  if (epilogue.bias == Bias::kNone || epilogue.bias == Bias::kAdded) return;
  for (size_t i = 0; i < gradient.size(); ++i) store(bias_type, desc.bias, bias_at(i), gradient[i]);
}

void multiply(const Matmul& call) {
  Epilogue epilogue;
  find_epilogue(call.desc.epilogue, epilogue);
  double largest = 0;
  for (int64_t batch = 0; batch < call.d.batch_count; ++batch) multiply_batch(call, epilogue, batch, largest);
  if (call.desc.largest_d != nullptr) store(CUDA_R_32F, call.desc.largest_d, 0, largest);
}

struct StatusText {
  cublasStatus_t status;
  const char *name, *text;
};
#define WEFT_STATUS(code, text) {code, #code, text}
constexpr StatusText kStatuses[] = {
    WEFT_STATUS(CUBLAS_STATUS_SUCCESS, "success"),
    WEFT_STATUS(CUBLAS_STATUS_NOT_INITIALIZED, "the library was not initialized"),
    WEFT_STATUS(CUBLAS_STATUS_ALLOC_FAILED, "the resource allocation failed"),
    WEFT_STATUS(CUBLAS_STATUS_INVALID_VALUE, "an invalid value was used as an argument"),
    WEFT_STATUS(CUBLAS_STATUS_ARCH_MISMATCH, "an absent device architectural feature is required"),
    WEFT_STATUS(CUBLAS_STATUS_MAPPING_ERROR, "access to the memory space of the device failed"),
    WEFT_STATUS(CUBLAS_STATUS_EXECUTION_FAILED, "the function failed to launch on the device"),
    WEFT_STATUS(CUBLAS_STATUS_INTERNAL_ERROR, "an internal operation failed"),
    WEFT_STATUS(CUBLAS_STATUS_NOT_SUPPORTED, "the functionality is not supported"),
    WEFT_STATUS(CUBLAS_STATUS_LICENSE_ERROR, "the licence check failed"),
};
#undef WEFT_STATUS

const StatusText* find(cublasStatus_t status) {
  const auto* found =
      std::find_if(std::begin(kStatuses), std::end(kStatuses), [&](const StatusText& s) { return s.status == status; });
  return found == std::end(kStatuses) ? nullptr : found;
}

template <class T, class... Arguments>
cublasStatus_t create(T** object, Arguments... arguments) {
  if (object == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  *object = new T{arguments...};
  return CUBLAS_STATUS_SUCCESS;
}
template <class T>
cublasStatus_t destroy(T* object) {
  delete object;
  return CUBLAS_STATUS_SUCCESS;
}

}  // namespace

int64_t products_with(int algorithm) { return runs[algorithm]; }

}  // namespace weft_emulation

using weft_emulation::create;
using weft_emulation::destroy;
using weft_emulation::set;

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) { return create(handle); }
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { return destroy(handle); }
const char* cublasLtGetStatusName(cublasStatus_t status) {
  const auto* found = weft_emulation::find(status);
  return found ? found->name : "unknown status";
}
const char* cublasLtGetStatusString(cublasStatus_t status) {
  const auto* found = weft_emulation::find(status);
  return found ? found->text : "unknown status";
}
size_t cublasLtGetVersion() { return 130000; }

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* desc, cublasComputeType_t compute, cudaDataType_t scale) {
  return create(desc, static_cast<int32_t>(compute), static_cast<int32_t>(scale));
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) { return destroy(desc); }

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, size_t bytes) {
  if (desc == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  switch (attribute) {
    case CUBLASLT_MATMUL_DESC_COMPUTE_TYPE:
      return set(desc->compute, value, bytes);
    case CUBLASLT_MATMUL_DESC_SCALE_TYPE:
      return set(desc->scale, value, bytes);
    case CUBLASLT_MATMUL_DESC_POINTER_MODE:
      return set(desc->pointer_mode, value, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSA:
      return set(desc->op_a, value, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSB:
      return set(desc->op_b, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
      return set(desc->epilogue, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
      return set(desc->bias, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE:
      return set(desc->bias_batch_stride, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER:
      return set(desc->aux, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD:
      return set(desc->aux_ld, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_BATCH_STRIDE:
      return set(desc->aux_batch_stride, value, bytes);
    case CUBLASLT_MATMUL_DESC_A_SCALE_POINTER:
      return set(desc->scale_a, value, bytes);
    case CUBLASLT_MATMUL_DESC_B_SCALE_POINTER:
      return set(desc->scale_b, value, bytes);
    case CUBLASLT_MATMUL_DESC_D_SCALE_POINTER:
      return set(desc->scale_d, value, bytes);
    case CUBLASLT_MATMUL_DESC_AMAX_D_POINTER:
      return set(desc->largest_d, value, bytes);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE:
      return set(desc->aux_type, value, bytes);
    case CUBLASLT_MATMUL_DESC_FAST_ACCUM:
      return set(desc->fast_accumulation, value, bytes);
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE:
      return set(desc->bias_type, value, bytes);
  }
  return CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type, uint64_t rows,
                                          uint64_t columns, int64_t leading_dimension) {
  return create(layout, static_cast<uint32_t>(type), static_cast<int32_t>(CUBLASLT_ORDER_COL), rows, columns,
                leading_dimension);
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) { return destroy(layout); }

cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t attribute, const void* value,
                                                size_t bytes) {
  if (layout == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  switch (attribute) {
    case CUBLASLT_MATRIX_LAYOUT_TYPE:
      return set(layout->type, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_ORDER:
      return set(layout->order, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_ROWS:
      return set(layout->rows, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_COLS:
      return set(layout->columns, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_LD:
      return set(layout->ld, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT:
      return set(layout->batch_count, value, bytes);
    case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET:
      return set(layout->batch_stride, value, bytes);
  }
  return CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) { return create(preference); }
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) { return destroy(preference); }

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute, const void* value,
                                                    size_t bytes) {
  if (preference == nullptr || value == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  if (attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES) return set(preference->workspace_bytes, value, bytes);
  if (attribute == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK) return set(preference->reductions, value, bytes);
  return bytes == sizeof(uint32_t) ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int requested,
                                              cublasLtMatmulHeuristicResult_t results[], int* returned) {
  if (handle == nullptr) return CUBLAS_STATUS_NOT_INITIALIZED;
  if (!desc || !a || !b || !c || !d || !preference || !results || !returned || requested < 1)
    return CUBLAS_STATUS_INVALID_VALUE;
  *returned = 0;
  const cublasStatus_t status = weft_emulation::check(*desc, *a, *b, *c, *d);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  for (size_t i = 0; i < std::size(weft_emulation::kAlgorithms) && *returned < requested; ++i) {
    const uint32_t reduction = weft_emulation::kAlgorithms[i].reduction;
    if (reduction != CUBLASLT_REDUCTION_SCHEME_NONE && (reduction & preference->reductions) == 0) continue;
    results[*returned] = {};
    results[*returned].algo.data[0] = i;
    results[*returned].algo.data[1] = weft_emulation::kAlgorithmMark;
    results[*returned].wavesCount = 1;
    ++*returned;
  }
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a,
                                       cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                       const cublasLtMatmulAlgo_t* algorithm, cublasLtMatmulHeuristicResult_t* result) {
  if (handle == nullptr) return CUBLAS_STATUS_NOT_INITIALIZED;
  if (!desc || !a || !b || !c || !d || !result || weft_emulation::find(algorithm) == nullptr)
    return CUBLAS_STATUS_INVALID_VALUE;
  *result = {};
  return weft_emulation::check(*desc, *a, *b, *c, *d);
}

cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute(const cublasLtMatmulAlgo_t* algorithm,
                                                    cublasLtMatmulAlgoConfigAttributes_t attribute, void* value,
                                                    size_t bytes, size_t* written) {
  const auto* found = weft_emulation::find(algorithm);
  if (found == nullptr || value == nullptr || bytes != sizeof(int32_t) || written == nullptr)
    return CUBLAS_STATUS_INVALID_VALUE;
  *written = bytes;
  if (attribute == CUBLASLT_ALGO_CONFIG_SPLITK_NUM) {
    std::memcpy(value, &found->parts, bytes);
  } else {
    std::memcpy(value, &found->reduction, bytes);
  }
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void* alpha, const void* a,
                              cublasLtMatrixLayout_t a_layout, const void* b, cublasLtMatrixLayout_t b_layout,
                              const void* beta, const void* c, cublasLtMatrixLayout_t c_layout, void* d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t* algorithm, void*, size_t,
                              cudaStream_t stream) {
  using namespace weft_emulation;
  if (handle == nullptr) return CUBLAS_STATUS_NOT_INITIALIZED;
  if (!desc || !alpha || !a || !a_layout || !b || !b_layout || !beta || !c_layout || !d || !d_layout)
    return CUBLAS_STATUS_INVALID_VALUE;
  const cublasStatus_t status = check(*desc, *a_layout, *b_layout, *c_layout, *d_layout);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  Epilogue epilogue;
  find_epilogue(desc->epilogue, epilogue);
  if ((epilogue.bias != Bias::kNone && desc->bias == nullptr) || (epilogue.aux && desc->aux == nullptr))
    return CUBLAS_STATUS_INVALID_VALUE;
  Matmul call = {*desc,
                 *a_layout,
                 *b_layout,
                 *c_layout,
                 *d_layout,
                 a,
                 b,
                 c,
                 d,
                 load(desc->scale, alpha, 0),
                 load(desc->scale, beta, 0)};
  if (call.beta != 0 && c == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  // Without an algorithm the library takes its own first choice.
  const Algorithm* const chosen = algorithm == nullptr ? kAlgorithms : weft_emulation::find(algorithm);
  if (chosen == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  ++runs[chosen - kAlgorithms];
  pass_time(chosen->seconds);
  const bool on_device = desc->pointer_mode == CUBLASLT_POINTER_MODE_DEVICE;
  const cudaError_t error = submit(stream, [call, on_device, alpha, beta]() mutable {
    if (on_device) {  // factors are what the memory holds when the product is made
      call.alpha = load(call.desc.scale, alpha, 0);
      call.beta = load(call.desc.scale, beta, 0);
    }
    multiply(call);
  });
  return error == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}

// Matrix products through cuBLASLt. It thinks in columns: our row-major C = A B is its C^T = B^T A^T, so that A and B
// change places and every row-major matrix is read as its transpose.
#include "ops/gemm.h"

#include <cublasLt.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>

#include "core/error.h"
#include "cuda/context.h"
#include "cuda/cublaslt_library.h"
#include "cuda/error.h"
#include "cuda/gemm_algorithm.h"
#include "cuda/strided.h"
#include "ops/elementwise_kernels.h"
#include "ops/fp8_kernels.h"
#include "ops/gemm_sums.h"
#include "ops/gemm_types.h"
#include "ops/reduce_kernels.h"

namespace weft {
namespace {

using cuda::Context;
using cuda::cublaslt;

void check(cublasStatus_t status, const char* call) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  fail(ErrorKind::kDevice, "gemm", call, ": ", cublaslt().GetStatusName(status), ": ",
       cublaslt().GetStatusString(status));
}
#define WEFT_BLAS(call) check((call), #call)

template <class T>
constexpr cudaDataType_t kType = std::is_same_v<T, double>  ? CUDA_R_64F
                                 : std::is_same_v<T, float> ? CUDA_R_32F
                                 : std::is_same_v<T, Half>  ? CUDA_R_16F
                                                            : CUDA_R_16BF;

/// One operand as cuBLASLt takes it: `rows` x `columns` in columns, `ld` apart, perhaps transposed.
struct Columns {
  bool transposed = false;
  int64_t rows = 0, columns = 0, ld = 0;
};

/// A row-major [rows, columns] matrix, whose transpose is wanted. A matrix of one row or column may have any stride in
/// the dimension that is not walked.
template <class T>
Columns columns_of(const MatrixRef<T>& x, int64_t rows, int64_t columns) {
  if (x.col_stride == 1) return {false, columns, rows, std::max(x.row_stride, columns)};
  return {true, rows, columns, std::max(x.col_stride, rows)};
}

/// Descriptors are made, used and destroyed with one product: they are host structs of some hundred bytes.
class Descriptor {
 public:
  Descriptor(cublasComputeType_t compute, cudaDataType_t scale) {
    WEFT_BLAS(cublaslt().MatmulDescCreate(&descriptor_, compute, scale));
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() { cublaslt().MatmulDescDestroy(descriptor_); }
  template <class Value>
  void set(cublasLtMatmulDescAttributes_t attribute, const Value& value) {
    WEFT_BLAS(cublaslt().MatmulDescSetAttribute(descriptor_, attribute, &value, sizeof value));
  }
  cublasLtMatmulDesc_t get() const { return descriptor_; }

 private:
  cublasLtMatmulDesc_t descriptor_ = nullptr;
};

class Layout {
 public:
  Layout(cudaDataType_t type, const Columns& x, int64_t batch, int64_t batch_stride) {
    WEFT_BLAS(cublaslt().MatrixLayoutCreate(&layout_, type, static_cast<uint64_t>(x.rows),
                                            static_cast<uint64_t>(x.columns), x.ld));
    if (batch == 1) return;
    const auto count = static_cast<int32_t>(batch);
    WEFT_BLAS(cublaslt().MatrixLayoutSetAttribute(layout_, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof count));
    WEFT_BLAS(cublaslt().MatrixLayoutSetAttribute(layout_, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &batch_stride,
                                                  sizeof batch_stride));
  }
  Layout(const Layout&) = delete;
  Layout& operator=(const Layout&) = delete;
  ~Layout() { cublaslt().MatrixLayoutDestroy(layout_); }
  cublasLtMatrixLayout_t get() const { return layout_; }

 private:
  cublasLtMatrixLayout_t layout_ = nullptr;
};

/// What an algorithm depends on. Alignment counts: an algorithm for 16-byte loads may not be given other pointers.
using Key = std::tuple<int, int, int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, bool, int,
                       int, int, unsigned>;

constexpr uint32_t kMostAlignment = 256;

/// The largest power of two up to 256 that divides the address.
uint32_t alignment_of(const void* p) {
  const auto address = reinterpret_cast<uintptr_t>(p) | kMostAlignment;
  return static_cast<uint32_t>(address & (~address + 1));
}

size_t bytes_of(cudaDataType_t type) { return type == CUDA_R_64F ? 8 : type == CUDA_R_32F ? 4 : 2; }

std::string type_name(int type) {
  switch (type) {
    case CUDA_R_64F:
      return "f64";
    case CUDA_R_32F:
      return "f32";
    case CUDA_R_16F:
      return "f16";
    case CUDA_R_16BF:
      return "bf16";
    case CUDA_R_8F_E4M3:
      return "f8e4m3";
    default:
      return "f8e5m2";
  }
}

/// The key in words, but for the device: what a list of algorithms knows the product by.
std::string name_of(const Key& key) {
  const auto& [a, b, c, m, n, k, ldb, lda, ldc, batch, trans_b, trans_a, device, epilogue, mode, alignment] = key;
  static_cast<void>(device);
  return concat(type_name(a), " x ", type_name(b), " -> ", type_name(c), ", m ", m, ", n ", n, ", k ", k, ", lda ", lda,
                trans_a ? " columns" : " rows", ", ldb ", ldb, trans_b ? " columns" : " rows", ", ldc ", ldc,
                ", batch ", batch, ", epilogue ", epilogue, (mode & 1) != 0 ? ", factor on the device" : "",
                (mode & 2) != 0 ? ", tf32" : "", ", aligned ", alignment >> 9 & 511, ' ', alignment >> 18, ' ',
                alignment & 511);
}

/// The algorithm for a product, asked for once: a function of the product, of the library's version and of the list of
/// choices, if one was given, so that every run makes the same choice and has the same bits. Nothing if the product is
/// `optional` and the library does not have it.
std::optional<cublasLtMatmulAlgo_t> algorithm(Context& context, const Key& key, const cuda::GemmCall& call,
                                              bool optional) {
  static std::mutex& mutex = *new std::mutex;
  static auto& known = *new std::map<Key, std::optional<cublasLtMatmulAlgo_t>>;
  static int64_t epoch = 0;
  const std::lock_guard lock(mutex);
  if (const int64_t now = cuda::gemm_algorithm_epoch(); now != epoch) {
    known.clear();
    epoch = now;
  }
  if (const auto found = known.find(key); found != known.end()) return found->second;
  context.refuse_while_capturing("looks for the algorithm of a product");  // which may take memory
  std::optional<cublasLtMatmulAlgo_t> chosen;
  if (!optional || cuda::has_gemm_algorithm(context, call))
    chosen = cuda::choose_gemm_algorithm(context, name_of(key), call);
  return known.emplace(key, chosen).first->second;
}

struct Operand {
  cudaDataType_t type;
  Columns columns;
  const void* data;
  int64_t step = 0;  ///< from one product of a batch to the next
};

/// op(first) op(second), and beta times what `out` holds, to `out`.
struct Product {
  Operand first, second, out;
  int64_t k = 0, batch = 1;
  const void *alpha, *beta;
  bool accumulates = false, tf32 = false, factor_on_device = false;
  cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  bool optional = false;  ///< the library may not have it
};

/// Queues the product that `descriptor` is of; false, and nothing, if it is optional and the library does not have it.
bool multiply(Context& context, cudaStream_t stream, Descriptor& descriptor, const Product& p) {
  const auto set_transposed = [&](cublasLtMatmulDescAttributes_t which, const Operand& operand) {
    descriptor.set(which, static_cast<int32_t>(operand.columns.transposed ? CUBLAS_OP_T : CUBLAS_OP_N));
  };
  set_transposed(CUBLASLT_MATMUL_DESC_TRANSA, p.first);
  set_transposed(CUBLASLT_MATMUL_DESC_TRANSB, p.second);
  if (p.epilogue != CUBLASLT_EPILOGUE_DEFAULT) descriptor.set(CUBLASLT_MATMUL_DESC_EPILOGUE, p.epilogue);
  const auto layout_of = [&](const Operand& o) { return Layout(o.type, o.columns, p.batch, o.step); };
  const Layout a = layout_of(p.first), b = layout_of(p.second), c = layout_of(p.out);
  const int64_t m = p.out.columns.columns, n = p.out.columns.rows;
  const std::array<uint32_t, 3> alignment = {alignment_of(p.first.data), alignment_of(p.second.data),
                                             alignment_of(p.out.data)};
  const Key key{p.second.type,
                p.first.type,
                p.out.type,
                m,
                n,
                p.k,
                p.first.columns.ld,
                p.second.columns.ld,
                p.out.columns.ld,
                p.batch,
                p.first.columns.transposed,
                p.second.columns.transposed,
                context.index,
                static_cast<int>(p.epilogue),
                static_cast<int>(p.factor_on_device) | static_cast<int>(p.tf32) << 1,
                alignment[0] << 18 | alignment[1] << 9 | alignment[2]};
  const int64_t elements = (p.batch - 1) * p.out.step + (m - 1) * p.out.columns.ld + n;
  void* const out = const_cast<void*>(p.out.data);
  const std::optional<cublasLtMatmulAlgo_t> chosen =
      algorithm(context, key,
                {.product = descriptor.get(),
                 .a = a.get(),
                 .b = b.get(),
                 .c = c.get(),
                 .alpha = p.alpha,
                 .a_data = p.first.data,
                 .b_data = p.second.data,
                 .beta = p.beta,
                 .c_data = out,
                 .alignment = alignment,
                 .accumulates = p.accumulates,
                 .c_bytes = static_cast<size_t>(elements) * bytes_of(p.out.type),
                 .flops = 2.0 * static_cast<double>(p.batch) * static_cast<double>(m) * static_cast<double>(n) *
                          static_cast<double>(p.k)},
                p.optional);
  if (!chosen) return false;
  WEFT_BLAS(cublaslt().Matmul(context.blas, descriptor.get(), p.alpha, p.first.data, a.get(), p.second.data, b.get(),
                              p.beta, out, c.get(), out, c.get(), &*chosen, context.workspace, Context::kWorkspace,
                              stream));
  return true;
}

/// C of all products of a batch.
template <class TA, class TB, class TC>
StridedView view_of_c(const Gemm<TA, TB, TC>& g, const GemmBatch& batch) {
  return {g.c, {batch.count, g.m, g.n}, {batch.c, g.ldc, 1}, kGemmDType<TC>};
}

/// C += bias, for where cuBLASLt does not.
template <class TA, class TB, class TC>
void add_bias(Cuda device, const Gemm<TA, TB, TC>& g, const GemmBatch& batch) {
  const StridedView c = view_of_c(g, batch);
  if constexpr (std::is_same_v<TC, typename Gemm<TA, TB, TC>::Sum>) {
    if (g.bias == nullptr) return;
    binary<scalar_math::Add>(device, c, c, StridedView{const_cast<TC*>(g.bias), c.shape, {0, 0, 1}, c.dtype});
  } else {
    if (g.bias_of_c == nullptr) return;
    binary<scalar_math::Add>(device, c, c, StridedView{const_cast<TC*>(g.bias_of_c), c.shape, {0, 0, 1}, c.dtype});
  }
}

/// The activation of a product that has been written, for where cuBLASLt does not do it.
template <class TA, class TB, class TC>
void activate(Cuda device, const Gemm<TA, TB, TC>& g, const GemmBatch& batch) {
  const StridedView c = view_of_c(g, batch);
  const auto beside = [&](const TC* data, int64_t step, int64_t ld) {
    return StridedView{const_cast<TC*>(data), c.shape, {step, ld, 1}, c.dtype};
  };
  if (g.activation == GemmActivation::kGelu) {
    unary<scalar_math::Gelu>(device, beside(g.d, batch.d, g.ldd), c);
  } else {
    unary_backward<scalar_math::Gelu>(device, c, c, beside(g.aux, batch.aux, g.ldaux));
  }
}

/// Whether cuBLASLt does the activation: not in f64, nor with an auxiliary matrix whose rows are not of whole units
/// of 8. What is not aligned as memory of its own is left to us too, so that no algorithm depends on that alignment.
template <class TA, class TB, class TC>
bool activates(const Gemm<TA, TB, TC>& g, const GemmBatch& batch) {
  const bool forward = g.activation == GemmActivation::kGelu;
  const int64_t ld = forward ? g.ldc : g.ldaux, step = forward ? batch.c : batch.aux;
  return g.k > 0 && !std::is_same_v<TC, double> && ld % 8 == 0 && step % 8 == 0 &&
         alignment_of(forward ? g.c : g.aux) == kMostAlignment;
}

/// With `sums`, which takes those over k of A's rows: false, and nothing, if the library does not have it.
template <class TA, class TB, class TC>
bool run(Cuda device, Gemm<TA, TB, TC> g, const GemmBatch& batch, TA* sums = nullptr) {
  using Sum = typename Gemm<TA, TB, TC>::Sum;
  if (g.m == 0 || g.n == 0 || batch.count == 0) return true;
  if (g.activation != GemmActivation::kNone && !activates(g, batch)) {
    const Gemm<TA, TB, TC> whole = g;
    g.activation = GemmActivation::kNone;
    run(device, g, batch);
    activate(device, whole, batch);
    return true;
  }
  if (g.k == 0) {  // not for cuBLASLt: an empty sum
    if (g.beta != Sum(0) && g.beta != Sum(1))
      fail(ErrorKind::kValue, "gemm", "with k = 0 beta must be 0 or 1, got ", g.beta);
    if (g.beta == Sum(0)) cuda::fill(device, view_of_c(g, batch), 0);
    add_bias(device, g, batch);
    return true;
  }
  if constexpr (std::is_same_v<TC, double>) {  // nor does it add a bias in f64
    if (g.bias != nullptr) {
      const Gemm<TA, TB, TC> whole = g;
      g.bias = nullptr;
      run(device, g, batch);
      add_bias(device, whole, batch);
      return true;
    }
  }
  Context& context = cuda::current_context();
  const auto stream = static_cast<cudaStream_t>(device.stream);

  const bool tf32 = g.tf32 && std::is_same_v<TA, float>, on_device = g.scale != nullptr;
  Descriptor descriptor(std::is_same_v<Sum, double> ? CUBLAS_COMPUTE_64F
                        : tf32                      ? CUBLAS_COMPUTE_32F_FAST_TF32
                                                    : CUBLAS_COMPUTE_32F,
                        kType<Sum>);
  cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  const void* bias = std::is_same_v<Sum, TC> ? static_cast<const void*>(g.bias) : static_cast<const void*>(g.bias_of_c);
  TC* written = g.c;
  int64_t written_ld = g.ldc, written_step = batch.c;
  if (bias != nullptr) {
    descriptor.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
    epilogue = CUBLASLT_EPILOGUE_BIAS;
  }
  if (g.activation != GemmActivation::kNone) {
    // cuBLASLt writes gelu(pre) where C is and pre to the auxiliary matrix.
    const bool forward = g.activation == GemmActivation::kGelu;
    const void* auxiliary = forward ? static_cast<const void*>(g.c) : static_cast<const void*>(g.aux);
    const int64_t auxiliary_ld = forward ? g.ldc : g.ldaux, auxiliary_step = forward ? batch.c : batch.aux;
    if (forward) written = g.d, written_ld = g.ldd, written_step = batch.d;
    epilogue = !forward          ? CUBLASLT_EPILOGUE_DGELU
               : bias != nullptr ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS
                                 : CUBLASLT_EPILOGUE_GELU_AUX;
    descriptor.set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, auxiliary);
    descriptor.set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, auxiliary_ld);
    if (batch.count > 1) descriptor.set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_BATCH_STRIDE, auxiliary_step);
  }
  if (sums != nullptr) {  // A is cuBLASLt's second matrix
    descriptor.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, static_cast<const void*>(sums));
    epilogue = CUBLASLT_EPILOGUE_BGRADB;
  }

  // alpha from the device's memory: its factor stands there already, and the host's is 1 wherever that is used.
  const void *alpha_at = &g.alpha, *beta_at = &g.beta;
  if (on_device) {
    if (g.alpha != Sum(1))
      fail(ErrorKind::kValue, "gemm", "a factor on the device stands for alpha, which must then be 1, got ", g.alpha);
    if (g.beta != Sum(0) && g.beta != Sum(1))
      fail(ErrorKind::kValue, "gemm", "with a factor on the device beta must be 0 or 1, got ", g.beta);
    descriptor.set(CUBLASLT_MATMUL_DESC_POINTER_MODE, static_cast<int32_t>(CUBLASLT_POINTER_MODE_DEVICE));
    alpha_at = g.scale;
    beta_at = static_cast<const Sum*>(context.zero_and_one(std::is_same_v<Sum, double>)) + (g.beta == Sum(1) ? 1 : 0);
  }
  const Columns out{false, g.n, g.m, std::max(written_ld, g.n)};
  return multiply(context, stream, descriptor,
                  {.first = {kType<TB>, columns_of(g.b, g.k, g.n), g.b.data, batch.b},
                   .second = {kType<TA>, columns_of(g.a, g.m, g.k), g.a.data, batch.a},
                   .out = {kType<TC>, out, written, written_step},
                   .k = g.k,
                   .batch = batch.count,
                   .alpha = alpha_at,
                   .beta = beta_at,
                   .accumulates = g.beta != Sum(0),
                   .tf32 = tf32,
                   .factor_on_device = on_device,
                   .epilogue = epilogue,
                   .optional = sums != nullptr});
}

cudaDataType_t type_of(Fp8Format format) { return format == Fp8Format::kE4M3 ? CUDA_R_8F_E4M3 : CUDA_R_8F_E5M2; }

}  // namespace

void fp8_check_device(Cuda) {
  const Context& context = cuda::current_context();
  constexpr int kLeast = 89;
  if (context.compute_capability >= kLeast) return;
  fail(ErrorKind::kDevice, "fp8", "device ", context.index, " has compute capability ", context.compute_capability / 10,
       '.', context.compute_capability % 10,
       "; products of 8-bit floats need 8.9 or newer (Ada, Hopper). Hint: precision bf16, whose products it has");
}

void fp8_gemm(Cuda device, const Fp8Gemm& g) {
  if (g.m == 0 || g.n == 0) return;
  Context& context = cuda::current_context();
  Descriptor descriptor(CUBLAS_COMPUTE_32F, CUDA_R_32F);
  descriptor.set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, static_cast<const void*>(&g.b.scale->inverse));
  descriptor.set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, static_cast<const void*>(&g.a.scale->inverse));
  if (g.bias != nullptr) descriptor.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, static_cast<const void*>(g.bias));
  const float alpha = 1, beta = g.accumulate ? 1.0f : 0.0f;
  // Both operands along k, which is the one form that 8-bit products have before compute capability 10.
  multiply(context, static_cast<cudaStream_t>(device.stream), descriptor,
           {.first = {type_of(g.b.format), {true, g.k, g.n, g.b.ld}, g.b.data},
            .second = {type_of(g.a.format), {false, g.k, g.m, g.a.ld}, g.a.data},
            .out = {CUDA_R_16BF, {false, g.n, g.m, g.n}, g.c},
            .k = g.k,
            .alpha = &alpha,
            .beta = &beta,
            .accumulates = g.accumulate,
            .epilogue = g.bias != nullptr ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT});
}

template <class TA, class TB, class TC>
void gemm(Cuda device, const Gemm<TA, TB, TC>& product) {
  run(device, product, {.count = 1});
}

template <class TA, class TB, class TC>
void gemm_batched(Cuda device, const Gemm<TA, TB, TC>& product, const GemmBatch& batch) {
  run(device, product, batch);
}

template <class T>
void gemm_with_sums(Cuda device, const Gemm<T>& g, T* sums) {
  if (g.bias != nullptr || g.bias_of_c != nullptr || g.activation != GemmActivation::kNone)
    fail(ErrorKind::kValue, "gemm", "sums of A come beside a plain product, without bias and activation");
  if (g.n > 0 && g.k > 0 && run(device, g, {.count = 1}, sums)) return;
  const Shape shape = {g.k, g.m};
  sum_over(device, StridedView{sums, shape, {0, 1}, kGemmDType<T>},
           StridedView{const_cast<T*>(g.a.data), shape, {g.a.col_stride, g.a.row_stride}, kGemmDType<T>}, 1);
  run(device, g, {.count = 1});
}
template void gemm_with_sums(Cuda, const Gemm<uint16_t>&, uint16_t*);
template void gemm_with_sums(Cuda, const Gemm<Half>&, Half*);

#define WEFT_GEMM_INSTANCE(TA, TB, TC)               \
  template void gemm(Cuda, const Gemm<TA, TB, TC>&); \
  template void gemm_batched(Cuda, const Gemm<TA, TB, TC>&, const GemmBatch&);
WEFT_GEMM_INSTANCE(float, float, float)
WEFT_GEMM_INSTANCE(double, double, double)
WEFT_GEMM_INSTANCE(uint16_t, uint16_t, float)
WEFT_GEMM_INSTANCE(uint16_t, uint16_t, uint16_t)
WEFT_GEMM_INSTANCE(Half, Half, float)
WEFT_GEMM_INSTANCE(Half, Half, Half)
#undef WEFT_GEMM_INSTANCE

}  // namespace weft

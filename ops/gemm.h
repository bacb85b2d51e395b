#pragma once
#include <cstdint>
#include <type_traits>

#include "ops/kernel_device.h"

namespace weft {

/// A matrix of which element (i, j) is data[i * row_stride + j * col_stride]. One of the strides must be 1:
/// {w, ld, 1} is a row-major matrix and {w, 1, ld} is its transpose. Strides count elements and are not negative.
template <class T>
struct MatrixRef {
  const T* data = nullptr;
  int64_t row_stride = 0;
  int64_t col_stride = 1;
};

/// What is done to each element of C after the product, while its tile is in the L1 cache. `pre` stands for
/// alpha * A B + beta * C + bias.
enum class GemmActivation : uint8_t {
  kNone,      ///< C = pre
  kGelu,      ///< C = pre, D = gelu(pre), the tanh form of GELU
  kGeluGrad,  ///< C = pre * gelu'(aux): what passes a GELU backwards; aux is the input that the GELU had
};

/// One matrix product:
///
///   C[m, n] = activation(alpha * A[m, k] B[k, n] + beta * C[m, n] + bias[n])
///
/// C, D and aux are row-major. With beta = 0, C is not read (it may hold NaN); with k = 0 or alpha = 0 the product is 0
/// and A and B are not read. Pointers may have any alignment. C must overlap neither A nor B nor D.
///
/// Element types <A, B, C>: <float>, <double>, and bfloat16 as its 16 bits, uint16_t: <uint16_t, uint16_t, float>,
/// <uint16_t, uint16_t, uint16_t>, <float, uint16_t, float>. Sums are kept in float (double for double); a bfloat16 C
/// is rounded once per call, to nearest even.
///
/// An element of C is summed in an order that depends on m, n, k, the layouts and the instruction set alone: the same
/// bits on any number of threads, and in a batch as alone.
///
/// With "avx512bf16", products of two bfloat16 matrices are summed by VDPBF16PS, two elements of k at a time. It rounds
/// each addition to nearest even, as the other instruction sets do, and so keeps their bound: |error| <= (k + 4) 2^-24
/// times the sum of |a b|. But it takes elements, products and sums below the smallest normal float, 1.2e-38, as 0.
/// (Products of up to 8 rows with a B that lies along k wait for memory: they are summed as with "avx512".)
template <class TA, class TB = TA, class TC = TA>
struct Gemm {
  using Sum = std::conditional_t<std::is_same_v<TA, double>, double, float>;

  int64_t m = 0, n = 0, k = 0;
  MatrixRef<TA> a;
  MatrixRef<TB> b;
  TC* c = nullptr;
  int64_t ldc = 0;  ///< elements from one row of C to the next, >= n
  Sum alpha = 1;
  Sum beta = 0;
  const Sum* scale = nullptr;     ///< a factor of alpha that the device keeps; null: 1
  const Sum* bias = nullptr;      ///< [n], or null
  const TC* bias_of_c = nullptr;  ///< what CUDA adds instead where Sum is wider than C
  bool tf32 = false;              ///< CUDA may round f32 operands to 10 bits
  GemmActivation activation = GemmActivation::kNone;
  TC* d = nullptr;  ///< for kGelu
  int64_t ldd = 0;
  const TC* aux = nullptr;  ///< for kGeluGrad
  int64_t ldaux = 0;
};

/// Steps in elements from one product of a batch to the next; 0 repeats the same matrix. Bias is shared. The C (and D)
/// matrices of a batch must not overlap.
struct GemmBatch {
  int64_t count = 0;
  int64_t a = 0, b = 0, c = 0;
  int64_t d = 0, aux = 0;
};

/// One product on the threads of core/thread_pool.h.
/// @throws Error kShape for negative sizes or ldc < n; kValue for a matrix without a unit stride, a null pointer where
///         data is needed, or an activation without its matrix.
template <class TA, class TB, class TC>
void gemm(const Gemm<TA, TB, TC>& product);

/// The same product for every batch index; tiles of all products are shared among the threads.
template <class TA, class TB, class TC>
void gemm_batched(const Gemm<TA, TB, TC>& product, const GemmBatch& batch);

template <class TA, class TB, class TC>
void gemm(Cpu, const Gemm<TA, TB, TC>& product) {
  gemm(product);
}
template <class TA, class TB, class TC>
void gemm_batched(Cpu, const Gemm<TA, TB, TC>& product, const GemmBatch& batch) {
  gemm_batched(product, batch);
}
/// The same through cuBLASLt: bits depend on its version. A GELU is computed in its epilogue from what was not rounded
/// yet; in f64, or where the auxiliary matrix is not aligned as the library wants it, by a kernel of its own. Not
/// offered: beta other than 0 and 1 where k = 0 or `scale` is given, alpha other than 1 beside `scale`.
template <class TA, class TB, class TC>
void gemm(Cuda, const Gemm<TA, TB, TC>& product);
template <class TA, class TB, class TC>
void gemm_batched(Cuda, const Gemm<TA, TB, TC>& product, const GemmBatch& batch);

/// One product on the calling thread, for use inside other kernels. Same bits as gemm(). Scratch memory belongs to the
/// thread and is kept. Arguments are not checked.
template <class TA, class TB, class TC>
void gemm_serial(const Gemm<TA, TB, TC>& product);

/// Short form: C[m, n] = alpha * A B + beta * C with leading dimensions as in BLAS; `trans_a` says that A is stored as
/// [k, m], `trans_b` that B is stored as [n, k] (a weight matrix [out, in] is trans_b).
template <class TA, class TB, class TC>
Gemm<TA, TB, TC> make_gemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const TA* a, int64_t lda,
                           const TB* b, int64_t ldb, TC* c, int64_t ldc, typename Gemm<TA, TB, TC>::Sum alpha = 1,
                           typename Gemm<TA, TB, TC>::Sum beta = 0) {
  Gemm<TA, TB, TC> product;
  product.m = m, product.n = n, product.k = k;
  product.a = trans_a ? MatrixRef<TA>{a, 1, lda} : MatrixRef<TA>{a, lda, 1};
  product.b = trans_b ? MatrixRef<TB>{b, 1, ldb} : MatrixRef<TB>{b, ldb, 1};
  product.c = c, product.ldc = ldc;
  product.alpha = alpha, product.beta = beta;
  return product;
}

/// Instruction set of the kernels in use: "avx512bf16", "avx512", "avx2" or "portable". "avx512bf16" is "avx512" with
/// instructions of its own for products of two bfloat16 matrices.
const char* gemm_isa();

/// Forces an instruction set by name, for tests and comparisons; "" goes back to the best. False, and no change, if
/// this machine or build does not have it. Must not be called while a product runs.
bool set_gemm_isa(const char* name);

}  // namespace weft

// What the library is without CUDA: the symbols of cuda/, with no device behind them. There is no CUDA tensor in this
// build, so no kernel below is ever called.
#include "core/backend.h"
#include "core/device_report.h"
#include "core/error.h"
#include "ops/attention_kernels.h"
#include "ops/attention_library.h"
#include "ops/column_sum.h"
#include "ops/dropout_kernels.h"
#include "ops/elementwise_kernels.h"
#include "ops/fp8_kernels.h"
#include "ops/gemm.h"
#include "ops/gemm_algorithms.h"
#include "ops/gemm_sums.h"
#include "ops/index_kernels.h"
#include "ops/loss_kernels.h"
#include "ops/norm_kernels.h"
#include "ops/reduce_kernels.h"
#include "ops/softmax_kernels.h"
#include "optim/optimizer_kernels.h"

namespace weft {
namespace {

constexpr const char* kWhy = "this build has no CUDA backend";

[[noreturn]] void absent() { fail(ErrorKind::kDevice, "cuda", kWhy); }

}  // namespace

std::unique_ptr<Backend> make_cuda_backend(int) { return nullptr; }
const char* why_no_cuda() { return kWhy; }
DeviceReport cuda_report() { return {{{"compiled for", "no device: this build has no CUDA backend"}}, {}}; }

Range::Range(const char*) {}
Range::~Range() = default;

// ---- elementwise ----

template <class Op>
void unary(Cuda, const StridedView&, const Operand&) {
  absent();
}
template <class Op>
void unary_backward(Cuda, const StridedView&, const Operand&, const Operand&) {
  absent();
}
template <class Op>
void binary(Cuda, const StridedView&, const Operand&, const Operand&) {
  absent();
}
void add_scaled(Cuda, const StridedView&, const Operand&, const Operand&, double) { absent(); }
void compare(Cuda, Comparison, const StridedView&, const Operand&, const Operand&) { absent(); }
void select(Cuda, const StridedView&, const StridedView&, const Operand&, const Operand&) { absent(); }

#define WEFT_UNARY(Op, function)                                                  \
  template void unary<scalar_math::Op>(Cuda, const StridedView&, const Operand&); \
  template void unary_backward<scalar_math::Op>(Cuda, const StridedView&, const Operand&, const Operand&);
#define WEFT_BINARY(Op, function) \
  template void binary<scalar_math::Op>(Cuda, const StridedView&, const Operand&, const Operand&);
#include "ops/op_list.def"

// ---- reductions and softmax ----

void sum_over(Cuda, const StridedView&, const StridedView&, double) { absent(); }
void extreme_index(Cuda, const StridedView&, bool, int64_t*) { absent(); }
void pick(Cuda, const StridedView&, const StridedView&, const int64_t*) { absent(); }
void mark(Cuda, const int64_t*, bool*, int64_t, int64_t) { absent(); }
void softmax(Cuda, const StridedView&, const StridedView&, int) { absent(); }
void log_softmax(Cuda, const StridedView&, const StridedView&, int) { absent(); }
void softmax_backward(Cuda, const StridedView&, const StridedView&, const StridedView&, int) { absent(); }
void log_softmax_backward(Cuda, const StridedView&, const StridedView&, const StridedView&, int) { absent(); }

// ---- what was not listed is a template over the dtype ----

void report_outside(Cuda, const char*, const int64_t*, int64_t, int64_t) { absent(); }
void local_ids(Cuda, const int64_t*, int64_t, int64_t, int64_t, int64_t*) { absent(); }
void embedding_forward(Cuda, const int64_t*, int64_t, const void*, int64_t, int64_t, void*) { absent(); }
void gather_forward(Cuda, const GatherLines&, const void*, int, void*) { absent(); }
void loss_denominator(Cuda, const char*, const LossTargets&, const KnownDenominator&, double*) { absent(); }
int64_t norm_blocks(Cuda, int64_t) { absent(); }
int64_t attention_workspace(Cuda, const AttentionShape&) { absent(); }

template <class T>
int64_t embedding_workspace(Cuda, int64_t, int64_t, int64_t) {
  absent();
}
template <class T>
void embedding_backward(Cuda, const EmbeddingBackward<T>&) {
  absent();
}
template <class T>
void gather_backward(Cuda, const GatherLines&, const T*, Accumulate<T>*) {
  absent();
}
template <class T>
void dropout_forward(Cuda, const T*, T*, int64_t, double, const RandomStream&, uint64_t, const double*) {
  absent();
}
template <class T>
void loss_forward(Cuda, const LossTargets&, const T*, Accumulate<T>*, double*) {
  absent();
}
template <class T>
void loss_backward(Cuda, const LossTargets&, const T*, const Accumulate<T>*, const LossScale<Accumulate<T>>&, T*) {
  absent();
}
template <class T>
void loss_in_place(Cuda, const LossTargets&, Accumulate<T>*, const LossScale<Accumulate<T>>&, double*) {
  absent();
}
template <class T>
void loss_slice_in_place(Cuda, const LossTargets&, int64_t, const Accumulate<T>*, const double*, Accumulate<T>*,
                         const LossScale<Accumulate<T>>&) {
  absent();
}
template <class T>
void scale_to(Cuda, const Accumulate<T>*, int64_t, const Accumulate<T>*, T*, bool) {
  absent();
}
template <class T>
void norm_forward(Cuda, const NormForward<T>&) {
  absent();
}
template <class T>
void norm_backward(Cuda, const NormBackward<T>&) {
  absent();
}
template <class T>
void attention_forward(Cuda, const AttentionForward<T>&) {
  absent();
}
template <class T>
void attention_backward(Cuda, const AttentionBackward<T>&) {
  absent();
}

#define WEFT_INSTANCES(T)                                                                                             \
  template int64_t embedding_workspace<T>(Cuda, int64_t, int64_t, int64_t);                                           \
  template void embedding_backward(Cuda, const EmbeddingBackward<T>&);                                                \
  template void gather_backward(Cuda, const GatherLines&, const T*, Accumulate<T>*);                                  \
  template void dropout_forward(Cuda, const T*, T*, int64_t, double, const RandomStream&, uint64_t, const double*);   \
  template void loss_forward(Cuda, const LossTargets&, const T*, Accumulate<T>*, double*);                            \
  template void loss_backward(Cuda, const LossTargets&, const T*, const Accumulate<T>*,                               \
                              const LossScale<Accumulate<T>>&, T*);                                                   \
  template void loss_in_place<T>(Cuda, const LossTargets&, Accumulate<T>*, const LossScale<Accumulate<T>>&, double*); \
  template void loss_slice_in_place<T>(Cuda, const LossTargets&, int64_t, const Accumulate<T>*, const double*,        \
                                       Accumulate<T>*, const LossScale<Accumulate<T>>&);                              \
  template void scale_to(Cuda, const Accumulate<T>*, int64_t, const Accumulate<T>*, T*, bool);                        \
  template void norm_forward(Cuda, const NormForward<T>&);                                                            \
  template void norm_backward(Cuda, const NormBackward<T>&);                                                          \
  template void attention_forward(Cuda, const AttentionForward<T>&);                                                  \
  template void attention_backward(Cuda, const AttentionBackward<T>&);
WEFT_INSTANCES(float)
WEFT_INSTANCES(double)
WEFT_INSTANCES(Half)
WEFT_INSTANCES(BFloat16)
#undef WEFT_INSTANCES

// ---- sums and products ----

template <class A>
void reduce_losses(Cuda, const double*, int64_t, const double*, A*) {
  absent();
}
template void reduce_losses(Cuda, const double*, int64_t, const double*, float*);
template void reduce_losses(Cuda, const double*, int64_t, const double*, double*);

template <class A>
void loss_parts(Cuda, const LossTargets&, int64_t, const A*, double*) {
  absent();
}
template void loss_parts(Cuda, const LossTargets&, int64_t, const float*, double*);
template void loss_parts(Cuda, const LossTargets&, int64_t, const double*, double*);
template <class A>
void join_loss_parts(Cuda, const LossTargets&, int64_t, const double*, A*, double*) {
  absent();
}
template void join_loss_parts(Cuda, const LossTargets&, int64_t, const double*, float*, double*);
template void join_loss_parts(Cuda, const LossTargets&, int64_t, const double*, double*, double*);

template <class T>
void column_sum(Cuda, const T*, int64_t, int64_t, int64_t, T*, bool) {
  absent();
}
template void column_sum(Cuda, const float*, int64_t, int64_t, int64_t, float*, bool);
template void column_sum(Cuda, const double*, int64_t, int64_t, int64_t, double*, bool);

template <class TA, class TB, class TC>
void gemm(Cuda, const Gemm<TA, TB, TC>&) {
  absent();
}
template <class TA, class TB, class TC>
void gemm_batched(Cuda, const Gemm<TA, TB, TC>&, const GemmBatch&) {
  absent();
}
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

void fp8_check_device(Cuda) { absent(); }
void fp8_quantise(Cuda, const Fp8Quantise&) { absent(); }
template <class T>
void gemm_with_sums(Cuda, const Gemm<T>&, T*) {
  absent();
}
template void gemm_with_sums(Cuda, const Gemm<uint16_t>&, uint16_t*);
template void gemm_with_sums(Cuda, const Gemm<Half>&, Half*);

void fp8_gemm(Cuda, const Fp8Gemm&) { absent(); }
void fp8_verdict(Cuda, const Fp8Verdict&) { absent(); }
void fp8_update(Cuda, const Fp8Update&) { absent(); }
void use_attention(Device, AttentionChoice) { absent(); }
AttentionUse attention_use(Device) { absent(); }
std::string describe_attention(Device, const AttentionShape&, DType) { absent(); }
GemmLibrary gemm_library(Device) { absent(); }
void use_gemm_algorithms(Device, std::span<const GemmAlgorithm>, const std::string&) { absent(); }
GemmAlgorithmUse gemm_algorithm_use(Device) { absent(); }
std::vector<GemmAlgorithm> tune_gemm(Device, const std::function<void()>&,
                                     const std::function<void(const GemmAlgorithm&)>&) {
  absent();
}

// ---- optimizers ----

namespace optim {

int64_t square_partials(Cuda, const TensorData&) { absent(); }
void sum_squares(Cuda, std::span<const TensorData>, double*, double*) { absent(); }
void scale(Cuda, std::span<const TensorData>, double) { absent(); }
void adam_decide(Cuda, const AdamInput*, const double*, int64_t, const TensorData&, AdamDecision*) { absent(); }
void adam_update(Cuda, std::span<const AdamTensor>, const AdamDecision*) { absent(); }
int64_t adam_partials(Cuda, const AdamTensor&) { absent(); }
void adam_moments(Cuda, std::span<const AdamTensor>, const AdamDecision*, double*, double*, int64_t) { absent(); }
void adam_rates(Cuda, const double*, int64_t, const AdamDecision*, double*) { absent(); }
void adam_apply(Cuda, std::span<const AdamTensor>, const AdamDecision*) { absent(); }
void adam_follow(Cuda, std::span<const AdamTensor>) { absent(); }

}  // namespace optim
}  // namespace weft

#include "ops/gemm.h"

#include <hwy/highway.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <string_view>
#include <utility>

#include "core/error.h"
#include "core/thread_pool.h"
#include "ops/gemm_engine.h"

namespace weft {
namespace detail {
namespace {

struct IsaInfo {
  GemmIsa isa;
  const char* name;
  int64_t hwy_targets;  ///< any of these must be supported; 0 for always
};
constexpr IsaInfo kIsas[] = {
    // best first
    {GemmIsa::kAvx512Bf16, "avx512bf16", HWY_AVX3},
    {GemmIsa::kAvx512, "avx512", HWY_AVX3},
    {GemmIsa::kAvx2, "avx2", HWY_AVX2},
    {GemmIsa::kPortable, "portable", 0},
};

/// Whether the processor multiplies pairs of bfloat16. Highway's targets that say so ask for more than our kernels do.
bool multiplies_bf16() {
#if HWY_ARCH_X86
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

bool available(const IsaInfo& info) {
  return (info.hwy_targets == 0 || (hwy::SupportedTargets() & info.hwy_targets) != 0) &&
         (info.isa != GemmIsa::kAvx512Bf16 || multiplies_bf16()) &&
         gemm_kernels<float, float, float>(info.isa) != nullptr;
}

const IsaInfo* best_isa() { return std::find_if(std::begin(kIsas), std::end(kIsas), available); }

std::atomic<const IsaInfo*>& current_isa() {
  static std::atomic<const IsaInfo*> isa = best_isa();
  return isa;
}

struct AlignedMemory {
  ~AlignedMemory() { std::free(data); }
  void* data = nullptr;
  size_t size = 0;
};

/// The grid of tasks of one product. Rows and columns of a task, the last of a line may have fewer.
struct Grid {
  int64_t rows, cols;
  int64_t row_tasks, col_tasks;
  int64_t tasks() const { return row_tasks * col_tasks; }
};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// The grid with the least estimated time; `count` products share the threads. Many tasks mean much reading and
/// packing, for each task packs its own piece of B if that must be transposed; few tasks mean idle threads. The
/// estimate knows no thread count: the grid is good for any few threads (and the same bits come out of any grid).
Grid plan(const GemmShape& shape, bool dots, bool across_k, bool transposes_b, int64_t m, int64_t n, int64_t k,
          int64_t count) {
  if (dots) {
    // Bound by reading B: pieces of 256 KiB.
    const int64_t cols = std::min(divide_up(n, 64), std::max<int64_t>(1, (int64_t{1} << 16) / (k * 64))) * 64;
    return {m, cols, 1, divide_up(n, cols)};
  }
  // In clock cycles of a core with one vector multiply-add per cycle; what an element of A or B costs a task was
  // measured.
  const double compute = double(m) * double(n) * double(k) / shape.lanes;
  const double b_cost = double(n) * double(k) * (transposes_b ? 8.0 : 3.0) / shape.lanes;
  const double a_cost = double(m) * double(k) * (across_k ? 4.0 : 2.0) / shape.lanes;
  constexpr double kTaskCost = 500;
  constexpr int64_t kMostRows = 512;  // A and C of a task stay near while the columns of B go by
  static constexpr int kSplits[] = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128};
  struct Rows {
    int64_t rows, tasks;
  } row_splits[std::size(kSplits)];
  size_t row_options = 0;
  const int64_t least_row_tasks = divide_up(m, kMostRows);
  for (const int split : kSplits) {
    const int64_t rows = divide_up(m, least_row_tasks * split);
    row_splits[row_options++] = {rows, divide_up(m, rows)};
    if (rows <= 2 * shape.rows) break;
  }
  const int64_t col_panels = divide_up(n, shape.cols);
  Grid best = {};
  double best_cost = std::numeric_limits<double>::infinity();
  for (const int split : kSplits) {
    const int64_t panels = divide_up(col_panels, split);
    const int64_t col_tasks = divide_up(col_panels, panels);
    for (size_t option = 0; option < row_options; ++option) {
      const auto [rows, row_tasks] = row_splits[option];
      const int64_t tasks = row_tasks * col_tasks * count;
      // Tasks that are missing to a multiple of 2, 4 and 8 threads, and the wait for the end of the last task.
      const double missing = 0.6 * double(-tasks & 1) + 0.25 * double(-tasks & 3) + 0.15 * double(-tasks & 7);
      const double cost = compute * (1 + (missing + 0.15) / double(tasks)) + b_cost * double(row_tasks) +
                          a_cost * double(col_tasks) + kTaskCost * double(row_tasks * col_tasks);
      if (cost < best_cost) best_cost = cost, best = {rows, panels * shape.cols, row_tasks, col_tasks};
    }
    if (panels == 1) break;
  }
  return best;
}

template <class TA, class TB, class TC>
void check(const Gemm<TA, TB, TC>& g, std::string_view where) {
  if (g.m < 0 || g.n < 0 || g.k < 0) {
    fail(ErrorKind::kShape, where, "m, n and k must not be negative, got ", g.m, ", ", g.n, ", ", g.k);
  }
  if (g.m == 0 || g.n == 0) return;
  const auto leading = [&](const char* name, const void* data, int64_t ld) {
    if (data == nullptr) fail(ErrorKind::kValue, where, "matrix ", name, " is missing (null)");
    if (ld < g.n && g.m > 1) {
      fail(ErrorKind::kShape, where, "ld", name, " must be at least n = ", g.n, ", got ", ld);
    }
  };
  leading("c", g.c, g.ldc);
  if (g.activation == GemmActivation::kGelu) leading("d", g.d, g.ldd);
  if (g.activation == GemmActivation::kGeluGrad) leading("aux", g.aux, g.ldaux);
  if (g.k == 0 || g.alpha == 0) return;
  const auto operand = [&](const char* name, const void* data, int64_t row_stride, int64_t col_stride) {
    if (data == nullptr) fail(ErrorKind::kValue, where, "matrix ", name, " is missing (null)");
    if (row_stride < 0 || col_stride < 0 || (row_stride != 1 && col_stride != 1)) {
      fail(ErrorKind::kValue, where, "one stride of matrix ", name, " must be 1 and none negative, got row stride ",
           row_stride, " and column stride ", col_stride, "; copy the matrix first");
    }
  };
  operand("a", g.a.data, g.a.row_stride, g.a.col_stride);
  operand("b", g.b.data, g.b.row_stride, g.b.col_stride);
}

template <class TA, class TB, class TC>
Gemm<TA, TB, TC> at_batch(Gemm<TA, TB, TC> g, const GemmBatch& batch, int64_t index) {
  if (g.a.data != nullptr) g.a.data += index * batch.a;
  if (g.b.data != nullptr) g.b.data += index * batch.b;
  g.c += index * batch.c;
  if (g.d != nullptr) g.d += index * batch.d;
  if (g.aux != nullptr) g.aux += index * batch.aux;
  return g;
}

/// `scale` taken into alpha.
template <class TA, class TB, class TC>
Gemm<TA, TB, TC> with_scale(Gemm<TA, TB, TC> g) {
  if (g.scale != nullptr) g.alpha *= *std::exchange(g.scale, nullptr);
  return g;
}

template <class TA, class TB, class TC>
const GemmKernels<TA, TB, TC>& kernels() {
  return *gemm_kernels<TA, TB, TC>(current_isa().load(std::memory_order_relaxed)->isa);
}

}  // namespace

bool gemm_multiplies_pairs() { return current_isa().load(std::memory_order_relaxed)->isa == GemmIsa::kAvx512Bf16; }

template <class T>
T* gemm_scratch(GemmScratch use, int64_t count) {
  static thread_local AlignedMemory memory[3];
  AlignedMemory& mine = memory[static_cast<int>(use)];
  const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 4095) / 4096 * 4096;
  if (bytes > mine.size) {
    std::free(mine.data);
    mine.size = 0;
    mine.data = std::aligned_alloc(4096, bytes);
    if (mine.data == nullptr)
      fail(ErrorKind::kMemory, "gemm", "no memory for ", grouped(int64_t(bytes)), " bytes of scratch");
    mine.size = bytes;
  }
  return static_cast<T*>(mine.data);
}
template float* gemm_scratch<float>(GemmScratch, int64_t);
template double* gemm_scratch<double>(GemmScratch, int64_t);
template Bf16Pair* gemm_scratch<Bf16Pair>(GemmScratch, int64_t);

}  // namespace detail

const char* gemm_isa() { return detail::current_isa().load()->name; }

bool set_gemm_isa(const char* name) {
  const std::string_view wanted = name == nullptr ? "" : name;
  for (const detail::IsaInfo& info : detail::kIsas) {
    if ((wanted.empty() || wanted == info.name) && detail::available(info)) {
      detail::current_isa().store(&info);
      return true;
    }
  }
  return false;
}

template <class TA, class TB, class TC>
void gemm_batched(const Gemm<TA, TB, TC>& product_, const GemmBatch& batch) {
  if (batch.count < 0) fail(ErrorKind::kShape, "gemm_batched", "count must not be negative, got ", batch.count);
  if (batch.count == 0) return;  // then there need be no matrices
  detail::check(product_, "gemm");
  const auto product = detail::with_scale(product_);
  if (product.m == 0 || product.n == 0) return;
  const auto& kernels = detail::kernels<TA, TB, TC>();
  const detail::Grid grid = detail::plan(kernels.shape, detail::uses_dot_kernel(product), product.a.col_stride != 1,
                                         product.b.col_stride != 1, product.m, product.n, product.k, batch.count);
  const int64_t tasks = grid.tasks();
  parallel_tasks(batch.count * tasks, [&](int64_t task) {
    const Gemm<TA, TB, TC> one = detail::at_batch(product, batch, task / tasks);
    // Neighbouring tasks share columns of B rather than rows of A: B is what is packed.
    const int64_t row = task % tasks % grid.row_tasks * grid.rows, col = task % tasks / grid.row_tasks * grid.cols;
    kernels.tile(one, {row, std::min(row + grid.rows, product.m), col, std::min(col + grid.cols, product.n)});
  });
}

template <class TA, class TB, class TC>
void gemm(const Gemm<TA, TB, TC>& product) {
  gemm_batched(product, GemmBatch{.count = 1});
}

template <class TA, class TB, class TC>
void gemm_serial(const Gemm<TA, TB, TC>& product) {
  if (product.m == 0 || product.n == 0) return;
  if (product.scale != nullptr) return gemm_serial(detail::with_scale(product));
  detail::kernels<TA, TB, TC>().tile(product, {0, product.m, 0, product.n});
}

#define WEFT_GEMM_INSTANCE(TA, TB, TC)                                               \
  template void gemm<TA, TB, TC>(const Gemm<TA, TB, TC>&);                           \
  template void gemm_batched<TA, TB, TC>(const Gemm<TA, TB, TC>&, const GemmBatch&); \
  template void gemm_serial<TA, TB, TC>(const Gemm<TA, TB, TC>&);
WEFT_GEMM_INSTANCE(float, float, float)
WEFT_GEMM_INSTANCE(double, double, double)
WEFT_GEMM_INSTANCE(uint16_t, uint16_t, float)
WEFT_GEMM_INSTANCE(uint16_t, uint16_t, uint16_t)
WEFT_GEMM_INSTANCE(float, uint16_t, float)
#undef WEFT_GEMM_INSTANCE

}  // namespace weft

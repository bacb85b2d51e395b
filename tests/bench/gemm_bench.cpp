// Speed of ops/gemm.h on the matrix products of GPT training, beside oneDNN and OpenBLAS.
//
//   gemm_bench [--threads 1,2] [--rounds N] [--filter TEXT] [--libs 0|1]
//
// Per shape and thread count the candidates run in turn (A B C A B C ...), and medians are compared, so that a busy
// neighbour hits all alike. The libraries run in the same thread pool, one single-threaded call for each tile of a
// fixed grid: their best use known here.
#include <cblas.h>
#include <dnnl.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "core/thread_pool.h"
#include "ops/gemm.h"

extern "C" void omp_set_num_threads(int);

namespace {

using weft::Gemm;

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// Memory as tensors have it: aligned, and in large pages where it is large.
class Matrix {
 public:
  explicit Matrix(int64_t count) : count_(static_cast<size_t>(count)) {
    constexpr size_t kLargePage = size_t{2} << 20;
    const size_t bytes = count_ * sizeof(float), align = bytes >= kLargePage ? kLargePage : 4096;
    data_ = static_cast<float*>(std::aligned_alloc(align, (bytes + align - 1) / align * align));
    if (data_ == nullptr) std::abort();
    if (align == kLargePage) madvise(data_, bytes, MADV_HUGEPAGE);
    std::fill_n(data_, count_, 0.0f);
  }
  Matrix(const Matrix&) = delete;
  ~Matrix() { std::free(data_); }
  float* data() { return data_; }
  std::span<float> values() { return {data_, count_}; }

 private:
  size_t count_;
  float* data_;
};

struct Shape {
  std::string name;
  bool trans_a, trans_b;
  int64_t m, n, k;
  float beta;
};

std::vector<Shape> training_shapes() {
  std::vector<Shape> shapes;
  const auto linear = [&](const std::string& name, int64_t tokens, int64_t in, int64_t out) {
    shapes.push_back({name + " forward", false, true, tokens, out, in, 0});
    shapes.push_back({name + " dX", false, false, tokens, in, out, 0});
    shapes.push_back({name + " dW", true, false, out, in, tokens, 1});
  };
  struct Model {
    const char* name;
    int64_t tokens, c, vocabulary;
  };
  for (const Model& m :
       {Model{"a128", 768, 128, 65}, {"v1024", 1024, 256, 1024}, {"b384", 4096, 384, 65}, {"c768", 256, 768, 50257}}) {
    const std::string name = m.name;
    linear(name + " qkv", m.tokens, m.c, 3 * m.c);
    linear(name + " proj", m.tokens, m.c, m.c);
    linear(name + " fc", m.tokens, m.c, 4 * m.c);
    linear(name + " fcproj", m.tokens, 4 * m.c, m.c);
    linear(name + " head", m.tokens, m.c, m.vocabulary);
  }
  for (const int64_t m : {1, 2, 4, 8, 16}) {
    shapes.push_back({"token m=" + std::to_string(m) + " fc", false, true, m, 3072, 768, 0});
    shapes.push_back({"token m=" + std::to_string(m) + " head", false, true, m, 50257, 768, 0});
  }
  for (const int64_t t : {32, 64, 128}) {
    shapes.push_back({"attention QK^T serial", false, true, t, t, 64, 0});
    shapes.push_back({"attention PV serial", false, false, t, 64, t, 1});
    shapes.push_back({"attention dK serial", true, false, t, 64, t, 1});
  }
  return shapes;
}

/// A fixed grid of library calls, as even as it comes.
void tiled(const Gemm<float>& g, const std::function<void(const Gemm<float>&)>& call) {
  const auto split = [](int64_t size, int64_t step) { return std::max<int64_t>(1, (size + step / 2) / step); };
  int64_t cols = split(g.n, g.n > 8192 ? 1024 : 256), rows = split(g.m, 512);
  while (cols * rows < 8 && g.m / rows >= 128) rows *= 2;
  while (cols * rows < 8 && g.n / cols >= 128) cols *= 2;
  weft::parallel_tasks(rows * cols, [&](int64_t task) {
    const int64_t i = task / cols, j = task % cols;
    const int64_t i0 = g.m * i / rows, i1 = g.m * (i + 1) / rows, j0 = g.n * j / cols / 16 * 16,
                  j1 = j + 1 == cols ? g.n : g.n * (j + 1) / cols / 16 * 16;
    Gemm<float> part = g;
    part.m = i1 - i0, part.n = j1 - j0;
    part.a.data += i0 * g.a.row_stride;
    part.b.data += j0 * g.b.col_stride;
    part.c += i0 * g.ldc + j0;
    call(part);
  });
}

void dnnl_call(const Gemm<float>& g) {
  thread_local const bool once = (omp_set_num_threads(1), true);
  (void)once;
  const bool ta = g.a.col_stride != 1, tb = g.b.col_stride != 1;
  dnnl_sgemm(ta ? 'T' : 'N', tb ? 'T' : 'N', g.m, g.n, g.k, g.alpha, g.a.data, ta ? g.a.col_stride : g.a.row_stride,
             g.b.data, tb ? g.b.col_stride : g.b.row_stride, g.beta, g.c, g.ldc);
}

void blas_call(const Gemm<float>& g) {
  const bool ta = g.a.col_stride != 1, tb = g.b.col_stride != 1;
  cblas_sgemm(CblasRowMajor, ta ? CblasTrans : CblasNoTrans, tb ? CblasTrans : CblasNoTrans, static_cast<int>(g.m),
              static_cast<int>(g.n), static_cast<int>(g.k), g.alpha, g.a.data,
              static_cast<int>(ta ? g.a.col_stride : g.a.row_stride), g.b.data,
              static_cast<int>(tb ? g.b.col_stride : g.b.row_stride), g.beta, g.c, static_cast<int>(g.ldc));
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<long>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<int> thread_counts = {1, 2};
  int rounds = 15;
  bool libraries = true;
  std::string filter;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string flag = argv[i];
    if (flag == "--threads") {
      thread_counts.clear();
      for (const char* at = argv[i + 1]; at != nullptr; at = std::strchr(at, ',') ? std::strchr(at, ',') + 1 : nullptr)
        thread_counts.push_back(std::atoi(at));
    } else if (flag == "--rounds") {
      rounds = std::atoi(argv[i + 1]);
    } else if (flag == "--filter") {
      filter = argv[i + 1];
    } else if (flag == "--libs") {
      libraries = std::atoi(argv[i + 1]) != 0;
    } else {
      std::fprintf(stderr, "gemm_bench: unknown option %s\n", argv[i]);
      return 2;
    }
  }
  std::printf("instruction set: %s; GFLOP/s, medians of %d interleaved rounds; ratio of times (best library / ours)\n",
              weft::gemm_isa(), rounds);
  std::printf("%-26s %6s %6s %6s %2s | %7s %7s %7s | %6s %6s | %6s\n", "shape", "m", "n", "k", "T", "weft", "oneDNN",
              "OpenBLAS", "median", "best", "GB/s");
  std::mt19937 engine(1);
  std::uniform_real_distribution<float> uniform(-1, 1);
  for (const Shape& s : training_shapes()) {
    if (!filter.empty() && s.name.find(filter) == std::string::npos) continue;
    const bool serial = s.name.find("serial") != std::string::npos;
    // Serial tiles lie within rows of 3 C elements, as in attention.
    const int64_t pad = serial ? 3 * 384 - std::max({s.m, s.n, s.k}) : 0;
    const int64_t lda = (s.trans_a ? s.m : s.k) + pad, ldb = (s.trans_b ? s.k : s.n) + pad, ldc = s.n + pad;
    Matrix a((s.trans_a ? s.k : s.m) * lda), b((s.trans_b ? s.n : s.k) * ldb), c(s.m * ldc);
    for (float& x : a.values()) x = uniform(engine);
    for (float& x : b.values()) x = uniform(engine);
    const auto g = weft::make_gemm<float, float, float>(s.trans_a, s.trans_b, s.m, s.n, s.k, a.data(), lda, b.data(),
                                                        ldb, c.data(), ldc, 1.0f, s.beta);
    const double flops = 2.0 * static_cast<double>(s.m) * static_cast<double>(s.n) * static_cast<double>(s.k);
    for (const int threads : thread_counts) {
      if (serial && threads != 1) continue;
      weft::set_num_threads(threads);
      std::vector<std::function<void()>> run;
      run.push_back([&] { serial ? gemm_serial(g) : gemm(g); });
      if (libraries) {
        run.push_back([&] { serial ? dnnl_call(g) : tiled(g, dnnl_call); });
        run.push_back([&] { serial ? blas_call(g) : tiled(g, blas_call); });
      }
      const int repeats = static_cast<int>(std::clamp(4e8 / flops, 1.0, 2000.0));
      std::vector<std::vector<double>> times(run.size());
      for (int round = -1; round < rounds; ++round) {
        for (size_t r = 0; r < run.size(); ++r) {
          const double start = seconds();
          for (int i = 0; i < repeats; ++i) run[r]();
          if (round >= 0) times[r].push_back((seconds() - start) / repeats);
        }
      }
      std::vector<double> rate(3, 0), best(3, 1e30), middle(3, 1e30);
      for (size_t r = 0; r < run.size(); ++r) {
        middle[r] = median(times[r]);
        best[r] = *std::min_element(times[r].begin(), times[r].end());
        rate[r] = flops / middle[r] * 1e-9;
      }
      std::printf("%-26s %6ld %6ld %6ld %2d | %7.1f %7.1f %7.1f | %6.3f %6.3f | %6.1f\n", s.name.c_str(), long(s.m),
                  long(s.n), long(s.k), threads, rate[0], rate[1], rate[2], std::min(middle[1], middle[2]) / middle[0],
                  std::min(best[1], best[2]) / best[0],
                  4e-9 * static_cast<double>(s.n) * static_cast<double>(s.k) / middle[0]);
      std::fflush(stdout);
    }
  }
  return 0;
}

// A task of the GEMM: blocks of B packed for the L2 cache, swept by register tiles. Included once per instruction set.
#if defined(WEFT_OPS_GEMM_TILE_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WEFT_OPS_GEMM_TILE_INL_H_
#undef WEFT_OPS_GEMM_TILE_INL_H_
#else
#define WEFT_OPS_GEMM_TILE_INL_H_
#endif

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "ops/gemm_dot-inl.h"
#include "ops/gemm_engine.h"
#include "ops/gemm_epilogue-inl.h"

HWY_BEFORE_NAMESPACE();
namespace weft::detail {
namespace HWY_NAMESPACE {

template <class P>
const std::array<TileKernel<P>, kTileRows> TileKernels<P>::all[2][kTileVecs] = {
    {tile_kernels_by_rows<P, 1, false>(std::make_integer_sequence<int, kTileRows>()),
     tile_kernels_by_rows<P, 2, false>(std::make_integer_sequence<int, kTileRows>())},
    {tile_kernels_by_rows<P, 1, true>(std::make_integer_sequence<int, kTileRows>()),
     tile_kernels_by_rows<P, 2, true>(std::make_integer_sequence<int, kTileRows>())}};

#ifdef WEFT_GEMM_LINKS_FLOAT_TILES
extern template struct TileKernels<float>;
#endif

// Cache blocking for an L2 of 1 MiB (one of 512 KiB still holds B). A block of B is kBlockK x kBlockCols, or wider if k
// is short: 384 KiB. A panel of A (14 rows x kBlockK: 21 KiB) meets all columns of the block before the next one comes.
template <class P>
inline constexpr int64_t kBlockK = 1536 / sizeof(P);
inline constexpr int64_t kBlockCols = 256;
inline constexpr int64_t kMaxBlockCols = 1024;
// Panels of A that are packed together if k is across: whole lines of memory.
inline constexpr int64_t kBlockPanels = 8;
inline constexpr int64_t kShortK = 128;        // sums of wide tiles are at most so long
inline constexpr int64_t kBlockRows = 512;     // rows of C that pass while a block of B stays
inline constexpr int64_t kBlockSumRows = 256;  // the same when C is bfloat16, and these rows are kept as float

/// Whether `lines` rows of memory, ld apart, can be read again and again from L2. They cannot if ld is a multiple of a
/// large power of two: 2,048 sets of 8 lines repeat every 128 KiB.
template <class T>
bool spreads_in_l2(int64_t ld, int64_t lines) {
  const int64_t bytes = ld * static_cast<int64_t>(sizeof(T)), period = 128 * 1024;
  const int64_t power = bytes & -bytes;
  return power <= 64 || period / power * 8 * 4 >= lines;
}

/// Whether the rows of a panel of A, ld apart, all fall on the same sets of L1, which repeat every 4 KiB.
template <class T>
bool collides_in_l1(int64_t ld) {
  return ld * static_cast<int64_t>(sizeof(T)) % 4096 == 0;
}

/// How k is cut: blocks of equal length, whole lines of memory, but the last.
struct BlocksOfK {
  BlocksOfK(int64_t k, int64_t most)
      : count((k + most - 1) / most), length(count <= 1 ? k : ((k + count - 1) / count + 15) / 16 * 16) {}
  int64_t count, length;
};

/// P: what the register tiles read, T or pairs.
template <class TA, class TB, class TC, class P>
class Task {
  using T = typename Gemm<TA, TB, TC>::Sum;
  static_assert(std::is_same_v<T, SumOf<P>>);
  static constexpr bool kPairs = !std::is_same_v<T, P>;
  static constexpr bool kRounds = !std::is_same_v<T, TC>;  // C is not of the type of the sums
  static constexpr int64_t n = kLanes<T>;
  static constexpr int64_t kPanelCols = kTileVecs * n;
  static constexpr int64_t kMaxDotCols = kPairs ? 0 : n / 4;  // so few columns of a vector are dot products

 public:
  Task(const Gemm<TA, TB, TC>& g, const GemmTile& tile) : g_(g), tile_(tile) {}

  void run() {
    if (uses_dot_kernel(g_)) return run_dots();
    const BlocksOfK blocks(g_.alpha == T(0) ? 0 : g_.k, kBlockK<P> * kPerElement<P>);
    tile_by_tile_ = kRounds && blocks.count <= 1;
    const int64_t row_step = kRounds && !tile_by_tile_ ? kBlockSumRows : kBlockRows;
    int64_t most_cols = kBlockCols;
    if ((!kRounds || tile_by_tile_) && blocks.count == 1)
      most_cols =
          std::min(kMaxBlockCols, kBlockK<P> * kBlockCols / depth_of<P>(blocks.length) / kPanelCols * kPanelCols);
    for (int64_t i = tile_.row0; i < tile_.row1; i += row_step) {
      for (int64_t j = tile_.col0; j < tile_.col1; j += most_cols) {
        block_of_c(blocks, i, std::min(row_step, tile_.row1 - i), j, std::min(most_cols, tile_.col1 - j));
      }
    }
  }

 private:
  void block_of_c(const BlocksOfK& blocks, int64_t i0, int64_t rows, int64_t j0, int64_t cols) {
    T* c;
    int64_t ldc;
    T beta = g_.beta;
    if constexpr (kRounds) {
      c = gemm_scratch<T>(GemmScratch::kSums, kBlockSumRows * kBlockCols);
      ldc = kBlockCols;
      if (beta != T(0)) {
        if (!tile_by_tile_) load_c(i0, rows, j0, cols, c, ldc);
        beta = 1;
      }
    } else {
      c = g_.c + i0 * g_.ldc + j0;
      ldc = g_.ldc;
    }
    // Even an empty sum passes through the tiles: it may still have beta, a bias and an activation.
    for (int64_t block = 0; block < std::max<int64_t>(blocks.count, 1); ++block) {
      const int64_t p0 = block * blocks.length;
      const bool last = block + 1 >= blocks.count;
      const int64_t k = blocks.count == 0 ? 0 : std::min(blocks.length, g_.k - p0);
      pack_block_of_b(p0, k, j0, cols, rows);
      sweep(i0, rows, j0, cols, p0, k, c, ldc, block == 0 ? beta : T(1), last);
    }
  }

  void load_c(int64_t i0, int64_t rows, int64_t j0, int64_t cols, T* c, int64_t ldc) {
    const Tag<T> d;
    const auto beta = hn::Set(d, g_.beta);
    for (int64_t i = 0; i < rows; ++i) {
      const TC* from = g_.c + (i0 + i) * g_.ldc + j0;
      for (int64_t j = 0; j < cols; j += n) {
        const auto old = j + n <= cols ? Source<T, TC>::load(d, from + j)
                                       : Source<T, TC>::load_n(d, from + j, static_cast<size_t>(cols - j));
        hn::StoreU(hn::Mul(beta, old), d, c + i * ldc + j);
      }
    }
  }

  // Register tiles read operands in place where they can: what they miss in L1 they have asked for long before they
  // need it, while a copy is waited for. Only a B that lies along k must be transposed.
  bool b_in_place(int64_t rows, int64_t k) const {
    if (!std::is_same_v<P, TB> || g_.b.col_stride != 1) return false;
    // Vectors that straddle two lines cost a copy's worth within a few panels of A.
    const bool aligned = reinterpret_cast<uintptr_t>(g_.b.data) % 64 == 0 && g_.b.row_stride * sizeof(T) % 64 == 0;
    return (aligned || rows <= 3 * kTileRows) && spreads_in_l2<T>(g_.b.row_stride, k);
  }

  bool a_in_place(int64_t k) const {
    if (kPairs) {  // whole pairs, which lie as the tiles read them
      return along_k() && k % 2 == 0 && g_.a.row_stride % 2 == 0 && reinterpret_cast<uintptr_t>(g_.a.data) % 4 == 0 &&
             !collides_in_l1<TA>(g_.a.row_stride);
    }
    if (!std::is_same_v<P, TA>) return false;
    return along_k() ? !collides_in_l1<T>(g_.a.row_stride) : spreads_in_l2<T>(g_.a.col_stride, k);
  }

  /// Columns after the last whole vector of a block of C that are dot products. Only the last block of a row has any.
  int64_t dot_cols(int64_t cols) const {
    const int64_t tail = cols % n;
    return kMaxDotCols > 0 && tail <= kMaxDotCols && along_k() && g_.k >= kMinDotK ? tail : 0;
  }

  /// B as the tiles read it. In place, only columns that do not fill a vector are copied.
  void pack_block_of_b(int64_t p0, int64_t k, int64_t j0, int64_t cols, int64_t rows) {
    constexpr int64_t kPanels = kBlockK<P> * kBlockCols + kMaxBlockCols / kPanelCols * panel_step<P>(0, 0);
    packed_b_ = gemm_scratch<P>(GemmScratch::kB, kPanels + std::max<int64_t>(kMaxDotCols, 1) * kBlockK<P>);
    if (k == 0) return;
    const int64_t dots = dot_cols(cols);
    cols -= dots;
    if constexpr (kMaxDotCols > 0) {
      if (dots > 0) pack_dot_cols(p0, k, j0 + cols, dots, packed_b_ + kPanels);
    }
    int64_t from = 0;
    if (b_in_place(rows, k)) {
      if (cols % n == 0) return;
      from = cols / kPanelCols * kPanelCols;
    }
    if (from == cols) return;
    pack_b<P, TB>(b_at(p0, j0 + from), g_.b.row_stride, g_.b.col_stride, k, cols - from,
                  packed_b_ + from / kPanelCols * panel_step<P>(kPanelCols, depth_of<P>(k)));
  }

  /// Columns of B for dot products, each along memory: a copy, or B itself.
  void pack_dot_cols(int64_t p0, int64_t k, int64_t j, int64_t cols, T* out) {
    if constexpr (std::is_same_v<T, TB>) {
      if (g_.b.row_stride == 1) {
        dot_b_ = b_at(p0, j), dot_ldb_ = g_.b.col_stride;
        return;
      }
    }
    dot_b_ = out, dot_ldb_ = k;
    for (int64_t p = 0; p < k; ++p) {
      for (int64_t q = 0; q < cols; ++q) out[q * k + p] = Source<T, TB>::scalar(*b_at(p0 + p, j + q));
    }
  }

  const TA* a_at(int64_t i, int64_t p) const { return g_.a.data + i * g_.a.row_stride + p * g_.a.col_stride; }
  const TB* b_at(int64_t p, int64_t j) const { return g_.b.data + p * g_.b.row_stride + j * g_.b.col_stride; }
  bool along_k() const { return g_.a.col_stride == 1; }

  void pack_block_of_a(const RowPanels& panels, int64_t panel, int64_t i0, int64_t p0, int64_t k, P* out) {
    const int64_t i = i0 + panels.first(panel);
    if (along_k()) return pack_a_along_k<P, TA>(a_at(i, p0), g_.a.row_stride, panels.rows(panel), k, out);
    const int64_t count = std::min(kBlockPanels, panels.count - panel);
    pack_a_across_k<P, TA>(a_at(i, p0), g_.a.col_stride, g_.m - i, panels, panel, count, k, out);
  }

  /// All panels of A against the block of B.
  void sweep(int64_t i0, int64_t rows, int64_t j0, int64_t cols, int64_t p0, int64_t k, T* c, int64_t ldc, T beta,
             bool last) {
    const bool packs = !a_in_place(k) && k > 0, b_here = b_in_place(rows, k) && k > 0;
    const bool finishes = last && (kRounds || g_.activation != GemmActivation::kNone);
    const T* bias = last && g_.bias != nullptr ? g_.bias + j0 : nullptr;
    const int64_t dots = k > 0 ? dot_cols(cols) : 0, tile_cols = cols - dots, depth = depth_of<P>(k);
    const bool wide = kWideRows > 0 && !packs && b_here && k <= kShortK && tile_cols % (kWideVecs * n) == 0;
    const int64_t tile_width = wide ? kWideVecs * n : kPanelCols;
    const RowPanels panels(rows, wide ? kWideRows : kTileRows);
    P* packed = nullptr;
    if (packs) packed = gemm_scratch<P>(GemmScratch::kA, kBlockPanels * panel_step<P>(kPanelRows<P>, kBlockK<P>) + n);
    // Where the sums of a tile are kept.
    const auto sums_at = [&](int64_t first, int64_t height, int64_t j, int64_t width) {
      if constexpr (kRounds) {
        if (tile_by_tile_ && beta != T(0)) load_c(i0 + first, height, j0 + j, width, c, ldc);
        if (tile_by_tile_) return c;
      }
      return c + first * ldc + j;
    };
    for (int64_t panel = 0; panel < panels.count; ++panel) {
      const int64_t first = panels.first(panel), height = panels.rows(panel);
      const P* a = nullptr;
      int64_t a_stride = 0;
      if (packs) {
        const int64_t slot = along_k() ? 0 : panel % kBlockPanels;
        if (slot == 0) pack_block_of_a(panels, panel, i0, p0, k, packed);
        a = packed + slot * panel_step<P>(kPanelRows<P>, depth);
        a_stride = along_k() ? packed_row<P>(depth) : kPanelRows<P>;
      } else if constexpr (kPairs || std::is_same_v<P, TA>) {
        if (k > 0) a = reinterpret_cast<const P*>(a_at(i0 + first, p0));
        a_stride = (along_k() ? g_.a.row_stride : g_.a.col_stride) / kPerElement<P>;
      }
      for (int64_t j = 0; j < tile_cols; j += tile_width) {
        const int64_t width = std::min(tile_width, tile_cols - j);
        const int vecs = static_cast<int>((width + n - 1) / n);
        const P* b = packed_b_ + j / kPanelCols * panel_step<P>(kPanelCols, depth);
        int64_t b_stride = vecs * n;
        if constexpr (std::is_same_v<P, TB>) {
          if (b_here && width % n == 0) b = b_at(p0, j0 + j), b_stride = g_.b.row_stride;
        }
        const TileOut<T> out = {
            sums_at(first, height, j, width), ldc, g_.alpha, beta, bias == nullptr ? nullptr : bias + j,
            static_cast<int>(width)};
        const TileKernel<P>* kernels = nullptr;
        if constexpr (kPairs) {
          kernels = TileKernels<P>::all[along_k()][vecs - 1].data();
        } else {
          kernels = wide ? kWideKernels<P>[along_k()].data() : TileKernels<P>::all[along_k()][vecs - 1].data();
        }
        kernels[height - 1](a, a_stride, b, b_stride, depth, out);
        if (finishes) finish_tile(out.c, ldc, i0 + first, height, j0 + j, width);
      }
      if constexpr (kMaxDotCols > 0) {
        if (dots == 0) continue;
        const TileOut<T> out = {sums_at(first, height, tile_cols, dots),
                                ldc,
                                g_.alpha,
                                beta,
                                bias == nullptr ? nullptr : bias + tile_cols,
                                static_cast<int>(dots)};
        dot_tile(a, a_stride, height, k, out);
        if (finishes) finish_tile(out.c, ldc, i0 + first, height, j0 + tile_cols, dots);
      }
    }
  }

  /// The last columns of a panel of C. Rows of A take the place of the columns of B in the dot products.
  void dot_tile(const T* a, int64_t a_stride, int64_t rows, int64_t k, const TileOut<T>& out) {
    constexpr int64_t kRowsUp = (kTileRows + 3) / 4 * 4;
    T sums[std::max<int64_t>(kMaxDotCols, 1) * kRowsUp];
    dots<T, T>(dot_b_, dot_ldb_, out.cols, a, a_stride, rows, k, sums, kRowsUp);
    for (int64_t j = 0; j < out.cols; ++j) {
      const T bias = out.bias == nullptr ? T(0) : out.bias[j];
      for (int64_t i = 0; i < rows; ++i) {
        T& c = out.c[i * out.ldc + j];
        const T value = out.alpha * sums[j * kRowsUp + i] + bias;
        c = out.beta == T(0) ? value : out.beta * c + value;
      }
    }
  }

  void finish_tile(const T* pre, int64_t ldpre, int64_t i, int64_t rows, int64_t j, int64_t cols) {
    finish<T, TC>(g_.activation, pre, ldpre, rows, cols, g_.c + i * g_.ldc + j, g_.ldc,
                  g_.d == nullptr ? nullptr : g_.d + i * g_.ldd + j, g_.ldd,
                  g_.aux == nullptr ? nullptr : g_.aux + i * g_.ldaux + j, g_.ldaux);
  }

  /// Few rows: dot products, piece by piece of the columns, then what the register tiles do when they store.
  void run_dots() {
    constexpr int64_t kPiece = 64;
    constexpr int64_t kMaxRows = 16;
    const int64_t rows = g_.m;
    const T* a = nullptr;
    int64_t lda = g_.k;
    if constexpr (std::is_same_v<T, TA>) {
      if (g_.a.col_stride == 1) a = g_.a.data, lda = g_.a.row_stride;
    }
    if (a == nullptr) {
      T* copy = gemm_scratch<T>(GemmScratch::kA, kMaxRows * g_.k);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t p = 0; p < g_.k; ++p) copy[i * g_.k + p] = Source<T, TA>::scalar(*a_at(i, p));
      }
      a = copy;
    }
    T* sums = gemm_scratch<T>(GemmScratch::kSums, kBlockSumRows * kBlockCols);
    for (int64_t j = tile_.col0; j < tile_.col1; j += kPiece) {
      const int64_t cols = std::min(kPiece, tile_.col1 - j);
      dots<T, TB>(a, lda, rows, b_at(0, j), g_.b.col_stride, cols, g_.k, sums, kPiece);
      for (int64_t i = 0; i < rows; ++i) apply_scales(i, j, cols, sums + i * kPiece);
      if constexpr (!kRounds) {
        for (int64_t i = 0; i < rows; ++i) std::copy_n(sums + i * kPiece, cols, g_.c + i * g_.ldc + j);
        if (g_.activation != GemmActivation::kNone) finish_tile(g_.c + j, g_.ldc, 0, rows, j, cols);
      } else {
        finish_tile(sums, kPiece, 0, rows, j, cols);
      }
    }
  }

  /// sums = alpha * sums + beta * C + bias for columns [j, j + cols) of row i.
  void apply_scales(int64_t i, int64_t j, int64_t cols, T* sums) const {
    const Tag<T> d;
    if (g_.alpha == T(1) && g_.beta == T(0) && g_.bias == nullptr) return;
    for (int64_t q = 0; q < cols; q += n) {
      const size_t left = static_cast<size_t>(std::min(n, cols - q));
      auto value = hn::Mul(hn::Set(d, g_.alpha), hn::LoadU(d, sums + q));
      if (g_.bias != nullptr) value = hn::Add(value, Source<T, T>::load_n(d, g_.bias + j + q, left));
      if (g_.beta != T(0)) {
        const auto old = Source<T, TC>::load_n(d, g_.c + i * g_.ldc + j + q, left);
        value = hn::MulAdd(hn::Set(d, g_.beta), old, value);
      }
      hn::StoreU(value, d, sums + q);
    }
  }

  const Gemm<TA, TB, TC>& g_;
  const GemmTile tile_;
  P* packed_b_ = nullptr;
  const T* dot_b_ = nullptr;
  int64_t dot_ldb_ = 0;
  bool tile_by_tile_ =
      false;  ///< sums that are to be rounded are final at once: each tile's take the place of the last one's
};

template <class TA, class TB, class TC, class P>
void run_tile(const Gemm<TA, TB, TC>& product, const GemmTile& tile) {
  Task<TA, TB, TC, P>(product, tile).run();
}

template <class TA, class TB, class TC, class P = typename Gemm<TA, TB, TC>::Sum>
inline constexpr GemmKernels<TA, TB, TC> kKernels = {
    {kTileRows, kTileVecs* kLanes<SumOf<P>>, kPerElement<P>* kLanes<SumOf<P>>}, &run_tile<TA, TB, TC, P>};

}  // namespace HWY_NAMESPACE
}  // namespace weft::detail
HWY_AFTER_NAMESPACE();
#endif

// Register tiles: a rows x cols piece of C, summed over one block of k. Included once per instruction set.
#if defined(WEFT_OPS_GEMM_KERNEL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WEFT_OPS_GEMM_KERNEL_INL_H_
#undef WEFT_OPS_GEMM_KERNEL_INL_H_
#else
#define WEFT_OPS_GEMM_KERNEL_INL_H_
#endif

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "hwy/highway.h"
#include "ops/gemm_engine.h"

HWY_BEFORE_NAMESPACE();
namespace weft::detail {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// AVX-512 has 32 registers: 14 x 2 sums, 2 vectors of B and the broadcast element of A. AVX2 has 16: 6 x 2 sums. More
// rows than that spill; fewer leave the load ports, not the multipliers, as the limit.
// (Built with AddressSanitizer, whose checks make the large tiles take minutes to compile, all tiles are small. The
// order of the sums, and so every bit, is the same.)
#if defined(__SANITIZE_ADDRESS__) || HWY_TARGET > HWY_AVX2
inline constexpr int kTileRows = 4;
#elif HWY_TARGET <= HWY_AVX3
inline constexpr int kTileRows = 14;
#else
inline constexpr int kTileRows = 6;
#endif
inline constexpr int kTileVecs = 2;

// Wide tiles, for sums so short that the start and the end of a tile count: fewer loads for each multiply-add, but
// more of B goes by for each row of A. 0 rows: there are none.
#if HWY_TARGET <= HWY_AVX3
inline constexpr int kWideRows = 6 < kTileRows ? 6 : kTileRows;
#else
inline constexpr int kWideRows = 0;
#endif
inline constexpr int kWideVecs = 4;

template <class T>
using Tag = hn::ScalableTag<T>;
template <class T>
constexpr int kLanes = static_cast<int>(hn::MaxLanes(Tag<T>()));

/// Where a register tile goes: c = alpha * sums + beta * c + bias.
template <class T>
struct TileOut {
  T* c;
  int64_t ldc;
  T alpha, beta;
  const T* bias;  ///< of the tile's first column, or null
  int cols;       ///< columns of the tile that exist; the last vector is masked
};

/// Hides where a value comes from. Without it GCC rewrites the fourteen addresses of a tile kernel into one register
/// each, which spills.
template <class P>
HWY_INLINE void keep_in_register(P& value) {
  asm("" : "+r"(value));
}

/// What sums of products of operands of type P are kept in.
template <class P>
using SumOf = std::conditional_t<std::is_same_v<P, Bf16Pair>, float, P>;

/// sum += a * b in the register that holds the sum; for pairs sum += a.first * b.first + a.second * b.second. GCC, left
/// to itself, moves sums between registers and the stack.
template <class P, class V>
HWY_INLINE void multiply_add(V a, V b, V& sum) {
#if HWY_ARCH_X86 && HWY_TARGET != HWY_SCALAR
  if constexpr (std::is_same_v<P, Bf16Pair>) {
    static_assert(sizeof(V) == 64);
    asm("vdpbf16ps %1, %2, %0" : "+v"(sum.raw) : "v"(a.raw), "v"(b.raw));
  } else if constexpr (sizeof(hn::TFromV<V>) == 4) {
    asm("vfmadd231ps %1, %2, %0" : "+v"(sum.raw) : "v"(a.raw), "v"(b.raw));
  } else {
    asm("vfmadd231pd %1, %2, %0" : "+v"(sum.raw) : "v"(a.raw), "v"(b.raw));
  }
#else
  sum = hn::MulAdd(a, b, sum);
#endif
}

/// Calls body(0), ..., body(kCount - 1) with constants: unlike an unrolled loop, this lets GCC see a local array as so
/// many variables from the start, and keep them in registers.
template <class Body, int... kIndex>
HWY_INLINE void unroll_sequence(Body&& body, std::integer_sequence<int, kIndex...>) {
  (body(std::integral_constant<int, kIndex>()), ...);
}
template <int kCount, class Body>
HWY_INLINE void unroll(Body&& body) {
  unroll_sequence(body, std::make_integer_sequence<int, kCount>());
}
#define WEFT_UNROLLED HWY_ATTR __attribute__((always_inline))

/// c = alpha * sum + bias + beta * c for one tile.
template <class T, int kRows, int kVecs>
HWY_INLINE void store_tile(hn::Vec<Tag<T>> (&sum)[kRows][kVecs], const TileOut<T>& out) {
  const Tag<T> d;
  using V = hn::Vec<Tag<T>>;
  constexpr int n = kLanes<T>;
  const int tail = out.cols - (kVecs - 1) * n;  // columns in the last vector
  const auto mask = hn::FirstN(d, static_cast<size_t>(tail));
  if (out.alpha != T(1)) {
    const V alpha = hn::Set(d, out.alpha);
    unroll<kRows>([&](auto i) WEFT_UNROLLED {
      unroll<kVecs>([&](auto v) WEFT_UNROLLED { sum[i][v] = hn::Mul(sum[i][v], alpha); });
    });
  }
  if (out.bias != nullptr) {
    unroll<kVecs>([&](auto v) WEFT_UNROLLED {
      const V bias = v < kVecs - 1 ? hn::LoadU(d, out.bias + v * n) : hn::MaskedLoad(mask, d, out.bias + v * n);
      unroll<kRows>([&](auto i) WEFT_UNROLLED { sum[i][v] = hn::Add(sum[i][v], bias); });
    });
  }
  T* HWY_RESTRICT c = out.c;
  if (out.beta != T(0)) {
    const V beta = hn::Set(d, out.beta);
    unroll<kRows>([&](auto i) WEFT_UNROLLED {
      unroll<kVecs>([&](auto v) WEFT_UNROLLED {
        const V old = v < kVecs - 1 ? hn::LoadU(d, c + v * n) : hn::MaskedLoad(mask, d, c + v * n);
        sum[i][v] = hn::MulAdd(beta, old, sum[i][v]);
      });
      c += out.ldc;
      keep_in_register(c);
    });
    c = out.c;
  }
  if (tail == n) {
    unroll<kRows>([&](auto i) WEFT_UNROLLED {
      unroll<kVecs>([&](auto v) WEFT_UNROLLED { hn::StoreU(sum[i][v], d, c + v * n); });
      c += out.ldc;
      keep_in_register(c);
    });
  } else {
    unroll<kRows>([&](auto i) WEFT_UNROLLED {
      unroll<kVecs - 1>([&](auto v) WEFT_UNROLLED { hn::StoreU(sum[i][v], d, c + v * n); });
      hn::BlendedStore(sum[i][kVecs - 1], mask, d, c + (kVecs - 1) * n);
      c += out.ldc;
      keep_in_register(c);
    });
  }
}

/// Sums a[i, p] * b[p, j] over p in [0, k), one multiply_add() after the other, and writes them out.
/// a: element (i, p) is a[i * a_stride + p] if kAlongK, else a[p * a_stride + i]. b: row p is at b + p * b_stride.
template <class P, int kRows, int kVecs, bool kAlongK>
HWY_NOINLINE void tile_kernel(const P* HWY_RESTRICT a, int64_t a_stride, const P* HWY_RESTRICT b, int64_t b_stride,
                              int64_t k, const TileOut<SumOf<P>>& out) {
  using T = SumOf<P>;  // pairs travel as the 32 bits of a float
  static_assert(sizeof(P) == sizeof(T));
  const Tag<T> d;
  using V = hn::Vec<Tag<T>>;
  constexpr int n = kLanes<T>;
  // With the pointers of rows along k, general registers run out: what the loop does not need then waits on the stack.
  // GCC would keep it in vector registers, whose way back to an address leads through the queue of multiply-adds.
  using Kept = const TileOut<T>*;
  std::conditional_t<kAlongK, Kept volatile, Kept> kept_out = &out;
  std::conditional_t<kAlongK, volatile uint64_t, uint64_t> kept_k = static_cast<uint64_t>(k);
  // The lines of C arrive while the sums are made. (A wide tile is too short for that, and its C is near.)
  const T* line = out.c;
  unroll<kVecs <= kTileVecs ? kRows : 0>([&](auto) WEFT_UNROLLED {
    __builtin_prefetch(line, 1);
    if (kVecs * n * sizeof(T) > 64) __builtin_prefetch(line + n, 1);
    line += out.ldc;
    keep_in_register(line);
  });
  V sum[kRows][kVecs];
  unroll<kRows>([&](auto i) WEFT_UNROLLED { unroll<kVecs>([&](auto v) WEFT_UNROLLED { sum[i][v] = hn::Zero(d); }); });

  // Three rows share a pointer, which x86 addresses as [p], [p + s] and [p + 2 s].
  constexpr int kGroups = kAlongK ? (kRows + 2) / 3 : 1;
  constexpr int64_t kBytes = sizeof(T);
  int64_t a_bytes = a_stride * kBytes, b_bytes = b_stride * kBytes;
  keep_in_register(a_bytes);
  keep_in_register(b_bytes);
  const char* rows[kGroups];
  unroll<kGroups>([&](auto g) WEFT_UNROLLED {
    rows[g] = reinterpret_cast<const char*>(a) + 3 * g * a_bytes;
    keep_in_register(rows[g]);
  });
  const char* row = reinterpret_cast<const char*>(b);
  const auto step = [&](auto u) WEFT_UNROLLED {
    V bv[kVecs];
    unroll<kVecs>([&](auto v) WEFT_UNROLLED { bv[v] = hn::LoadU(d, reinterpret_cast<const T*>(row) + v * n); });
    row += b_bytes;
    keep_in_register(row);
    unroll<kRows>([&](auto i) WEFT_UNROLLED {
      const char* at = kAlongK ? rows[i / 3 % kGroups] + (i % 3) * a_bytes + u * kBytes : rows[0] + i * kBytes;
      T element;
      std::memcpy(&element, at, sizeof element);
      const V av = hn::Set(d, element);
      unroll<kVecs>([&](auto v) WEFT_UNROLLED { multiply_add<P>(av, bv[v], sum[i][v]); });
    });
    if (!kAlongK) {
      rows[0] += a_bytes;
      keep_in_register(rows[0]);
    }
  };
  const auto advance = [&](int64_t bytes) WEFT_UNROLLED {
    unroll<kAlongK ? kGroups : 0>([&](auto g) WEFT_UNROLLED {
      rows[g] += bytes;
      keep_in_register(rows[g]);
    });
  };
  constexpr int kUnroll = 4;
  for (uint64_t left = static_cast<uint64_t>(k) / kUnroll; left > 0; --left) {
    unroll<kUnroll>(step);
    advance(kUnroll * kBytes);
  }
  for (uint64_t left = kept_k % kUnroll; left > 0; --left) {
    step(std::integral_constant<int, 0>());
    advance(kBytes);
  }
  store_tile<T, kRows, kVecs>(sum, *kept_out);
}

template <class P>
using TileKernel = void (*)(const P*, int64_t, const P*, int64_t, int64_t, const TileOut<SumOf<P>>&);

template <class P, int kVecs, bool kAlongK, int... kRow>
constexpr std::array<TileKernel<P>, sizeof...(kRow)> tile_kernels_by_rows(std::integer_sequence<int, kRow...>) {
  return {&tile_kernel<P, kRow + 1, kVecs, kAlongK>...};
}

/// The kernels take the compiler most of a minute: they are made where the GEMM is (gemm_tile-inl.h), and others link
/// to them.
template <class P>
struct TileKernels {
  /// [along k][vectors - 1][rows - 1]
  static const std::array<TileKernel<P>, kTileRows> all[2][kTileVecs];
};

/// kernels[along k][rows - 1]
template <class P>
inline constexpr std::array<TileKernel<P>, kWideRows> kWideKernels[2] = {
    tile_kernels_by_rows<P, kWideVecs, false>(std::make_integer_sequence<int, kWideRows>()),
    tile_kernels_by_rows<P, kWideVecs, true>(std::make_integer_sequence<int, kWideRows>())};

}  // namespace HWY_NAMESPACE
}  // namespace weft::detail
HWY_AFTER_NAMESPACE();
#endif

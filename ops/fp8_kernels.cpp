// The CPU's kernels of 8-bit floats: they stand for a GPU's, to the bit in what is converted and counted.
#include "ops/fp8_kernels.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>

#include "core/thread_pool.h"
#include "ops/gemm.h"

namespace weft {
namespace {

/// Rows and columns of a tile: a row of the transposed tile is a cache line.
constexpr int64_t kTile = 64;

void raise(unsigned long long& to, unsigned long long value) {
  const std::atomic_ref<unsigned long long> shared(to);
  unsigned long long old = shared.load(std::memory_order_relaxed);
  while (old < value && !shared.compare_exchange_weak(old, value, std::memory_order_relaxed)) {
  }
}

uint32_t largest_magnitude(const BFloat16* x, int64_t count, uint32_t most) {
  for (int64_t i = 0; i < count; ++i) most = std::max<uint32_t>(most, x[i].bits & 0x7fffu);
  return most;
}

/// One row of a tile; returns how many elements saturated.
template <class Float8>
uint32_t convert_row(const BFloat16* x, int64_t count, float scale, uint8_t* y) {
  uint32_t saturated = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float scaled = static_cast<float>(x[i]) * scale;
    y[i] = saturating_cast<Float8>(scaled).bits;
    saturated += std::abs(scaled) > Float8Format<Float8>::kLargest;
  }
  return saturated;
}

template <class Float8>
void quantise(const Fp8Quantise& q) {
  const bool converts = q.y != nullptr || q.transposed != nullptr;
  const int64_t rows = q.transposed != nullptr ? q.transposed_ld : q.rows;
  parallel_for(rows, kTile, [&](int64_t begin, int64_t end) {
    const int64_t filled = std::clamp<int64_t>(q.rows - begin, 0, end - begin);
    uint32_t most = 0;
    unsigned long long saturated = 0;
    std::array<uint8_t, kTile * kTile> tile{};
    for (int64_t column = 0; column < q.columns; column += kTile) {
      const int64_t width = std::min(kTile, q.columns - column);
      for (int64_t r = 0; r < filled; ++r) {
        const BFloat16* x = q.x + (begin + r) * q.columns + column;
        most = largest_magnitude(x, width, most);
        if (!converts) continue;
        uint8_t* y = tile.data() + r * kTile;
        saturated += convert_row<Float8>(x, width, q.scale->scale, y);
        if (q.y != nullptr) std::memcpy(q.y + (begin + r) * q.columns + column, y, static_cast<size_t>(width));
      }
      if (q.transposed == nullptr) continue;
      for (int64_t c = 0; c < width; ++c) {
        uint8_t* to = q.transposed + (column + c) * q.transposed_ld + begin;
        for (int64_t r = 0; r < end - begin; ++r) to[r] = r < filled ? tile[static_cast<size_t>(r * kTile + c)] : 0;
      }
    }
    if (q.stats == nullptr) return;
    raise(q.stats->amax, static_cast<unsigned long long>(most) << 16);
    std::atomic_ref(q.stats->saturated).fetch_add(saturated, std::memory_order_relaxed);
  });
  if (q.stats != nullptr && converts) q.stats->converted += static_cast<unsigned long long>(q.rows * q.columns);
}

/// The bf16 bits of every 8-bit code: both formats are subsets of bf16.
template <class Float8>
const std::array<uint16_t, 256>& widened() {
  static const std::array<uint16_t, 256> table = [] {
    std::array<uint16_t, 256> made{};
    for (size_t code = 0; code < made.size(); ++code) {
      Float8 value;
      value.bits = static_cast<uint8_t>(code);
      made[code] = BFloat16(static_cast<float>(value)).bits;
    }
    return made;
  }();
  return table;
}

void widen(const Fp8Matrix& from, int64_t rows, int64_t columns, uint16_t* to) {
  dispatch_fp8(from.format, [&]<class Float8>() {
    const std::array<uint16_t, 256>& table = widened<Float8>();
    parallel_for(rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        for (int64_t c = 0; c < columns; ++c) to[r * columns + c] = table[from.data[r * from.ld + c]];
      }
    });
  });
}

}  // namespace

void fp8_quantise(Cpu, const Fp8Quantise& arguments) {
  dispatch_fp8(arguments.format, [&]<class Float8>() { quantise<Float8>(arguments); });
}

int64_t fp8_gemm_workspace(Cpu, int64_t m, int64_t n, int64_t k) {
  return (m + n) * k * static_cast<int64_t>(sizeof(uint16_t)) + n * static_cast<int64_t>(sizeof(float));
}

void fp8_gemm(Cpu, const Fp8Gemm& g) {
  auto* bias = static_cast<float*>(g.workspace);
  auto* a = reinterpret_cast<uint16_t*>(bias + g.n);
  uint16_t* b = a + g.m * g.k;
  widen(g.a, g.m, g.k, a);
  widen(g.b, g.n, g.k, b);
  auto product = make_gemm(false, true, g.m, g.n, g.k, a, g.k, b, g.k, g.c, g.n,
                           g.a.scale->inverse * g.b.scale->inverse, g.accumulate ? 1.0f : 0.0f);
  if (g.bias != nullptr) {
    for (int64_t i = 0; i < g.n; ++i) bias[i] = std::bit_cast<float>(static_cast<uint32_t>(g.bias[i]) << 16);
    product.bias = bias;
  }
  gemm(product);
}

void fp8_verdict(Cpu, const Fp8Verdict& arguments) {
  unsigned long long most = 0;
  for (int64_t i = 0; i < arguments.count; ++i) most = std::max(most, arguments.stats[i].amax);
  *arguments.verdict = fp8_verdict_of(most);
}

void fp8_update(Cpu, const Fp8Update& arguments) {
  for (int64_t i = 0; i < arguments.count; ++i) fp8_update_one(arguments, i);
}

}  // namespace weft

#include "dist/reduce_tree.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "core/thread_pool.h"

namespace weft::dist {
namespace {

/// Elements that are reduced at a time: partial results of all levels stay in the first cache.
constexpr int64_t kBlock = 512;
/// Elements of a task of the pool.
constexpr int64_t kGrain = int64_t{1} << 16;
/// Levels of a tree over up to 2^20 ranks.
constexpr int kLevels = 21;

/// What values of T are reduced in; unsigned, so that integer sums wrap around.
template <class T>
struct Wide {
  using type = Accumulate<T>;
};
template <>
struct Wide<int32_t> {
  using type = int32_t;
};
template <>
struct Wide<int64_t> {
  using type = int64_t;
};
template <>
struct Wide<uint8_t> {
  using type = uint8_t;
};

template <Reduction kReduction, class A>
A combine(A a, A b) {
  if constexpr (kReduction == Reduction::sum) {
    if constexpr (std::is_integral_v<A>) {
      return static_cast<A>(static_cast<std::make_unsigned_t<A>>(a) + static_cast<std::make_unsigned_t<A>>(b));
    } else {
      return a + b;
    }
  } else {
    // A NaN on either side stays: it compares false, and a != a keeps the one of a.
    const bool keep = kReduction == Reduction::max ? a >= b : a <= b;
    return keep || a != a ? a : b;
  }
}

template <Reduction kReduction, class T>
void reduce_block(std::span<const void* const> inputs, int64_t at, int64_t n, typename Wide<T>::type* result,
                  typename Wide<T>::type (*levels)[kBlock]) {
  using A = typename Wide<T>::type;
  const auto load = [&](size_t i) { return static_cast<const T*>(inputs[i]) + at; };
  if (inputs.size() == 1) {
    const T* a = load(0);
    for (int64_t i = 0; i < n; ++i) result[i] = static_cast<A>(a[i]);
    return;
  }
  if (inputs.size() == 2) {
    const T *a = load(0), *b = load(1);
    for (int64_t i = 0; i < n; ++i) result[i] = combine<kReduction>(static_cast<A>(a[i]), static_cast<A>(b[i]));
    return;
  }
  // The left branch is as large a power of two as leaves something for the right one.
  const size_t left = std::bit_floor(inputs.size() - 1);
  reduce_block<kReduction, T>(inputs.subspan(0, left), at, n, result, levels);
  A* right = levels[0];
  reduce_block<kReduction, T>(inputs.subspan(left), at, n, right, levels + 1);
  for (int64_t i = 0; i < n; ++i) result[i] = combine<kReduction>(result[i], right[i]);
}

template <Reduction kReduction, class T>
void reduce_range(std::span<const void* const> inputs, std::span<void* const> outputs, int64_t begin, int64_t end,
                  bool average) {
  using A = typename Wide<T>::type;
  A levels[kLevels][kBlock];
  T rounded[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = std::min(kBlock, end - at);
    A* result = levels[0];
    reduce_block<kReduction, T>(inputs, at, n, result, levels + 1);
    if (average) {
      for (int64_t i = 0; i < n; ++i) result[i] = static_cast<A>(result[i] / static_cast<A>(inputs.size()));
    }
    for (int64_t i = 0; i < n; ++i) rounded[i] = T(result[i]);
    for (void* output : outputs) std::memcpy(static_cast<T*>(output) + at, rounded, static_cast<size_t>(n) * sizeof(T));
  }
}

template <class T>
void reduce_typed(Reduction reduction, std::span<const void* const> inputs, std::span<void* const> outputs, int64_t n) {
  parallel_for(n, kGrain, [&](int64_t begin, int64_t end) {
    switch (reduction) {
      case Reduction::sum:
      case Reduction::avg:
        return reduce_range<Reduction::sum, T>(inputs, outputs, begin, end, reduction == Reduction::avg);
      case Reduction::max:
        return reduce_range<Reduction::max, T>(inputs, outputs, begin, end, false);
      case Reduction::min:
        return reduce_range<Reduction::min, T>(inputs, outputs, begin, end, false);
    }
  });
}

}  // namespace

void reduce_tree(Reduction reduction, DType dtype, std::span<const void* const> inputs, std::span<void* const> outputs,
                 int64_t n) {
  switch (dtype) {
    case DType::i32:
      return reduce_typed<int32_t>(reduction, inputs, outputs, n);
    case DType::i64:
      return reduce_typed<int64_t>(reduction, inputs, outputs, n);
    case DType::u8:
      return reduce_typed<uint8_t>(reduction, inputs, outputs, n);
    default:
      return dispatch_float(dtype, "reduce", [&]<class T>() { reduce_typed<T>(reduction, inputs, outputs, n); });
  }
}

}  // namespace weft::dist

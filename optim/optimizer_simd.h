#pragma once
#include <cstdint>

#include "core/dtype.h"
#include "optim/optimizer_kernels.h"

// Vector kernels over a piece of one tensor, on the calling thread. T is the type of the parameter and of its gradient;
// everything is computed, and all state kept, as Accumulate<T>. Where the two differ, `w` is the master copy of the
// weights and `rounded` the parameter, which follows it, rounded to nearest even; else `rounded` is not used.

namespace weft::optim {

/// What AdamConstants lacks for one tensor.
template <class T>
struct AdamRates {
  T weight_decay, lr;
};

struct SquareSums {
  double weight = 0;  ///< sum of w^2
  double update = 0;  ///< sum of u^2
};

/// m, v and w in one pass.
template <class T, class A = Accumulate<T>>
void update_piece(int64_t n, A* w, const T* g, A* m, A* v, T* rounded, const AdamConstants<A>& c,
                  const AdamRates<A>& rates);
/// m and v, and the squares that a trust ratio needs, added in A over blocks of kSumBlock and then in f64.
template <class T, class A = Accumulate<T>>
SquareSums moments_piece(int64_t n, const A* w, const T* g, A* m, A* v, const AdamConstants<A>& c,
                         const AdamRates<A>& rates);
/// w.
template <class T, class A = Accumulate<T>>
void apply_piece(int64_t n, A* w, const A* m, const A* v, T* rounded, const AdamConstants<A>& c,
                 const AdamRates<A>& rates);

/// Sum of x^2: in Accumulate<T> over blocks of kSumBlock, then in f64.
template <class T>
double sum_of_squares(int64_t n, const T* x);

inline constexpr int64_t kSumBlock = kSquareBlock;

}  // namespace weft::optim

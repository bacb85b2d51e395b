#pragma once
#include <cstdint>

#include "optim/optimizer_kernels.h"

// Vector kernels over a piece of one tensor, on the calling thread; T is float or double.

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
template <class T>
void update_piece(int64_t n, T* w, const T* g, T* m, T* v, const AdamConstants<T>& c, const AdamRates<T>& rates);
/// m and v, and the squares that a trust ratio needs, added in T over blocks of kSumBlock and then in f64.
template <class T>
SquareSums moments_piece(int64_t n, const T* w, const T* g, T* m, T* v, const AdamConstants<T>& c,
                         const AdamRates<T>& rates);
/// w.
template <class T>
void apply_piece(int64_t n, T* w, const T* m, const T* v, const AdamConstants<T>& c, const AdamRates<T>& rates);

/// Sum of x^2: in T over blocks of kSumBlock, then in f64.
template <class T>
double sum_of_squares(int64_t n, const T* x);

inline constexpr int64_t kSumBlock = 1024;

}  // namespace weft::optim

#pragma once
#include <cstdint>

namespace weft::optim {

/// Constants of one Adam step for one tensor, in the state's type.
template <class T>
struct AdamConstants {
  T grad_scale;  ///< clip factor
  T beta1, beta2;
  T rest1, rest2;   ///< 1 - beta1 and 1 - beta2, subtracted before rounding to T
  T inverse_bias1;  ///< 1 / (1 - beta1^t)
  T inverse_bias2;  ///< 1 / (1 - beta2^t)
  T eps;
  T weight_decay;
  T lr;  ///< times the trust ratio
};

// Kernels over a piece of one tensor, on the calling thread; T is float or double.

/// m, v and w in one pass.
template <class T>
void adam_update(int64_t n, T* w, const T* g, T* m, T* v, const AdamConstants<T>& c);

struct SquareSums {
  double weight = 0;  ///< sum of w^2
  double update = 0;  ///< sum of u^2
};
/// The first pass with a trust ratio: m and v, and the squares that the ratio needs.
template <class T>
SquareSums adam_moments(int64_t n, const T* w, const T* g, T* m, T* v, const AdamConstants<T>& c);
/// The second: w.
template <class T>
void adam_apply(int64_t n, T* w, const T* m, const T* v, const AdamConstants<T>& c);

/// Sum of x^2: in T over blocks of 1,024, then in f64.
template <class T>
double sum_of_squares(int64_t n, const T* x);

}  // namespace weft::optim

#pragma once
// What device code finds without a header: barriers, warp operations, atomics and arithmetic, under CUDA's names. Where
// CUDA has overloads there are overloads here, so that a call resolves to the same one.
#include <math.h>

#include <atomic>
#include <bit>
#include <chrono>
#include <cstdint>
#include <limits>
#include <source_location>

#include "block.h"

constexpr int warpSize = 32;

// ---- barriers and fences ----

using weft_emulation_place = std::source_location;

inline void __syncthreads(weft_emulation_place where = weft_emulation_place::current()) {
  weft_emulation::block_barrier(weft_emulation::Barrier::kPlain, false, where);
}
inline int __syncthreads_count(int predicate, weft_emulation_place where = weft_emulation_place::current()) {
  return weft_emulation::block_barrier(weft_emulation::Barrier::kCount, predicate != 0, where);
}
inline int __syncthreads_and(int predicate, weft_emulation_place where = weft_emulation_place::current()) {
  return weft_emulation::block_barrier(weft_emulation::Barrier::kAnd, predicate != 0, where);
}
inline int __syncthreads_or(int predicate, weft_emulation_place where = weft_emulation_place::current()) {
  return weft_emulation::block_barrier(weft_emulation::Barrier::kOr, predicate != 0, where);
}
inline void __threadfence_block() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence_system() { std::atomic_thread_fence(std::memory_order_seq_cst); }

// ---- warp operations ----

namespace weft_emulation {

template <class T>
uint64_t to_bits(T value) {
  if constexpr (sizeof(T) == 4)
    return std::bit_cast<uint32_t>(value);
  else
    return std::bit_cast<uint64_t>(value);
}
template <class T>
T from_bits(uint64_t bits) {
  if constexpr (sizeof(T) == 4)
    return std::bit_cast<T>(static_cast<uint32_t>(bits));
  else
    return std::bit_cast<T>(bits);
}

/// Lanes exchange values in groups of `width`, a power of two; outside its group a lane has no partner but itself.
template <class T>
T shuffle(WarpOperation operation, unsigned mask, T value, int argument, int width, std::source_location where) {
  if (width < 1 || width > warpSize || (width & (width - 1)) != 0) die("shuffles with a width of %d", width);
  const int own = static_cast<int>(lane()), first = own & ~(width - 1);
  int source = argument;
  switch (operation) {
    case WarpOperation::kShuffleUp:
      source = own - argument < first ? own : own - argument;
      break;
    case WarpOperation::kShuffleDown:
      source = own + argument >= first + width ? own : own + argument;
      break;
    case WarpOperation::kShuffleXor:
      source = (own ^ argument) >= first + width ? own : own ^ argument;
      break;
    default:
      source = first + (argument & (width - 1));
  }
  return from_bits<T>(warp_operation(operation, mask, to_bits(value), source, where));
}

}  // namespace weft_emulation

#define WEFT_SHUFFLES(T)                                                                                              \
  inline T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,                                      \
                       weft_emulation_place where = weft_emulation_place::current()) {                                \
    return weft_emulation::shuffle(weft_emulation::WarpOperation::kShuffle, mask, value, source, width, where);       \
  }                                                                                                                   \
  inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,                               \
                          weft_emulation_place where = weft_emulation_place::current()) {                             \
    const int lanes = delta < 32 ? static_cast<int>(delta) : 32;                                                      \
    return weft_emulation::shuffle(weft_emulation::WarpOperation::kShuffleUp, mask, value, lanes, width, where);      \
  }                                                                                                                   \
  inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,                             \
                            weft_emulation_place where = weft_emulation_place::current()) {                           \
    const int lanes = delta < 32 ? static_cast<int>(delta) : 32;                                                      \
    return weft_emulation::shuffle(weft_emulation::WarpOperation::kShuffleDown, mask, value, lanes, width, where);    \
  }                                                                                                                   \
  inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize,                                    \
                           weft_emulation_place where = weft_emulation_place::current()) {                            \
    return weft_emulation::shuffle(weft_emulation::WarpOperation::kShuffleXor, mask, value, bits & 31, width, where); \
  }
WEFT_SHUFFLES(int)
WEFT_SHUFFLES(unsigned)
WEFT_SHUFFLES(long)
WEFT_SHUFFLES(unsigned long)
WEFT_SHUFFLES(long long)
WEFT_SHUFFLES(unsigned long long)
WEFT_SHUFFLES(float)
WEFT_SHUFFLES(double)
#undef WEFT_SHUFFLES

inline void __syncwarp(unsigned mask = ~0u, weft_emulation_place where = weft_emulation_place::current()) {
  weft_emulation::warp_operation(weft_emulation::WarpOperation::kSync, mask, 0, 0, where);
}
/// The lanes that have not exited: threads of a warp that took another branch count too.
inline unsigned __activemask() { return weft_emulation::live_lanes(); }

#define WEFT_WARP(Result, name, T, operation)                                                                 \
  inline Result name(unsigned mask, T value, weft_emulation_place where = weft_emulation_place::current()) {  \
    return static_cast<Result>(weft_emulation::warp_operation(weft_emulation::WarpOperation::operation, mask, \
                                                              weft_emulation::to_bits(value), 0, where));     \
  }
WEFT_WARP(unsigned, __ballot_sync, int, kBallot)
WEFT_WARP(int, __any_sync, int, kAny)
WEFT_WARP(int, __all_sync, int, kAll)
WEFT_WARP(unsigned, __match_any_sync, int, kMatchAny)
WEFT_WARP(unsigned, __match_any_sync, unsigned, kMatchAny)
WEFT_WARP(unsigned, __match_any_sync, long, kMatchAny)
WEFT_WARP(unsigned, __match_any_sync, unsigned long, kMatchAny)
WEFT_WARP(unsigned, __match_any_sync, long long, kMatchAny)
WEFT_WARP(unsigned, __match_any_sync, unsigned long long, kMatchAny)
WEFT_WARP(unsigned, __match_any_sync, float, kMatchAny)
WEFT_WARP(unsigned, __match_any_sync, double, kMatchAny)
WEFT_WARP(unsigned, __reduce_add_sync, unsigned, kAdd)
WEFT_WARP(unsigned, __reduce_min_sync, unsigned, kMinUnsigned)
WEFT_WARP(unsigned, __reduce_max_sync, unsigned, kMaxUnsigned)
WEFT_WARP(int, __reduce_add_sync, int, kAdd)
WEFT_WARP(int, __reduce_min_sync, int, kMinSigned)
WEFT_WARP(int, __reduce_max_sync, int, kMaxSigned)
#undef WEFT_WARP

// ---- atomics; each returns the old value ----

namespace weft_emulation {

template <class T, class Update>
T atomic_update(T* address, Update update) {
  const std::atomic_ref<T> shared(*address);
  T old = shared.load(std::memory_order_relaxed);
  while (!shared.compare_exchange_weak(old, update(old), std::memory_order_relaxed)) {
  }
  return old;
}

}  // namespace weft_emulation

#define WEFT_ATOMIC(name, T, expression)                                                       \
  inline T name(T* address, T value) {                                                         \
    return weft_emulation::atomic_update(address, [value](T old) -> T { return expression; }); \
  }
#define WEFT_ATOMIC_INTEGER(T)                                            \
  WEFT_ATOMIC(atomicExch, T, (static_cast<void>(old), value))             \
  WEFT_ATOMIC(atomicMin, T, old < value ? old : value)                    \
  WEFT_ATOMIC(atomicMax, T, old > value ? old : value)                    \
  WEFT_ATOMIC(atomicAnd, T, old& value)                                   \
  WEFT_ATOMIC(atomicOr, T, old | value)                                   \
  WEFT_ATOMIC(atomicXor, T, old ^ value)                                  \
  inline T atomicCAS(T* address, T compare, T value) {                    \
    std::atomic_ref<T>(*address).compare_exchange_strong(compare, value); \
    return compare;                                                       \
  }
WEFT_ATOMIC_INTEGER(int)
WEFT_ATOMIC_INTEGER(unsigned)
WEFT_ATOMIC_INTEGER(unsigned long long)
WEFT_ATOMIC(atomicAdd, int, static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value)))
WEFT_ATOMIC(atomicAdd, unsigned, old + value)
WEFT_ATOMIC(atomicAdd, unsigned long long, old + value)
WEFT_ATOMIC(atomicAdd, float, old + value)
WEFT_ATOMIC(atomicAdd, double, old + value)
WEFT_ATOMIC(atomicSub, int, static_cast<int>(static_cast<unsigned>(old) - static_cast<unsigned>(value)))
WEFT_ATOMIC(atomicSub, unsigned, old - value)
WEFT_ATOMIC(atomicExch, float, (static_cast<void>(old), value))
WEFT_ATOMIC(atomicInc, unsigned, old >= value ? 0 : old + 1)
WEFT_ATOMIC(atomicDec, unsigned, old == 0 || old > value ? value : old - 1)
WEFT_ATOMIC(atomicMin, long long, old < value ? old : value)
WEFT_ATOMIC(atomicMax, long long, old > value ? old : value)
#undef WEFT_ATOMIC_INTEGER
#undef WEFT_ATOMIC

// ---- memory and time ----

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}
template <class T>
void __stcg(T* address, T value) {
  *address = value;
}
inline size_t __cvta_generic_to_shared(const void* pointer) { return reinterpret_cast<size_t>(pointer); }

/// Another thread may run meanwhile, so a loop that waits for one of its own block ends.
inline void __nanosleep(unsigned) { weft_emulation::yield(); }
inline long long clock64() { return std::chrono::steady_clock::now().time_since_epoch().count(); }
[[noreturn]] inline void __trap() { weft_emulation::die("__trap"); }

// ---- bits ----

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1) << (31 - bit);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>(int64_t{a} * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  __extension__ using uint128 = unsigned __int128;
  return static_cast<unsigned long long>(static_cast<uint128>(a) * b >> 64);
}

// ---- arithmetic, rounded once ----

namespace weft_emulation {

/// Keeps the compiler from merging the operation that made `x` with the next one.
template <class T>
T rounded(T x) {
  __asm__("" : "+m"(x));
  return x;
}

/// A conversion to an integer as the device does it: NaN gives 0, what is out of range the nearest integer there is.
template <class Integer>
Integer to_integer(double x) {
  constexpr double kLowest = static_cast<double>(std::numeric_limits<Integer>::min());
  constexpr double kAbove = -2.0 * static_cast<double>(std::numeric_limits<Integer>::min() / 2);
  constexpr double kLimit = std::numeric_limits<Integer>::is_signed ? kAbove : 4294967296.0;
  if (x != x) return 0;
  if (x <= kLowest) return std::numeric_limits<Integer>::min();
  if (x >= kLimit) return std::numeric_limits<Integer>::max();
  return static_cast<Integer>(x);
}

}  // namespace weft_emulation

inline float __fadd_rn(float a, float b) { return weft_emulation::rounded(a + b); }
inline float __fsub_rn(float a, float b) { return weft_emulation::rounded(a - b); }
inline float __fmul_rn(float a, float b) { return weft_emulation::rounded(a * b); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return ::fmaf(a, b, c); }
inline float __frcp_rn(float a) { return 1 / a; }
inline float __fsqrt_rn(float a) { return ::sqrtf(a); }
inline float __frsqrt_rn(float a) { return static_cast<float>(1 / ::sqrt(static_cast<double>(a))); }
inline double __dadd_rn(double a, double b) { return weft_emulation::rounded(a + b); }
inline double __dsub_rn(double a, double b) { return weft_emulation::rounded(a - b); }
inline double __dmul_rn(double a, double b) { return weft_emulation::rounded(a * b); }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return ::sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return ::fma(a, b, c); }

inline int __float2int_rn(float x) { return weft_emulation::to_integer<int>(::nearbyint(static_cast<double>(x))); }
inline int __float2int_rz(float x) { return weft_emulation::to_integer<int>(x); }
inline int __float2int_rd(float x) { return weft_emulation::to_integer<int>(::floor(static_cast<double>(x))); }
inline int __float2int_ru(float x) { return weft_emulation::to_integer<int>(::ceil(static_cast<double>(x))); }
inline unsigned __float2uint_rn(float x) {
  return weft_emulation::to_integer<unsigned>(::nearbyint(static_cast<double>(x)));
}
inline unsigned __float2uint_rz(float x) { return weft_emulation::to_integer<unsigned>(x); }
inline long long __float2ll_rz(float x) { return weft_emulation::to_integer<long long>(x); }
inline int __double2int_rn(double x) { return weft_emulation::to_integer<int>(::nearbyint(x)); }
inline int __double2int_rz(double x) { return weft_emulation::to_integer<int>(x); }
inline long long __double2ll_rz(double x) { return weft_emulation::to_integer<long long>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }

// ---- functions that math.h lacks; the fast ones are as exact here as the slow ones ----

// With the linkage that glibc, which declares some of these names without defining them, gives them.
extern "C" {
inline float __expf(float x) noexcept { return ::expf(x); }
inline float __exp10f(float x) noexcept { return ::powf(10, x); }
inline float __logf(float x) noexcept { return ::logf(x); }
inline float __log2f(float x) noexcept { return ::log2f(x); }
inline float __log10f(float x) noexcept { return ::log10f(x); }
inline float __powf(float x, float y) noexcept { return ::powf(x, y); }
inline float __sinf(float x) noexcept { return ::sinf(x); }
inline float __cosf(float x) noexcept { return ::cosf(x); }
inline float __tanf(float x) noexcept { return ::tanf(x); }
inline float rsqrtf(float x) noexcept { return __frsqrt_rn(x); }
inline double rsqrt(double x) noexcept { return 1 / ::sqrt(x); }
}
inline float rsqrt(float x) { return rsqrtf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }

#define WEFT_MIN_MAX(T)                               \
  constexpr T min(T a, T b) { return a < b ? a : b; } \
  constexpr T max(T a, T b) { return a < b ? b : a; }
WEFT_MIN_MAX(int)
WEFT_MIN_MAX(unsigned)
WEFT_MIN_MAX(long)
WEFT_MIN_MAX(unsigned long)
WEFT_MIN_MAX(long long)
WEFT_MIN_MAX(unsigned long long)
#undef WEFT_MIN_MAX
// A mixed pair is compared as C++ converts it, and a NaN loses against a number.
#define WEFT_MIN_MAX_MIXED(Result, A, B)                                                         \
  constexpr Result min(A a, B b) { return min(static_cast<Result>(a), static_cast<Result>(b)); } \
  constexpr Result max(A a, B b) { return max(static_cast<Result>(a), static_cast<Result>(b)); }
WEFT_MIN_MAX_MIXED(unsigned, int, unsigned)
WEFT_MIN_MAX_MIXED(unsigned, unsigned, int)
WEFT_MIN_MAX_MIXED(unsigned long, long, unsigned long)
WEFT_MIN_MAX_MIXED(unsigned long, unsigned long, long)
WEFT_MIN_MAX_MIXED(unsigned long long, long long, unsigned long long)
WEFT_MIN_MAX_MIXED(unsigned long long, unsigned long long, long long)
#undef WEFT_MIN_MAX_MIXED
inline float min(float a, float b) { return ::fminf(a, b); }
inline float max(float a, float b) { return ::fmaxf(a, b); }
inline double min(double a, double b) { return ::fmin(a, b); }
inline double max(double a, double b) { return ::fmax(a, b); }
inline double min(float a, double b) { return ::fmin(static_cast<double>(a), b); }
inline double max(float a, double b) { return ::fmax(static_cast<double>(a), b); }
inline double min(double a, float b) { return ::fmin(a, static_cast<double>(b)); }
inline double max(double a, float b) { return ::fmax(a, static_cast<double>(b)); }

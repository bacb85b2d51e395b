#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/dropout.cpp"
#define HWY_DISABLED_TARGETS (HWY_AVX3_DL | HWY_SSE4 | HWY_SSSE3)
#include "hwy/foreach_target.h"  // must come before highway.h
//
#include <algorithm>
#include <cmath>

#include "core/autograd.h"
#include "core/thread_pool.h"
#include "hwy/highway.h"
#include "ops/dropout.h"
#include "ops/launch.h"

#ifndef WEFT_OPS_DROPOUT_ONCE
#define WEFT_OPS_DROPOUT_ONCE
namespace weft::detail {
/// Philox blocks are made in multiples of this number, at most the lanes of one vector at a time.
inline constexpr int64_t kPhiloxBlocks = 16;
}  // namespace weft::detail
#endif

HWY_BEFORE_NAMESPACE();
namespace weft::detail {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// Philox blocks [first, first + count), as RandomStream::block gives them, to out[4 * count]; count is a multiple of
/// kPhiloxBlocks.
#if HWY_TARGET == HWY_SCALAR
void philox_blocks(uint64_t key, uint64_t step, uint64_t first, int64_t count, uint32_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    const auto words = philox(key, first + static_cast<uint64_t>(i), step);
    std::copy(words.begin(), words.end(), out + 4 * i);
  }
}
#else
// One block to a lane.
void philox_blocks(uint64_t key, uint64_t step, uint64_t first, int64_t count, uint32_t* out) {
  const hn::CappedTag<uint32_t, kPhiloxBlocks> d;
  const hn::Repartition<uint64_t, decltype(d)> wide;
  using V = hn::Vec<decltype(d)>;
  // High and low halves of the 64-bit products of all lanes with a constant.
  const auto multiply = [&](V c, uint32_t by, V& high, V& low) HWY_ATTR {
    const auto m = hn::Set(d, by);
    const auto even = hn::BitCast(d, hn::MulEven(c, m));
    const auto odd = hn::BitCast(d, hn::MulEven(hn::BitCast(d, hn::ShiftRight<32>(hn::BitCast(wide, c))), m));
    low = hn::OddEven(hn::BitCast(d, hn::ShiftLeft<32>(hn::BitCast(wide, odd))), even);
    high = hn::OddEven(odd, hn::BitCast(d, hn::ShiftRight<32>(hn::BitCast(wide, even))));
  };
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t i = 0; i < count; i += lanes) {
    const uint64_t start = first + static_cast<uint64_t>(i);
    V c0 = hn::Iota(d, static_cast<uint32_t>(start));
    // A lane whose low word wrapped around is in the next 2^32 blocks.
    const auto wrapped = hn::Lt(c0, hn::Set(d, static_cast<uint32_t>(start)));
    V c1 = hn::Add(hn::Set(d, static_cast<uint32_t>(start >> 32)), hn::IfThenElseZero(wrapped, hn::Set(d, 1)));
    V c2 = hn::Set(d, static_cast<uint32_t>(step)), c3 = hn::Set(d, static_cast<uint32_t>(step >> 32));
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
      V high0, low0, high2, low2;
      multiply(c0, 0xD2511F53, high0, low0);
      multiply(c2, 0xCD9E8D57, high2, low2);
      c0 = hn::Xor(hn::Xor(high2, c1), hn::Set(d, k0));
      c2 = hn::Xor(hn::Xor(high0, c3), hn::Set(d, k1));
      c1 = low2;
      c3 = low0;
    }
    hn::StoreInterleaved4(c0, c1, c2, c3, d, out + 4 * i);
  }
}
#endif

}  // namespace HWY_NAMESPACE
}  // namespace weft::detail
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace weft {
namespace detail {
HWY_EXPORT(philox_blocks);
}

namespace {

/// Elements whose random words are made at a time: they stay in the L1 cache.
constexpr int64_t kPiece = 1024;
constexpr int64_t kGrain = 16 * kPiece;

template <class T>
void dropout_forward(Cpu, const T* x, T* y, int64_t count, double p, const RandomStream& stream, uint64_t first) {
  using A = Accumulate<T>;
  const uint64_t threshold = static_cast<uint64_t>(std::llround(p * 0x1p32));
  const A scale = static_cast<A>(1 / (1 - p));
  parallel_for(count, kGrain, [&](int64_t begin, int64_t end) {
    alignas(64) uint32_t words[kPiece + 4 * detail::kPhiloxBlocks];
    for (int64_t piece = begin; piece < end; piece += kPiece) {
      const int64_t last = std::min(end, piece + kPiece);
      const uint64_t from = first + static_cast<uint64_t>(piece), block = from / 4;
      const uint64_t blocks = (from + static_cast<uint64_t>(last - piece) + 3) / 4 - block;
      const int64_t rounded = (static_cast<int64_t>(blocks) + detail::kPhiloxBlocks - 1) / detail::kPhiloxBlocks * detail::kPhiloxBlocks;
      HWY_DYNAMIC_DISPATCH(detail::philox_blocks)(stream.key(), stream.step(), block, rounded, words);
      const uint32_t* word = words + from % 4;
      for (int64_t i = piece; i < last; ++i) y[i] = word[i - piece] >= threshold ? T(static_cast<A>(x[i]) * scale) : T(0.0f);
    }
  });
}

}  // namespace

Tensor dropout(const Tensor& x, double p, RandomStream stream, bool training, uint64_t first) {
  constexpr const char* kOp = "dropout";
  dispatch_float(x.dtype(), kOp, []<class T>() {});
  if (!(p >= 0 && p < 1)) fail(ErrorKind::kValue, kOp, "p must be in [0, 1), got ", p);
  if (!training || p == 0) return x;
  Tensor out = Tensor::empty(x.shape(), x.dtype(), x.device());
  {
    const autograd::NoGrad no_grad;
    const Tensor source = x.contiguous();
    launch(x.device(), kOp, [&](auto device) {
      dispatch_float(x.dtype(), kOp, [&]<class T>() {
        dropout_forward(device, source.data<T>(), out.data<T>(), source.numel(), p, stream, first);
      });
    });
  }
  autograd::record(
      kOp, {x}, {out}, {},
      [p, stream, first](autograd::BackwardContext& context) { context.set(0, dropout(context.grad(), p, stream, true, first)); },
      autograd::Rule::kDifferentiable);
  return out;
}

}  // namespace weft
#endif

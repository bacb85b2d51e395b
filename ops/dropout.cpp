#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/dropout.cpp"
#include "hwy/foreach_target.h"  // must come before highway.h
//
#include <algorithm>
#include <cmath>
#include <tuple>

#include "core/autograd.h"
#include "core/thread_pool.h"
#include "hwy/highway.h"
#include "ops/dropout.h"
#include "ops/dropout_kernels.h"
#include "ops/launch.h"
#include "ops/norm_lanes-inl.h"

#ifndef WEFT_OPS_DROPOUT_ONCE
#define WEFT_OPS_DROPOUT_ONCE
namespace weft::detail {
/// Philox blocks are made in multiples of this number, at most the lanes of one vector at a time.
inline constexpr int64_t kPhiloxBlocks = 16;
/// Elements whose random words are made at a time: they stay in the L1 cache.
inline constexpr int64_t kPiece = 1024;

/// Up to kPiece elements, the first of them number `first` of the stream.
template <class T>
using DropoutPiece = void (*)(const T* x, T* y, int64_t count, uint64_t threshold, Accumulate<T> scale,
                              const RandomStream& stream, uint64_t first);
using DropoutTable = std::tuple<DropoutPiece<float>, DropoutPiece<double>, DropoutPiece<Half>, DropoutPiece<BFloat16>>;
}  // namespace weft::detail
#endif

HWY_BEFORE_NAMESPACE();
namespace weft::detail {
namespace HWY_NAMESPACE {

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

template <class T>
void dropout_piece(const T* x, T* y, int64_t count, uint64_t threshold, Accumulate<T> scale, const RandomStream& stream,
                   uint64_t first) {
  // Longer than its use: the last vector of a piece may read past the words that count.
  alignas(64) uint32_t words[kPiece + 4 * kPhiloxBlocks + hn::MaxLanes(Tag<float>())] = {};
  const uint64_t block = first / 4, last = (first + static_cast<uint64_t>(count) + 3) / 4;
  const int64_t blocks = (static_cast<int64_t>(last - block) + kPhiloxBlocks - 1) / kPhiloxBlocks * kPhiloxBlocks;
  philox_blocks(stream.key(), stream.step(), block, blocks, words);
  const uint32_t* word = words + first % 4;
  if constexpr (std::is_same_v<T, double>) {
    for (int64_t i = 0; i < count; ++i) y[i] = word[i] >= threshold ? x[i] * scale : 0;
  } else {
    const Tag<T> d;
    const hn::Rebind<uint32_t, Tag<T>> du;
    // p so close to 1 that the threshold is 2^32 keeps nothing.
    const auto limit = hn::Set(du, static_cast<uint32_t>(std::min<uint64_t>(threshold, UINT32_MAX)));
    const auto factor = hn::Set(d, threshold > UINT32_MAX ? 0 : scale);
    for_lanes(d, count, [&](auto, int64_t i, auto which) HWY_ATTR {
      const auto dropped = hn::RebindMask(d, hn::Lt(hn::LoadU(du, word + i), limit));
      store<T>(d, hn::IfThenZeroElse(dropped, hn::Mul(load<T>(d, x + i, which), factor)), y + i, which);
    });
  }
}

const DropoutTable* dropout_table() {
  static constexpr DropoutTable kTable{dropout_piece<float>, dropout_piece<double>, dropout_piece<Half>,
                                       dropout_piece<BFloat16>};
  return &kTable;
}

}  // namespace HWY_NAMESPACE
}  // namespace weft::detail
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace weft {
namespace detail {
HWY_EXPORT(dropout_table);
}

template <class T>
void dropout_forward(Cpu, const T* x, T* y, int64_t count, double p, const RandomStream& named, uint64_t first,
                     const double* step) {
  const RandomStream stream = step == nullptr ? named : named.at_step(static_cast<uint64_t>(*step));
  const auto rows = std::get<detail::DropoutPiece<T>>(*HWY_DYNAMIC_DISPATCH(detail::dropout_table)());
  const uint64_t threshold = static_cast<uint64_t>(std::llround(p * 0x1p32));
  const auto scale = static_cast<Accumulate<T>>(1 / (1 - p));
  parallel_for(count, 16 * detail::kPiece, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += detail::kPiece) {
      rows(x + i, y + i, std::min(end - i, detail::kPiece), threshold, scale, stream, first + static_cast<uint64_t>(i));
    }
  });
}

#define WEFT_DROPOUT_INSTANCE(T) \
  template void dropout_forward(Cpu, const T*, T*, int64_t, double, const RandomStream&, uint64_t, const double*);
WEFT_DROPOUT_INSTANCE(float)
WEFT_DROPOUT_INSTANCE(double)
WEFT_DROPOUT_INSTANCE(Half)
WEFT_DROPOUT_INSTANCE(BFloat16)
#undef WEFT_DROPOUT_INSTANCE

Tensor dropout(const Tensor& x, double p, RandomStream stream, bool training, uint64_t first, const Tensor& step) {
  return dropout(x, p, stream, training, std::vector<StreamRun>{{x.numel(), first}}, step);
}

Tensor dropout(const Tensor& x, double p, RandomStream stream, bool training, const std::vector<StreamRun>& runs,
               const Tensor& step) {
  constexpr const char* kOp = "dropout";
  dispatch_float(x.dtype(), kOp, []<class T>() {});
  if (!(p >= 0 && p < 1)) fail(ErrorKind::kValue, kOp, "p must be in [0, 1), got ", p);
  int64_t count = 0;
  for (const StreamRun& run : runs) {
    if (run.count < 0) fail(ErrorKind::kShape, kOp, "a run has ", run.count, " elements");
    count += run.count;
  }
  if (count != x.numel()) fail(ErrorKind::kShape, kOp, "the runs have ", count, " elements, x is ", x.describe());
  const double* step_at = nullptr;
  if (step.defined()) {
    if (step.device() != x.device() || step.numel() != 1) {
      fail(ErrorKind::kDevice, kOp, "the step must be one element on x's device ", x.device(), ", got ",
           step.describe(), " on ", step.device());
    }
    step_at = step.data<double>();
  }
  if (!training || p == 0) return x;
  Tensor out = Tensor::empty(x.shape(), x.dtype(), x.device());
  {
    const autograd::NoGrad no_grad;
    const Tensor source = x.contiguous();
    launch(x.device(), kOp, [&](auto device) {
      dispatch_float(x.dtype(), kOp, [&]<class T>() {
        int64_t begin = 0;
        for (const StreamRun& run : runs) {
          dropout_forward(device, source.data<T>() + begin, out.data<T>() + begin, run.count, p, stream, run.first,
                          step_at);
          begin += run.count;
        }
      });
    });
  }
  autograd::record(
      kOp, {x}, {out}, step.defined() ? std::vector<Tensor>{step} : std::vector<Tensor>{},
      [p, stream, runs, stepped = step.defined()](autograd::BackwardContext& context) {
        context.set(0, dropout(context.grad(), p, stream, true, runs, stepped ? context.saved(0) : Tensor()));
      },
      autograd::Rule::kDifferentiable);
  return out;
}

}  // namespace weft
#endif

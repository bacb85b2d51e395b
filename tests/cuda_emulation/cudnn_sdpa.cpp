// Where cuda/cudnn_sdpa.cpp asks cuDNN, plain loops over the same tensors: what the emulated device has of cuDNN. Heads
// of at most 128 columns, as one that is older than some would have them.
#include "cuda/cudnn_sdpa.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <vector>

#include "core/error.h"
#include "core/float_types.h"
#include "cuda/context.h"
#include "emulation.h"
#include "runtime.h"

namespace weft::cuda {
namespace {

constexpr int64_t kWidest = 128;

/// The tensors of a pass, element by element in f32.
template <class T>
struct Tensors {
  const Sdpa& s;
  const SdpaPointers& at;

  T& element(SdpaTensor which, int64_t b, int64_t h, int64_t t, int64_t c) const {
    const Sdpa::Strides& strides = s.strides[which];
    return static_cast<T*>(at[which])[b * strides.batch + h * strides.head + t * strides.token + c];
  }
  float read(SdpaTensor which, int64_t b, int64_t h, int64_t t, int64_t c) const {
    return static_cast<float>(element(which, b, h, t, c));
  }
  float& lse(int64_t b, int64_t h, int64_t t) const {
    return static_cast<float*>(at[kLse])[(b * s.heads + h) * s.tokens + t];
  }
  float dot(SdpaTensor x, int64_t hx, int64_t i, SdpaTensor y, int64_t hy, int64_t j, int64_t b) const {
    float sum = 0;
    for (int64_t c = 0; c < s.head_size; ++c) sum += read(x, b, hx, i, c) * read(y, b, hy, j, c);
    return sum;
  }
  int64_t keys_of(int64_t query) const { return s.causal ? query + 1 : s.tokens; }
  float scale() const { return static_cast<float>(s.scale); }
};

template <class T>
void forward(const Tensors<T>& x) {
  const Sdpa& s = x.s;
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t h = 0; h < s.heads; ++h) {
      const int64_t kv = h / (s.heads / s.kv_heads);
      for (int64_t i = 0; i < s.tokens; ++i) {
        std::vector<float> p(static_cast<size_t>(x.keys_of(i)));
        float high = -INFINITY, sum = 0;
        for (size_t j = 0; j < p.size(); ++j) {
          p[j] = x.scale() * x.dot(kQ, h, i, kK, kv, static_cast<int64_t>(j), b);
          high = std::max(high, p[j]);
        }
        for (float& each : p) sum += each = std::exp(each - high);
        for (int64_t c = 0; c < s.head_size; ++c) {
          float out = 0;
          for (size_t j = 0; j < p.size(); ++j) out += p[j] * x.read(kV, b, kv, static_cast<int64_t>(j), c);
          x.element(kOut, b, h, i, c) = static_cast<T>(out / sum);
        }
        x.lse(b, h, i) = high + std::log(sum);
      }
    }
  }
}

/// Sums of a key over the queries of all heads that share it, in f32.
template <class T>
void backward(const Tensors<T>& x, float* delta) {
  const Sdpa& s = x.s;
  const int64_t group = s.heads / s.kv_heads;
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t kv = 0; kv < s.kv_heads; ++kv) {
      const auto size = static_cast<size_t>(s.tokens * s.head_size);
      std::vector<float> dk(size), dv(size);
      for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
        for (int64_t i = 0; i < s.tokens; ++i) {
          float& sum = delta[(b * s.heads + h) * s.tokens + i];
          sum = x.dot(kDout, h, i, kOut, h, i, b);
          std::vector<float> dq(static_cast<size_t>(s.head_size));
          for (int64_t j = 0; j < x.keys_of(i); ++j) {
            const float p = std::exp(x.scale() * x.dot(kQ, h, i, kK, kv, j, b) - x.lse(b, h, i));
            const float ds = p * (x.dot(kDout, h, i, kV, kv, j, b) - sum) * x.scale();
            for (int64_t c = 0; c < s.head_size; ++c) {
              const auto place = static_cast<size_t>(j * s.head_size + c);
              dq[static_cast<size_t>(c)] += ds * x.read(kK, b, kv, j, c);
              dk[place] += ds * x.read(kQ, b, h, i, c);
              dv[place] += p * x.read(kDout, b, h, i, c);
            }
          }
          for (int64_t c = 0; c < s.head_size; ++c)
            x.element(kDq, b, h, i, c) = static_cast<T>(dq[static_cast<size_t>(c)]);
        }
      }
      for (int64_t j = 0; j < s.tokens; ++j) {
        for (int64_t c = 0; c < s.head_size; ++c) {
          const auto place = static_cast<size_t>(j * s.head_size + c);
          x.element(kDk, b, kv, j, c) = static_cast<T>(dk[place]);
          x.element(kDv, b, kv, j, c) = static_cast<T>(dv[place]);
        }
      }
    }
  }
}

template <class T>
void compute(const Sdpa& s, const SdpaPointers& pointers, void* workspace) {
  const Tensors<T> tensors{s, pointers};
  if (s.backward) return backward(tensors, static_cast<float*>(workspace));
  forward(tensors);
}

class EmulatedPlan final : public SdpaPlan {
 public:
  EmulatedPlan(const Context& context, const Sdpa& s) : stream_(context.stream), sdpa_(s) {
    if (s.backward) workspace = static_cast<size_t>(s.batch * s.heads * s.tokens) * sizeof(float);
  }
  void run(const SdpaPointers& tensors, void* memory) override {
    for (const SdpaTensor each : {kQ, kK, kV, kOut, kLse}) require(tensors[each] != nullptr);
    for (const SdpaTensor each : {kDout, kDq, kDk, kDv}) require((tensors[each] != nullptr) == sdpa_.backward);
    require((memory != nullptr) == (workspace > 0));
    weft_emulation::submit(stream_, [sdpa = sdpa_, tensors, memory] {
      sdpa.dtype == DType::bf16 ? compute<BFloat16>(sdpa, tensors, memory) : compute<Half>(sdpa, tensors, memory);
    });
  }

 private:
  static void require(bool given) {
    if (!given) fail(ErrorKind::kDevice, "cudnn", "attention could not be queued: a tensor too few or too many");
  }
  cudaStream_t stream_;
  const Sdpa sdpa_;
};

}  // namespace

std::string why_no_cudnn() { return weft_emulation::has_cudnn() ? "" : "the emulated cuDNN is put away"; }
std::string cudnn_version() { return "0.0.0 (emulated)"; }
std::string describe_cudnn() { return cudnn_version() + ", the build saw it: attention in f16 and bf16 (--attention)"; }

std::unique_ptr<SdpaPlan> make_sdpa_plan(Context& context, const Sdpa& s) {
  if (s.head_size > kWidest) {
    fail(ErrorKind::kDevice, "cudnn", "no plan for attention is supported: heads of at most ", kWidest,
         " columns, got ", s.head_size);
  }
  return std::make_unique<EmulatedPlan>(context, s);
}

std::vector<std::string> sdpa_proposals(const Sdpa&, const std::string&, int) {
  fail(ErrorKind::kDevice, "cudnn", "the emulated cuDNN knows the emulated device alone");
}

}  // namespace weft::cuda

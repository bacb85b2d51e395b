#include "core/random.h"

#include <cmath>
#include <numbers>

#include "core/backend.h"
#include "core/thread_pool.h"

namespace weft {
namespace {

__extension__ using uint128 = unsigned __int128;

uint64_t splitmix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

template <class Value>
void fill(const Tensor& tensor, const char* op, Value value) {
  if (!tensor.is_contiguous()) {
    fail(ErrorKind::kValue, op, "fills contiguous tensors, got ", tensor.describe(), " with strides ",
         tensor.strides());
  }
  tensor.begin_change(op);
  if (DryRun::active()) return;
  if (tensor.device().kind != DeviceKind::cpu) {  // the same bits everywhere: made in one place
    const Tensor host = Tensor::empty(tensor.shape(), tensor.dtype());
    fill(host, op, value);
    backend(tensor.device())
        .to_device(tensor.raw(), host.raw(), static_cast<size_t>(host.numel() * size_of(host.dtype())));
    return;
  }
  dispatch_float(tensor.dtype(), op, [&]<class T>() {
    T* out = tensor.data<T>();
    parallel_for(tensor.numel(), 4096, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) out[i] = T(value(static_cast<uint64_t>(i)));
    });
  });
}

}  // namespace

RandomStream::RandomStream(uint64_t seed, std::string_view name) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  key_ = splitmix64(splitmix64(seed) ^ hash);
}

double RandomStream::uniform_f64(uint64_t index) const {
  const auto words = philox(key_, index / 2, step_);
  const uint64_t high = words[index % 2 * 2], low = words[index % 2 * 2 + 1];
  return static_cast<double>((high << 32 | low) >> 11) * 0x1p-53;
}

double RandomStream::normal(uint64_t index) const {
  const uint64_t pair = index & ~uint64_t{1};
  const double radius = std::sqrt(-2 * std::log(1 - uniform_f64(pair)));
  const double angle = 2 * std::numbers::pi * uniform_f64(pair + 1);
  return radius * (index & 1 ? std::sin(angle) : std::cos(angle));
}

uint64_t RandomStream::below(uint64_t index, uint64_t bound) const {
  const auto words = philox(key_, index / 2, step_);
  const uint64_t x = static_cast<uint64_t>(words[index % 2 * 2]) << 32 | words[index % 2 * 2 + 1];
  return static_cast<uint64_t>(static_cast<uint128>(x) * bound >> 64);
}

void fill_normal(const Tensor& tensor, const RandomStream& stream, double mean, double deviation, uint64_t first) {
  fill(tensor, "fill_normal", [&](uint64_t i) { return mean + deviation * stream.normal(first + i); });
}

void fill_uniform(const Tensor& tensor, const RandomStream& stream, double low, double high) {
  fill(tensor, "fill_uniform", [&](uint64_t i) { return low + (high - low) * stream.uniform_f64(i); });
}

}  // namespace weft

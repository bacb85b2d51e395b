#include <algorithm>
#include <cmath>
#include <vector>

#include "core/thread_pool.h"
#include "optim/optimizer_simd.h"

namespace weft::optim {
namespace {

/// Elements of a piece of work. Pieces of all tensors are shared out together, so that small tensors cost no barrier.
constexpr int64_t kSquarePiece = 1 << 16;  // some ten microseconds of reading
constexpr int64_t kAdamPiece = 1 << 14;

/// Below this a sum of squares in f32 may have lost some of them to underflow: what is lost is at most 2^-150 each.
constexpr double kUnderflow = 1e-30;

int64_t pieces(int64_t count, int64_t size) { return (count + size - 1) / size; }

/// body(number, tensor, begin, end) over the pieces of all tensors, which are numbered in order.
template <class Tensor, class Body>
void for_each_piece(std::span<const Tensor> tensors, int64_t size, Body body) {
  struct Piece {
    const Tensor* tensor;
    int64_t begin, end;
  };
  std::vector<Piece> all;
  for (const Tensor& tensor : tensors) {
    for (int64_t begin = 0; begin < tensor.count; begin += size) {
      all.push_back({&tensor, begin, std::min(tensor.count, begin + size)});
    }
  }
  parallel_tasks(static_cast<int64_t>(all.size()), [&](int64_t i) {
    const Piece& piece = all[static_cast<size_t>(i)];
    body(i, *piece.tensor, piece.begin, piece.end);
  });
}

/// Block by block: the blocks' sums are the same wherever a tensor is cut between two of them.
template <class T>
ExactSum squares_of(const T* data, int64_t begin, int64_t end) {
  ExactSum sum;
  for (int64_t block = begin; block < end; block += kSumBlock) {
    const int64_t stop = std::min(end, block + kSumBlock);
    double total = sum_of_squares(stop - block, data + block);
    if (!(total >= kUnderflow) || !std::isfinite(total)) {
      total = 0;
      for (int64_t i = block; i < stop; ++i) total += static_cast<double>(data[i]) * static_cast<double>(data[i]);
    }
    sum.add(total);
  }
  return sum;
}

/// An AdamTensor with its types; T is that of the parameter.
template <class T>
struct Typed {
  using State = Accumulate<T>;
  explicit Typed(const AdamTensor& t)
      : parameter(static_cast<T*>(t.parameter)),
        gradient(static_cast<const T*>(t.gradient)),
        weight(static_cast<State*>(t.weight)),
        exp_avg(static_cast<State*>(t.exp_avg)),
        exp_avg_sq(static_cast<State*>(t.exp_avg_sq)),
        rates{static_cast<State>(t.weight_decay), t.lr == nullptr ? State(0) : static_cast<State>(*t.lr)} {}
  T* parameter;
  const T* gradient;
  State *weight, *exp_avg, *exp_avg_sq;
  AdamRates<State> rates;
};

}  // namespace

// ---- norms ----

std::vector<ExactSum> exact_squares(std::span<const TensorData> tensors) {
  int64_t count = 0;
  for (const TensorData& tensor : tensors) count += pieces(tensor.count, kSquarePiece);
  std::vector<ExactSum> partials(static_cast<size_t>(count)), sums(tensors.size());
  for_each_piece(tensors, kSquarePiece, [&](int64_t piece, const TensorData& tensor, int64_t begin, int64_t end) {
    partials[static_cast<size_t>(piece)] = dispatch_float(tensor.dtype, "grad_norm", [&]<class T>() {
      return squares_of(static_cast<const T*>(tensor.data), begin, end);
    });
  });
  auto partial = partials.begin();
  for (size_t i = 0; i < tensors.size(); ++i) {
    for (int64_t k = 0; k < pieces(tensors[i].count, kSquarePiece); ++k) sums[i].add(*partial++);
  }
  return sums;
}

int64_t square_partials(Cpu, const TensorData&) { return 0; }

void sum_squares(Cpu, std::span<const TensorData> tensors, double*, double* sums) {
  for (const ExactSum& sum : exact_squares(tensors)) *sums++ = sum.value();
}

void scale(Cpu, std::span<const TensorData> tensors, double factor) {
  for_each_piece(tensors, kSquarePiece, [&](int64_t, const TensorData& tensor, int64_t begin, int64_t end) {
    dispatch_float(tensor.dtype, "clip_grad_norm", [&]<class T>() {
      T* x = static_cast<T*>(tensor.data);
      for (int64_t i = begin; i < end; ++i) {
        x[i] = T(static_cast<Accumulate<T>>(x[i]) * static_cast<Accumulate<T>>(factor));
      }
    });
  });
}

// ---- Adam ----

void adam_decide(Cpu, const AdamInput* input, const double* squares, int64_t count, const TensorData& losses,
                 AdamDecision* decision) {
  double total = 0, loss = 0;
  for (int64_t i = 0; i < count; ++i) total += squares[i];
  for (int64_t i = 0; i < losses.count; ++i) {
    loss += losses.dtype == DType::f64 ? static_cast<const double*>(losses.data)[i]
                                       : static_cast<double>(static_cast<const float*>(losses.data)[i]);
  }
  *decision = decide(*input, total, loss);
}

void adam_update(Cpu, std::span<const AdamTensor> tensors, const AdamDecision* decision) {
  if (decision->verdict != AdamDecision::kTake) return;
  for_each_piece(tensors, kAdamPiece, [&](int64_t, const AdamTensor& tensor, int64_t begin, int64_t end) {
    dispatch_float(tensor.dtype, "adam", [&]<class T>() {
      const Typed<T> at(tensor);
      const auto& c = decision->constants<Accumulate<T>>();
      update_piece(end - begin, at.weight + begin, at.gradient + begin, at.exp_avg + begin, at.exp_avg_sq + begin,
                   at.parameter + begin, c, at.rates);
    });
  });
}

int64_t adam_partials(Cpu, const AdamTensor&) { return 0; }

std::vector<ExactSum> exact_moments(std::span<const AdamTensor> tensors, const AdamDecision* decision,
                                    int64_t parameters) {
  std::vector<ExactSum> sums(static_cast<size_t>(2 * parameters));
  if (decision->verdict != AdamDecision::kTake) return sums;
  int64_t all = 0;
  for (const AdamTensor& tensor : tensors) all += pieces(tensor.count, kAdamPiece);
  std::vector<ExactSum> weights(static_cast<size_t>(all)), updates(static_cast<size_t>(all));
  for_each_piece(tensors, kAdamPiece, [&](int64_t piece, const AdamTensor& tensor, int64_t begin, int64_t end) {
    dispatch_float(tensor.dtype, "adam", [&]<class T>() {
      const Typed<T> at(tensor);
      const auto& c = decision->constants<Accumulate<T>>();
      for (int64_t i = begin; i < end; i += kSumBlock) {
        const SquareSums block = moments_piece(std::min(kSumBlock, end - i), at.weight + i, at.gradient + i,
                                               at.exp_avg + i, at.exp_avg_sq + i, c, at.rates);
        weights[static_cast<size_t>(piece)].add(block.weight);
        updates[static_cast<size_t>(piece)].add(block.update);
      }
    });
  });
  size_t piece = 0;
  for (const AdamTensor& tensor : tensors) {
    for (int64_t k = 0; k < pieces(tensor.count, kAdamPiece); ++k, ++piece) {
      sums[static_cast<size_t>(tensor.number)].add(weights[piece]);
      sums[static_cast<size_t>(parameters + tensor.number)].add(updates[piece]);
    }
  }
  return sums;
}

void adam_moments(Cpu, std::span<const AdamTensor> tensors, const AdamDecision* decision, double*, double* sums,
                  int64_t parameters) {
  for (const ExactSum& sum : exact_moments(tensors, decision, parameters)) *sums++ = sum.value();
}

void adam_rates(Cpu, const double* sums, int64_t parameters, const AdamDecision* decision, double* rates) {
  for (int64_t i = 0; i < parameters; ++i) rates[i] = trusted_rate(decision->lr, sums[i], sums[parameters + i]);
}

void adam_apply(Cpu, std::span<const AdamTensor> tensors, const AdamDecision* decision) {
  if (decision->verdict != AdamDecision::kTake) return;
  for_each_piece(tensors, kAdamPiece, [&](int64_t, const AdamTensor& tensor, int64_t begin, int64_t end) {
    dispatch_float(tensor.dtype, "adam", [&]<class T>() {
      const Typed<T> at(tensor);
      apply_piece(end - begin, at.weight + begin, at.exp_avg + begin, at.exp_avg_sq + begin, at.parameter + begin,
                  decision->constants<Accumulate<T>>(), at.rates);
    });
  });
}

void adam_follow(Cpu, std::span<const AdamTensor> tensors) {
  for_each_piece(tensors, kAdamPiece, [&](int64_t, const AdamTensor& tensor, int64_t begin, int64_t end) {
    dispatch_float(tensor.dtype, "adam", [&]<class T>() {
      const Typed<T> at(tensor);
      for (int64_t i = begin; i < end; ++i) {
        const auto value = static_cast<Accumulate<T>>(at.parameter[i]);
        if (static_cast<Accumulate<T>>(T(at.weight[i])) != value) at.weight[i] = value;
      }
    });
  });
}

}  // namespace weft::optim

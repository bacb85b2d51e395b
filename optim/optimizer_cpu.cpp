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

/// sums[place(i)] = the sum of tensors[i]'s partial sums, which lie one tensor after another.
template <class Tensor, class Place>
void add_partials(std::span<const Tensor> tensors, int64_t size, const double* partials, double* sums, Place place) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t count = pieces(tensors[i].count, size);
    double& sum = sums[place(i)];
    sum = 0;
    for (int64_t k = 0; k < count; ++k) sum += partials[k];
    partials += count;
  }
}

template <class T>
double squares_of(const T* data, int64_t begin, int64_t end) {
  double total = sum_of_squares(end - begin, data + begin);
  if (total >= kUnderflow && std::isfinite(total)) return total;
  total = 0;
  for (int64_t i = begin; i < end; ++i) total += static_cast<double>(data[i]) * static_cast<double>(data[i]);
  return total;
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

int64_t square_partials(Cpu, const TensorData& tensor) { return pieces(tensor.count, kSquarePiece); }

void sum_squares(Cpu, std::span<const TensorData> tensors, double* partials, double* sums) {
  for_each_piece(tensors, kSquarePiece, [&](int64_t piece, const TensorData& tensor, int64_t begin, int64_t end) {
    partials[piece] = dispatch_float(tensor.dtype, "grad_norm", [&]<class T>() {
      return squares_of(static_cast<const T*>(tensor.data), begin, end);
    });
  });
  add_partials(tensors, kSquarePiece, partials, sums, [](size_t i) { return i; });
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

int64_t adam_partials(Cpu, const AdamTensor& tensor) { return pieces(tensor.count, kAdamPiece); }

void adam_moments(Cpu, std::span<const AdamTensor> tensors, const AdamDecision* decision, double* partials,
                  double* sums, int64_t parameters) {
  if (decision->verdict != AdamDecision::kTake) return;
  int64_t all = 0;
  for (const AdamTensor& tensor : tensors) all += pieces(tensor.count, kAdamPiece);
  for_each_piece(tensors, kAdamPiece, [&](int64_t piece, const AdamTensor& tensor, int64_t begin, int64_t end) {
    SquareSums total;
    dispatch_float(tensor.dtype, "adam", [&]<class T>() {
      const Typed<T> at(tensor);
      const auto& c = decision->constants<Accumulate<T>>();
      total = moments_piece(end - begin, at.weight + begin, at.gradient + begin, at.exp_avg + begin,
                            at.exp_avg_sq + begin, c, at.rates);
    });
    partials[piece] = total.weight;
    partials[all + piece] = total.update;
  });
  const auto sum_of = [&](size_t i) { return static_cast<size_t>(tensors[i].number); };
  add_partials(tensors, kAdamPiece, partials, sums, sum_of);
  add_partials(tensors, kAdamPiece, partials + all, sums + parameters, sum_of);
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

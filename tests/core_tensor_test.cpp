#include "core/tensor.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "core/autograd.h"
#include "core/thread_pool.h"
#include "tests/error_of.h"

namespace weft {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// What a tensor should read as: its shape and its elements in row-major order. Views are made element by element.
struct Model {
  Shape shape;
  std::vector<double> values;

  int rank() const { return shape.rank(); }
  double at(const Dims& index) const {
    int64_t flat = 0;
    for (int d = 0; d < rank(); ++d) flat = flat * shape[d] + index[d];
    return values.at(static_cast<size_t>(flat));
  }
  /// The model of `to` whose element at `index` is this one's at source(index).
  template <class Source>
  Model gather(const Shape& to, Source source) const {
    Model out{to, {}};
    Dims index = Dims::filled(to.rank(), 0);
    const int64_t n = numel(to);
    for (int64_t i = 0; i < n; ++i) {
      int64_t rest = i;
      for (int d = to.rank() - 1; d >= 0; --d) index[d] = rest % to[d], rest /= to[d];
      out.values.push_back(at(source(index)));
    }
    return out;
  }
};

void expect_same(const Tensor& tensor, const Model& model, const std::string& what) {
  ASSERT_EQ(tensor.shape(), model.shape) << what;
  ASSERT_EQ(tensor.numel(), static_cast<int64_t>(model.values.size())) << what;
  ASSERT_EQ(tensor.to_vector<double>(), model.values) << what;
}

/// f64 tensor and model of the values 1, 2, 3, ...
std::pair<Tensor, Model> counting(const Shape& shape) {
  Model model{shape, std::vector<double>(static_cast<size_t>(numel(shape)))};
  std::iota(model.values.begin(), model.values.end(), 1.0);
  return {Tensor::from(model.values, shape), model};
}

/// A random differentiable view or copy, done to both. `random(n)` is below n.
template <class Random>
std::string random_view(Tensor& tensor, Model& model, Random&& random) {
  const int rank = model.rank();
  const auto signed_dim = [&](int dim, int of) { return random(2) ? dim : dim - of; };
  switch (random(11)) {
    case 0: {
      if (rank == 0) return "";
      const int a = static_cast<int>(random(rank)), b = static_cast<int>(random(rank));
      Shape to = model.shape;
      std::swap(to[a], to[b]);
      tensor = tensor.transpose(signed_dim(a, rank), signed_dim(b, rank));
      model = model.gather(to, [&](Dims i) { return std::swap(i[a], i[b]), i; });
      return concat(" transpose ", a, ' ', b);
    }
    case 1: {
      Dims order, given;
      for (int d = 0; d < rank; ++d) order.insert(static_cast<int>(random(d + 1)), d);
      Shape to;
      for (int d = 0; d < rank; ++d)
        to.push_back(model.shape[static_cast<int>(order[d])]),
            given.push_back(signed_dim(static_cast<int>(order[d]), rank));
      tensor = tensor.permute(given);
      model = model.gather(to, [&](const Dims& i) {
        Dims from = i;
        for (int d = 0; d < rank; ++d) from[static_cast<int>(order[d])] = i[d];
        return from;
      });
      return concat(" permute ", order);
    }
    case 2: {
      if (rank == 0) return "";
      const int dim = static_cast<int>(random(rank));
      const int64_t size = model.shape[dim], start = random(size + 1), stop = start + random(size - start + 1),
                    step = 1 + random(3);
      Shape to = model.shape;
      to[dim] = 0;
      for (int64_t i = start; i < stop; i += step) ++to[dim];
      const bool back = start < size && stop < size && random(2);
      tensor = tensor.slice(signed_dim(dim, rank), back ? start - size : start, back ? stop - size : stop, step);
      model = model.gather(to, [&](Dims i) { return i[dim] = start + i[dim] * step, i; });
      return concat(" slice ", dim, ' ', start, ' ', stop, ' ', step);
    }
    case 3: {
      if (rank == 0) return "";
      const int dim = static_cast<int>(random(rank));
      const int64_t size = model.shape[dim], start = random(size + 1), length = random(size - start + 1);
      Shape to = model.shape;
      to[dim] = length;
      tensor = tensor.narrow(signed_dim(dim, rank), start, length);
      model = model.gather(to, [&](Dims i) { return i[dim] += start, i; });
      return concat(" narrow ", dim, ' ', start, ' ', length);
    }
    case 4: {
      if (rank == 0) return "";
      const int dim = static_cast<int>(random(rank));
      if (model.shape[dim] == 0) return "";
      const int64_t index = random(model.shape[dim]);
      Shape to = model.shape;
      to.erase(dim);
      tensor = tensor.select(signed_dim(dim, rank), random(2) ? index : index - model.shape[dim]);
      model = model.gather(to, [&](Dims i) { return i.insert(dim, index), i; });
      return concat(" select ", dim, ' ', index);
    }
    case 5: {
      Shape to = model.shape;
      for (int d = 0; d < rank; ++d) {
        if (to[d] == 1 && random(2)) to[d] = random(4);
      }
      while (to.rank() < kMaxRank && random(3) == 0) to.insert(0, 1 + random(2));
      if (numel(to) > 500) return "";
      const int lead = to.rank() - rank;
      tensor = tensor.expand(to);
      model = model.gather(to, [&, from = model.shape](const Dims& i) {
        Dims index;
        for (int d = 0; d < rank; ++d) index.push_back(from[d] == 1 ? 0 : i[d + lead]);
        return index;
      });
      return concat(" expand ", to);
    }
    case 6: {
      for (int dim = 0; dim < rank; ++dim) {
        if (model.shape[dim] != 1) continue;
        tensor = tensor.squeeze(signed_dim(dim, rank));
        model.shape.erase(dim);
        return concat(" squeeze ", dim);
      }
      return "";
    }
    case 7: {
      if (rank == kMaxRank) return "";
      const int dim = static_cast<int>(random(rank + 1));
      tensor = tensor.unsqueeze(signed_dim(dim, rank + 1));
      model.shape.insert(dim, 1);
      return concat(" unsqueeze ", dim);
    }
    case 8: {  // sizes are kept but regrouped: two neighbours merged, or one split at a divisor
      Shape to = model.shape;
      if (rank >= 2 && random(2)) {
        const int dim = static_cast<int>(random(rank - 1));
        to[dim] *= to[dim + 1];
        to.erase(dim + 1);
      } else if (rank >= 1 && rank < kMaxRank) {
        const int dim = static_cast<int>(random(rank));
        int64_t part = 1 + random(4);
        if (to[dim] % part != 0) part = 1;
        to[dim] /= part;
        to.insert(dim + 1, part);
      }
      Shape given = to;
      if (to.rank() > 0 && numel(to) > 0 && random(2)) given[static_cast<int>(random(to.rank()))] = -1;
      tensor = tensor.reshape(given);
      model.shape = to;
      return concat(" reshape ", given);
    }
    case 9: {
      if (rank == 0 || model.shape[0] == 0) return "";
      const int64_t size = 1 + random(model.shape[0]);
      std::vector<Tensor> pieces = tensor.split(size, -rank);
      std::swap(pieces.front(), pieces.back());
      tensor = cat(pieces, 0);
      std::vector<int64_t> rows;
      const int64_t count = (model.shape[0] + size - 1) / size;
      for (int64_t p = 0; p < count; ++p) {
        const int64_t piece = p == 0 ? count - 1 : p == count - 1 ? 0 : p;
        for (int64_t r = piece * size; r < std::min(model.shape[0], (piece + 1) * size); ++r) rows.push_back(r);
      }
      model = model.gather(model.shape, [&](Dims i) { return i[0] = rows[static_cast<size_t>(i[0])], i; });
      return concat(" split and cat ", size);
    }
    default: {
      tensor = random(2) ? tensor.contiguous() : tensor.clone();
      EXPECT_TRUE(tensor.is_contiguous());
      return " contiguous";
    }
  }
}

Shape random_shape(std::mt19937& random) {
  Shape shape;
  const int rank = static_cast<int>(random() % 7);
  const bool empty = random() % 8 == 0;
  for (int d = 0; d < rank; ++d) shape.push_back(1 + static_cast<int64_t>(random() % 3));
  if (rank > 0 && empty) shape[static_cast<int>(random() % static_cast<unsigned>(rank))] = 0;
  return shape;
}

TEST(TensorViews, ChainsOfRandomViewsReadLikeTheIndexModel) {
  for (unsigned seed = 0; seed < 3000; ++seed) {
    std::mt19937 generator(seed);
    const auto random = [&](int64_t n) { return static_cast<int64_t>(generator() % static_cast<uint64_t>(n)); };
    const Shape shape = random_shape(generator);
    auto [tensor, model] = counting(shape);
    std::string what = concat("seed ", seed, ": ", shape);
    for (int i = 0; i < 6; ++i) {
      what += random_view(tensor, model, random);
      expect_same(tensor, model, what);
      if (HasFatalFailure() || HasNonfatalFailure()) return;
    }
  }
}

TEST(TensorViews, GradientsOfRandomChainsMatchFiniteDifferencesInF64) {
  for (unsigned seed = 0; seed < 400; ++seed) {
    const auto chain = [&](const Tensor& x) {
      std::mt19937 generator(seed);
      const auto random = [&](int64_t n) { return static_cast<int64_t>(generator() % static_cast<uint64_t>(n)); };
      random_shape(generator);
      Tensor y = x;
      Model model{x.shape(), x.to_vector<double>()};
      for (int i = 0; i < 5; ++i) random_view(y, model, random);
      return y;
    };
    std::mt19937 generator(seed);
    const Shape shape = random_shape(generator);
    std::vector<double> values(static_cast<size_t>(numel(shape)));
    for (double& value : values) value = static_cast<double>(generator() % 2001) / 1000 - 1;
    Tensor x = Tensor::from(values, shape);
    x.requires_grad_();
    const Tensor y = chain(x);
    std::vector<double> weights(static_cast<size_t>(y.numel()));
    for (double& weight : weights) weight = static_cast<double>(generator() % 2001) / 1000 - 1;
    if (y.is_same(x)) continue;  // no view was drawn
    y.backward(Tensor::from(weights, y.shape()));
    ASSERT_TRUE(x.grad().defined()) << seed;
    ASSERT_EQ(x.grad().shape(), shape);
    const std::vector<double> gradient = x.grad().to_vector<double>();
    const auto loss = [&](const std::vector<double>& at) {
      const std::vector<double> out = chain(Tensor::from(at, shape)).to_vector<double>();
      return std::inner_product(out.begin(), out.end(), weights.begin(), 0.0);
    };
    constexpr double kStep = 0.5;  // the chain is linear: any step is exact but for rounding
    for (size_t i = 0; i < values.size(); ++i) {
      std::vector<double> up = values, down = values;
      up[i] += kStep, down[i] -= kStep;
      ASSERT_NEAR(gradient[i], (loss(up) - loss(down)) / (2 * kStep), 1e-11) << "seed " << seed << " element " << i;
    }
  }
}

TEST(TensorViews, ShareMemoryWithTheirBase) {
  Tensor x = Tensor::zeros({2, 3, 4});
  const Tensor views[] = {x.reshape({6, 4}), x.transpose(0, 2), x.permute({2, 0, 1}),   x.slice(1, 0, 3, 2),
                          x.narrow(2, 1, 2), x.select(0, 1),    x.expand({5, 2, 3, 4}), x.unsqueeze(1),
                          x.detach(),        x.split(1)[1]};
  for (const Tensor& view : views) EXPECT_EQ(view.storage(), x.storage());
  x.fill_(7);
  for (const Tensor& view : views) {
    for (const double value : view.to_vector<double>()) ASSERT_EQ(value, 7);
  }
}

TEST(TensorViews, ReshapeCopiesOnlyWhereStridesDemandIt) {
  const Tensor x = counting({4, 6}).first;
  EXPECT_EQ(x.transpose(0, 1).reshape({6, 2, 2}).storage(), x.storage()) << "one dimension split in two";
  EXPECT_EQ(x.slice(1, 0, 6, 2).reshape({2, 2, 3}).storage(), x.storage()) << "rows with holes, split";
  EXPECT_EQ(x.slice(1, 0, 6, 2).reshape({12}).storage(), x.storage()) << "columns with equal holes merge with rows";
  EXPECT_EQ(x.expand({3, 4, 6}).reshape({3, 24}).storage(), x.storage());
  const Tensor copied = x.transpose(0, 1).reshape({24});
  EXPECT_NE(copied.storage(), x.storage());
  EXPECT_TRUE(copied.is_contiguous());
  EXPECT_EQ(copied.to_vector<double>()[1], 7);
  EXPECT_NE(x.narrow(1, 0, 4).reshape({16}).storage(), x.storage());
  EXPECT_NE(x.expand({3, 4, 6}).reshape({72}).storage(), x.storage());
}

TEST(TensorViews, WorkAtSixDimensions) {
  const auto [x, model] = counting({2, 3, 1, 2, 3, 2});
  EXPECT_EQ(x.rank(), 6);
  EXPECT_EQ(x.permute({5, 4, 3, 2, 1, 0}).permute({5, 4, 3, 2, 1, 0}).to_vector<double>(), model.values);
  EXPECT_EQ(x.permute({5, 0, 4, 1, 3, 2}).reshape({-1}).numel(), 72);
  EXPECT_ERROR(ErrorKind::kShape, "more than 6 dimensions", x.unsqueeze(0));
}

TEST(TensorViews, EmptyTensorsHaveEveryView) {
  const Tensor x = Tensor::empty({0, 3});
  EXPECT_EQ(x.numel(), 0);
  EXPECT_EQ(x.raw(), nullptr);
  EXPECT_TRUE(x.to_vector<float>().empty());
  EXPECT_EQ(x.transpose(0, 1).contiguous().shape(), (Shape{3, 0}));
  EXPECT_EQ(x.reshape({3, 0, 7}).shape(), (Shape{3, 0, 7}));
  EXPECT_EQ(x.reshape({-1}).shape(), (Shape{0}));
  EXPECT_EQ(x.select(1, 2).shape(), (Shape{0}));
  EXPECT_EQ(x.select(1, 2).raw(), nullptr);
  EXPECT_EQ(x.expand({2, 0, 3}).shape(), (Shape{2, 0, 3}));
  EXPECT_TRUE(x.split(2).empty());
  EXPECT_EQ(cat({x, Tensor::ones({2, 3}), x}).shape(), (Shape{2, 3}));
  EXPECT_EQ(x.to(DType::i64).shape(), (Shape{0, 3}));
  EXPECT_EQ(x.slice(1, 3, 3).slice(0, 0, 0).shape(), (Shape{0, 0}));
}

TEST(TensorViews, StepsLongerThanTheDimensionTakeOneElement) {
  const Tensor x = counting({5, 2}).first;
  const int64_t most = std::numeric_limits<int64_t>::max();
  EXPECT_EQ(x.slice(0, 1, 5, most).to_vector<double>(), (std::vector<double>{3, 4}));
  EXPECT_EQ(x.slice(0, 0, 5, 4).to_vector<double>(), (std::vector<double>{1, 2, 9, 10}));
  EXPECT_EQ(x.slice(0, 5, 5, most).numel(), 0);
}

TEST(TensorViews, SplitGivesASmallerLastPiece) {
  const std::vector<Tensor> pieces = counting({2, 7}).first.split(3, -1);
  ASSERT_EQ(pieces.size(), 3u);
  EXPECT_EQ(pieces[0].to_vector<double>(), (std::vector<double>{1, 2, 3, 8, 9, 10}));
  EXPECT_EQ(pieces[2].to_vector<double>(), (std::vector<double>{7, 14}));
  EXPECT_EQ(counting({2, 7}).first.split(std::numeric_limits<int64_t>::max(), 1).size(), 1u);
}

TEST(TensorViews, BadArgumentsNameTheFunctionTheValuesAndTheRule) {
  const Tensor x = Tensor::zeros({2, 3, 4});
  EXPECT_ERROR(ErrorKind::kShape, "[reshape] f32 [2, 3, 4] has 24 elements, [5, 5] has 25", x.reshape({5, 5}));
  EXPECT_ERROR(ErrorKind::kShape, "[reshape] at most one size may be -1, got [-1, -1]", x.reshape({-1, -1}));
  EXPECT_ERROR(ErrorKind::kShape, "[reshape] sizes must not be negative (but for one -1) nor overflow, got [-2, 3]",
               x.reshape({-2, 3}));
  EXPECT_ERROR(ErrorKind::kShape, "which [7, -1] cannot hold for any -1", x.reshape({7, -1}));
  EXPECT_ERROR(ErrorKind::kShape, "cannot hold for any -1", x.reshape({0, -1}));
  EXPECT_ERROR(ErrorKind::kShape, "nor overflow", x.reshape({int64_t{1} << 62, 4}));
  EXPECT_ERROR(ErrorKind::kIndex, "[transpose] dimension 3 of a tensor with 3 dimensions; expected one from -3 to 2",
               x.transpose(0, 3));
  EXPECT_ERROR(ErrorKind::kIndex, "[transpose] dimension 0 of a tensor with 0 dimensions",
               Tensor::zeros({}).transpose(0, 0));
  EXPECT_ERROR(ErrorKind::kShape, "[permute] order [0, 1] must name each of the 3 dimensions once", x.permute({0, 1}));
  EXPECT_ERROR(ErrorKind::kShape, "[permute] order [0, 1, -2] names dimension 1 twice", x.permute({0, 1, -2}));
  EXPECT_ERROR(ErrorKind::kIndex, "[slice] elements 2 to 1 in steps of 1 of dimension 2 of f32 [2, 3, 4]",
               x.slice(2, 2, 1));
  EXPECT_ERROR(ErrorKind::kIndex, "[slice] elements 0 to 5", x.slice(2, 0, 5));
  EXPECT_ERROR(ErrorKind::kIndex, "[slice] elements -5 to 2", x.slice(2, -5, 2));
  EXPECT_ERROR(ErrorKind::kIndex, "a step of at least 1", x.slice(2, 0, 2, 0));
  EXPECT_ERROR(ErrorKind::kIndex, "[narrow] 2 elements from 3 of dimension 2 of f32 [2, 3, 4], which has 4",
               x.narrow(2, 3, 2));
  EXPECT_ERROR(ErrorKind::kIndex, "[narrow]", x.narrow(0, -1, 1));
  EXPECT_ERROR(ErrorKind::kIndex, "[narrow]", x.narrow(0, 0, -1));
  EXPECT_ERROR(ErrorKind::kIndex, "[narrow]", x.narrow(0, 1, std::numeric_limits<int64_t>::max()));
  EXPECT_ERROR(ErrorKind::kIndex, "[select] element 2 of dimension 0 of f32 [2, 3, 4]", x.select(0, 2));
  EXPECT_ERROR(ErrorKind::kIndex, "[select] element -3", x.select(0, -3));
  EXPECT_ERROR(ErrorKind::kShape, "[expand] shape [2, 3, 4] does not broadcast to [2, 2, 3, 5]",
               x.expand({2, 2, 3, 5}));
  EXPECT_ERROR(ErrorKind::kShape, "[expand] a size must not be negative, got [-1]", Tensor::zeros({1}).expand({-1}));
  EXPECT_ERROR(ErrorKind::kShape, "[squeeze] dimension 1 of f32 [2, 3, 4] has size 3, not 1", x.squeeze(1));
  EXPECT_ERROR(ErrorKind::kIndex, "[unsqueeze] dimension 4", x.unsqueeze(4));
  EXPECT_ERROR(ErrorKind::kValue, "[split] pieces need at least one element, got a size of 0", x.split(0));
  EXPECT_ERROR(ErrorKind::kIndex, "[split] dimension 5", x.split(1, 5));
  EXPECT_ERROR(ErrorKind::kIndex, "[Tensor::size] dimension -4", x.size(-4));
}

TEST(Cat, RefusesWhatDoesNotFitByKind) {
  const Tensor x = Tensor::zeros({2, 3});
  EXPECT_ERROR(ErrorKind::kValue, "[cat] needs at least one tensor", cat({}));
  EXPECT_ERROR(
      ErrorKind::kShape,
      "[cat] cannot join f32 [2, 3] on cpu and f32 [2, 4] on cpu along dimension 0: all other sizes must be equal",
      cat({x, Tensor::zeros({2, 4})}));
  EXPECT_ERROR(ErrorKind::kShape, "[cat] cannot join", cat({x, Tensor::zeros({2, 3, 1})}));
  EXPECT_ERROR(ErrorKind::kDType, "dtypes must be equal", cat({x, Tensor::zeros({2, 3}, DType::f64)}));
  EXPECT_ERROR(ErrorKind::kIndex, "[cat] dimension 2", cat({x, x}, 2));
  const Tensor endless = Tensor::zeros({1}).expand({int64_t{1} << 62});
  EXPECT_ERROR(ErrorKind::kShape, "the size overflows 64 bits", cat({endless, endless, endless}));
}

// ---- making and reading ----

TEST(Tensor, UndefinedOnesSayWhatTheyAre) {
  const Tensor none;
  EXPECT_FALSE(none.defined());
  EXPECT_EQ(none.describe(), "undefined");
  EXPECT_EQ(concat(none), "undefined");
  EXPECT_ERROR(ErrorKind::kState, "[tensor] this tensor is undefined (default-constructed or moved from)",
               none.shape());
  EXPECT_ERROR(ErrorKind::kState, "undefined", none.to(DType::f32));
  EXPECT_ERROR(ErrorKind::kState, "undefined", Tensor::zeros({1}).copy_(none));
  EXPECT_ERROR(ErrorKind::kState, "undefined", none.requires_grad());
}

TEST(Tensor, FactoriesFillEveryDType) {
  for (int i = 0; i < kDTypeCount; ++i) {
    const auto dtype = static_cast<DType>(i);
    EXPECT_EQ(Tensor::zeros({2, 3}, dtype).to_vector<double>(), std::vector<double>(6, 0)) << dtype;
    EXPECT_EQ(Tensor::ones({2, 3}, dtype).to_vector<double>(), std::vector<double>(6, 1)) << dtype;
    EXPECT_EQ(Tensor::full({5}, 6, dtype).to_vector<double>(), std::vector<double>(5, dtype == DType::boolean ? 1 : 6))
        << dtype;
    EXPECT_EQ(Tensor::zeros_like(Tensor::ones({4}, dtype)).dtype(), dtype);
  }
  EXPECT_EQ(Tensor::arange(5).to_vector<int64_t>(), (std::vector<int64_t>{0, 1, 2, 3, 4}));
  EXPECT_EQ(Tensor::arange(3, DType::bf16).to_vector<float>(), (std::vector<float>{0, 1, 2}));
  EXPECT_EQ(Tensor::arange(0).numel(), 0);
  EXPECT_ERROR(ErrorKind::kValue, "[arange] n must not be negative, got -1", Tensor::arange(-1));
  EXPECT_ERROR(ErrorKind::kShape, "[Tensor::empty] a size must not be negative, got [2, -1]", Tensor::empty({2, -1}));
}

TEST(Tensor, FromChecksTheNumberOfValues) {
  EXPECT_ERROR(ErrorKind::kShape, "[Tensor::from] 3 values do not fill shape [2, 2], which has 4 elements",
               Tensor::from(std::vector<float>{1, 2, 3}, {2, 2}));
  EXPECT_ERROR(ErrorKind::kShape, "[Tensor::from] a size must not be negative",
               Tensor::from(std::vector<float>{1}, {-1, -1}));
  EXPECT_EQ(Tensor::from(std::vector<int32_t>{4}, {}).item(), 4);
}

TEST(Tensor, DataIsTypedAndItemNeedsOneElement) {
  const Tensor x = Tensor::ones({2}, DType::f64);
  EXPECT_EQ(x.data<double>()[1], 1);
  EXPECT_EQ(x.data<const double>()[0], 1);
  EXPECT_ERROR(ErrorKind::kDType, "[Tensor::data] the tensor is f64, asked for as f32", x.data<float>());
  EXPECT_ERROR(ErrorKind::kShape, "[Tensor::item] needs exactly one element, got f64 [2]", x.item());
  EXPECT_EQ(x.select(0, 1).item(), 1);
}

TEST(Tensor, PrintsItsShapeAndFirstValues) {
  EXPECT_EQ(concat(Tensor::arange(3)), "i64 [3] {0, 1, 2}");
  EXPECT_EQ(concat(Tensor::full({}, 2.5)), "f32 [] {2.5}");
  EXPECT_EQ(concat(Tensor::arange(20).reshape({4, 5}).transpose(0, 1)), "i64 [5, 4] {0, 5, 10, 15, 1, 6, 11, 16, ...}");
  EXPECT_EQ(concat(Tensor::zeros({0})), "f32 [0] {}");
}

TEST(Tensor, DevicesThatAreNotThereAreErrors) {
  EXPECT_ERROR(ErrorKind::kDevice, "[device] there is one CPU device, cpu; got index 1",
               Tensor::zeros({1}, DType::f32, {DeviceKind::cpu, 1}));
  if (Device::best() == Device::cpu()) {
    EXPECT_ERROR(ErrorKind::kDevice, "[device] cuda:0 is not available",
                 Tensor::zeros({1}, DType::f32, Device::cuda()));
    EXPECT_ERROR(ErrorKind::kDevice, "[device] cuda:2 is not available", Tensor::zeros({1}).to(Device::cuda(2)));
  }
  EXPECT_ERROR(ErrorKind::kDevice, "[device] an index must not be negative, got cuda:-1",
               Tensor::zeros({1}, DType::f32, Device::cuda(-1)));
  EXPECT_EQ(to_string(Device::cuda(3)), "cuda:3");
  const Tensor x = Tensor::zeros({1});
  EXPECT_TRUE(x.to(Device::cpu()).is_same(x));
}

TEST(Tensor, SoleOwnerMeansNoOtherHandleAndNoView) {
  Tensor x = Tensor::zeros({2});
  EXPECT_TRUE(x.is_sole_owner());
  Tensor other = x;
  EXPECT_FALSE(x.is_sole_owner());
  other = Tensor();
  const Tensor view = x.reshape({1, 2});
  EXPECT_FALSE(x.is_sole_owner());
}

// ---- casts ----

/// What a cast should give, in double, which holds every value of these types but large i64.
double cast_model(double x, DType to) {
  const auto clamp = [&](double low, double high) {
    return std::isnan(x) ? 0 : std::trunc(std::min(std::max(x, low), high));
  };
  switch (to) {
    case DType::f64:
      return x;
    case DType::f32:
      return static_cast<double>(static_cast<float>(x));
    case DType::f16:
      return static_cast<double>(Half(x));
    case DType::bf16:
      return static_cast<double>(BFloat16(x));
    case DType::f8e4m3:
      return static_cast<double>(Float8E4M3(x));
    case DType::f8e5m2:
      return static_cast<double>(Float8E5M2(x));
    case DType::i32:
      return clamp(-2147483648.0, 2147483647.0);
    case DType::i64:
      return clamp(-0x1p63, 0x1p63);
    case DType::u8:
      return clamp(0, 255);
    case DType::i8:
      return clamp(-128, 127);
    case DType::boolean:
      return x != 0;
  }
  return 0;
}

bool equal(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

TEST(Casts, BetweenAllDTypesRoundTruncateAndSaturate) {
  const std::vector<double> values = {0,
                                      -0.0,
                                      1,
                                      -1,
                                      0.5,
                                      -0.5,
                                      1.5,
                                      2.5,
                                      -2.5,
                                      3.99,
                                      -3.99,
                                      100.25,
                                      127,
                                      128,
                                      -128,
                                      -129,
                                      255,
                                      256,
                                      300,
                                      448,
                                      464,
                                      465,
                                      57344,
                                      61440,
                                      65504,
                                      65520,
                                      -65520,
                                      1e5,
                                      1e-3,
                                      1e-5,
                                      6e-8,
                                      1e-8,
                                      1e-40,
                                      1e10,
                                      -1e10,
                                      1e20,
                                      -1e20,
                                      3.4e38,
                                      3.5e38,
                                      1e300,
                                      -1e300,
                                      kNaN,
                                      kInfinity,
                                      -kInfinity,
                                      2147483647,
                                      2147483648.0,
                                      -2147483649.0,
                                      16777217,
                                      1.00390625,
                                      1.01171875,
                                      1 + 0x1p-8 + 0x1p-40};
  const auto n = static_cast<int64_t>(values.size());
  const Tensor source = Tensor::from(values, {n});
  for (int i = 0; i < kDTypeCount; ++i) {
    const auto from = static_cast<DType>(i);
    const Tensor x = source.to(from);
    EXPECT_EQ(x.dtype(), from);
    for (int j = 0; j < kDTypeCount; ++j) {
      const auto to = static_cast<DType>(j);
      const Tensor y = x.to(to);
      ASSERT_EQ(y.dtype(), to);
      const std::vector<double> got = y.to_vector<double>();
      for (size_t k = 0; k < values.size(); ++k) {
        const double middle = cast_model(values[k], from), want = cast_model(middle, to);
        EXPECT_TRUE(equal(got[k], want)) << values[k] << ' ' << from << " -> " << to << ": got " << got[k] << ", want "
                                         << want;
      }
      // The same through strides, which is other code.
      const Tensor strided = cat({x.unsqueeze(1), x.unsqueeze(1)}, 1).select(1, 1).to(to);
      const std::vector<double> again = strided.to_vector<double>();
      for (size_t k = 0; k < values.size(); ++k) EXPECT_TRUE(equal(again[k], got[k])) << from << " -> " << to;
    }
  }
}

TEST(Casts, LargeWholeNumbersKeepEveryBitAndSaturate) {
  const int64_t most = std::numeric_limits<int64_t>::max(), least = std::numeric_limits<int64_t>::min();
  const Tensor x = Tensor::from(std::vector<int64_t>{most, least, most - 1, (int64_t{1} << 53) + 1}, {4});
  EXPECT_EQ(x.transpose(0, 0).to_vector<int64_t>(),
            (std::vector<int64_t>{most, least, most - 1, (int64_t{1} << 53) + 1}));
  EXPECT_EQ(x.to(DType::i32).to_vector<int32_t>(),
            (std::vector<int32_t>{2147483647, -2147483647 - 1, 2147483647, 2147483647}));
  EXPECT_EQ(x.to(DType::u8).to_vector<uint8_t>(), (std::vector<uint8_t>{255, 0, 255, 255}));
  EXPECT_EQ(x.to(DType::f32).to_vector<float>()[3], 9007199254740992.0f);
  const Tensor bounds = Tensor::from(std::vector<double>{1e19, -1e19}, {2});
  EXPECT_EQ(bounds.to(DType::i64).to_vector<int64_t>(), (std::vector<int64_t>{most, least}));
}

TEST(Casts, ToTheSameTypeIsTheSameTensor) {
  const Tensor x = Tensor::zeros({2});
  EXPECT_TRUE(x.to(DType::f32).is_same(x));
  EXPECT_TRUE(x.contiguous().is_same(x));
  EXPECT_FALSE(x.clone().is_same(x));
  EXPECT_NE(x.clone().storage(), x.storage());
}

TEST(Casts, DoNotDependOnTheNumberOfThreads) {
  const int before = num_threads();
  std::vector<std::vector<double>> runs;
  for (const int threads : {1, 3}) {
    set_num_threads(threads);
    const Tensor x = Tensor::arange(200000).reshape({400, 500}).to(DType::f32);
    runs.push_back(x.transpose(0, 1).to(DType::bf16).contiguous().to_vector<double>());
  }
  set_num_threads(before);
  EXPECT_EQ(runs[0], runs[1]);
}

// ---- in place ----

TEST(InPlace, WritesThroughViews) {
  Tensor x = Tensor::zeros({3, 4}, DType::i32);
  x.transpose(0, 1).select(0, 1).fill_(5);
  x.slice(0, 0, 3, 2).slice(1, 2, 4).copy_(Tensor::from(std::vector<double>{1.9, 2.9, 3.9, -4.9}, {2, 2}));
  EXPECT_EQ(x.to_vector<int32_t>(), (std::vector<int32_t>{0, 5, 1, 2, 0, 5, 0, 0, 0, 5, 3, -4}));
  x.zero_();
  EXPECT_EQ(x.to_vector<int32_t>(), std::vector<int32_t>(12, 0));
}

TEST(InPlace, CopyBetweenOverlappingViewsReadsBeforeItWrites) {
  for (const int64_t n : {10, 200000}) {  // 200,000: more than one piece of work
    const Tensor x = Tensor::arange(n);
    x.slice(0, 1, n).copy_(x.slice(0, 0, n - 1));
    std::vector<int64_t> want(static_cast<size_t>(n));
    for (int64_t i = 1; i < n; ++i) want[static_cast<size_t>(i)] = i - 1;
    ASSERT_EQ(x.to_vector<int64_t>(), want);
  }
  const Tensor square = Tensor::arange(9).reshape({3, 3});
  Tensor(square).copy_(square.transpose(0, 1));
  EXPECT_EQ(square.to_vector<int64_t>(), (std::vector<int64_t>{0, 3, 6, 1, 4, 7, 2, 5, 8}));
  Tensor(square).copy_(square.reshape({3, 3}));
  EXPECT_EQ(square.to_vector<int64_t>()[1], 3) << "onto itself";
}

TEST(InPlace, NeverBroadcasts) {
  Tensor x = Tensor::zeros({2, 3});
  EXPECT_ERROR(ErrorKind::kShape,
               "[copy_] the source is f32 [3], the target f32 [2, 3]; shapes must be equal in place. Hint: expand()",
               x.copy_(Tensor::ones({3})));
  x.copy_(Tensor::from(std::vector<float>{1, 2, 3}, {3}).expand({2, 3}));
  EXPECT_EQ(x.to_vector<float>(), (std::vector<float>{1, 2, 3, 1, 2, 3}));
}

TEST(InPlace, IsRefusedOnExpandedTensors) {
  const Tensor x = Tensor::zeros({3, 1});
  EXPECT_ERROR(ErrorKind::kState, "[fill_] would change in place a tensor (f32 [3, 4]) whose dimension 1 is expanded",
               x.expand({3, 4}).fill_(1));
  EXPECT_ERROR(ErrorKind::kState, "[copy_] would change in place", x.expand({3, 4}).copy_(Tensor::ones({3, 4})));
  EXPECT_EQ(x.to_vector<float>(), std::vector<float>(3, 0));
  x.expand({1, 3, 1}).fill_(2);
  EXPECT_EQ(x.to_vector<float>(), std::vector<float>(3, 2)) << "a new dimension of size 1 repeats nothing";
}

TEST(InPlace, IsRefusedWhereAGradientWouldGetLost) {
  Tensor leaf = Tensor::zeros({2, 2});
  leaf.requires_grad_();
  EXPECT_ERROR(ErrorKind::kState, "[fill_] would change in place a tensor (f32 [2, 2]) that takes part in a graph",
               leaf.fill_(1));
  EXPECT_ERROR(ErrorKind::kState, "[copy_] would change in place", leaf.copy_(Tensor::ones({2, 2})));
  EXPECT_ERROR(ErrorKind::kState, "[fill_] would change in place", leaf.transpose(0, 1).fill_(1));
  Tensor plain = Tensor::zeros({2, 2});
  EXPECT_ERROR(ErrorKind::kState, "[copy_] the source (f32 [2, 2]) takes part in a graph", plain.copy_(leaf));
  plain.copy_(leaf.detach());
  leaf.detach().fill_(3);
  EXPECT_EQ(leaf.to_vector<float>(), std::vector<float>(4, 3));
  const autograd::NoGrad no_grad;
  leaf.fill_(4);
  plain.copy_(leaf);
  EXPECT_EQ(plain.to_vector<float>(), std::vector<float>(4, 4));
}

TEST(InPlace, EveryChangeIsCountedAndNamed) {
  Tensor x = Tensor::zeros({4});
  const uint64_t version = x.storage()->version();
  x.fill_(1);
  EXPECT_STREQ(x.storage()->last_change(), "fill_");
  x.reshape({2, 2}).copy_(Tensor::ones({2, 2}));
  EXPECT_EQ(x.storage()->version(), version + 2);
  EXPECT_STREQ(x.storage()->last_change(), "copy_");
}

// ---- gradients' slots ----

TEST(Tensor, RequiresGradIsForFloatLeaves) {
  Tensor whole = Tensor::zeros({2}, DType::i64);
  EXPECT_ERROR(ErrorKind::kDType, "[requires_grad_] only float tensors have gradients, got i64 [2]",
               whole.requires_grad_());
  Tensor leaf = Tensor::zeros({2});
  EXPECT_FALSE(leaf.requires_grad());
  EXPECT_TRUE(leaf.requires_grad_().requires_grad());
  Tensor view = leaf.reshape({1, 2});
  EXPECT_TRUE(view.requires_grad());
  EXPECT_FALSE(view.is_leaf());
  EXPECT_ERROR(ErrorKind::kState, "this tensor was computed by [reshape]. Hint: detach() it first",
               view.requires_grad_(false));
  EXPECT_FALSE(leaf.to(DType::i64).requires_grad());
  EXPECT_FALSE(leaf.requires_grad_(false).requires_grad());
}

TEST(Tensor, SetGradChecksShapeDTypeAndDevice) {
  const Tensor x = Tensor::zeros({2, 3});
  EXPECT_ERROR(ErrorKind::kShape, "[set_grad] the gradient is f32 [3] on cpu, the tensor f32 [2, 3] on cpu",
               x.set_grad(Tensor::zeros({3})));
  EXPECT_ERROR(ErrorKind::kShape, "[set_grad]", x.set_grad(Tensor::zeros({2, 3}, DType::f64)));
  EXPECT_FALSE(x.grad().defined());
  x.set_grad(Tensor::ones({2, 3}));
  EXPECT_EQ(x.grad().to_vector<float>(), std::vector<float>(6, 1));
  x.clear_grad();
  EXPECT_FALSE(x.grad().defined());
  x.set_grad(Tensor());
}

}  // namespace
}  // namespace weft

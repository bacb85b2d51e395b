#include "ops/index.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "core/autograd.h"
#include "core/random.h"
#include "core/thread_pool.h"
#include "ops/dropout.h"
#include "tests/values.h"

namespace weft {
namespace {

using testing::leaf;
using testing::same_bits;
using testing::Values;

Tensor random(const Shape& shape, DType dtype, const char* name) {
  const Tensor values = Tensor::empty(shape, DType::f64);
  fill_uniform(values, RandomStream(7, name), -2, 2);
  return values.to(dtype);
}

Tensor random_indices(const Shape& shape, int64_t limit) {
  const RandomStream stream(7, "indices");
  std::vector<int64_t> values;
  for (int64_t i = 0; i < numel(shape); ++i) {
    values.push_back(static_cast<int64_t>(stream.below(static_cast<uint64_t>(i), static_cast<uint64_t>(limit))));
  }
  return Tensor::from(values, shape);
}

void expect_error(ErrorKind kind, const std::string& text, const std::function<void()>& call) {
  try {
    call();
    ADD_FAILURE() << "no error; wanted " << text;
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), kind) << error.what();
    EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
  }
}

// ---- embedding ----

TEST(Embedding, TakesRowsByNumber) {
  const Tensor table = random({5, 3}, DType::f32, "table");
  const Tensor y = embedding(Tensor::from(std::vector<int32_t>{4, 0, 4, 1}, {2, 2}), table);
  ASSERT_TRUE(y.shape() == Shape({2, 2, 3}));
  const Values rows = table.to_vector<double>(), got = y.to_vector<double>();
  const size_t want[] = {4, 0, 4, 1};
  for (size_t i = 0; i < got.size(); ++i) EXPECT_EQ(got[i], rows[want[i / 3] * 3 + i % 3]) << i;
}

TEST(Embedding, CopiesExactlyWhateverTheSizeOfARowAndOfTheResult) {
  // 12000 rows of 768 f32 are more than the cache: they are written past it.
  for (const auto& [rows, columns] :
       std::vector<std::pair<int64_t, int64_t>>{{12000, 768}, {40, 16}, {40, 17}, {40, 33}, {1, 1}}) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      const Tensor table = random({53, columns}, dtype, "table"), ids = random_indices({rows}, 53);
      const Tensor y = embedding(ids, table);
      const std::vector<int64_t> numbers = ids.to_vector<int64_t>();
      for (int64_t i = 0; i < rows; ++i) {
        ASSERT_TRUE(same_bits(y.narrow(0, i, 1), table.narrow(0, numbers[static_cast<size_t>(i)], 1)))
            << rows << " x " << columns << ' ' << i;
      }
    }
  }
}

/// Sums of rows of dy in their order, in the type that the kernel adds in, rounded once.
template <class A>
Tensor scatter(const Tensor& dy, const std::vector<int64_t>& ids, int64_t rows, int64_t columns) {
  std::vector<A> sums(static_cast<size_t>(rows * columns), A(0));
  const Values values = dy.to_vector<double>();
  for (size_t i = 0; i < values.size(); ++i) {
    const size_t c = static_cast<size_t>(columns);
    sums[static_cast<size_t>(ids[i / c]) * c + i % c] += static_cast<A>(values[i]);
  }
  return Tensor::from(sums, {rows, columns}).to(dy.dtype());
}

TEST(Embedding, AddsGradientsInTheOrderOfTheIds) {
  for (const int64_t columns : {1, 5, 64, 67}) {
    for (const DType dtype : {DType::f64, DType::f32, DType::f16, DType::bf16}) {
      const Tensor ids = random_indices({3, 41}, 19), table = leaf(random({23, columns}, dtype, "table"));
      const Tensor dy = random({3, 41, columns}, dtype, "dy");
      autograd::backward({embedding(ids, table)}, {dy});
      const std::vector<int64_t> flat = ids.to_vector<int64_t>();
      const Tensor want =
          dtype == DType::f64 ? scatter<double>(dy, flat, 23, columns) : scatter<float>(dy, flat, 23, columns);
      EXPECT_TRUE(same_bits(table.grad(), want)) << dtype << ' ' << columns;
    }
  }
}

TEST(Embedding, AddsToAGradientThatIsThereAlready) {
  const Tensor table = leaf(random({9, 4}, DType::f32, "table")),
               ids = Tensor::from(std::vector<int64_t>{2, 7, 2}, {3});
  Tensor held = Tensor::zeros({9, 4});
  held.narrow(0, 5, 1).fill_(3);
  held.narrow(0, 7, 1).fill_(10);
  table.set_grad(held);
  autograd::backward({embedding(ids, table)}, {Tensor::ones({3, 4})});
  Values want(36, 0);
  for (size_t c = 0; c < 4; ++c) want[2 * 4 + c] = 2, want[5 * 4 + c] = 3, want[7 * 4 + c] = 11;
  EXPECT_EQ(table.grad().to_vector<double>(), want);
  EXPECT_TRUE(table.grad().storage() == held.storage()) << "the gradient must be written where it is";
}

TEST(Embedding, HasTheSameBitsOnAnyNumberOfThreads) {
  const Tensor ids = random_indices({5000}, 300), dy = random({5000, 96}, DType::f32, "dy");
  const auto gradient = [&](int threads) {
    set_num_threads(threads);
    const Tensor table = leaf(Tensor::zeros({300, 96}));
    autograd::backward({embedding(ids, table)}, {dy});
    return table.grad();
  };
  const int before = num_threads();
  const Tensor one = gradient(1);
  for (const int threads : {2, 3, 5}) EXPECT_TRUE(same_bits(one, gradient(threads))) << threads;
  set_num_threads(before);
}

TEST(Embedding, TakesNothing) {
  const Tensor table = leaf(Tensor::ones({4, 3}));
  const Tensor y = embedding(Tensor::zeros({0}, DType::i64), table);
  EXPECT_TRUE(y.shape() == Shape({0, 3}));
  autograd::backward({y}, {Tensor::zeros({0, 3})});
  EXPECT_EQ(table.grad().to_vector<double>(), Values(12, 0));
  EXPECT_TRUE(embedding(Tensor::zeros({2}, DType::i64), Tensor::ones({4, 0})).shape() == Shape({2, 0}));
}

TEST(Embedding, NamesTheIdThatIsOutside) {
  const Tensor table = Tensor::zeros({50257, 2});
  const auto with = [&](std::vector<int64_t> ids) { return embedding(Tensor::from(ids, {2, 3}), table); };
  expect_error(ErrorKind::kIndex,
               "[embedding] ids[1, 2] is 50257 but must be from 0 to 50256: the table is f32 [50257, 2]",
               [&] { with({0, 1, 2, 3, 4, 50257}); });
  expect_error(ErrorKind::kIndex, "ids[0, 1] is -1", [&] { with({0, -1, 2, 3, 4, 99999}); });
  expect_error(ErrorKind::kDType, "ids must be i64 or i32", [&] { embedding(Tensor::zeros({2}), table); });
  expect_error(ErrorKind::kShape, "the table must be [V, C]",
               [&] { embedding(Tensor::zeros({2}, DType::i64), Tensor::zeros({3})); });
  expect_error(ErrorKind::kDType, "takes f32",
               [&] { embedding(Tensor::zeros({2}, DType::i64), Tensor::zeros({3, 2}, DType::i64)); });
}

// ---- gather ----

/// Index in a row-major array.
size_t at(const Shape& shape, int64_t i, int64_t j, int64_t k) {
  return static_cast<size_t>((i * shape[1] + j) * shape[2] + k);
}

TEST(Gather, MatchesItsDefinitionAndDerivativeAlongEachDimension) {
  const Shape shape = {5, 4, 6};
  for (int dim = 0; dim < 3; ++dim) {
    Shape wanted = {4, 3, 5};
    wanted[dim] = 7;  // more than x has: elements are taken several times
    const Tensor x = leaf(random(shape, DType::f64, "x")), index = random_indices(wanted, shape[dim]);
    const Tensor dy = random(wanted, DType::f64, "dy");
    const Tensor y = gather(x, dim - 3, index.to(DType::i32));
    autograd::backward({y}, {dy});
    const Values from = x.to_vector<double>(), got = y.to_vector<double>(), gradient = dy.to_vector<double>();
    const std::vector<int64_t> to = index.to_vector<int64_t>();
    Values want_dx(from.size(), 0);
    for (int64_t i = 0; i < wanted[0]; ++i) {
      for (int64_t j = 0; j < wanted[1]; ++j) {
        for (int64_t k = 0; k < wanted[2]; ++k) {
          const size_t here = at(wanted, i, j, k);
          Dims place = {i, j, k};
          place[dim] = to[here];
          const size_t there = at(shape, place[0], place[1], place[2]);
          EXPECT_EQ(got[here], from[there]);
          want_dx[there] += gradient[here];
        }
      }
    }
    EXPECT_EQ(x.grad().to_vector<double>(), want_dx) << "dim " << dim;
  }
}

TEST(Gather, CopiesEveryType) {
  const Tensor index = Tensor::from(std::vector<int64_t>{2, 0, 1, 1}, {4});
  for (const DType dtype :
       {DType::f32, DType::f64, DType::f16, DType::bf16, DType::i32, DType::i64, DType::u8, DType::boolean}) {
    const Tensor x = Tensor::from(std::vector<int64_t>{0, 1, 5}, {3}).to(dtype);
    const Values values = x.to_vector<double>();
    EXPECT_EQ(gather(x, 0, index).to_vector<double>(), (Values{values[2], values[0], values[1], values[1]})) << dtype;
  }
}

TEST(Gather, NamesWhatDoesNotFit) {
  const Tensor x = Tensor::zeros({3, 4});
  expect_error(ErrorKind::kIndex,
               "[gather] index[1, 0] is 4 but must be from 0 to 3: dimension 1 of x, which is f32 [3, 4]",
               [&] { gather(x, 1, Tensor::from(std::vector<int64_t>{3, 4}, {2, 1})); });
  expect_error(ErrorKind::kShape, "index must have the rank of x",
               [&] { gather(x, 1, Tensor::zeros({4, 1}, DType::i64)); });
  expect_error(ErrorKind::kShape, "index must have the rank of x",
               [&] { gather(x, 1, Tensor::zeros({3}, DType::i64)); });
  expect_error(ErrorKind::kDType, "index must be i64 or i32", [&] { gather(x, 1, x); });
  expect_error(ErrorKind::kIndex, "gather", [&] { gather(x, 2, Tensor::zeros({3, 1}, DType::i64)); });
}

// ---- dropout ----

TEST(Dropout, KeepsExactlyTheElementsThatTheStreamNames) {
  for (const uint64_t first : {uint64_t{0}, uint64_t{3}, (uint64_t{1} << 34) - 2050}) {  // the last crosses block 2^32
    for (const double p : {0.1, 0.5, 0.999}) {
      for (const DType dtype : {DType::f64, DType::f32, DType::f16, DType::bf16}) {
        const RandomStream stream = RandomStream(11, "dropout").at_step(5);
        const Tensor x = random({17, 301}, dtype, "x");
        const Tensor y = dropout(x, p, stream, true, first);
        const Values from = x.to_vector<double>(), got = y.to_vector<double>();
        std::vector<double> want;
        for (size_t i = 0; i < from.size(); ++i) {
          const bool kept = stream.bits(first + i) >= p * 0x1p32;
          const double exact =
              from[i] * (dtype == DType::f64 ? 1 / (1 - p) : static_cast<double>(static_cast<float>(1 / (1 - p))));
          want.push_back(kept ? exact : 0);
        }
        Tensor rounded = Tensor::from(want, {17, 301});
        if (dtype != DType::f64) rounded = rounded.to(DType::f32);
        EXPECT_EQ(got, rounded.to(dtype).to_vector<double>()) << dtype << " p " << p << " first " << first;
      }
    }
  }
}

TEST(Dropout, GivesPartsTheMaskOfTheWhole) {
  const RandomStream stream(11, "dropout");
  const Tensor x = random({30, 7}, DType::f32, "x");
  const Tensor whole = dropout(x, 0.4, stream);
  for (const int64_t row : {0, 1, 10, 29}) {
    EXPECT_TRUE(same_bits(dropout(x.narrow(0, row, 1), 0.4, stream, true, static_cast<uint64_t>(row * 7)),
                          whole.narrow(0, row, 1)));
  }
}

TEST(Dropout, RunsThatDoNotFitAreNamed) {
  const Tensor x = Tensor::ones({2, 3});
  const RandomStream stream(11, "dropout");
  const auto with = [&](const std::vector<StreamRun>& runs) {
    return [&, runs] { dropout(x, 0.4, stream, true, runs); };
  };
  expect_error(ErrorKind::kShape, "the runs have 5 elements, x is f32 [2, 3]", with({{2, 0}, {3, 7}}));
  expect_error(ErrorKind::kShape, "a run has -1 elements", with({{7, 0}, {-1, 7}}));
}

TEST(Dropout, DropsTheShareThatIsAskedFor) {
  const int64_t n = 1 << 20;
  const Tensor x = Tensor::ones({n}, DType::f64);
  double previous = 0;
  for (const double p : {0.05, 0.3, 0.9}) {
    double kept = 0, sum = 0;
    for (const double value : dropout(x, p, RandomStream(3, "dropout")).to_vector<double>())
      kept += value != 0, sum += value;
    const double deviation = std::sqrt(p * (1 - p) / static_cast<double>(n));
    EXPECT_NEAR(kept / static_cast<double>(n), 1 - p, 5 * deviation);
    EXPECT_NEAR(sum / static_cast<double>(n), 1, 5 * deviation / (1 - p));
    EXPECT_NE(kept, previous);
    previous = kept;
  }
}

TEST(Dropout, MakesTheSameMaskBackwards) {
  const RandomStream stream(11, "dropout");
  const Tensor x = leaf(random({13, 79}, DType::f32, "x")), dy = random({13, 79}, DType::f32, "dy");
  autograd::backward({dropout(x, 0.25, stream)}, {dy});
  EXPECT_TRUE(same_bits(x.grad(), dropout(dy, 0.25, stream)));
}

TEST(Dropout, HasTheSameBitsOnAnyNumberOfThreadsAndAnotherMaskAtAnotherStep) {
  const RandomStream stream(11, "dropout");
  const Tensor x = Tensor::ones({100003});
  const int before = num_threads();
  set_num_threads(1);
  const Tensor one = dropout(x, 0.5, stream);
  set_num_threads(3);
  EXPECT_TRUE(same_bits(one, dropout(x, 0.5, stream)));
  EXPECT_FALSE(same_bits(one, dropout(x, 0.5, stream.at_step(1))));
  set_num_threads(before);
}

TEST(Dropout, AStepInATensorIsThatOfTheStreamWhenTheMaskIsMade) {
  const Tensor step = Tensor::full({1}, 7, DType::f64);
  const RandomStream stream(3, "dropout");
  Tensor x = random({5, 7}, DType::f32, "x").requires_grad_();
  const Tensor y = dropout(x, 0.25, stream, true, 2, step);
  EXPECT_TRUE(same_bits(y, dropout(x, 0.25, stream.at_step(7), true, 2)));
  const Tensor dy = random({5, 7}, DType::f32, "dy");
  autograd::backward({y}, {dy});
  EXPECT_TRUE(same_bits(x.grad(), dropout(dy, 0.25, stream.at_step(7), true, 2)));
  expect_error(ErrorKind::kDevice, "the step must be one element",
               [&] { dropout(x, 0.25, stream, true, 0, Tensor::zeros({2}, DType::f64)); });
}

TEST(Dropout, AnswersWithItsInputWhenThereIsNothingToDrop) {
  const Tensor x = random({3}, DType::f32, "x");
  EXPECT_TRUE(dropout(x, 0, RandomStream(1, "d")).is_same(x));
  EXPECT_TRUE(dropout(x, 0.5, RandomStream(1, "d"), false).is_same(x));
  for (const double p : {-0.1, 1.0, 1.5, static_cast<double>(NAN)}) {
    expect_error(ErrorKind::kValue, "[dropout] p must be in [0, 1)",
                 [&] { dropout(x, p, RandomStream(1, "d"), false); });
  }
  expect_error(ErrorKind::kDType, "takes f32", [&] { dropout(x.to(DType::i32), 0.5, RandomStream(1, "d")); });
}

}  // namespace
}  // namespace weft

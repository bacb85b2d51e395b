#include "core/tensor_part.h"

#include <gtest/gtest.h>

#include <numeric>

#include "tests/error_of.h"

namespace weft {
namespace {

Tensor counting(const Shape& shape) {
  std::vector<float> values(static_cast<size_t>(numel(shape)));
  std::iota(values.begin(), values.end(), 0.0F);
  return Tensor::from(values, shape);
}

TEST(TensorPart, AllOfATensorIsOneRun) {
  const TensorPart part = TensorPart::all({3, 4});
  EXPECT_TRUE(part.is_whole());
  EXPECT_EQ(part.shape(), (Shape{3, 4}));
  int runs = 0;
  part.for_each_run([&](int64_t at, int64_t from, int64_t count) {
    ++runs;
    EXPECT_EQ((std::vector<int64_t>{at, from, count}), (std::vector<int64_t>{0, 0, 12}));
  });
  EXPECT_EQ(runs, 1);
  EXPECT_EQ(TensorPart::all({}).count(), 1);
}

TEST(TensorPart, SlicesOfAnyDimensionAreThoseOfNarrow) {
  const Tensor whole = counting({4, 5, 3});
  for (int64_t dim = 0; dim < 3; ++dim) {
    const TensorPart part = TensorPart::along({4, 5, 3}, dim, {{0, 1}, {2, 3}});
    const Tensor expected = cat({whole.narrow(dim, 0, 1), whole.narrow(dim, 2, 1)}, dim);
    EXPECT_EQ(part.shape(), expected.shape());
    EXPECT_EQ(part.of(whole).to_vector<float>(), expected.contiguous().to_vector<float>()) << dim;
  }
}

TEST(TensorPart, AnyElementsOfAnySlicesCanBeCutOutAgain) {
  const Tensor whole = counting({4, 5, 3});
  for (int64_t dim = 0; dim < 3; ++dim) {
    const TensorPart slices = TensorPart::along({4, 5, 3}, dim, {{0, 1}, {1, 2}});
    const std::vector<float> all = slices.of(whole).to_vector<float>();
    for (int64_t from = 0; from <= slices.count(); ++from) {
      for (int64_t to = from; to <= slices.count(); ++to) {
        const TensorPart part = slices.elements(from, to);
        EXPECT_EQ(part.of(whole).to_vector<float>(), std::vector<float>(all.begin() + from, all.begin() + to));
      }
    }
  }
}

TEST(TensorPart, NeighbouringRangesOfTheFirstDimensionAreOneRun) {
  int runs = 0;
  TensorPart::along({6, 7}, 0, {{1, 2}, {2, 5}}).for_each_run([&](int64_t at, int64_t from, int64_t count) {
    ++runs;
    EXPECT_EQ((std::vector<int64_t>{at, from, count}), (std::vector<int64_t>{7, 0, 28}));
  });
  EXPECT_EQ(runs, 1);
}

TEST(TensorPart, ARangeOutsideTheTensorIsRefused) {
  EXPECT_ERROR(ErrorKind::kIndex, "indices 3 to 6 are not within dimension 1 of [4, 5]",
               TensorPart::along({4, 5}, 1, {{3, 6}}));
  EXPECT_ERROR(ErrorKind::kIndex, "2", TensorPart::along({4, 5}, 2, {}));
  EXPECT_ERROR(ErrorKind::kValue, "must increase", TensorPart::along({4, 5}, 0, {{2, 3}, {0, 1}}));
  EXPECT_ERROR(ErrorKind::kIndex, "3 to 6", TensorPart::along({4, 5}, 0, {{2, 3}}).elements(3, 6));
  EXPECT_ERROR(ErrorKind::kShape, "[2]", TensorPart::all({2}).of(counting({3})));
}

}  // namespace
}  // namespace weft

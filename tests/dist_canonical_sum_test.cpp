// The order in which micro-batches are added up does not depend on who computed them.
#include "dist/canonical_sum.h"

#include <gtest/gtest.h>

#include "core/random.h"
#include "tests/error_of.h"

namespace weft::dist {
namespace {

/// Numbers whose f32 sum depends on the order.
Tensor gradient(int64_t micro_batch) {
  Tensor t = Tensor::empty({33});
  fill_normal(t, RandomStream(5, "gradient").at_step(static_cast<uint64_t>(micro_batch)), 0, 1);
  return t;
}

/// The definition: the sum over a node of the tree that splits at the largest power of two below its size.
std::vector<float> by_definition(int64_t begin, int64_t end) {
  if (end - begin == 1) return gradient(begin).to_vector<float>();
  int64_t half = 1;
  while (2 * half < end - begin) half *= 2;
  std::vector<float> left = by_definition(begin, begin + half);
  const std::vector<float> right = by_definition(begin + half, end);
  for (size_t i = 0; i < left.size(); ++i) left[i] += right[i];
  return left;
}

TEST(CanonicalSum, IsThatOfTheTreeForAnyNumberOfMicroBatches) {
  for (int64_t total = 1; total <= 20; ++total) {
    CanonicalSum sum(total);
    for (int64_t i = 0; i < total; ++i) sum.add({i, i + 1}, gradient(i));
    EXPECT_EQ(sum.take().to_vector<float>(), by_definition(0, total)) << total << " micro-batches";
  }
}

TEST(CanonicalSum, HasTheSameBitsHoweverTheMicroBatchesAreSharedOut) {
  for (int64_t total = 1; total <= 16; ++total) {
    const std::vector<float> expected = by_definition(0, total);
    for (int64_t first = 0; first <= total; ++first) {
      for (int64_t second = first; second <= total; ++second) {
        CanonicalSum all(total);
        const int64_t cuts[] = {0, first, second, total};
        for (int rank = 0; rank < 3; ++rank) {
          CanonicalSum own(total);
          for (int64_t i = cuts[rank]; i < cuts[rank + 1]; ++i) own.add({i, i + 1}, gradient(i));
          std::vector<MicroBatchRange> ranges;
          for (const CanonicalSum::Part& part : own.parts()) {
            ranges.push_back(part.range);
            all.add(part.range, part.tensor);
          }
          EXPECT_EQ(ranges, CanonicalSum::nodes({cuts[rank], cuts[rank + 1]}, total));
        }
        EXPECT_EQ(all.take().to_vector<float>(), expected)
            << total << " micro-batches, cut at " << first << " and " << second;
      }
    }
  }
}

TEST(CanonicalSum, EqualPowersOfTwoARankMakeOneNodeEach) {
  for (int64_t ranks = 1; ranks <= 7; ++ranks) {
    for (const int64_t each : {1, 2, 4, 8}) {
      for (int64_t rank = 0; rank < ranks; ++rank) {
        EXPECT_EQ(CanonicalSum::nodes({rank * each, (rank + 1) * each}, ranks * each).size(), 1u);
      }
    }
  }
}

TEST(CanonicalSum, KeepsFewTensors) {
  CanonicalSum sum(1000);
  for (int64_t i = 0; i < 1000; ++i) {
    sum.add({i, i + 1}, {});
    EXPECT_LE(sum.parts().size(), 10u);
  }
  for (int64_t begin = 0; begin < 64; ++begin) {
    for (int64_t end = begin + 1; end <= 64; ++end) {
      EXPECT_LE(CanonicalSum::nodes({begin, end}, 64).size(), 11u);
    }
  }
}

TEST(CanonicalSum, WhatIsMissingOutOfOrderOrNoNodeIsAnError) {
  EXPECT_ERROR(ErrorKind::kValue, "at least one micro-batch, got 0", CanonicalSum(0));
  CanonicalSum sum(6);
  EXPECT_ERROR(ErrorKind::kValue, "[0, 3) is no node", sum.add({0, 3}, {}));
  EXPECT_ERROR(ErrorKind::kValue, "got [5, 7)", sum.add({5, 7}, {}));
  sum.add({0, 2}, {});
  EXPECT_ERROR(ErrorKind::kValue, "expected micro-batches from 2 on", sum.add({1, 2}, {}));
  EXPECT_ERROR(ErrorKind::kState, "not all of the 6 micro-batches were added", sum.take());
  sum.add({2, 4}, {});
  sum.add({4, 6}, {});  // a node, cut off at the end
  EXPECT_NO_THROW(sum.take());
}

}  // namespace
}  // namespace weft::dist
